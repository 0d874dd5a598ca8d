"""Simulation-based calibration: whether draws have the posterior's law, by ranks of exact posterior draws among them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from scipy.stats import binom
from torch import Tensor

from ppl_lm.criticism.statistics import numbers
from ppl_lm.infer.draws import Draws

REPEATS = 2000  # of ranks that are uniform, by which p-values are found


@dataclass(frozen=True)
class Calibration:
    """Of R replications and each number by which texts are summarised.

    :param ranks: how many of `num_draws` draws have a smaller value than the posterior's text, ties broken at random, (R,);
        uniform on 0 … num_draws where the draws are the posterior's.
    :param p_values: of uniformity.
    :param band: the ECDF of uniform ranks stays between these, at every rank at once, with 95% probability, (2, num_draws + 1).
    :param detectable: the power: the shift, in standard deviations of a normal number, that would have been found (p < 0.05 /
        numbers) with 80% probability.
    """

    ranks: dict[str, Int[Tensor, "R"]]
    num_draws: int
    p_values: dict[str, float]
    band: Float[Tensor, "2 L"]
    detectable: float

    @property
    def p_value(self) -> float:
        """The smallest, times their number (Bonferroni)."""
        return min(1.0, min(self.p_values.values()) * len(self.p_values))

    def __str__(self) -> str:
        p_values = ", ".join(f"{name} p = {p:.3g}" for name, p in self.p_values.items())
        count = len(next(iter(self.ranks.values())))
        verdict = "calibrated as far as can be seen" if self.p_value >= 0.05 else "not calibrated"
        shift = f"{count} replications would show a shift of {self.detectable:.2f} deviations 4 times of 5"
        return f"{verdict}: {p_values}; {shift}"


def sbc(
    exact: Draws,
    draws: Draws,
    num_draws: int = 19,
    statistics: Callable[[Draws], Mapping[str, Tensor]] | None = None,
    seed: int = 0,
) -> Calibration:
    """Simulation-based calibration (Talts et al. 2018), for latent text, with the observation held at what the model observes.

    Simulating x from the prior and the evidence from its likelihood, and keeping the pairs whose evidence is the observed one,
    is what `rejection` does: its draws are the x of the replications. Each is ranked among `num_draws` draws of its own, which
    are to have the same law: by reward, length, log p of the prior and the model's other records. Ranks see only what these
    numbers see. With a likelihood of power 1 + s the log likelihood moves by about s σ of its own standard deviations, σ being
    that under the posterior in nats: compare `detectable`. A mode that is missing may leave all as they were. The number that
    sees it is log q, the density that made the draws (Modrák et al. 2023),
    `statistics=lambda draws: {"log_q": draws.under(guide).log_guide}`. Of several prompts all ranks are taken together.

    :param exact: R exact posterior draws of each prompt.
    :param draws: at least R · num_draws of what is tested, as they come: weights are not used.
    :param statistics: more numbers of the draws, (C, S, B); -inf is one.
    :raises ValueError: if there are too few draws, fewer than 20 replications, a number is NaN, or `exact` is not exact."""
    if exact.kind != "exact":
        raise ValueError("exact= must hold exact posterior draws (rejection)")
    count, generator = exact.num_samples, torch.Generator().manual_seed(seed)
    if count < 20 or num_draws < 1:
        raise ValueError(f"{count} replications of num_draws={num_draws}; give at least 20 and 1")
    if draws.num_samples < count * num_draws:
        raise ValueError(
            f"{draws.num_samples} draws for {count} replications of {num_draws}; give at least {count * num_draws}"
        )
    further = statistics or (lambda _: {})
    truth, tested = ({**numbers(d), **further(d)} for d in (exact, draws))
    if truth.keys() != tested.keys():
        raise ValueError(f"the exact draws have the numbers {sorted(truth)}, the tested ones {sorted(tested)}")
    ranks = {}
    for name, value in truth.items():
        for number, of in ((value, exact), (tested[name], draws)):
            if number.shape not in (of.log_prior.shape, (*of.log_prior.shape[:2], 1)):
                raise ValueError(
                    f"the number {name!r} has the shape {tuple(number.shape)}, draws {tuple(of.log_prior.shape)}"
                )
            if bool(number.isnan().any()):
                raise ValueError(f"the number {name!r} is NaN for some draw; it cannot be ranked")
        one = value.flatten(0, 1).cpu()  # (R, B)
        many = tested[name].flatten(0, 1)[: count * num_draws].cpu().unflatten(0, (count, num_draws))  # (R, L, B)
        if one.numel() and float(one.max() - one.min()) + float(many.max() - many.min()) == 0:
            continue  # what never changes has no rank
        smaller, equal = (many < one.unsqueeze(1)).sum(1), (many == one.unsqueeze(1)).sum(1)
        ties = (torch.rand(equal.shape, generator=generator, dtype=torch.float64) * (equal + 1)).long()
        ranks[name] = (smaller + ties).flatten()
    if not ranks:
        raise ValueError("none of the draws' numbers ever changes: there is nothing to rank")
    total = len(next(iter(ranks.values())))
    null, band = _null(total, num_draws)
    p_values = {name: _p_value(_statistic(_ecdf(r.unsqueeze(0), num_draws), total), null) for name, r in ranks.items()}
    return Calibration(ranks, num_draws, p_values, band.clone(), _detectable(total, num_draws, 0.05 / len(ranks)))


def _ecdf(ranks: Int[Tensor, "N R"], num_draws: int) -> Float[Tensor, "N L"]:
    """How many ranks are at most 0, 1, …, num_draws - 1."""
    grid = torch.arange(num_draws)
    ordered = ranks.sort(-1).values
    return torch.searchsorted(ordered, grid.expand(len(ranks), -1).contiguous(), right=True).double()


def _statistic(below: Float[Tensor, "N L"], total: int) -> Float[Tensor, "N"]:
    """The smallest two-sided tail probability over all ranks: small where the ECDF leaves the diagonal anywhere (Säilynoja,
    Bürkner & Vehtari 2022)."""
    lower, upper = _tails(total, below.shape[1])
    column = torch.arange(below.shape[1])
    at = below.long()
    return torch.minimum(lower[at, column], upper[at, column]).amin(-1)


def _tails(total: int, num_draws: int) -> tuple[Float64[Tensor, "k L"], Float64[Tensor, "k L"]]:
    """P(X ≤ k) and P(X ≥ k), k = 0, …, total, of binomials with `total` trials and success probabilities 1/(L+1), …,
    L/(L+1)."""
    p = np.arange(1, num_draws + 1) / (num_draws + 1)
    k = np.arange(total + 1)[:, None]
    return torch.as_tensor(binom.cdf(k, total, p)), torch.as_tensor(binom.sf(k - 1, total, p))


@cache
def _null(total: int, num_draws: int) -> tuple[Float[Tensor, "N"], Float[Tensor, "2 L"]]:
    """The statistic of uniform ranks, and the band that its 5% point makes."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(num_draws + 1, (REPEATS, total), generator=generator)
    statistics = _statistic(_ecdf(ranks, num_draws), total)
    limit = statistics.quantile(0.05)
    lower, upper = _tails(total, num_draws)
    low = (lower < limit).sum(0).double()  # the smallest count that is not too small
    high = total - (upper < limit).sum(0).double()
    edge = torch.tensor([1.0], dtype=torch.float64)
    return statistics, torch.stack([torch.cat([low / total, edge]), torch.cat([high / total, edge])])


def _p_value(statistic: Float[Tensor, "1"], null: Float[Tensor, "N"]) -> float:
    return (1 + int((null <= statistic * (1 + 1e-9)).sum())) / (1 + len(null))


@cache
def _detectable(total: int, num_draws: int, level: float) -> float:
    """By simulation of normal numbers: a shifted one has the rank Binomial(L, Φ(z + shift))."""
    limit = _null(total, num_draws)[0].quantile(level)
    generator = torch.Generator().manual_seed(1)
    shift = 0.5 / math.sqrt(total)
    while True:
        z = torch.randn(200, total, generator=generator, dtype=torch.float64) + shift
        ranks = _binomial(num_draws, torch.special.ndtr(z), generator)
        if float((_statistic(_ecdf(ranks, num_draws), total) <= limit).double().mean()) >= 0.8:
            return shift
        shift *= 1.1


def _binomial(count: int, p: Float[Tensor, "*S"], generator: torch.Generator) -> Int[Tensor, "*S"]:
    return (torch.rand(*p.shape, count, generator=generator, dtype=torch.float32) < p.unsqueeze(-1)).sum(-1)
