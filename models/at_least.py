"""The prior, given that a reward reaches a level: a rare event."""

import math
from collections.abc import Callable

import pyro
import torch
from jaxtyping import Int
from torch import Tensor

from ppl_lm.likelihood.optimality import Optimality
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts


def at_least(
    prompts: Prompts, prior: LanguageModel, reward: Callable[[Prompts, Tensor], Tensor], level: float = 1.0
) -> Int[Tensor, "*S T"]:
    """p(x | prompt, r(x) ≥ level), whose evidence is the probability of the event: P(r ≥ level).

    Where that is small, `ppl_lm.infer.samplers.splitting` comes there by way of lower levels.

    :param level: in the reward's unit."""
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("x", prior(prompts))
        score = pyro.deterministic("reward", reward(prompts, x), event_dim=0)
        pyro.sample(
            "reached",
            Optimality(torch.where(score.double() >= level, 0.0, -math.inf).double()),
            obs=torch.ones(score.shape, device=score.device),
            infer={"log_bound": 0.0, "hard": True},
        )
    return x
