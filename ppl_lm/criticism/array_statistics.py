"""ArviZ's statistics of plain arrays, whichever of its two lives is installed."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np


def array_statistic(name: str) -> Callable[..., Any]:
    """`ess`, `mcse` or `rhat` of numbers by chain and draw, (C, S). They stand in `arviz_stats` since ArviZ 1."""
    import arviz as az

    return getattr(_since_1(), name) if _since_1() is not None else getattr(az, name)


def psis(log_w: np.ndarray, tail: int) -> tuple[np.ndarray, float]:
    """Pareto-smoothed log weights, (S,), up to a constant, and the shape k̂ of their tail (Vehtari et al. 2024).

    ArviZ's `psislw` takes log weights, and since ArviZ 1.3 log likelihoods, whose negatives are the weights of leave-one-out:
    which of them is found out. Since ArviZ 1 weights that are tied with the tail's lower end count as of the tail, and of a
    tail whose lowest quarter is tied there is no k̂: so it is told how many are above that end, and ties are broken by 1e-10.

    :param tail: M, how many weights are in the tail, without those tied with its lower end; at least 5."""
    import arviz as az

    if (stats := _since_1()) is None:
        smoothed, khat = az.psislw(log_w)
        return np.asarray(smoothed), float(khat)
    largest = np.argsort(log_w, kind="stable")[-tail:]
    log_w = log_w.copy()
    log_w[largest] += 1e-10 * np.arange(1, tail + 1)
    relative = 9 * len(log_w) / (tail + 0.5) ** 2  # ArviZ's tail has 3 √(S / relative) draws, or at most S/5
    smoothed, khat = stats.psislw(-log_w if _takes_likelihoods() else log_w, r_eff=relative)
    return np.asarray(smoothed), float(khat)


def _since_1() -> Any:
    import arviz as az

    if hasattr(az, "psislw"):
        return None
    from arviz_stats.base import array_stats  # pyright: ignore[reportMissingImports]

    return array_stats


@cache
def _takes_likelihoods() -> bool:
    """By log weights whose tail has the shape 1; turned round they have a smallest and a largest."""
    log_w = -np.log(np.arange(1, 101) / 101)
    return float(_since_1().psislw(-log_w)[1]) > float(_since_1().psislw(log_w)[1])
