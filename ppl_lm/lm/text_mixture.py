"""`mixture`: language models of which one is drawn for each text."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ppl_lm.lm.experts import Caches, Experts, combined, cuts_of
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.network import Answer
from ppl_lm.lm.scoring.teacher_forcing import normalise


def mixture(lms: Sequence[LanguageModel], weights: Sequence[float]) -> LanguageModel:
    """q(x | prompt) = Σ_k w_k p_k(x | prompt), of whole texts: one component is drawn for each text.

    Token by token it is Σ_k w_k(x_<t) p_k(x_t | prompt, x_<t), where w_k(x_<t) ∝ w_k p_k(x_<t | prompt): so it is a language
    model like any other, with an exact density. The gradient of its log-density gives each component its responsibility.
    With (1 - ε, ε) of a guide and the prior, the weights of draws are bounded: p0(x) φ(x) / q(x) ≤ max φ / ε.

    A mixture at every token, each with the same weights, is another law, whose bound is ε to the power -T.

    :param lms: of one vocabulary; prompts and end tokens are the first one's; of one `max_new_tokens`.
    :param weights: above 0; they add up to 1.
    :raises ValueError: if vocabularies or `max_new_tokens` differ, or the weights are none."""
    if not lms or len(lms) != len(weights):
        raise ValueError(
            f"{len(lms)} language models and {len(weights)} weights; give one weight for each, at least one"
        )
    total = sum(weights)
    if not all(weight > 0 for weight in weights) or not abs(total - 1) <= 1e-6:
        raise ValueError(f"weights={list(weights)}; give numbers above 0 that add up to 1")
    log_weights = [math.log(weight / total) for weight in weights]
    return combined(_Mixture([lm.model for lm in lms], log_weights, lms[0].vocabulary.end_ids), lms)


class _Mixture(Experts):
    """Where a pass is asked for the logits of its last m positions, the last m - 1 of its tokens are the text's, and what is
    before them the prompt, which says nothing of the component; in a pass that goes on from another all are the text's."""

    def __init__(self, models: Sequence[nn.Module], log_weights: list[float], end_ids: Sequence[int]):
        super().__init__(models)
        self.log_weights, self.end_ids = log_weights, end_ids

    @property
    def cuts(self) -> frozenset[int]:  # what one component can draw the mixture can
        return frozenset.intersection(*(cuts_of(model) for model in self.models))

    def new_cache(self) -> "_Begun":
        return _Begun.of(self.models)

    def forward(
        self,
        input_ids: Int[Tensor, "N L"],
        past_key_values: "_Begun | None" = None,
        logits_to_keep: int = 1,
        **inputs: Any,
    ) -> Answer:
        keep = logits_to_keep
        logits, moved = self.each(past_key_values, input_ids=input_ids, logits_to_keep=keep, **inputs)
        log_p = torch.stack([normalise(one[:, -keep:]) for one in logits])  # (C, N, m, V): of the next token
        so_far = None if past_key_values is None else past_key_values.so_far
        if so_far is None:  # the first logits are of the text's first token, and the weights of it are those given
            first = log_p.new_tensor(self.log_weights)[:, None].expand(-1, len(input_ids))
            tokens, before, ended = input_ids[:, input_ids.shape[1] - keep + 1 :], log_p[:, :, :-1], None
            earlier = [first[..., None]]
        else:
            last, first, ended = so_far
            tokens, before, earlier = input_ids, torch.cat([last[:, :, None], log_p[:, :, :-1]], 2), []
        said = before.gather(-1, tokens[None, :, :, None].expand(len(log_p), -1, -1, 1)).squeeze(
            -1
        )  # (C, N, m or m - 1)
        over = self._over(tokens, ended)  # what stands after a text's end says nothing of it
        said = said.masked_fill(over, 0.0)
        log_w = torch.cat([*earlier, first[..., None] + said.cumsum(-1)], -1)  # (C, N, m), up to a constant of each row
        log_w = log_w.masked_fill((log_w == -torch.inf).all(0), 0.0)  # a text that is impossible has been told so
        log_w = log_w - log_w.logsumexp(0)
        mixed = _log_sum(log_w.unsqueeze(-1) + log_p)
        ended = over[:, -1] | self._ends(tokens[:, -1]) if tokens.shape[1] else torch.zeros_like(input_ids[:, 0]).bool()
        return Answer(mixed, _Begun(moved, (log_p[:, :, -1], log_w[..., -1], ended)))

    def _ends(self, tokens: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
        return torch.isin(tokens, torch.tensor(self.end_ids, device=tokens.device))

    def _over(self, tokens: Int[Tensor, "N U"], ended: Bool[Tensor, "N"] | None) -> Bool[Tensor, "N U"]:
        ends = self._ends(tokens).long()
        over = (ends.cumsum(-1) - ends) > 0
        return over if ended is None else over | ended[:, None]


def _log_sum(log_p: Float[Tensor, "C *S"]) -> Float[Tensor, "*S"]:
    """Of the components; where all of them are -inf so is the sum, without a gradient."""
    nowhere = (log_p == -torch.inf).all(0)
    return log_p.masked_fill(nowhere, 0.0).logsumexp(0).masked_fill(nowhere, -torch.inf)


class _Begun(Caches):
    """The components' caches, and of the texts so far: log p of every next token (C, N, V), log-weights of the components
    (C, N), and whether they have ended (N,)."""

    def __init__(self, caches: list[Any], so_far: tuple[Tensor, Tensor, Tensor] | None = None):
        super().__init__(caches)
        self.so_far = so_far

    def batch_select_indices(self, rows: Int[Tensor, "M"]) -> None:
        super().batch_select_indices(rows)
        if self.so_far is not None:
            log_p, log_w, ended = self.so_far
            self.so_far = log_p[:, rows], log_w[:, rows], ended[rows]
