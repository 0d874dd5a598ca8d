"""Texts as heat maps: each token in the colour of a number, such as `token_gains`. Text is untrusted: it is never markup, and
what cannot be seen is spelt out."""

import html
import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from ppl_lm.diagnose.plots import axes, said
from ppl_lm.infer.token_gains import token_gains
from ppl_lm.lm.vocabulary import Vocabulary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["heat_html", "pieces", "plot_heat", "token_gains", "visible"]

POINTS = 9.0  # size of the text
ADVANCE = 0.645  # width of a character in its size: DejaVu Sans Mono's 0.602, rounded up to whole pixels
LINE = 1.9  # height of a line, likewise
UNKNOWN = (0.85, 0.85, 0.85, 1.0)
PART = "⋯"  # a token that writes no whole character


def pieces(vocabulary: Vocabulary, row: Int[Tensor, "T"]) -> list[str]:
    """What each token of one completion adds to its text, up to the end token. A character that several tokens write belongs to
    the last of them, and the others add ""; a special token is its name, as in ⟨end⟩."""
    tokenizer: Any = vocabulary.tokenizer
    (ids,) = vocabulary.completion_ids(row.unsqueeze(0))
    special = set(tokenizer.all_special_ids)
    plain = [[i for i in ids[: n + 1] if i not in special] for n in range(len(ids))]
    texts = tokenizer.batch_decode(plain, clean_up_tokenization_spaces=False) if ids else []
    last = max((n for n, i in enumerate(ids) if i not in special), default=-1)
    made, done = [], 0
    for n, (token, text) in enumerate(zip(ids, texts, strict=True)):
        if token in special:
            made.append(f"⟨{tokenizer.convert_ids_to_tokens(token).strip('<|>/')}⟩")
            continue
        known = len(text) if n == last else len(text.rstrip("\N{REPLACEMENT CHARACTER}"))  # the rest may yet be whole
        made.append(text[done:known])
        done = max(done, known)
    return made


def visible(text: str) -> str:
    """Characters that would not be seen, or would move others, as ⟨U+202E⟩; a new line as ↵."""

    def show(c: str) -> str:
        hidden = unicodedata.category(c)[0] == "C" or unicodedata.category(c) in ("Zl", "Zp")
        return "↵" if c == "\n" else f"⟨U+{ord(c):04X}⟩" if hidden else c

    return "".join(map(show, text)) or PART


def heat_html(tokens: Sequence[str], values: Iterable[float], scale: float | None = None) -> str:
    """Tokens as HTML spans of class `token`, and `up`, `down` or `unknown` by the sign of their value, which is in `title`. The
    custom property `--v`, -1 to 1, is the value by `scale` (None: the largest there is), for the stylesheet to colour."""
    numbers = _numbers(tokens, values)
    scale = scale or _scale(numbers)
    spans = []
    for token, value in zip(tokens, numbers, strict=True):
        sign = "unknown" if math.isnan(value) else "up" if value > 0 else "down" if value < 0 else "zero"
        share = 0.0 if math.isnan(value) else max(-1.0, min(1.0, value / scale))
        title = "no value" if math.isnan(value) else f"{value:+.3f} nats"
        spans.append(
            f'<span class="token {sign}" dir="auto" style="--v:{share:.3f}" title="{title}">'
            f"{html.escape(visible(token))}</span>"
        )
    return f'<div class="heat">{"".join(spans)}</div>'


def plot_heat(
    tokens: Sequence[str], values: Iterable[float], ax: "Axes | None" = None, scale: float | None = None
) -> "Axes":
    """Tokens as wrapped text, each on the colour of its value in nats: blue where it is above 0, red below. A value that is not
    finite has the colour's end, NaN is grey. On given Axes, what does not fit is counted in the title.

    :param scale: nats at the colours' ends; None: the largest value there is."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    numbers = _numbers(tokens, values)
    shown = [visible(token) for token in tokens]
    owned = ax is None
    ax = axes(ax)
    figure: Any = ax.figure
    scale = scale or _scale(numbers)
    colours = ScalarMappable(Normalize(-scale, scale), colormaps["RdBu"])
    bar = figure.colorbar(colours, ax=ax, location="bottom", fraction=0.08, aspect=40, pad=0.04)
    bar.set_label("log q - log p0 of each token [nats]")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
    if not shown:
        return said(ax, ["no token is given"])
    infinite = sum(not math.isfinite(v) for v in numbers)
    unknown = [f"{infinite} of {len(shown)} values are not finite"] if infinite else []
    unseen: list[str] = []
    for _ in range(5):  # the figure grows, and the title takes room
        said(ax, unseen + unknown)
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


def _room(ax: "Axes") -> tuple[float, float]:
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


def _numbers(tokens: Sequence[str], values: Iterable[float]) -> list[float]:
    numbers = [math.nan if v is None else float(v) for v in values]
    if len(numbers) != len(tokens):
        raise ValueError(
            f"{len(numbers)} values for {len(tokens)} tokens; give one each (cut the values after the end)"
        )
    return numbers


def _scale(numbers: Sequence[float]) -> float:
    return max((abs(v) for v in numbers if math.isfinite(v)), default=0.0) or 1.0
