"""`twist_like`: a trainable network whose logits are the log of a twist."""

from typing import Any

from torch import nn

from ppl_lm.lm.language_model import LanguageModel


def twist_like(lm: LanguageModel, head_only: bool = False) -> LanguageModel:
    """A trainable network whose *logits*, as they are, stand for log ψ_t(x_<t, v) of every next token v: `lm`'s own body with
    a head of zeros, so that it begins at ψ = 1, no twist at all.

    :param head_only: leave the body frozen: a linear function of the LM's last hidden state."""
    twist = lm.copy()
    head: Any = twist.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if head is None:
        raise ValueError(
            "this network names no output embeddings, so its head cannot be replaced; make the twist a network of your own"
        )
    weight = head.weight
    fresh = nn.Linear(head.in_features, head.out_features, head.bias is not None, weight.device, weight.dtype)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    twist.model.config.tie_word_embeddings = False  # pyright: ignore
    twist.model.set_output_embeddings(fresh)  # pyright: ignore[reportCallIssue]
    if head_only:
        twist.requires_grad_(False)
        fresh.requires_grad_(True)
    return twist
