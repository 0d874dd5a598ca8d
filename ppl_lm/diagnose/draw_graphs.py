"""Drawings of `graphs`: matplotlib Axes. Texts are untrusted: shown without markup and without control characters."""

from typing import Any

import networkx

from ppl_lm.diagnose.show import clean

INK, GREY, SOFT = "#222222", "#8f8f8f", "#666666"
SHRANK_TO_GREW = ("#7a2f04", "#d9883a", "#d3cdc2", "#45a79b", "#00463d")  # told apart by colour-blind readers too
SIZE = 9.5  # points, of text
ROW = 16.0  # points between branches
GAP = 30.0  # points between a text and what follows it
BAR = 46.0  # points, of the largest mass but the root's
FOLDS = 3  # mass that grew or shrank 2**FOLDS times has the strongest colour


def draw_prefix_tree(tree: networkx.DiGraph, ax: Any = None) -> Any:
    """Texts read from left to right. Before each piece of text its mass as two bars: grey the prior's, below it the posterior's
    (or the guide's where there is no posterior), whose colour says how many times the mass grew or shrank.

    The branch with the most mass goes straight on. A square is the end of a text, an ellipsis what is not shown.

    :param ax: a figure of its own size by default; in a given one all is scaled to fit."""
    laws = tree.graph["laws"]
    after = next((law for law in ("posterior", "guide") if law in laws), None)
    first, colour = after or "prior", _shades(after)
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
        shown[node] = (
            line(tree.graph["prompt"], 40) or "(empty prompt)" if node == () else line(data["text"], 34).strip()
        )
        shown[node] += "" if data["over"] == "end" or children else " …"
        place[node] = (x, -row * ROW)
        ends[node] = x + _width(shown[node], weight="bold" if node == () else "normal")
        if node != ():
            ends[node] += slot[node] + 5 + (9 if data["over"] == "end" else 0) + 6 + _width(_figures(data, after), 0.76)
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
    wide = max(*ends.values(), _width(heading, 1.25, "bold"), _width(note, 0.85), 300.0)
    ax, scale = _axes(ax, -8, wide + 8, bottom - (62 if after else 14), 54)
    _text(ax, 0, 42, heading, SIZE * 1.25 * scale, va="center", weight="bold")
    _text(ax, 0, 26, note, SIZE * 0.85 * scale, va="center", color=SOFT)
    for parent, child in tree.edges:
        (_, y), (x, below) = place[parent], place[child]
        start, end = ends[parent] + 4, x - 2
        _curve(ax, (start, y), (end, below), colour(tree.nodes[child]), 1.3 * scale)
    for node, (x, y) in place.items():
        data = tree.nodes[node]
        if node == ():
            _text(ax, x, y, shown[node], SIZE * scale, va="center", weight="bold")
            continue
        high = 4.6
        _bar(ax, x, y if after else y - high / 2, BAR * data["prior"] / largest, high, GREY)
        if after:
            _bar(ax, x, y - high, BAR * data[after] / largest, high, colour(data))
        left = x + slot[node] + 5
        _text(ax, left, y, shown[node], SIZE * scale, va="center")
        left += _width(shown[node])
        if data["over"] == "end":
            _bar(ax, left + 3.5, y - 2, 4, 4, INK)
            left += 9
        _text(ax, left + 6, y, _figures(data, after), SIZE * 0.76 * scale, color=SOFT, va="center")
    if after:
        _key(ax, bottom - 30, after, scale)
    return ax


def _key(ax: Any, y: float, after: str, scale: float) -> None:
    """What bars and colours mean."""
    _bar(ax, 0, y, 16, 4.6, GREY)
    _bar(ax, 0, y - 4.6, 16, 4.6, _shades(after)({"prior": 1.0, after: 2.0}))
    _text(ax, 21, y + 3.5, "prior", SIZE * 0.8 * scale, va="center")
    _text(ax, 21, y - 5.5, after, SIZE * 0.8 * scale, va="center")
    x = 86.0
    for fold in range(-FOLDS, FOLDS + 1):
        _bar(ax, x, y - 4.6, 26, 9.2, _shades(after)({"prior": 1.0, after: 2.0**fold}))
        word = f"÷{2**-fold}" if fold < 0 else f"×{2**fold}" if fold else "same"
        _text(ax, x + 13, y - 8, word, SIZE * 0.76 * scale, ha="center", va="top", color=SOFT)
        x += 26
    _text(ax, x + 8, y, f"{after} ÷ prior", SIZE * 0.8 * scale, va="center")


def draw_model(graph: networkx.DiGraph, ax: Any = None) -> Any:
    """Plate notation: what is observed is filled, what is latent is not, what is computed has a dashed border; a plate is a
    box around its sites. Dashed arrows are dependences that may be (`known` is False)."""
    from matplotlib.patches import FancyBboxPatch

    place = _by_layers(graph, lambda n: graph.nodes[n]["plates"])
    wide = 16 + max((max(_width(line(n, 24)), _width(graph.nodes[n]["distribution"], 0.78)) for n in graph), default=40)
    high = 32.0
    nested = max((len(data["plates"]) for _, data in graph.nodes(data=True)), default=0)
    margin = 12 + 13 * nested
    place = {n: (x * (wide + 2 * margin), -y * (high + 2 * margin)) for n, (x, y) in place.items()}
    ax, scale = _axes(ax, *_around(place, wide / 2 + margin + 4, high / 2 + margin + 4))
    for plate, size in graph.graph["plates"].items():
        inside = [place[n] for n in graph if plate in graph.nodes[n]["plates"]]
        if not inside:
            continue
        depth = max(graph.nodes[n]["plates"].index(plate) for n in graph if plate in graph.nodes[n]["plates"])
        edge = margin - 10 * depth
        left, right, low, top = _around(dict(enumerate(inside)), wide / 2 + edge, high / 2 + edge)
        box = FancyBboxPatch((left, low), right - left, top - low, boxstyle="round,pad=0,rounding_size=7")
        box.set(fc="none", ec=GREY, lw=1.1 * scale, zorder=1)
        ax.add_patch(box)
        _text(
            ax,
            right - 5,
            low + 4,
            f"{line(plate, 24)}: {size}",
            SIZE * 0.8 * scale,
            ha="right",
            va="bottom",
            color=SOFT,
        )
    patches = {}
    for node, (x, y) in place.items():
        data = graph.nodes[node]
        box = FancyBboxPatch((x - wide / 2, y - high / 2), wide, high, boxstyle=f"round,pad=0,rounding_size={high / 2}")
        dashed = "--" if data["kind"] == "deterministic" else "-"
        box.set(fc="#cfd8dc" if data["kind"] == "observed" else "white", ec=INK, lw=1.2 * scale, ls=dashed, zorder=3)
        ax.add_patch(box)
        patches[node] = box
        _text(ax, x, y + 0.5, line(node, 24), SIZE * scale, ha="center", va="bottom", weight="bold", zorder=4)
        law = "computed" if data["kind"] == "deterministic" else data["distribution"]
        _text(ax, x, y - 1.5, law, SIZE * 0.78 * scale, ha="center", va="top", color="#555555", zorder=4)
    for parent, child, known in graph.edges(data="known"):
        (x, y), (to, below) = place[parent], place[child]
        bend = 0.35 if x == to and y - below > 1.5 * (high + 2 * margin) else 0.0
        _arrow(ax, (x, y), (to, below), bend, scale, patches[parent], patches[child], "-" if known else "--")
    return ax


def draw_automaton(graph: networkx.DiGraph, ax: Any = None) -> Any:
    """States from the start (left, with an arrow) onwards; a text may end in a state with a double border."""
    from matplotlib.patches import Circle

    radius, column = 11.0, 78.0
    labels = {edge: line(text, 26) for *edge_, text in graph.edges(data="label") for edge in [tuple(edge_)]}
    place = _by_layers(graph, lambda _: (), across=True)
    widest: dict[int, float] = {}  # column -> its longest label
    for (one, two), text in labels.items():
        here = int(min(place[one][0], place[two][0]))
        widest[here] = max(widest.get(here, 0.0), _width(text) / max(1.0, abs(place[one][0] - place[two][0])))
    at = [0.0]
    for n in range(int(max(x for x, _ in place.values()))):
        at.append(at[-1] + max(column, widest.get(n, 0.0) + 2 * radius + 26))
    place = {n: (at[int(x)], -y * 62) for n, (x, y) in place.items()}
    left, right, low, top = _around(place, radius + 8, radius + 12)
    loop = max((_width(text) / 2 for (one, two), text in labels.items() if one == two), default=0.0)
    bends = any(place[two][0] <= place[one][0] or place[two][0] > place[one][0] + 400 for one, two in labels)
    ax, scale = _axes(ax, min(left - 18, -loop), max(right, right - radius + loop), low - 30 * bends, top + 38)
    discs = {}
    for node, (x, y) in place.items():
        data = graph.nodes[node]
        discs[node] = ax.add_patch(Circle((x, y), radius, fc="white", ec=INK, lw=1.2 * scale, zorder=3))
        if data["accepting"]:
            ax.add_patch(Circle((x, y), radius - 2.6, fc="none", ec=INK, lw=1.0 * scale, zorder=4))
        _text(ax, x, y, line(node, 6), SIZE * 0.85 * scale, ha="center", va="center", zorder=5)
        if data["start"]:
            _arrow(ax, (x - radius - 18, y), (x - radius, y), 0.0, scale)
    for (one, two), text in labels.items():
        (x, y), (to, below) = place[one], place[two]
        if one == two:
            _arrow(ax, (x - 6, y + radius * 0.8), (x + 6, y + radius * 0.8), -1.9, scale)
            where = (x, y + radius + 17)
        else:
            far = abs(to - x) > 1.2 * max(b - a for a, b in zip(at, at[1:], strict=False)) if y == below else False
            bend = 0.3 if (two, one) in labels or to <= x or far else 0.0
            _arrow(ax, (x, y), (to, below), bend, scale, discs[one], discs[two])
            where = ((x + to) / 2 + bend * (below - y) / 2, (y + below) / 2 - bend * (to - x) / 2)
        plain: Any = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none"}
        _text(ax, *where, text, SIZE * scale, ha="center", va="center", color="#00515f", zorder=6, bbox=plain)
    return ax


def line(text: Any, width: int) -> str:
    """One printable line; a space at its start stays, since it parts two words of a text."""
    return clean(str(text), width).plain


def _folds(data: dict[str, Any], law: str) -> float:
    """log2 of the ratio of the masses, within ±FOLDS, also where one of them is zero."""
    from math import log2

    if not data["prior"] or not data[law]:
        return 0.0 if data["prior"] == data[law] else FOLDS if data[law] else -FOLDS
    return max(-FOLDS, min(FOLDS, log2(data[law] / data["prior"])))


def _shades(after: str | None) -> Any:
    """Colour of a node: how its mass under `after` compares with the prior's."""
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("shrank_to_grew", SHRANK_TO_GREW)
    return lambda data: GREY if after is None else scale((_folds(data, after) + FOLDS) / (2 * FOLDS))


def _figures(data: dict[str, Any], after: str | None) -> str:
    before = _percent(data["prior"])
    return before if after is None else f"{before} → {_percent(data[after])}"


def _percent(share: float) -> str:
    if 0 < share < 0.0005:
        return "<0.1"
    return f"{100 * share:.0f}" if share >= 0.0995 or not share else f"{100 * share:.1f}"


def _width(text: str, size: float = 1.0, weight: str = "normal") -> float:
    """Points, at `size` times the usual one."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=SIZE * size, weight=weight)
    return text_to_path.get_text_width_height_descent(text, font, False)[0] if text else 0.0


def _axes(ax: Any, left: float, right: float, low: float, top: float) -> tuple[Any, float]:
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


def _around(place: dict[Any, tuple[float, float]], wide: float, high: float) -> tuple[float, float, float, float]:
    xs, ys = [x for x, _ in place.values()] or [0.0], [y for _, y in place.values()] or [0.0]
    return min(xs) - wide, max(xs) + wide, min(ys) - high, max(ys) + high


def _by_layers(graph: networkx.DiGraph, group: Any, across: bool = False) -> dict[Any, tuple[float, float]]:
    """(column, row): rows by the longest path from a root, nodes of one group in columns of their own; `across`: columns by
    the fewest steps from the first node."""
    nodes = list(graph)
    if across:
        steps = networkx.single_source_shortest_path_length(graph, nodes[0]) if nodes else {}
        taken: dict[int, int] = {}
        place = {}
        for node in sorted(steps, key=lambda n: steps[n]):
            place[node] = (float(steps[node]), float(taken.setdefault(steps[node], 0)))
            taken[steps[node]] += 1
        return place
    rows: dict[Any, int] = {}
    for node in networkx.lexicographical_topological_sort(graph, key=nodes.index):
        rows[node] = max((rows[p] + 1 for p in graph.predecessors(node)), default=0)
    plates = list(graph.graph["plates"])
    groups = sorted({group(n) for n in nodes}, key=lambda g: [plates.index(p) for p in g])
    offset, place = 0, {}
    for g in groups:
        used: dict[int, int] = {}
        for node in (n for n in nodes if group(n) == g):
            place[node] = (float(offset + used.get(rows[node], 0)), float(rows[node]))
            used[rows[node]] = used.get(rows[node], 0) + 1
        offset += max(used.values())
    return place


def _text(ax: Any, x: float, y: float, text: str, size: float, **style: Any) -> None:
    ax.text(x, y, text, fontsize=size, parse_math=False, usetex=False, **{"color": INK, "zorder": 4, **style})


def _bar(ax: Any, x: float, y: float, wide: float, high: float, colour: Any) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((x, y), wide, high, fc=colour, ec="none", zorder=3))


def _curve(ax: Any, start: tuple[float, float], end: tuple[float, float], colour: Any, width: float) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    middle = (start[0] + end[0]) / 2
    path = Path([start, (middle, start[1]), (middle, end[1]), end], [Path.MOVETO, *[Path.CURVE4] * 3])
    ax.add_patch(PathPatch(path, fc="none", ec=colour, lw=width, capstyle="round", zorder=1))


def _arrow(
    ax: Any, start: tuple[float, float], end: tuple[float, float], bend: float, scale: float, *patches: Any
) -> None:
    """:param patches: those from whose border to whose border it goes, then perhaps a line style."""
    from matplotlib.patches import FancyArrowPatch

    *ends, style = patches if patches and isinstance(patches[-1], str) else (*patches, "-")
    arrow = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10 * scale, shrinkA=0, shrinkB=0, color=INK)
    if ends:
        arrow.patchA, arrow.patchB = ends  # pyright: ignore[reportAttributeAccessIssue]
    arrow.set(lw=1.0 * scale, ls=style, connectionstyle=f"arc3,rad={bend}", zorder=2)
    ax.add_patch(arrow)
