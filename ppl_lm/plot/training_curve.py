"""The ELBO by step of a fit."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from ppl_lm.plot.style import BLUE, BOUNDS, GREY, SKY, SMALL, axes, legend_below, number, with_notes


def training(
    metrics: Sequence[Mapping[str, Any]], diagnosis: Mapping[str, Any] | None = None, ax: Axes | None = None
) -> Axes:
    """ELBO per prompt by step with its standard error and a running mean, nats; at its end the kept guide's evidence bracket,
    ELBO ≤ log Z ≤ EUBO, whose gaps are KL(q ‖ p) and KL(p ‖ q).

    :param metrics: the rows of `metrics.jsonl`, or `Fit.metrics`; steps without a finite ELBO are counted, not drawn.
    :param diagnosis: what `diagnosis.json` holds."""
    ax = axes(ax)
    columns = [[number(row.get(key)) for row in metrics] for key in ("elbo", "elbo_se")]
    elbo, se = np.array(columns[0]), np.array(columns[1])
    step = np.array([number(row.get("step", n)) for n, row in enumerate(metrics)])
    seen = np.isfinite(elbo) & np.isfinite(step)
    notes = [] if seen.all() else [f"{int((~seen).sum())} of {len(seen)} steps have no finite ELBO: not shown"]
    notes = notes if len(seen) else ["no step was made"]
    step, elbo, se = step[seen], elbo[seen], np.nan_to_num(se[seen], posinf=0.0)
    if len(step):
        ax.fill_between(step, elbo - se, elbo + se, color=SKY, alpha=0.3, linewidth=0)
        ax.plot(step, elbo, ".", color=SKY, markersize=4, label="ELBO of a step ± SE")
    half = min(25, len(step) // 20 + 1)
    if len(step) > 2:
        ax.plot(step, _running_mean(elbo, half), color=BLUE, label=f"running mean of {2 * half + 1} steps")
    if diagnosis is not None:
        notes += _bracket(ax, diagnosis, float(step[-1]) if len(step) else 0.0)
    ax.set_xlabel("step")
    ax.set_ylabel("nats per prompt")
    if ax.get_legend_handles_labels()[0]:
        legend_below(ax, *ax.get_legend_handles_labels())
    return with_notes(ax, notes)


def _bracket(ax: Axes, diagnosis: Mapping[str, Any], last: float) -> list[str]:
    """Returns what could not be drawn."""
    x = last + 0.06 * max(last, 1.0)
    bounds = {
        key: (number(diagnosis.get(key)), number(diagnosis.get(f"{key}_se"))) for key in ("elbo", "log_z", "upper")
    }
    notes = []
    for key, (value, se) in bounds.items():
        name, marker, colour = BOUNDS[key]
        if not math.isfinite(value):
            notes.append(f"{name} is not finite")
            continue
        error = 0.0 if not math.isfinite(se) else se
        label = f"{name} {value:.2f} ± {se:.2f}"
        if key == "log_z":
            ax.axhspan(value - error, value + error, color=GREY, alpha=0.3, linewidth=0)
            ax.axhline(value, color=colour, linewidth=1, label=label)
            continue
        label += ", kept guide" if key == "elbo" else ""
        ax.errorbar(x, value, error, color=colour, marker=marker, capsize=3, linestyle="none", label=label)
    low, high = ax.get_ylim()
    middle = bounds["log_z"][0]
    for key, gap, name in (("elbo", "kl_q_p", "KL(q ‖ p)"), ("upper", "kl_p_q", "KL(p ‖ q)")):
        end, kl, se = bounds[key][0], number(diagnosis.get(gap)), number(diagnosis.get(f"{gap}_se"))
        if not all(map(math.isfinite, (end, middle, kl))):
            continue
        ax.plot([x, x], [end, middle], ":", color=GREY, linewidth=1.5)
        wide = abs(end - middle) > 0.15 * (high - low)  # else the label stands outside of the bracket
        below = key == "elbo"
        ax.annotate(
            f"{name}\n{kl:.2f} ± {se:.2f}",
            (x, (end + middle) / 2 if wide else end),
            (7, 0 if wide else -4 if below else 4),
            textcoords="offset points",
            va="center" if wide else "top" if below else "bottom",
            fontsize=SMALL,
        )
    ticks = [tick for tick in ax.get_xticks() if 0 <= tick <= last]  # beyond lies no step
    ax.set_xticks(ticks or [0])
    ax.set_xlim(right=last + 0.38 * max(last, 1.0))
    ax.margins(y=0.2)
    return notes


def _running_mean(values: Float[np.ndarray, "N"], half: int) -> Float[np.ndarray, "N"]:
    """Each with as many neighbours on either side, `half` at most: no lag, and no bias of a straight line at the ends."""
    n = np.arange(len(values))
    reach = np.minimum(half, np.minimum(n, len(values) - 1 - n))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[n + reach + 1] - total[n - reach]) / (2 * reach + 1)
