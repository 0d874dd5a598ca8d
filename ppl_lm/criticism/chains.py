"""Convergence of Markov chains by the numbers of their draws: R-hat and effective draws (ArviZ's), with jackknife errors."""

import math
from typing import Any

import numpy as np

from ppl_lm.criticism.array_statistics import array_statistic
from ppl_lm.criticism.statistics import numbers
from ppl_lm.infer.draws import Draws

GROUPS = 16  # of chains, of which the jackknife leaves out one after the other


def r_hat(draws: Draws) -> float:
    """The largest split R-hat of the numbers that chains are summarised by: rewards, lengths, log p of the prior. NaN where
    none of them ever changes."""
    largest = worst(columns(draws), "rhat")
    return math.nan if largest is None else largest


def columns(draws: Draws) -> list[np.ndarray]:
    """Each number of each prompt, (C, S)."""
    return [v[..., b].cpu().numpy() for v in numbers(draws).values() for b in range(v.shape[-1])]


def worst(columns: list[np.ndarray], statistic: str, method: str | None = None) -> float | None:
    """The largest R-hat, or the fewest effective draws, of any number; None where none has one."""
    values = [v for v in of_chains(columns, statistic, method) if not math.isnan(v)]
    return (max if statistic == "rhat" else min)(values, default=None)


def jackknife(columns: list[np.ndarray], statistic: str, method: str) -> float | None:
    """Standard error of `worst` by its values without one group of chains after the other (Efron & Stein 1981)."""
    chains = len(columns[0])
    if chains < 4:
        return None
    left = []
    for group in np.array_split(np.arange(chains), min(chains, GROUPS)):
        without_group = worst([np.delete(column, group, 0) for column in columns], statistic, method)
        if without_group is None or not math.isfinite(without_group):
            return None
        # Effective draws add up over chains: what is left out is scaled back.
        left.append(without_group * (chains / (chains - len(group)) if statistic == "ess" else 1.0))
    return float(np.std(left)) * math.sqrt(len(left) - 1)


def of_chains(columns: list[np.ndarray], statistic: str, method: str | None = None) -> list[float]:
    """ArviZ's statistic of each number, (C, S), that changes at all."""
    function = array_statistic(statistic)
    how: dict[str, Any] = {} if method is None else {"method": method}
    how |= {"prob": (0.05, 0.95)} if method == "tail" else {}
    with np.errstate(invalid="ignore", divide="ignore"):  # chains that each stay where they are
        return [float(function(column, **how)) for column in columns if column.max() > column.min()]
