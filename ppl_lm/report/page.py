"""Pages for people: one self-contained HTML file each, from the templates in `pages/`. Nothing is fetched and no script can
run: the page's own policy forbids both. Text of models, rewards and users is untrusted: it is escaped, and what cannot be seen
is spelt out."""

import base64
import io
import math
import shlex
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from matplotlib.axes import Axes

from ppl_lm.lm.prompt_names import content, readable
from ppl_lm.plot.untrusted import visible
from ppl_lm.report.heat_map import heat_html

SCALE = 2.0  # nats at which a token has the full colour
DPI = 170


def render(template: str, **values: Any) -> str:
    """A page of `pages/`.

    `values` are escaped, but for pictures and heat maps, which are made here."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    pages = Environment(
        loader=PackageLoader("ppl_lm.report", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "quoted": shlex.quote,
        "shown": shown,
        "lines": lines,
        "messages": messages,
        "number": plain_number,
        "signed": lambda v: f"{v:+.2f}".replace("-", "−"),
    }
    pages.globals["heat"] = lambda tokens, gains: Markup(heat_html(tokens, gains or [math.nan] * len(tokens), SCALE))
    pages.globals["version"] = version("ppl_lm")
    return pages.get_template(template).render(**values)


def shown(text: Any) -> str:
    """Untrusted text in one line: a prompt, of a chat each message after its role, a name, a path."""
    return visible(readable(text) if isinstance(text, (str, list, tuple)) else repr(text)) if text != "" else "(empty)"


def messages(chat: list[Any]) -> list[tuple[str, str]]:
    """Role and text of each message, untrusted text of several lines."""
    return [(shown(str(message.get("role"))), lines(content(message.get("content")))) for message in chat]


def lines(text: str) -> str:
    """Untrusted text of several lines, such as a program."""
    return "\n".join(visible(line.expandtabs(4)) if line else "" for line in text.rstrip().splitlines())


def pm(value: float | None, error: float | None = None) -> str:
    """A figure with its standard error, to two digits of the error.

    >>> pm(0.22713, 0.0274), pm(31.02, 2.0), pm(1234.5), pm(None), pm(0.5, None), pm(-0.00004, 0.002)
    ('0.227 ± 0.027', '31.0 ± 2.0', '1,234', '–', '0.500', '0.0000 ± 0.0020')
    """
    if value is None or not math.isfinite(value):
        return "–" if value is None or math.isnan(value) else "∞" if value > 0 else "−∞"
    if error is None or not math.isfinite(error) or error == 0:
        return plain_number(value)
    digits = max(0, min(6, 1 - math.floor(math.log10(error))))
    return f"{_signed(value, digits)} ± {error:,.{digits}f}"


def plain_number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else _signed(value, 3 if abs(value) < 100 else 0)


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")  # + 0.0: no minus before a zero


def picture(plot: Callable[[], Axes | None], alt: str, caption: str) -> dict[str, str]:
    """What a plot shows, for the page: `src`, or `why` there is none; `alt`, which says it in words, and `caption`."""
    labels = {"alt": alt, "caption": caption, "src": "", "why": ""}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")
            ax = plot()
    except ValueError as error:  # of plots that these draws do not have
        return labels | {"why": str(error)}
    if ax is None:
        return labels | {"why": "not measured"}
    stream = io.BytesIO()
    figure: Any = ax.figure
    with warnings.catch_warnings():  # a script that the font lacks is drawn as boxes; the texts are on the page as well
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(stream, format="png", dpi=DPI, transparent=True, metadata={"Software": None})
    width, height = figure.get_size_inches()
    size = {"width": f"{round(96 * width)}", "height": f"{round(96 * height)}"}
    return labels | size | {"src": "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()}


def rows(figures: Mapping[str, Any], table: Mapping[str, tuple[str, str, str]]) -> list[dict[str, str]]:
    """Those figures that are known, as a table has them: `name`, `value` with its error, `unit`, `meaning`.

    :param table: key -> name, unit, meaning; "%" shows a share in percent."""
    lines = []
    for key, (name, unit, meaning) in table.items():
        value, error = figures.get(key), figures.get(f"{key}_se")
        if value is None or math.isnan(value):
            continue
        if unit == "%":
            value, error = (None if v is None else 100 * v for v in (value, error))
        lines.append({"name": name, "value": pm(value, error), "unit": unit, "meaning": meaning})
    return lines
