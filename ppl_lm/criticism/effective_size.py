"""`ess`: how many independent posterior draws any draws are worth."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ppl_lm.criticism.chains import columns, worst
from ppl_lm.criticism.expectations import expectation
from ppl_lm.criticism.statistics import numbers
from ppl_lm.infer.draws import Draws
from ppl_lm.infer.log_weights import kong_ess


def ess(draws: Draws | Float[Tensor, "S *B"]) -> Float[Tensor, "*B"]:
    """How many independent posterior draws these are worth, for each prompt: of weighted draws Kong's (Σw)²/Σw² (1992), 0 where
    all weights are zero; of exact draws all; of chains ArviZ's bulk effective sample size, and of runs that grew together how
    many independent draws would give means with such errors, the fewest of any number (the model's records, lengths, log p of
    the prior). NaN where it cannot be told: of one run, or where no number ever changes. 0 where no draw is possible.

    :param draws: of any kind, or log weights of independent draws, nats.
    :raises ValueError: of weights of other shapes than (S,) and (S, B)."""
    if isinstance(draws, Tensor):
        if draws.dim() > 2:
            raise ValueError(f"log weights of shape {tuple(draws.shape)}; give (S,) or (S, B), or the draws themselves")
        return kong_ess(draws)
    amounts = [effective(draws.of_prompt(b)) for b in range(draws.log_guide.shape[-1])]
    return torch.tensor([math.nan if amount is None else amount for amount in amounts], dtype=torch.float64)


def effective(draws: Draws) -> float | None:
    """`ess` of one prompt, or of all where only their joint weight exists; None where it cannot be told."""
    if draws.kind == "exact":
        return float(draws.num_samples)
    if bool((draws.log_weight == -torch.inf).all()):
        return 0.0
    if draws.kind == "weighted":
        return float(kong_ess(draws.log_weight.flatten(0, 1)))
    if draws.kind == "chains":
        return worst(columns(draws), "ess")
    return _by_errors(draws)


def _by_errors(draws: Draws) -> float | None:
    amounts = [float(moments(draws, value).ess) for value in numbers(draws).values()]
    return min((amount for amount in amounts if 0 < amount < math.inf), default=None)


@dataclass(frozen=True)
class Moments:
    """Of each number, for each prompt, under the posterior: mean, standard deviation, the mean's Monte Carlo standard error
    `se`, and how many independent draws would have that error, sd²/se²: all of exact draws, NaN of a number that never changes,
    0 where the error cannot be told."""

    mean: Float[Tensor, "B *E"]
    sd: Float[Tensor, "B *E"]
    se: Float[Tensor, "B *E"]
    ess: Float[Tensor, "B *E"]


def moments(draws: Draws, values: Shaped[Tensor, "C S B *E"]) -> Moments:
    """Of numbers of each draw, by draws of every kind; see `expectation`."""
    estimate = expectation(draws, values)
    variance = expectation(draws, (values.double() - estimate.mean).square()).mean
    constant = variance.sqrt() <= 1e-12 * estimate.mean.abs()  # but for rounding
    variance, amount = variance.where(~constant, 0.0), (variance / estimate.se.square()).where(~constant, math.nan)
    amount = amount.where(~estimate.se.isinf(), 0.0)
    se = estimate.se.where(~constant | estimate.se.isinf(), 0.0)
    if draws.kind == "exact":
        amount = torch.where(amount > 0, float(draws.num_samples), amount)
    return Moments(estimate.mean, variance.sqrt(), se, amount)
