"""The prior with a low-rank adapter, which alone is free: the prior's weights lie in memory once."""

import pyro
from jaxtyping import Int
from torch import Tensor

from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts


def lora(prompts: Prompts, adapted: LanguageModel) -> Int[Tensor, "*S T"]:
    """q(x | prompt) = adapted(x | prompt), `adapted` from `prior.adapted(rank=16)` (Hu et al. 2022)."""
    with pyro.plate("prompts", len(prompts)):
        return pyro.sample("x", adapted(prompts))
