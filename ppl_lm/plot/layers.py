"""What diagrams of graphs share: where nodes stand, in layers, and the arrows between them."""

from collections.abc import Callable, Hashable, Sequence

import networkx
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Patch

from ppl_lm.plot.canvas import INK


def around(place: dict[Hashable, tuple[float, float]], wide: float, high: float) -> tuple[float, float, float, float]:
    """Left, right, low and top of the box that reaches so far beyond all places."""
    xs, ys = [x for x, _ in place.values()] or [0.0], [y for _, y in place.values()] or [0.0]
    return min(xs) - wide, max(xs) + wide, min(ys) - high, max(ys) + high


def by_layers(
    graph: networkx.DiGraph, group: Callable[[Hashable], Sequence[str]], across: bool = False
) -> dict[Hashable, tuple[float, float]]:
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
    rows: dict[Hashable, int] = {}
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


def arrow(
    ax: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    bend: float,
    scale: float,
    *ends: Patch,
    style: str = "-",
) -> None:
    """:param ends: two patches, from whose border to whose border it goes; none: from `start` to `end`."""
    arrow = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10 * scale, shrinkA=0, shrinkB=0, color=INK)
    if ends:
        arrow.patchA, arrow.patchB = ends  # pyright: ignore[reportAttributeAccessIssue]
    arrow.set(lw=1.0 * scale, ls=style, connectionstyle=f"arc3,rad={bend}", zorder=2)
    ax.add_patch(arrow)
