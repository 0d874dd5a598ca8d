"""Resampling: N weighted particles become `count`, without changing what any weighted sum is expected to be.

Each rule takes log weights (N, P), one column a population, and returns as many particles for each. E[Σ_k w'_k f(z'_k)] =
Σ_n w_n f(z_n) for every f: so the mean weight stays an unbiased estimate of Z whenever a rule is used.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor

from ppl_lm.infer.counts import require_count

SMALLEST = 1e-15  # a point is kept so far below the end of the line that it does not round to it


@dataclass(frozen=True)
class Resampled:
    """:param index: which of the N each is, (count, P). A population without any weight is returned as it stood.
    :param log_w: their weights, nats, (count, P).
    :param slot: where the particle `through` went, (P,); None where none was asked for."""

    index: Int[Tensor, "count P"]
    log_w: Float[Tensor, "count P"]
    slot: Int[Tensor, "P"] | None = None


Rule = Callable[..., Resampled]
"""(log_w, count, u=None, through=None) -> Resampled.

- `u`: the uniform numbers in [0, 1) by which it chooses, (count + 1, P), float64; None draws them.
- `through`: (P,) a particle of each population that has to survive: the rule's law given that, and that one of its
  offspring, all of them alike, is looked at. This is what conditional SMC needs (Andrieu et al. 2010)."""


def multinomial(
    log_w: Float[Tensor, "N P"],
    count: int,
    u: Float64[Tensor, "points P"] | None = None,
    through: Int[Tensor, "P"] | None = None,
) -> Resampled:
    """Each of `count` drawn by itself, in proportion to the weights (Gordon et al. 1993)."""
    u = _uniform(log_w, count) if u is None else u
    points, slot = u[1:], None
    if through is not None:
        slot = (u[0] * count).long().clamp_max(count - 1)
    mass = _mass(log_w)
    index = _find(mass.cumsum(0), points)
    return _even(log_w, index if slot is None else _put(index, slot, through), slot)


def stratified(
    log_w: Float[Tensor, "N P"],
    count: int,
    u: Float64[Tensor, "points P"] | None = None,
    through: Int[Tensor, "P"] | None = None,
) -> Resampled:
    """One point in each of `count` equal parts of the line of weights, each by itself (Kitagawa 1996)."""
    u = _uniform(log_w, count) if u is None else u
    line = _mass(log_w).cumsum(0)
    within, slot = u[1:], None
    if through is not None:
        slot, here = _point(line * count, u[0], through, count)
        within = _put(within, slot, here)
    grid = torch.arange(count, device=u.device).unsqueeze(-1)
    index = _find(line, (grid + within) / count)
    return _even(log_w, index if slot is None else _put(index, slot, through), slot)


def systematic(
    log_w: Float[Tensor, "N P"],
    count: int,
    u: Float64[Tensor, "points P"] | None = None,
    through: Int[Tensor, "P"] | None = None,
) -> Resampled:
    """One point in each of `count` equal parts of the line of weights, at the same place in all (Carpenter et al. 1999)."""
    u = _uniform(log_w, count) if u is None else u
    line = _mass(log_w).cumsum(0)
    within, slot = u[0], None
    if through is not None:
        slot, within = _point(line * count, u[0], through, count)
    grid = torch.arange(count, device=u.device).unsqueeze(-1)
    index = _find(line, (grid + within) / count)
    return _even(log_w, index if slot is None else _put(index, slot, through), slot)


def without_replacement(
    log_w: Float[Tensor, "N P"],
    count: int,
    u: Float64[Tensor, "points P"] | None = None,
    through: Int[Tensor, "P"] | None = None,
) -> Resampled:
    """None is taken twice: particle n with probability min(1, c w_n), c such that `count` are taken, and the weight
    w_n / min(1, c w_n): the heavy ones keep theirs, the others all get 1/c (Fearnhead & Clifford 2003; Lew et al. 2023).

    Does something only where there are more particles than `count`: see `expand` of `smc`."""
    u = _uniform(log_w, count) if u is None else u
    w = (log_w - log_w.amax(0)).exp().nan_to_num(0.0)
    chance = _inclusion(w, count)  # (N, P)
    line = chance.cumsum(0)
    within, slot = u[0], None
    if through is not None:
        slot, within = _point(line, u[0], through, count)
    grid = torch.arange(count, device=u.device).unsqueeze(-1) + within.clamp_max(1 - SMALLEST)  # (count, P)
    index = torch.searchsorted(line.T.contiguous(), grid.T.contiguous(), right=True).T
    spare = index >= len(w)  # fewer particles with any weight than are wanted
    index = index.clamp_max(len(w) - 1)
    if slot is not None:
        index = _put(index, slot, through)
    taken = log_w.gather(0, index) - chance.gather(0, index).log()
    taken = taken.masked_fill(spare | (chance.gather(0, index) == 0), -torch.inf)
    return Resampled(index, taken, slot)


def _inclusion(w: Float[Tensor, "N P"], count: int) -> Float[Tensor, "N P"]:
    """min(1, c w) with Σ min(1, c w) = count; 1 for all that have a weight where they are no more than that."""
    ordered = w.sort(0, descending=True).values
    kept = torch.arange(len(w), device=w.device).unsqueeze(-1)
    tail = ordered.flip(0).cumsum(0).flip(0)  # Σ of the (kept + 1)th and smaller ones
    c = (count - kept) / tail.clamp_min(torch.finfo(w.dtype).tiny)
    fits = (kept < count) & (c * ordered <= 1)  # the first number kept for which no other is heavier than 1/c
    first = fits.to(torch.uint8).argmax(0)
    chosen = c.gather(0, first.unsqueeze(0))
    few = (w > 0).sum(0) <= count
    return torch.where(few, (w > 0).double(), (chosen * w).clamp_max(1.0))


def _uniform(log_w: Float[Tensor, "N P"], count: int) -> Float64[Tensor, "points P"]:
    require_count("count", count)
    return torch.rand(count + 1, log_w.shape[1], dtype=torch.float64, device=log_w.device)


def _mass(log_w: Float[Tensor, "N P"]) -> Float[Tensor, "N P"]:
    """Normalised weights; of a population without any weight, equal ones."""
    return torch.where((log_w == -torch.inf).all(0), 0.0, log_w).softmax(0)


def _find(line: Float[Tensor, "N P"], points: Float[Tensor, "count P"]) -> Int[Tensor, "count P"]:
    """In whose part of the line each point lies."""
    scaled = points.clamp_max(1 - SMALLEST) * line[-1]
    return torch.searchsorted(line.T.contiguous(), scaled.T.contiguous(), right=True).T.clamp_max(len(line) - 1)


def _point(
    line: Float[Tensor, "N P"], u: Float[Tensor, "P"], through: Int[Tensor, "P"], count: int
) -> tuple[Int[Tensor, "P"], Float[Tensor, "P"]]:
    """A point uniform in the part of the line, of length `count`, that is `through`'s: its whole number and the rest."""
    end = line.gather(0, through.unsqueeze(0))[0]
    begin = torch.where(through > 0, line.gather(0, (through - 1).clamp_min(0).unsqueeze(0))[0], 0.0)
    z = begin + u * (end - begin)
    slot = z.long().clamp_max(count - 1)
    return slot, z - slot


def _put(
    values: Shaped[Tensor, "count P"], slot: Int[Tensor, "P"], value: Shaped[Tensor, "P"] | None
) -> Shaped[Tensor, "count P"]:
    assert value is not None
    return values.scatter(0, slot.unsqueeze(0), value.unsqueeze(0).to(values.dtype))


def _even(log_w: Float[Tensor, "N P"], index: Int[Tensor, "count P"], slot: Int[Tensor, "P"] | None) -> Resampled:
    """All with the same weight, Σ w / count."""
    share = log_w.logsumexp(0) - math.log(len(index))
    return Resampled(index, share.expand(index.shape).clone(), slot)
