"""Draws and figures as pandas tables, and tables as HTML for notebooks."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_lm.lm.prompts import Prompts


def table_of_draws(
    prompts: Prompts, texts: Sequence[str], latents: Mapping[str, Tensor], numbers: Mapping[str, Tensor]
) -> Any:
    """A `pandas.DataFrame` with a row for each chain, draw and prompt.

    :param latents: (C, S, B, *inner, *event), of which texts, several in one cell where an inner plate has them, and numbers
        are shown.
    :param numbers: (C, S, B). B may be 1 of both: then every prompt's row has it."""
    import pandas as pd

    first = next(iter(numbers.values()))
    shape = (*first.shape[:2], len(prompts))
    count = shape[0] * shape[1] * shape[2]
    grid = [axis.flatten().tolist() for axis in torch.meshgrid(*map(torch.arange, shape), indexing="ij")]
    names = prompts.names
    columns: dict[str, Any] = {"chain": grid[0], "draw": grid[1], "prompt": [names[b] for b in grid[2]]}
    for name in texts:
        x = latents[name].expand(*shape, *latents[name].shape[3:]).reshape(*shape, -1, latents[name].shape[-1])
        decoded = prompts.decode(x.movedim(2, 3))  # (C, S, inner, B, T)
        decoded = np.array(decoded, dtype=object).reshape(*shape[:2], -1, shape[2]).swapaxes(2, 3).reshape(count, -1)
        decoded, several = decoded.flatten().tolist(), [tuple(row) for row in decoded]
        columns[name] = decoded if latents[name].dim() == 4 else several
    other = {name: value for name, value in latents.items() if name not in texts}
    for name, value in (*numbers.items(), *other.items()):
        if value.dim() == 3 and name not in columns:
            columns[name] = value.detach().cpu().expand(shape).flatten().numpy()
    return pd.DataFrame(columns)


def as_html(table: Any, caption: str) -> str:
    """A table for a notebook. Texts are escaped, and characters that would not be seen, or move others, are written out."""
    import pandas as pd

    shown = table.map(lambda cell: visible(cell) if isinstance(cell, str) else cell)
    shown.index = shown.index.map(lambda name: visible(name) if isinstance(name, str) else name)
    with pd.option_context("display.max_colwidth", 200, "display.html.use_mathjax", False):
        return f"<p>{escape(visible(caption))}</p>{shown.to_html(escape=True, notebook=True, max_rows=60)}"


def visible(text: str) -> str:
    r"""Text with its line breaks and other characters that do not print as Python writes them.

    >>> visible("two\nlines")
    'two\\nlines'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
