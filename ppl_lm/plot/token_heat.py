"""Texts as heat maps: each token in the colour of a number, such as `token_gains`. Text is untrusted: it is never markup, and
what cannot be seen is spelt out."""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes

from ppl_lm.plot.style import axes, with_notes
from ppl_lm.plot.untrusted import visible

POINTS = 9.0  # size of the text
ADVANCE = 0.645  # width of a character in its size: DejaVu Sans Mono's 0.602, rounded up to whole pixels
LINE = 1.9  # height of a line, likewise
UNKNOWN = (0.85, 0.85, 0.85, 1.0)


def heat(
    tokens: Sequence[str], values: Iterable[float | None], ax: Axes | None = None, scale: float | None = None
) -> Axes:
    """Tokens as wrapped text, each on the colour of its value in nats: blue where it is above 0, red below. A value that is not
    finite has the colour's end, NaN and None are grey. On given Axes, what does not fit is counted in the title.

    :param scale: nats at the colours' ends; None: the largest value there is."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    numbers = as_numbers(tokens, values)
    shown = [visible(token) for token in tokens]
    owned = ax is None
    ax = axes(ax)
    figure: Any = ax.figure
    scale = largest(numbers, scale)
    colours = ScalarMappable(Normalize(-scale, scale), colormaps["RdBu"])
    bar = figure.colorbar(colours, ax=ax, location="bottom", fraction=0.08, aspect=40, pad=0.04)
    bar.set_label("log q - log p0 of each token [nats]")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
    if not shown:
        return with_notes(ax, ["no token is given"])
    infinite = sum(not math.isfinite(v) for v in numbers)
    unknown = [f"{infinite} of {len(shown)} values are not finite"] if infinite else []
    unseen: list[str] = []
    for _ in range(5):  # the figure grows, and the title takes room
        with_notes(ax, unseen + unknown)
        width, room = _room(ax)
        cells, lines = _wrapped(shown, max(1, int(width)))
        missing = lines + 0.1 - room
        if owned and (missing > 0 or missing < -0.5):
            inches = figure.get_size_inches()
            figure.set_size_inches(inches[0], max(1.5, inches[1] + missing * LINE * POINTS / 72))
        elif missing > 0:
            unseen = [f"{len({n for n, line, *_ in cells if line + 1 > room})} of {len(shown)} tokens do not fit"]
        else:
            break
    ax.set_xlim(0, width)
    ax.set_ylim(room, 0)
    for n, line, column, text in cells:
        if line + 1 > room:
            continue
        value = numbers[n]
        share = 0.5 + 0.5 * max(-1.0, min(1.0, value / scale))
        face = UNKNOWN if math.isnan(value) else colormaps["RdBu"](share)
        dark = 0.299 * face[0] + 0.587 * face[1] + 0.114 * face[2] < 0.5
        box = Rectangle((column, line + 0.08), _columns(text), 0.84, facecolor=face, edgecolor="white", linewidth=0.8)
        ax.add_patch(box)
        ax.text(
            column,
            line + 0.5,
            text,
            family="monospace",
            fontsize=POINTS,
            va="center_baseline",
            color="white" if dark else "black",
            parse_math=False,
            usetex=False,
            clip_on=True,
        )
    return ax


def _room(ax: Axes) -> tuple[float, float]:
    """Characters that fit beside and below each other, by the layout as it is now."""
    figure: Any = ax.figure
    figure.draw_without_rendering()
    box = ax.get_window_extent()
    width, height = (72 * side / figure.dpi for side in (box.width, box.height))  # points
    return max(1.0, width / (ADVANCE * POINTS)), max(1.0, height / (LINE * POINTS))


def _wrapped(texts: Sequence[str], columns: int) -> tuple[list[tuple[int, int, int, str]], int]:
    """(token, line, column, text) of each box, and the number of lines; a token wider than a line is broken."""
    cells, line, column = [], 0, 0
    for n, text in enumerate(texts):
        if column and column + _columns(text) > columns:
            line, column = line + 1, 0
        while _columns(text) > columns:
            cells.append((n, line, 0, text[:columns]))
            text, line = text[columns:], line + 1
        cells.append((n, line, column, text))
        column += _columns(text)
        if text.endswith("↵"):
            line, column = line + 1, 0
    return cells, line + 1


def _columns(text: str) -> int:
    """Wide characters take two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return max(1, len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text))


def as_numbers(tokens: Sequence[str], values: Iterable[float | None]) -> list[float]:
    numbers = [math.nan if v is None else float(v) for v in values]
    if len(numbers) != len(tokens):
        raise ValueError(
            f"{len(numbers)} values for {len(tokens)} tokens; give one each (cut the values after the end)"
        )
    return numbers


def largest(numbers: Sequence[float], scale: float | None = None) -> float:
    """The colours' scale, nats: as given, or the largest of the numbers.

    :raises ValueError: if it is not above 0."""
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale={scale}; give a number of nats above 0, or None for the largest value")
    return scale or max((abs(v) for v in numbers if math.isfinite(v)), default=0.0) or 1.0
