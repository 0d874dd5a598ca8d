"""The prior itself, as a proposal: nothing to train."""

import pyro
from jaxtyping import Int
from torch import Tensor

from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts


def prior(prompts: Prompts, prior: LanguageModel) -> Int[Tensor, "*S T"]:
    """q(x | prompt) = prior(x | prompt)."""
    with pyro.plate("prompts", len(prompts)):
        return pyro.sample("x", prior(prompts))
