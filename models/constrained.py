"""The prior, given that a yes-or-no property holds."""

from collections.abc import Callable

import pyro
import torch
from jaxtyping import Int
from torch import Tensor

from ppl_lm.likelihood.optimality import Optimality
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts


def constrained(
    prompts: Prompts, prior: LanguageModel, constraint: Callable[[Prompts, Tensor], Tensor]
) -> Int[Tensor, "*S T"]:
    """p(x | prompt, C) ∝ prior(x | prompt) · 1[constraint(prompt, x)]  (pointwise GDC, Khalifa et al. 2021).

    Texts that break the constraint have probability 0, so reverse KL cannot fit it: fit with forward KL or
    another objective that can, or draw with importance or rejection.

    :param constraint: a function in a reward's signature that returns yes or no (1 or 0) for each completion, such as an
        `Automaton`.
    """
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("x", prior(prompts))
        holds = pyro.deterministic("holds", constraint(prompts, x), event_dim=0)
        if not bool(((holds == 0) | (holds == 1)).all()):
            raise ValueError("the constraint must answer yes or no (1 or 0) for each completion; for scores use tilted")
        pyro.sample(
            "satisfied",
            Optimality(holds.log()),
            obs=torch.ones(holds.shape, device=holds.device),
            infer={"log_bound": 0.0, "hard": True},
        )
    return x
