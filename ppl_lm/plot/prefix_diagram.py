"""The drawing of `prefix_tree`: texts from left to right, with the mass that the prior and the posterior give them."""

from collections.abc import Callable
from math import log2
from typing import Any

import networkx
from matplotlib.axes import Axes

from ppl_lm.plot import canvas
from ppl_lm.plot.canvas import GREY, INK, SIZE, SOFT

SHRANK_TO_GREW = ("#7a2f04", "#d9883a", "#d3cdc2", "#45a79b", "#00463d")  # told apart by colour-blind readers too
ROW = 16.0  # points between branches
GAP = 30.0  # points between a text and what follows it
BAR = 46.0  # points, of the largest mass but the root's
FOLDS = 3  # mass that grew or shrank 2**FOLDS times has the strongest colour
ERRORS = 2.0  # standard errors that a mass may be away, as Wilson's interval has it


def prefix_tree(tree: networkx.DiGraph, ax: Axes | None = None) -> Axes:
    """Texts read from left to right. Before each piece of text its mass as two bars: grey the prior's, below it the posterior's
    (or the guide's where there is no posterior), whose colour says how many times at the least the mass grew or shrank, two
    standard errors of both masses granted: what may be noise has no colour. Errors are no better than the draws, see
    `prefix_tree`.

    The branch with the most mass goes straight on. A square is the end of a text, an ellipsis what is not shown.

    :param ax: a figure of its own size by default; in a given one all is scaled to fit."""
    laws = tree.graph["laws"]
    after = next((law for law in ("posterior", "guide") if law in laws), None)
    first, shade = after or "prior", _shades(after)
    place: dict[Any, tuple[float, float]] = {}
    ends: dict[Any, float] = {}
    shown: dict[Any, str] = {}
    slot: dict[Any, float] = {}  # points for the bars, the same for all that follow one prefix
    row = 0

    largest = max(
        (data[law] for node, data in tree.nodes(data=True) if node != () for law in ("prior", first)), default=1.0
    )

    def put(node: Any, x: float) -> None:
        nonlocal row
        data = tree.nodes[node]
        children = sorted(tree.successors(node), key=lambda c: (-tree.nodes[c][first], -tree.nodes[c]["prior"], c))
        text = tree.graph["prompt"] if node == () else data["text"]
        shown[node] = canvas.line(text, 40) or "(empty prompt)" if node == () else canvas.line(text, 34).strip()
        shown[node] += "" if data["over"] == "end" or children else " …"
        place[node] = (x, -row * ROW)
        ends[node] = x + canvas.width(shown[node], weight="bold" if node == () else "normal")
        if node != ():
            ends[node] += slot[node] + 5 + (9 if data["over"] == "end" else 0)
            ends[node] += 6 + canvas.width(_figures(data, after), 0.76)
        longest = max((tree.nodes[c][law] for c in children for law in ("prior", first)), default=0.0)
        for n, child in enumerate(children):
            row += n > 0
            slot[child] = BAR * longest / largest
            put(child, ends[node] + GAP)

    put((), 0.0)
    heading = (
        f"Where the {after} puts its mass, text by text" if after else "Where the prior has its mass, text by text"
    )
    note = f"% of texts that begin like this: {' → '.join(['prior', *([after] if after else [])])}.  … goes on, ■ ends."
    root = tree.nodes[()]
    hidden = " → ".join(_percent(root[f"rest_{law}"]) for law in ("prior", after) if law)
    note += f"  Other beginnings, not drawn: {hidden}."
    bottom = -row * ROW
    wide = max(*ends.values(), canvas.width(heading, 1.25, "bold"), canvas.width(note, 0.85), 300.0)
    colours = {
        n: shade(_folds(data, after, tree.graph["worth"]) if after else 0.0) for n, data in tree.nodes(data=True)
    }
    ax, scale = canvas.axes(ax, -8, wide + 8, bottom - (62 if after else 14), 54)
    canvas.text(ax, 0, 42, heading, SIZE * 1.25 * scale, va="center", weight="bold")
    canvas.text(ax, 0, 26, note, SIZE * 0.85 * scale, va="center", color=SOFT)
    for parent, child in tree.edges:
        (_, y), (x, below) = place[parent], place[child]
        start, end = ends[parent] + 4, x - 2
        _curve(ax, (start, y), (end, below), colours[child], 1.3 * scale)
    for node, (x, y) in place.items():
        data = tree.nodes[node]
        if node == ():
            canvas.text(ax, x, y, shown[node], SIZE * scale, va="center", weight="bold")
            continue
        high = 4.6
        _bar(ax, x, y if after else y - high / 2, BAR * data["prior"] / largest, high, GREY)
        if after:
            _bar(ax, x, y - high, BAR * data[after] / largest, high, colours[node])
        left = x + slot[node] + 5
        canvas.text(ax, left, y, shown[node], SIZE * scale, va="center")
        left += canvas.width(shown[node])
        if data["over"] == "end":
            _bar(ax, left + 3.5, y - 2, 4, 4, INK)
            left += 9
        canvas.text(ax, left + 6, y, _figures(data, after), SIZE * 0.76 * scale, color=SOFT, va="center")
    if after:
        _key(ax, bottom - 30, after, scale)
    return ax


def _key(ax: Any, y: float, after: str, scale: float) -> None:
    """What bars and colours mean."""
    _bar(ax, 0, y, 16, 4.6, GREY)
    _bar(ax, 0, y - 4.6, 16, 4.6, _shades(after)(1.0))
    canvas.text(ax, 21, y + 3.5, "prior", SIZE * 0.8 * scale, va="center")
    canvas.text(ax, 21, y - 5.5, after, SIZE * 0.8 * scale, va="center")
    x = 86.0
    for fold in range(-FOLDS, FOLDS + 1):
        _bar(ax, x, y - 4.6, 26, 9.2, _shades(after)(fold))
        word = f"÷{2**-fold}" if fold < 0 else f"×{2**fold}" if fold else "unsure"
        canvas.text(ax, x + 13, y - 8, word, SIZE * 0.76 * scale, ha="center", va="top", color=SOFT)
        x += 26
    canvas.text(ax, x + 8, y, f"{after} ÷ prior, at the least", SIZE * 0.8 * scale, va="center")


def _folds(data: dict[str, Any], law: str, worth: dict[str, float]) -> float:
    """log2 of the least ratio of the masses that their errors allow, within ±FOLDS; 0 where they may be the same."""
    (low, high), (low_prior, high_prior) = (_interval(data[n], data[f"{n}_se"], worth[n]) for n in (law, "prior"))
    if low > high_prior:
        return min(FOLDS, log2(low / high_prior))
    if low_prior > high:
        return max(-FOLDS, log2(high / low_prior))
    return 0.0


def _interval(share: float, error: float, worth: float) -> tuple[float, float]:
    """Wilson's of as many draws as have this error, or are worth that much: it holds for a share of 0, too."""
    count = min(worth, share * (1 - share) / error**2) if error else worth
    z = ERRORS**2 / count
    middle, half = (share + z / 2) / (1 + z), (z * share * (1 - share) + z * z / 4) ** 0.5 / (1 + z)
    return max(0.0, middle - half), middle + half


def _shades(after: str | None) -> Callable[[float], Any]:
    """Colour of a mass under `after` that is so many times doubled."""
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("shrank_to_grew", SHRANK_TO_GREW)
    return lambda folds: GREY if after is None else scale((folds + FOLDS) / (2 * FOLDS))


def _figures(data: dict[str, Any], after: str | None) -> str:
    before = _percent(data["prior"])
    return before if after is None else f"{before} → {_percent(data[after])}"


def _percent(share: float) -> str:
    if 0 < share < 0.0005:
        return "<0.1"
    return f"{100 * share:.0f}" if share >= 0.0995 or not share else f"{100 * share:.1f}"


def _bar(ax: Any, x: float, y: float, wide: float, high: float, colour: Any) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((x, y), wide, high, fc=colour, ec="none", zorder=3))


def _curve(ax: Any, start: tuple[float, float], end: tuple[float, float], colour: Any, width: float) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    middle = (start[0] + end[0]) / 2
    path = Path([start, (middle, start[1]), (middle, end[1]), end], [Path.MOVETO, *[Path.CURVE4] * 3])
    ax.add_patch(PathPatch(path, fc="none", ec=colour, lw=width, capstyle="round", zorder=1))
