"""Ranks of simulation-based calibration, as an ECDF with its band."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ppl_lm.criticism.calibration import Calibration
from ppl_lm.plot.style import CYCLE, GREY, axes, legend_below, with_notes
from ppl_lm.plot.untrusted import plain


def calibration(calibration: Calibration, ax: Axes | None = None, name: str | None = None) -> Axes:
    """ECDF of the ranks less that of uniform ones; draws of the posterior's law stay in the band, at every rank at once, with
    95% probability for each number.

    :param name: of the one number to show; None: all.
    :raises ValueError: if there is no such number."""
    if name is not None and name not in calibration.ranks:
        raise ValueError(f"name={name!r}; this calibration has {sorted(calibration.ranks)}")
    ax, length = axes(ax), calibration.num_draws
    rank = np.arange(length + 1)
    uniform = (rank + 1) / (length + 1)
    low, high = calibration.band.cpu().numpy() - uniform
    ax.fill_between(rank, low, high, step="post", color=GREY, alpha=0.3, linewidth=0, label="95% band of uniform ranks")
    ax.axhline(0, color=GREY, linewidth=0.8)
    shown = [name] if name is not None else list(calibration.ranks)
    for n, key in enumerate(shown):
        below = np.searchsorted(np.sort(calibration.ranks[key].cpu().numpy()), rank, side="right")
        style: Any = {"color": CYCLE[n % 6], "linestyle": ("-", "--", ":")[n // 6 % 3]}
        label = f"{plain(key)}, p = {calibration.p_values[key]:.2g}"
        ax.step(rank, below / len(calibration.ranks[key]) - uniform, where="post", label=label, **style)
    ax.set_xlabel(f"rank among {length} draws")
    ax.set_ylabel("ECDF of ranks - uniform")
    ax.locator_params(axis="x", integer=True)
    legend_below(ax, *ax.get_legend_handles_labels())
    count = len(next(iter(calibration.ranks.values())))
    return with_notes(
        ax, [f"{count} replications would show a shift of {calibration.detectable:.2f} deviations 4 times of 5"]
    )
