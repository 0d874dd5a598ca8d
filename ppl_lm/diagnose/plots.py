"""Plots of fits, bounds and calibration. Each draws on the Axes that it is given, or on a figure of its own, without
pyplot's global state; what cannot be drawn is said in the title. Colours are Okabe and Ito's."""

import math
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_lm.diagnose.evidence import FEWEST, Evidence
from ppl_lm.diagnose.sbc import Calibration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, RED, SKY, PURPLE, GREY = [
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#7F7F7F",
]
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY)
SMALL = 8.5  # points
BOUNDS = {  # of the evidence, from below: what it is called, its marker and colour
    "elbo": ("ELBO", ">", BLUE),
    "iwae": ("IWAE", "4", SKY),
    "log_z": ("log Z", "D", "black"),
    "iwae_upper": ("IWAE upper", "3", ORANGE),
    "upper": ("EUBO", "<", RED),
}


def plot_training(
    metrics: Sequence[Mapping[str, Any]], diagnosis: Mapping[str, Any] | None = None, ax: "Axes | None" = None
) -> "Axes":
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
    return said(ax, notes)


def _bracket(ax: "Axes", diagnosis: Mapping[str, Any], last: float) -> list[str]:
    """Returns what could not be drawn."""
    x = last + 0.06 * max(last, 1.0)
    made = {key: (number(diagnosis.get(key)), number(diagnosis.get(f"{key}_se"))) for key in ("elbo", "log_z", "upper")}
    exact = bool(diagnosis.get("upper_exact", True))
    notes = []
    for key, (value, se) in made.items():
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
        label += ", kept guide" if key == "elbo" else "" if exact else ", approximate"
        face = colour if key == "elbo" or exact else "none"
        ax.errorbar(x, value, error, color=colour, marker=marker, mfc=face, capsize=3, linestyle="none", label=label)
    low, high = ax.get_ylim()
    middle = made["log_z"][0]
    for key, gap, name in (("elbo", "kl_q_p", "KL(q ‖ p)"), ("upper", "kl_p_q", "KL(p ‖ q)")):
        end, kl, se = made[key][0], number(diagnosis.get(gap)), number(diagnosis.get(f"{gap}_se"))
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


def plot_evidence(evidence: Mapping[str, Evidence | Mapping[str, Any]], ax: "Axes | None" = None) -> "Axes":
    """The bracket of log Z by method, one row each: ELBO, IWAE, log Z, reverse IWAE and EUBO, each ± one standard error, nats,
    mean over prompts. Hollow upper bounds are approximate.

    :param evidence: method -> `Evidence`, or what `diagnosis.json` holds."""
    ax, notes = axes(ax), [] if evidence else ["no method is given"]
    hollow, particles, labelled = False, set(), set()
    for row, (method, made) in enumerate(evidence.items()):
        bounds, exact, count = _bounds(made)
        particles.add(count)
        lacking = [name for key, (name, _, _) in BOUNDS.items() if not math.isfinite(bounds[key][0])]
        if lacking:
            notes.append(f"{plain(method)}: {', '.join(lacking)} not finite")
        places = [(bounds[key][0], row + 0.12 * (n - 2)) for n, key in enumerate(BOUNDS)]  # close bounds stay apart
        ax.plot(*zip(*places, strict=True), color=GREY, linewidth=1, zorder=1)
        for n, (key, (_, marker, colour)) in enumerate(BOUNDS.items()):
            value, se = bounds[key]
            if not math.isfinite(value):
                continue
            approximate = key in ("iwae_upper", "upper") and not exact
            hollow |= approximate
            ax.errorbar(
                *places[n],
                xerr=se if math.isfinite(se) else None,
                marker=marker,
                color=colour,
                mfc="none" if approximate else colour,
                capsize=3,
                linestyle="none",
                label=None if key in labelled else key,
            )
            labelled.add(key)
    handles, keys = ax.get_legend_handles_labels()
    (width,) = particles if len(particles) == 1 else (None,)
    names = {
        key: name if width is None else name.replace("IWAE", f"IWAE-{width}") for key, (name, _, _) in BOUNDS.items()
    }
    if handles:
        order = sorted(range(len(keys)), key=lambda i: list(BOUNDS).index(keys[i]))
        legend_below(ax, [handles[i] for i in order], [names[keys[i]] for i in order], 5)
    ax.set_yticks(range(len(evidence)), [plain(method) for method in evidence])
    ax.set_ylim(max(len(evidence), 1) - 0.5, -0.5)
    ax.set_xlabel("log evidence bounds [nats per prompt], ± SE")
    return said(ax, notes + ["hollow: approximate, from the guide's own draws"] * hollow)


def _bounds(made: Evidence | Mapping[str, Any]) -> tuple[dict[str, tuple[float, float]], bool, int | None]:
    """Each bound with its error, whether the upper ones are exact, and the particles of IWAE where they are known."""
    if isinstance(made, Evidence):
        pairs = {key: (getattr(made, key), getattr(made, f"{key}_se")) for key in BOUNDS}
        mean = {key: (float(v.mean()), float(se.square().sum().sqrt()) / len(se)) for key, (v, se) in pairs.items()}
        return mean, made.upper_exact, made.iwae_particles
    known = made.get("num_samples")
    count = min(64, max(1, int(known) // FEWEST)) if known else None  # as log_evidence has it
    pairs = {key: (number(made.get(key)), number(made.get(f"{key}_se"))) for key in BOUNDS}
    return pairs, bool(made.get("upper_exact", True)), count


def plot_sbc(calibration: Calibration, ax: "Axes | None" = None, name: str | None = None) -> "Axes":
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
    return said(
        ax, [f"{count} replications would show a shift of {calibration.detectable:.2f} deviations 4 times of 5"]
    )


def axes(ax: "Axes | None", width: float = 6.0, height: float = 4.0) -> "Axes":
    """The Axes as given, or those of a new figure of so many inches."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots()


def said(ax: "Axes", notes: Sequence[str]) -> "Axes":
    """Notes on what is seen, and on what is not, above the plot."""
    if notes:
        ax.set_title("\n".join(textwrap.fill(note, 78) for note in notes), fontsize=9, loc="left")
    return ax


def legend_below(ax: "Axes", handles: Sequence[Any], labels: Sequence[str], ncols: int = 2) -> None:
    """A legend under the axis' label, where it hides nothing."""
    from matplotlib.transforms import ScaledTranslation

    figure: Any = ax.figure
    lower = ax.transAxes + ScaledTranslation(0, -0.5, figure.dpi_scale_trans)  # inches
    place: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "bbox_transform": lower}
    ax.legend(handles, labels, ncols=ncols, fontsize=SMALL, columnspacing=1.2, handletextpad=0.4, **place)


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: no mathtext, no control characters, no label that a legend hides."""
    shown = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _running_mean(values: "np.ndarray[Any, Any]", half: int) -> "np.ndarray[Any, Any]":
    """Each with as many neighbours on either side, `half` at most: no lag, and no bias of a straight line at the ends."""
    n = np.arange(len(values))
    reach = np.minimum(half, np.minimum(n, len(values) - 1 - n))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[n + reach + 1] - total[n - reach]) / (2 * reach + 1)


def number(value: Any) -> float:
    """JSON's null is NaN."""
    return math.nan if value is None else float(value)
