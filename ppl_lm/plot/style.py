"""What pictures with axes of numbers share: colours (Okabe and Ito's), Axes, notes above them and legends below."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

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


def axes(ax: Axes | None, width: float = 6.0, height: float = 4.0) -> Axes:
    """The Axes as given, or those of a new figure of so many inches."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots()


def with_notes(ax: Axes, notes: Sequence[str]) -> Axes:
    """Notes on what is seen, and on what is not, above the plot."""
    if notes:
        ax.set_title("\n".join(textwrap.fill(note, 78) for note in notes), fontsize=9, loc="left")
    return ax


def legend_below(ax: Axes, handles: Sequence[Any], labels: Sequence[str], ncols: int = 2) -> None:
    """A legend under the axis' label, where it hides nothing."""
    from matplotlib.transforms import ScaledTranslation

    figure: Any = ax.figure
    lower = ax.transAxes + ScaledTranslation(0, -0.5, figure.dpi_scale_trans)  # inches
    place: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "bbox_transform": lower}
    ax.legend(handles, labels, ncols=ncols, fontsize=SMALL, columnspacing=1.2, handletextpad=0.4, **place)


def number(value: Any) -> float:
    """JSON's null is NaN."""
    return math.nan if value is None else float(value)
