"""A trained language model beside the prior, one of which is drawn for each text: its weights are bounded."""

import pyro
from jaxtyping import Int
from torch import Tensor

from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.text_mixture import mixture as mixture_of


def mixture(prompts: Prompts, lm: LanguageModel, prior: LanguageModel, epsilon: float = 0.1) -> Int[Tensor, "*S T"]:
    """q(x | prompt) = (1 - ε) lm(x | prompt) + ε prior(x | prompt): the weight of a draw is at most 1 / ε times the largest
    likelihood of any text, so that it is worth something wherever the prior is.

    :param lm: a trainable copy of the prior, or `prior.adapted()`.
    :param epsilon: the prior's share of the texts, between 0 and 1."""
    with pyro.plate("prompts", len(prompts)):
        return pyro.sample("x", mixture_of([lm, prior], [1 - epsilon, epsilon])(prompts))
