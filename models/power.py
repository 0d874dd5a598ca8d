"""The prior raised to a power: what is likely as a whole text, not token by token."""

import pyro
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_lm.likelihood.optimality import Optimality
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.token_sequence import TokenSequence


def power(prompts: Prompts, prior: LanguageModel, alpha: float = 4.0) -> Int[Tensor, "*S T"]:
    """p(x | prompt) ∝ prior(x | prompt)^alpha = prior(x | prompt) · exp((alpha - 1) log prior(x | prompt)).

    Above 1 it sharpens the law of whole texts (Karan & Du 2025). That is not the LM at temperature 1/alpha, which sharpens
    each token's law by itself: here a token also counts by how concentrated the law of what follows it is.

    :param alpha: above 0; 1 is the prior. As `tilted` with log prior(x) for a reward and beta = 1/(alpha - 1).
    """
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha={alpha}; the prior's power must be above 0, and finite")
    with pyro.plate("prompts", len(prompts)):
        law = prior(prompts)
        x = pyro.sample("x", law)
        log_p = _log_prob(law, x)  # (*S, B) nats
        pyro.sample(
            "likely",
            Optimality(torch.where(log_p > -torch.inf, (alpha - 1) * log_p, 0.0)),  # the prior itself has the -inf
            obs=torch.ones(log_p.shape, device=log_p.device),
            infer={"log_bound": 0.0 if alpha >= 1 else None, "prior_power": alpha},
        )
    return x


@torch.no_grad()
def _log_prob(law: TokenSequence, x: Int[Tensor, "*#S T"]) -> Float[Tensor, "*#S"]:
    """log law(x), from the pass that drew x where that was this law's."""
    by_token = law.sampled_log_probs(x)
    return law.log_prob(x) if by_token is None else by_token.sum(-1)
