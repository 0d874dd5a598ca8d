"""A program in plate notation."""

import networkx
from matplotlib.axes import Axes

from ppl_lm.plot import canvas
from ppl_lm.plot.canvas import GREY, INK, SIZE, SOFT
from ppl_lm.plot.layers import around, arrow, by_layers


def model(graph: networkx.DiGraph, ax: Axes | None = None) -> Axes:
    """Plate notation: what is observed is filled, what is latent is not, what is computed has a dashed border; a plate is a
    box around its sites. Dashed arrows are dependences that may be (`known` is False)."""
    from matplotlib.patches import FancyBboxPatch

    place = by_layers(graph, lambda n: graph.nodes[n]["plates"])
    wide = 16 + max(
        (max(canvas.width(canvas.line(n, 24)), canvas.width(graph.nodes[n]["distribution"], 0.78)) for n in graph),
        default=40,
    )
    high = 32.0
    nested = max((len(data["plates"]) for _, data in graph.nodes(data=True)), default=0)
    margin = 12 + 13 * nested
    place = {n: (x * (wide + 2 * margin), -y * (high + 2 * margin)) for n, (x, y) in place.items()}
    ax, scale = canvas.axes(ax, *around(place, wide / 2 + margin + 4, high / 2 + margin + 4))
    for plate, size in graph.graph["plates"].items():
        inside = [place[n] for n in graph if plate in graph.nodes[n]["plates"]]
        if not inside:
            continue
        depth = max(graph.nodes[n]["plates"].index(plate) for n in graph if plate in graph.nodes[n]["plates"])
        edge = margin - 10 * depth
        left, right, low, top = around(dict(enumerate(inside)), wide / 2 + edge, high / 2 + edge)
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
        arrow(ax, (x, y), (to, below), bend, scale, patches[parent], patches[child], style="-" if known else "--")
    return ax
