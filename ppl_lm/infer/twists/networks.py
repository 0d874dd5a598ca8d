"""`twist_like`: a trainable network whose logits are the log of a twist."""

from typing import Any

import torch
from torch import nn

from ppl_lm.lm.language_model import LanguageModel


def twist_like(lm: LanguageModel, head_only: bool = False) -> LanguageModel:
    """A trainable network whose *logits*, as they are, stand for log ψ_t(x_<t, v) of every next token v: `lm`'s own body with
    a head of zeros, so that it begins at ψ = 1, no twist at all.

    :param head_only: leave the body frozen: a linear function of the LM's last hidden state, a value head. The body is then
        `lm`'s own, lies in memory once, and is passed once for both (`smc`, `fit_twist`, `product`) where its weights are
        float32 or wider, unless `lm` is being trained; so move or convert `lm`, and not the twist.
    :raises ValueError: if `lm` names no output embeddings, or has a forward that was put on it."""
    shared = head_only and not any(weight.requires_grad for weight in lm.parameters())
    twist = lm.around_same_weights() if shared else lm.copy()
    head: Any = twist.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if head is None:
        raise ValueError(
            "this network names no output embeddings, so its head cannot be replaced; make the twist a network of your own"
        )
    weight = head.weight
    dtype = weight.dtype
    if shared and dtype.itemsize < 4:  # steps are smaller than half precision can tell
        twist.compute_dtype, dtype = dtype, torch.float32
    fresh = nn.Linear(head.in_features, head.out_features, head.bias is not None, weight.device, dtype)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    twist.model.config.tie_word_embeddings = False  # pyright: ignore
    twist.model.set_output_embeddings(fresh)  # pyright: ignore[reportCallIssue]
    if head_only:
        twist.requires_grad_(False)
        fresh.requires_grad_(True)
    return twist
