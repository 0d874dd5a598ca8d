"""`summary`: posterior means of every number of the draws, with right errors, as a pandas table."""

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

from ppl_lm.criticism.effective_size import moments
from ppl_lm.criticism.statistics import Statistic, recorded, scalars
from ppl_lm.criticism.weights import psis_khat
from ppl_lm.infer.draws import TOGETHER, Draws

SHARED = "all prompts"


def summary(draws: Draws, error: float | None = None, statistics: Mapping[str, Statistic] | None = None) -> Any:
    """A `pandas.DataFrame` of posterior means, right for draws of every kind: weighted by their weights, of runs and Markov
    chains with the errors that dependent draws have. Its rows are (prompt by name, number): the model's records, latent sites
    that are no text, lengths, log p of the prior, and a user's statistics of the texts; "all prompts" where all share a number.

    - `mean`, `sd`: of the posterior, in the number's own unit.
    - `se`: Monte Carlo standard error of the mean (`expectation`).
    - `ess`: how many independent draws would have this error, sd²/se²: of weights that have nothing to do with the number about
      Kong's, which `ess(draws)` gives. NaN of a number that never changes.
    - `khat`: of weighted draws the shape of the weights' tail: above 0.7 `se` is too small (`psis_khat`). NaN where it does not
      apply.
    - `more_draws`: with `error`, how many more of such draws make `se` as small, since it falls as 1/√S; of runs whole runs.
      <NA> where the error is not known.

    :param error: the standard error that is wanted, in the numbers' own unit.
    :param statistics: further numbers of texts, name -> function from texts to one finite number each.
    :raises ValueError: of an error that is not positive, draws without weights (`under`), or a statistic that fails.
    :raises NoSupportError: if all weights of a prompt are zero."""
    import pandas as pd

    if error is not None and not 0 < error < math.inf:
        raise ValueError(f"error={error!r}; give the standard error that is wanted, a positive number such as 0.01")
    draws = recorded(draws, statistics)
    names, khat = draws.prompts.names, _khats(draws)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for number, value in scalars(draws).items():
        found = moments(draws, value)  # (B, *inner) of each
        prompts = names if len(found.mean) == len(names) and not _is_shared(draws, number) else [SHARED]
        for place in product(*map(range, found.mean.shape)):
            inner = f"[{', '.join(map(str, place[1:]))}]" if place[1:] else ""
            mean, sd, se, amount = (float(v[place]) for v in (found.mean, found.sd, found.se, found.ess))
            row: dict[str, Any] = {
                "mean": mean,
                "sd": sd,
                "se": se,
                "ess": amount,
                "khat": khat[min(place[0], len(khat) - 1)],
            }
            if error is not None:
                row["more_draws"] = _more_draws(draws, se, error)
            rows[(prompts[place[0]], number + inner)] = row
    order = sorted(rows, key=lambda row: [*names, SHARED].index(row[0]))  # a prompt's numbers together
    index = pd.MultiIndex.from_tuples(order, names=["prompt", "number"])
    table = pd.DataFrame([rows[row] for row in order], index=index)
    return table.astype({"more_draws": "Int64"}) if error is not None else table


def _is_shared(draws: Draws, name: str) -> bool:
    return draws.plates.get(name, ("prompt",))[0] is None


def _khats(draws: Draws) -> list[float]:
    if draws.kind != "weighted":
        return [math.nan]
    found = map(psis_khat, draws.log_weight.flatten(0, 1).unbind(-1))
    return [math.nan if khat is None else khat for khat in found]


def _more_draws(draws: Draws, se: float, error: float) -> int | None:
    if not math.isfinite(se):
        return None
    chains, count = draws.log_guide.shape[:2]
    parts, size = (chains, count) if draws.kind in TOGETHER else (chains * count, 1)
    return max(0, math.ceil(parts * (se / error) ** 2) - parts) * size
