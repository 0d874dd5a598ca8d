"""How many independent posterior draws any draws are worth."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ppl_lm.criticism.statistics import numbers
from ppl_lm.criticism.weights import ess, weighted_mean
from ppl_lm.infer.draws import Draws

GROUPS = 16  # of chains, of which the jackknife leaves out one after the other


def r_hat(draws: Draws) -> float:
    """The largest split R-hat of the numbers that chains are summarised by: rewards, lengths, log p of the prior. NaN where
    none of them ever changes."""
    found = worst(columns(draws), "rhat")
    return math.nan if found is None else found


def worth(draws: Draws) -> float | None:
    """How many independent posterior draws those of one prompt amount to: of weighted draws Kong's effective sample size; of
    chains ArviZ's, and of interacting draws what the errors of their means say, the fewest of any number. None where that
    cannot be told."""
    if draws.exact:
        return float(draws.num_samples)
    if draws.interacting:
        return _by_errors(draws)
    if not draws.markov:
        return float(ess(draws))
    return worst(columns(draws), "ess")


def _by_errors(draws: Draws) -> float | None:
    """How many independent draws would have such standard errors of the means, the fewest of any number. None of one run."""
    if len(draws.log_guide) < 2:
        return None
    worth = []
    for value in numbers(draws).values():
        flat = value.flatten(0, 1)
        centre, se = weighted_mean(flat, draws)
        variance, _ = weighted_mean((flat - centre).square(), draws)
        if float(se) > 0:
            worth.append(float(variance / se.square()))
    return min(worth, default=None)


def columns(draws: Draws) -> list[np.ndarray]:
    """Each number of each prompt, (C, S)."""
    return [v[..., b].cpu().numpy() for v in numbers(draws).values() for b in range(v.shape[-1])]


def worst(columns: list[np.ndarray], statistic: str, method: str | None = None) -> float | None:
    """The largest R-hat, or the fewest effective draws, of any number; None where none has one."""
    found = [v for v in of_chains(columns, statistic, method) if not math.isnan(v)]
    return (max if statistic == "rhat" else min)(found, default=None)


def jackknife(columns: list[np.ndarray], statistic: str, method: str) -> float | None:
    """Standard error of `worst` by its values without one group of chains after the other (Efron & Stein 1981)."""
    chains = len(columns[0])
    if chains < 4:
        return None
    left = []
    for group in np.array_split(np.arange(chains), min(chains, GROUPS)):
        found = worst([np.delete(column, group, 0) for column in columns], statistic, method)
        if found is None or not math.isfinite(found):
            return None
        # Effective draws add up over chains: what is left out is scaled back.
        left.append(found * (chains / (chains - len(group)) if statistic == "ess" else 1.0))
    return float(np.std(left)) * math.sqrt(len(left) - 1)


def of_chains(columns: list[np.ndarray], statistic: str, method: str | None = None) -> list[float]:
    """ArviZ's statistic of each number, (C, S), that changes at all."""
    import arviz as az

    function: Callable[..., Any] = getattr(az, statistic)
    how = {} if method is None else {"method": method}
    with np.errstate(invalid="ignore", divide="ignore"):  # chains that each stay where they are
        return [float(function(column, **how)) for column in columns if column.max() > column.min()]
