"""The posterior of KL-regularised RL."""

from collections.abc import Callable

import pyro
import torch
from jaxtyping import Int
from torch import Tensor

from ppl_lm.likelihood.optimality import Optimality
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts


def tilted(
    prompts: Prompts, prior: LanguageModel, reward: Callable[[Prompts, Tensor], Tensor], beta: float = 0.2
) -> Int[Tensor, "*S T"]:
    """p(x | prompt, O=1) ∝ prior(x | prompt) · exp(reward(prompt, x) / beta).

    The optimum of KL-regularised RL, E[reward] - beta · KL(q ‖ prior) (Korbak, Perez & Buckley 2022, eq. 5).

    :param beta: the reward's temperature, above 0, in the reward's unit for each nat.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta}; the reward's temperature must be above 0")
    bound = getattr(reward, "r_max", None)
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("x", prior(prompts))  # the LM prior
        r = pyro.deterministic("reward", reward(prompts, x), event_dim=0)
        pyro.sample(  # the likelihood
            "optimal",
            Optimality(r / beta),
            obs=torch.ones(r.shape, device=r.device),
            infer={"log_bound": None if bound is None else bound / beta},
        )
    return x
