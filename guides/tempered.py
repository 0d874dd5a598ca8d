"""The prior at a temperature of its own, which alone is free: one number, at first 1, where it is the prior."""

import pyro
from jaxtyping import Int
from torch import Tensor

from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts


def tempered(prompts: Prompts, tempered: LanguageModel) -> Int[Tensor, "*S T"]:
    """q(x_t | prompt, x_<t) ∝ prior(x_t | prompt, x_<t)^(1/τ), `tempered` from `ppl_lm.lm.tempered(prior, trainable=True)`."""
    with pyro.plate("prompts", len(prompts)):
        return pyro.sample("x", tempered(prompts))
