"""`heat_html`: a text as a heat map of its tokens, in HTML."""

import html
import math
from collections.abc import Iterable, Sequence

from ppl_lm.plot.token_heat import as_numbers, largest
from ppl_lm.plot.untrusted import visible


def heat_html(tokens: Sequence[str], values: Iterable[float], scale: float | None = None) -> str:
    """Tokens as HTML spans of class `token`, and `up`, `down` or `unknown` by the sign of their value, which is in `title`. The
    custom property `--v`, -1 to 1, is the value by `scale` (None: the largest there is), for the stylesheet to colour."""
    numbers = as_numbers(tokens, values)
    scale = largest(numbers, scale)
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
