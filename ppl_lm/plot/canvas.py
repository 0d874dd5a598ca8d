"""What diagrams share: Axes without numbers whose data are points, so that texts fit, and text that is never markup."""

from typing import Any

from matplotlib.axes import Axes

from ppl_lm.plot.untrusted import one_line

INK, GREY, SOFT = "#222222", "#8f8f8f", "#666666"
SIZE = 9.5  # points, of text


def axes(ax: Axes | None, left: float, right: float, low: float, top: float) -> tuple[Axes, float]:
    """Axes whose data are points at a scale of 1, and the scale at which texts and lines fit into them."""
    if ax is None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=((right - left) / 72, (top - low) / 72), dpi=144)
        ax = figure.add_axes((0, 0, 1, 1))
        scale = 1.0
    else:
        box = ax.get_window_extent()
        scale = min(1.0, box.width / ax.figure.dpi * 72 / (right - left), box.height / ax.figure.dpi * 72 / (top - low))
    ax.set(xlim=(left, right), ylim=(low, top), aspect="equal")
    ax.axis("off")
    return ax, scale


def text(ax: Axes, x: float, y: float, words: str, size: float, **style: Any) -> None:
    ax.text(x, y, words, fontsize=size, parse_math=False, usetex=False, **{"color": INK, "zorder": 4, **style})


def width(words: str, size: float = 1.0, weight: str = "normal") -> float:
    """Points, at `size` times the usual one."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=SIZE * size, weight=weight)
    return text_to_path.get_text_width_height_descent(words, font, False)[0] if words else 0.0


def line(text: Any, width: int) -> str:
    """One printable line; a space at its start stays, since it parts two words of a text."""
    return one_line(str(text), width)
