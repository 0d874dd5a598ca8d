"""Predictive checks: whether texts that a user has could have come from the prior or the posterior, by numbers of texts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from scipy.special import kolmogorov
from torch import Tensor

from ppl_lm.criticism.effective_size import effective
from ppl_lm.criticism.expectations import expectation
from ppl_lm.criticism.statistics import Statistic, evaluate, values
from ppl_lm.criticism.weights import pareto_smooth
from ppl_lm.infer.draws import Draws


@dataclass(frozen=True)
class PredictiveCheck:
    """Of one statistic: N observed texts against the law of the draws.

    :param observed: its values, (N,), and `observed_mean`.
    :param mean: under the draws' law, with Monte Carlo standard error `se`.
    :param pit: where each observed value lies in that law, P(Y < y) + P(Y = y) / 2, (N,).
    :param tails: of each observed value by itself, the two-sided mid-p value 2 min(pit, 1 - pit), (N,).
    :param p_value: of the mean, two-sided, among means of N values of the law; a shift of the mean shows here.
    :param p_value_pit: of the uniformity of `pit`, ties broken at random; any other shape shows here.
    :param ess: how many independent draws the law rests on; None where it cannot be told (then `p_value_pit` is None too).
    """

    name: str
    observed: Float[Tensor, "N"]
    observed_mean: float
    mean: float
    se: float
    pit: Float[Tensor, "N"]
    tails: Float[Tensor, "N"]
    p_value: float
    p_value_pit: float | None
    ess: float | None

    def __str__(self) -> str:
        shape = "unknown" if self.p_value_pit is None else f"{self.p_value_pit:.3g}"
        return (
            f"{self.name}: observed mean {self.observed_mean:.3f}, predicted {self.mean:.3f} ± {self.se:.3f}, "
            f"p = {self.p_value:.3g} of the mean, {shape} of the whole law"
        )


def predictive_check(
    draws: Draws,
    observed: Sequence[str] | Int[Tensor, "N T"],
    statistics: Mapping[str, Statistic],
    *,
    prior: bool = False,
    name: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> list[PredictiveCheck]:
    """Each statistic of the observed texts against its law under the draws: a posterior-predictive check (Gelman et al. 1996),
    or with `prior` a prior-predictive one (Box 1980). Observed texts should not be those that the posterior was fitted to:
    then p-values are too large.

    Exact draws and Markov chains count as they come, all others by their weights, a guide's Pareto-smoothed. That the draws
    are few is part of both p-values: the mean's null is that of N values of the draws' law, moved by a normal of the standard
    error; the PIT's is Kolmogorov's for n = N·ess / (N + ess) (Stephens 1970).

    :param draws: of one prompt: `draws.of_prompt(b)`.
    :param observed: texts, or token ids of the draws' vocabulary.
    :param statistics: name -> function from texts to one finite number each.
    :param prior: check the prior: the likelihood is left out of the weights, which must be a guide's (`importance`; its guide
        may be None, the prior itself).
    :param name: of the site that is text; None: `x`, or the first.
    :param seed: of the resampled means and of ties; torch's random state is neither used nor changed.
    :raises ValueError: if there is no observed text, more than one prompt, a statistic is not one finite number a text, or
        `prior` is asked of draws that are the posterior's or came about together.
    :raises NoSupportError: if all weights are zero.
    """
    if len(draws.prompts) != 1:
        raise ValueError(f"draws of {len(draws.prompts)} prompts; give those of one: draws.of_prompt(b)")
    texts = draws.prompts.decode(observed) if isinstance(observed, Tensor) else list(observed)
    if not texts or isinstance(observed, str):
        raise ValueError("observed must be a list of at least one text, or their token ids of shape (N, T)")
    if draws.num_samples < 2:
        raise ValueError("one draw has no standard error; give at least 2")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}; give at least 1")
    draws = draws.map(lambda v: v.cpu())
    if prior:
        if draws.kind != "weighted":
            raise ValueError(
                "prior=True needs a guide's own draws (importance), whose weights can do without the evidence"
            )
        draws = replace(draws, log_likelihood=torch.zeros_like(draws.log_likelihood))
    predicted = evaluate(draws, statistics, name)
    law = pareto_smooth(draws)
    share = shares(law)
    return [
        against(key, value, values(key, statistics[key], texts), law, share, resamples, seed)
        for key, value in predicted.items()
    ]


def against(
    name: str,
    value: Float[Tensor, "C S 1"],
    observed: Float[Tensor, "N"],
    draws: Draws,
    share: Float[Tensor, "C*S"],
    resamples: int,
    seed: int,
) -> PredictiveCheck:
    """Of one statistic's numbers: of the draws, with their normalised weights `share`, and of the observed texts."""
    generator = torch.Generator().manual_seed(seed)
    flat, count = value.flatten(), len(observed)
    centre, se = expectation(draws, value).item()
    order = flat.argsort()
    sorted_, mass = flat[order], torch.cat([share.new_zeros(1), share[order].cumsum(0)])
    mass = (mass / mass[-1]).clamp_max(1.0)
    below = mass[torch.searchsorted(sorted_, observed, right=False)]
    upto = mass[torch.searchsorted(sorted_, observed, right=True)]
    pit = (below + upto) / 2

    picks = torch.multinomial(share, count * resamples, replacement=True, generator=generator)
    means = flat[picks].reshape(resamples, count).mean(1)
    means = means + se * torch.randn(resamples, generator=generator, dtype=torch.float64)
    gap, observed_mean = (
        1e-12 * float(flat.abs().max()),
        float(observed.mean()),
    )  # of means that are equal but for rounding
    above, beneath = float((means > observed_mean + gap).sum()), float((means < observed_mean - gap).sum())
    ties = resamples - above - beneath
    tail = (min(above, beneath) + ties / 2 + 0.5) / (resamples + 1)

    noisy = below + (upto - below) * torch.rand(count, generator=generator, dtype=torch.float64)
    amount = effective(draws)
    return PredictiveCheck(
        name=name,
        observed=observed,
        observed_mean=observed_mean,
        mean=centre,
        se=se,
        pit=pit,
        tails=2 * torch.minimum(pit, 1 - pit),
        p_value=min(1.0, 2 * tail),
        p_value_pit=uniform(noisy, count * amount / (count + amount)) if amount else None,
        ess=amount,
    )


def shares(draws: Draws) -> Float[Tensor, "S"]:
    """Normalised weights of one prompt's draws, whatever their kind.

    :raises NoSupportError: if all are zero. :raises ValueError: if one is NaN or infinite."""
    if bool((draws.log_weight.isnan() | (draws.log_weight == torch.inf)).any()):
        raise ValueError("a weight is NaN or infinite; give draws as a sampler made them")
    return draws.weights.flatten()


def uniform(pit: Float[Tensor, "N"], count: float) -> float:
    """p-value of uniformity by Kolmogorov's largest distance, for `count` independent numbers (Stephens 1970)."""
    ordered, n = pit.sort().values, len(pit)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = float(torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max())
    scaled = (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count)) * distance
    return float(kolmogorov(scaled))
