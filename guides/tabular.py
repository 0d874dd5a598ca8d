"""A table of logits, one row for each prefix: exact for any posterior, for tiny vocabularies."""

import pyro
from jaxtyping import Int
from torch import Tensor

from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts


def tabular(prompts: Prompts, table: LanguageModel) -> Int[Tensor, "*S T"]:
    """q(x_t | prompt, x_<t) = softmax(table[prompt, x_<t]), `table` from `ppl_lm.lm.table.table_like(prior)`."""
    with pyro.plate("prompts", len(prompts)):
        return pyro.sample("x", table(prompts))
