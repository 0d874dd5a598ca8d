"""ArviZ's statistics of plain arrays, whichever of its two lives is installed."""

from collections.abc import Callable
from typing import Any


def array_statistic(name: str) -> Callable[..., Any]:
    """`ess`, `mcse` or `rhat` of numbers by chain and draw, (C, S); `psislw` of log weights, (S,). They stand in `arviz_stats`
    since ArviZ 1."""
    import arviz as az

    if hasattr(az, "psislw"):
        return getattr(az, name)
    from arviz_stats.base import array_stats  # pyright: ignore[reportMissingImports]

    return getattr(array_stats, name)
