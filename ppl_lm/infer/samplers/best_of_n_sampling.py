"""Best of n draws, and its soft kin: what they give, and how far that is from the posterior."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_lm.infer.counts import require_count
from ppl_lm.infer.draws import Draws, NoSupportError
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.in_pieces import Progress
from ppl_lm.likelihood.best_of import log_ratio
from ppl_lm.lm.decoding.decoder import invert

CELLS = 2**22  # of the table of picks and groups, at a time


@torch.no_grad()
def best_of_n(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    prompts: Any,
    *,
    num_samples: int = 1000,
    n: int = 8,
    soft: bool = False,
    max_plate_nesting: int | None = None,
    on_progress: Progress | None = None,
) -> Draws:
    """For each sample, n draws of the guide of which the likeliest evidence's is kept: that of the highest reward.

    It is not the posterior. Its law is q(z) (F^n - F_^n) / (F - F_), F and F_ being the shares of the guide's draws whose
    log-likelihood is at most, and less than, that of z. With `soft` one of the n is drawn in proportion to its weight w
    (sampling importance resampling; with the prior as guide soft best-of-n), whose law, q(z) n E[w / (w + Σ w_j)] over
    n - 1 others, tends to the posterior with n. `log_guide` is the log of that law, with its expectations estimated from
    all num_samples · n draws: the samples' weights correct them, and `log_evidence` says how far they are.

    :param guide: None draws from the model's own prior.
    :raises NoSupportError: if with `soft` all n draws of a sample are impossible under the posterior.
    """
    require_count("num_samples", num_samples, 2 if soft else 1)
    require_count("n", n)
    settings: Any = {"max_plate_nesting": max_plate_nesting, "on_progress": on_progress}
    pool = importance(model, guide, prompts, num_samples=num_samples * n, **settings)
    by_group = (pool.log_weight if soft else pool.log_likelihood).reshape(num_samples, n, -1)  # (S, n, B)
    # (S, B); equals are alike, so that any order will do
    pick = _pick_by_weight(by_group) if soft else by_group.argmax(1)
    rows = pick + n * torch.arange(num_samples, device=pick.device).unsqueeze(-1)
    column = torch.arange(pick.shape[1], device=pick.device)
    best = pool.map(lambda v: v[:, rows[:, 0]] if pick.shape[1] == 1 else v[:, rows, column])
    chosen = by_group.gather(1, pick.unsqueeze(1)).squeeze(1)  # (S, B)
    gain = _soft_gain(chosen, by_group) if soft else _gain(chosen, by_group)
    return replace(best, log_guide=best.log_guide + gain, proposals=replace(pool, latents={}))


def _pick_by_weight(log_w: Float[Tensor, "S n B"]) -> Int[Tensor, "S B"]:
    if bool((log_w == -torch.inf).all(1).any()):
        raise NoSupportError(
            f"all {log_w.shape[1]} draws of a sample are impossible under the posterior (the best log weight of the others "
            f"is {float(log_w.max()):.2f} nats); raise n"
        )
    flat = log_w.log_softmax(1).transpose(1, 2).flatten(0, 1)  # (S·B, n)
    u = torch.rand(len(flat), dtype=torch.float64, device=flat.device)
    return invert(flat, u).reshape(len(log_w), -1)


def _gain(chosen: Float[Tensor, "S B"], by_group: Float[Tensor, "S n B"]) -> Float[Tensor, "S B"]:
    """log (F^n - F_^n) / (F - F_) of each chosen draw, F and F_ from all draws, itself among them."""
    count, n = by_group.shape[0] * by_group.shape[1], by_group.shape[1]
    known = by_group.flatten(0, 1).T.sort(-1).values.contiguous()  # (B, S·n)
    below, upto = (torch.searchsorted(known, chosen.T.contiguous(), right=side).T for side in (False, True))
    return log_ratio(below.double() / count, upto.double() / count, n)


def _soft_gain(chosen: Float[Tensor, "S B"], log_w: Float[Tensor, "S n B"]) -> Float[Tensor, "S B"]:
    """log n E[w / (w + Σ w_j)] of each chosen draw; the n - 1 others are those of every other sample in turn."""
    samples, n, batch = log_w.shape
    others = log_w[:, : n - 1].logsumexp(1)  # (S, B); -inf where there are none
    own, parts = torch.arange(samples, device=log_w.device), []
    size = max(1, CELLS // (samples * batch))
    for mine, index in zip(chosen.split(size), own.split(size), strict=True):
        share = -torch.logaddexp(torch.zeros((), dtype=log_w.dtype, device=log_w.device), others - mine.unsqueeze(1))
        share = share.masked_fill((own == index.unsqueeze(-1)).unsqueeze(-1), -torch.inf)  # (size, S, B)
        parts.append(share.logsumexp(1) - math.log(samples - 1) + math.log(n))
    return torch.cat(parts)
