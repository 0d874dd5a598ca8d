"""`truncated`: each next token among the likely ones alone, by top-p, min-p or top-k."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ppl_lm.lm.experts import combined
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.laws.around import Around

ROUNDING = 1e-6  # share of the mass, or nats, by which a token may fall short and still count
WIDTH = 64  # tokens that are sorted at first


def truncated(
    lm: LanguageModel, *, top_p: float | None = None, min_p: float | None = None, top_k: int | None = None
) -> LanguageModel:
    """q(x_t | prompt, x_<t) ∝ lm(x_t | prompt, x_<t) for the tokens that are kept, 0 for all others, the end token like any
    other: what is sampled by top-p, min-p or top-k, as a language model with an exact density over whole texts.

    Kept are in this order, as in transformers, of the `top_k` most probable tokens the fewest whose share of their mass reaches
    `top_p` (Holtzman et al. 2020), and of these the ones with at least `min_p` times the probability of the most probable
    (Nguyen et al. 2024): the most probable one always. Of equal ones the lower ids are kept; what falls short by less than a
    millionth counts as reaching. For a temperature before the cut give `tempered(lm, τ)`.

    Texts with another token have log-probability -inf. The gradient is that of the law with the kept tokens held as they are.
    Whatever proposes from this law and is weighted to a posterior stands for what the posterior has on its support alone:
    `diagnose` and `diagnose_draws` say so, `rejection` and `mcmc` refuse it. To make up for it give the model the same
    truncated language model as its prior, or propose from `mixture([truncated, prior], [0.9, 0.1])`.

    :param top_p: above 0, at most 1; `min_p`: from 0 to 1; `top_k`: at least 1. None: not cut by it; at least one.
    :raises ValueError: if none is given, or one is out of its range."""
    if top_p is None and min_p is None and top_k is None:
        raise ValueError("truncated by nothing; give top_p=, min_p= or top_k=, such as top_p=0.95")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; give a share of the mass above 0 and at most 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p}; give a share of the largest probability, from 0 to 1")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise ValueError(f"top_k={top_k!r}; give a whole number of tokens, at least 1")
    return combined(_Truncated(lm.model, top_p, min_p, top_k, lm.vocabulary.size), [lm])


class _Truncated(Around):
    """Logits of tokens that are not kept are -inf."""

    def __init__(self, model: nn.Module, top_p: float | None, min_p: float | None, top_k: int | None, size: int):
        super().__init__(model)
        self.top_p = None if top_p == 1 else top_p
        self.min_p = min_p or None
        self.top_k = None if top_k is None or top_k >= size else top_k

    @property
    def cuts(self) -> frozenset[int]:
        whole = self.top_p is None and self.min_p is None and self.top_k is None
        return super().cuts if whole else super().cuts | {id(self)}

    def law(self, logits: Float[Tensor, "N m V"]) -> Float[Tensor, "N m V"]:
        kept = kept_tokens(logits.detach(), self.top_p, self.min_p, self.top_k)
        return logits.masked_fill(~kept, -torch.inf)


@torch.no_grad()
def kept_tokens(
    logits: Float[Tensor, "*S V"], top_p: float | None = None, min_p: float | None = None, top_k: int | None = None
) -> Bool[Tensor, "*S V"]:
    """Which next tokens `truncated` keeps; none where a logit is NaN."""
    peak = logits.amax(-1, keepdim=True)
    least = torch.full_like(peak, -torch.inf) if min_p is None else peak + (math.log(min_p) - ROUNDING)
    if top_p is None and top_k is None:
        return logits >= least
    if top_p is None:
        values = logits.topk(min(top_k or 1, logits.shape[-1])).values
        last, count = values[..., -1:], torch.full_like(peak, values.shape[-1], dtype=torch.int64)
    else:
        last, count = _nucleus(logits, peak, top_p, top_k)
    likely = most_probable(logits, last, count) & ~peak.isnan()
    return likely if min_p is None else likely & (logits >= least)


def _nucleus(
    logits: Float[Tensor, "*S V"], peak: Float[Tensor, "*S 1"], top_p: float, top_k: int | None
) -> tuple[Float[Tensor, "*S 1"], Int[Tensor, "*S 1"]]:
    """How many of the `top_k` largest logits have `top_p` of their mass, and the smallest of those: a few are sorted, and more
    only of rows where these are too few."""
    flat, peaks = logits.reshape(-1, logits.shape[-1]), peak.reshape(-1, 1)
    size = min(top_k or logits.shape[-1], logits.shape[-1])
    width = size if top_k else min(WIDTH, size)
    total = (flat - peaks).exp().sum(-1, keepdim=True, dtype=torch.float64) if top_k is None else None
    last, count = torch.empty_like(peaks), torch.empty_like(peaks, dtype=torch.int64)
    rows = torch.arange(len(flat), device=flat.device)
    while len(rows):
        values = (flat if len(rows) == len(flat) else flat[rows]).topk(width).values
        mass = (values - peaks[rows]).exp().cumsum(-1, dtype=torch.float64)
        goal = (top_p - ROUNDING) * (mass[:, -1:] if total is None else total[rows])
        enough = (mass < goal).sum(-1, keepdim=True) + 1
        count[rows] = enough.clamp_max(width)
        last[rows] = values.gather(-1, count[rows] - 1)
        rows = rows[:0] if width == size else rows[enough[:, 0] > width]
        width = min(8 * width, size)
    return last.reshape(peak.shape), count.reshape(peak.shape)


def most_probable(
    logits: Float[Tensor, "*S V"], last: Float[Tensor, "*S 1"], count: Int[Tensor, "*S 1"]
) -> Bool[Tensor, "*S V"]:
    """The `count` largest logits of each row, of which `last` is the smallest; of equal ones the lower ids."""
    kept = logits >= last
    if not bool((kept.sum(-1, keepdim=True) > count).any()):
        return kept
    above, equal = logits > last, logits == last
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
