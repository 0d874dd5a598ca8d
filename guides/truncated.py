"""A trained language model as texts are often drawn from one: of each next token the likely ones alone."""

import pyro
from jaxtyping import Int
from torch import Tensor

from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.laws.support import truncated as truncated_of
from ppl_lm.lm.prompts import Prompts


def truncated(
    prompts: Prompts, lm: LanguageModel, top_p: float = 0.95, min_p: float = 0.0, top_k: int | None = None
) -> Int[Tensor, "*S T"]:
    """q(x_t | prompt, x_<t) ∝ lm(x_t | prompt, x_<t) for the tokens that top-p, min-p and top-k keep, 0 for others (see
    `ppl_lm.lm.truncated`): KL(posterior ‖ q) is infinite, whatever `lm`, a trainable copy of the prior, has learned."""
    with pyro.plate("prompts", len(prompts)):
        return pyro.sample("x", truncated_of(lm, top_p=top_p, min_p=min_p, top_k=top_k)(prompts))
