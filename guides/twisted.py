"""A prior steered token by token by a learned twist."""

import pyro
from jaxtyping import Int
from torch import Tensor

from ppl_lm.lm.experts import product
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts


def twisted(prompts: Prompts, prior: LanguageModel, twist: LanguageModel) -> Int[Tensor, "*S T"]:
    """q(x_t | prompt, x_<t) ∝ prior(x_t | prompt, x_<t) ψ_t(x_≤t): the proposal that a twist induces (Zhao et al. 2024).

    :param twist: from `ppl_lm.twists.twist_like(prior)`; its logits are log ψ_t. With `head_only` it reads the prior's pass."""
    with pyro.plate("prompts", len(prompts)):
        return pyro.sample("x", product([prior, twist])(prompts))
