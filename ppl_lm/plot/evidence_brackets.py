"""The bracket of log Z by method."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from ppl_lm.criticism.evidence import Evidence, iwae_particles_of
from ppl_lm.plot.style import BOUNDS, GREY, axes, legend_below, number, with_notes
from ppl_lm.plot.untrusted import plain


def evidence(evidence: Mapping[str, Evidence | Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """The bracket of log Z by method, one row each: ELBO, IWAE, log Z, reverse IWAE and EUBO, each ± one standard error, nats,
    mean over prompts. Hollow upper bounds are approximate.

    :param evidence: method -> `Evidence`, or what `diagnosis.json` holds."""
    ax, notes = axes(ax), [] if evidence else ["no method is given"]
    hollow, particles, labelled = False, set(), set()
    for row, (method, bracket) in enumerate(evidence.items()):
        bounds, unsure, count = _bounds(bracket)
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
            approximate = key in unsure
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
    return with_notes(ax, notes + ["hollow: approximate, from the guide's own draws"] * hollow)


def _bounds(bracket: Evidence | Mapping[str, Any]) -> tuple[dict[str, tuple[float, float]], set[str], int | None]:
    """Each bound with its error, which of them are approximate, and the particles of IWAE where they are known."""
    if isinstance(bracket, Evidence):
        pairs = {key: (getattr(bracket, key), getattr(bracket, f"{key}_se")) for key in BOUNDS}
        mean = {key: (float(v.mean()), float(se.square().sum().sqrt()) / len(se)) for key, (v, se) in pairs.items()}
        return mean, set() if bracket.upper_exact else {"iwae_upper", "upper"}, bracket.iwae_particles
    num_samples = bracket.get("num_samples")
    count = iwae_particles_of(int(num_samples)) if num_samples else None
    pairs = {key: (number(bracket.get(key)), number(bracket.get(f"{key}_se"))) for key in BOUNDS}
    return pairs, set() if bracket.get("iwae_upper_exact", True) else {"iwae_upper"}, count
