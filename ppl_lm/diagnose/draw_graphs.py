"""Drawings of `model_graph` and `automaton_graph`: matplotlib Axes."""

from typing import Any

import networkx

from ppl_lm.diagnose import canvas
from ppl_lm.diagnose.canvas import GREY, INK, SIZE, SOFT


def draw_model(graph: networkx.DiGraph, ax: Any = None) -> Any:
    """Plate notation: what is observed is filled, what is latent is not, what is computed has a dashed border; a plate is a
    box around its sites. Dashed arrows are dependences that may be (`known` is False)."""
    from matplotlib.patches import FancyBboxPatch

    place = _by_layers(graph, lambda n: graph.nodes[n]["plates"])
    wide = 16 + max(
        (max(canvas.width(canvas.line(n, 24)), canvas.width(graph.nodes[n]["distribution"], 0.78)) for n in graph),
        default=40,
    )
    high = 32.0
    nested = max((len(data["plates"]) for _, data in graph.nodes(data=True)), default=0)
    margin = 12 + 13 * nested
    place = {n: (x * (wide + 2 * margin), -y * (high + 2 * margin)) for n, (x, y) in place.items()}
    ax, scale = canvas.axes(ax, *_around(place, wide / 2 + margin + 4, high / 2 + margin + 4))
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
        canvas.text(
            ax,
            right - 5,
            low + 4,
            f"{canvas.line(plate, 24)}: {size}",
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
        canvas.text(
            ax, x, y + 0.5, canvas.line(node, 24), SIZE * scale, ha="center", va="bottom", weight="bold", zorder=4
        )
        law = "computed" if data["kind"] == "deterministic" else data["distribution"]
        canvas.text(ax, x, y - 1.5, law, SIZE * 0.78 * scale, ha="center", va="top", color="#555555", zorder=4)
    for parent, child, known in graph.edges(data="known"):
        (x, y), (to, below) = place[parent], place[child]
        bend = 0.35 if x == to and y - below > 1.5 * (high + 2 * margin) else 0.0
        _arrow(ax, (x, y), (to, below), bend, scale, patches[parent], patches[child], "-" if known else "--")
    return ax


def draw_automaton(graph: networkx.DiGraph, ax: Any = None) -> Any:
    """States from the start (left, with an arrow) onwards; a text may end in a state with a double border."""
    from matplotlib.patches import Circle

    radius, column = 11.0, 78.0
    labels = {edge: canvas.line(text, 26) for *edge_, text in graph.edges(data="label") for edge in [tuple(edge_)]}
    place = _by_layers(graph, lambda _: (), across=True)
    widest: dict[int, float] = {}  # column -> its longest label
    for (one, two), text in labels.items():
        here = int(min(place[one][0], place[two][0]))
        widest[here] = max(widest.get(here, 0.0), canvas.width(text) / max(1.0, abs(place[one][0] - place[two][0])))
    at = [0.0]
    for n in range(int(max(x for x, _ in place.values()))):
        at.append(at[-1] + max(column, widest.get(n, 0.0) + 2 * radius + 26))
    place = {n: (at[int(x)], -y * 62) for n, (x, y) in place.items()}
    left, right, low, top = _around(place, radius + 8, radius + 12)
    loop = max((canvas.width(text) / 2 for (one, two), text in labels.items() if one == two), default=0.0)
    bends = any(place[two][0] <= place[one][0] or place[two][0] > place[one][0] + 400 for one, two in labels)
    ax, scale = canvas.axes(ax, min(left - 18, -loop), max(right, right - radius + loop), low - 30 * bends, top + 38)
    discs = {}
    for node, (x, y) in place.items():
        data = graph.nodes[node]
        discs[node] = ax.add_patch(Circle((x, y), radius, fc="white", ec=INK, lw=1.2 * scale, zorder=3))
        if data["accepting"]:
            ax.add_patch(Circle((x, y), radius - 2.6, fc="none", ec=INK, lw=1.0 * scale, zorder=4))
        canvas.text(ax, x, y, canvas.line(node, 6), SIZE * 0.85 * scale, ha="center", va="center", zorder=5)
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
        canvas.text(ax, *where, text, SIZE * scale, ha="center", va="center", color="#00515f", zorder=6, bbox=plain)
    return ax


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
