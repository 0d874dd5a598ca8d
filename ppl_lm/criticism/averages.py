"""`over_prompts`: the figures of several prompts as one row."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def over_prompts(
    figures_by_prompt: Sequence[Mapping[str, Any]],
    *,
    largest: Collection[str] = (),
    smallest: Collection[str] = (),
    total: Collection[str] = (),
    shared: Collection[str] = (),
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Means over prompts, and standard errors (`_se`) of means of independent figures. Of truth values whether all are true, of
    words the first, of figures by name likewise each. None where a prompt lacks the figure.

    :param largest: of these the largest, with its own error; of prompts that have none there is none.
    :param smallest: likewise.
    :param total: the sum.
    :param shared: the first, since all are the same.
    :param without: keys that are left out.

    >>> over_prompts([{"kl": 1.0, "kl_se": 0.3, "khat": 0.2}, {"kl": 2.0, "kl_se": 0.4, "khat": 0.9}], largest=["khat"])
    {'kl': 1.5, 'kl_se': 0.25, 'khat': 0.9}
    """
    row: dict[str, Any] = {}
    for key in figures_by_prompt[0]:
        of, column = key.removesuffix("_se"), [figures[key] for figures in figures_by_prompt]
        if key in without:
            continue
        if of in largest or of in smallest:
            known = [figures for figures in figures_by_prompt if figures[of] is not None]
            pick = max if of in largest else min
            row[key] = pick(known, key=lambda figures: figures[of])[key] if known else None  # noqa: B023  called at once
        elif None in column:
            row[key] = None
        elif isinstance(column[0], dict):
            row[key] = {name: over_prompts([by_name[name] for by_name in column]) for name in column[0]}
        elif isinstance(column[0], bool):
            row[key] = all(column)
        elif isinstance(column[0], str) or key in shared:
            row[key] = column[0]
        elif key in total:
            row[key] = sum(column)
        elif key.endswith("_se"):
            row[key] = math.hypot(*column) / len(column)
        else:
            row[key] = sum(column) / len(column)
    return row
