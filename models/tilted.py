"""The posterior of KL-regularised RL."""

from typing import Any

import pyro
import torch
from torch import Tensor

from ppl_lm.likelihood.optimality import Optimality


def tilted(prompts: Any, prior: Any, reward: Any, beta: float = 0.2) -> Tensor:
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
