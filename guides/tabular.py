"""A table of logits, one row for each prefix: exact for any posterior, for tiny vocabularies."""

from typing import Any

import pyro
from torch import Tensor


def tabular(prompts: Any, table: Any) -> Tensor:
    """q(x_t | prompt, x_<t) = softmax(table[prompt, x_<t]), `table` from `ppl_lm.lm.table.table_like(prior)`."""
    with pyro.plate("prompts", len(prompts)):
        return pyro.sample("x", table(prompts))
