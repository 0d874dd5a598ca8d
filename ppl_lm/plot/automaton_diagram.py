"""An automaton's states and moves."""

from typing import Any

import networkx
from matplotlib.axes import Axes

from ppl_lm.plot import canvas
from ppl_lm.plot.canvas import INK, SIZE
from ppl_lm.plot.layers import around, arrow, by_layers


def automaton(graph: networkx.DiGraph, ax: Axes | None = None) -> Axes:
    """States from the start (left, with an arrow) onwards; a text may end in a state with a double border."""
    from matplotlib.patches import Circle

    radius, column = 11.0, 78.0
    labels = {edge: canvas.line(text, 26) for *edge_, text in graph.edges(data="label") for edge in [tuple(edge_)]}
    place = by_layers(graph, lambda _: (), across=True)
    widest: dict[int, float] = {}  # column -> its longest label
    for (one, two), text in labels.items():
        here = int(min(place[one][0], place[two][0]))
        widest[here] = max(widest.get(here, 0.0), canvas.width(text) / max(1.0, abs(place[one][0] - place[two][0])))
    at = [0.0]
    for n in range(int(max(x for x, _ in place.values()))):
        at.append(at[-1] + max(column, widest.get(n, 0.0) + 2 * radius + 26))
    place = {n: (at[int(x)], -y * 62) for n, (x, y) in place.items()}
    left, right, low, top = around(place, radius + 8, radius + 12)
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
            arrow(ax, (x - radius - 18, y), (x - radius, y), 0.0, scale)
    for (one, two), text in labels.items():
        (x, y), (to, below) = place[one], place[two]
        if one == two:
            arrow(ax, (x - 6, y + radius * 0.8), (x + 6, y + radius * 0.8), -1.9, scale)
            where = (x, y + radius + 17)
        else:
            far = abs(to - x) > 1.2 * max(b - a for a, b in zip(at, at[1:], strict=False)) if y == below else False
            bend = 0.3 if (two, one) in labels or to <= x or far else 0.0
            arrow(ax, (x, y), (to, below), bend, scale, discs[one], discs[two])
            where = ((x + to) / 2 + bend * (below - y) / 2, (y + below) / 2 - bend * (to - x) / 2)
        plain: Any = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none"}
        canvas.text(ax, *where, text, SIZE * scale, ha="center", va="center", color="#00515f", zorder=6, bbox=plain)
    return ax
