"""A language model all of whose weights are free."""

import pyro
from jaxtyping import Int
from torch import Tensor

from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts


def finetuned(prompts: Prompts, lm: LanguageModel) -> Int[Tensor, "*S T"]:
    """q(x | prompt) = lm(x | prompt), `lm` a trainable copy of the prior."""
    with pyro.plate("prompts", len(prompts)):
        return pyro.sample("x", lm(prompts))
