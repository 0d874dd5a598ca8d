"""The reward–KL frontier: the most reward that any law can have at a KL from the prior."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_lm.infer.draws import Draws
from ppl_lm.infer.log_weights import kong_ess, log_mean


def reward_kl_frontier(prior: Draws, betas: Sequence[float]) -> Float[Tensor, "4 N"]:
    """KL(p_β ‖ prior) in nats, E[reward] under p_β, its standard error at that KL, and the effective sample size, for N
    temperatures, by weights w = softmax(r/β) of the prior's draws: KL = Σ w log(S w). Means over prompts; the least ESS.

    On the frontier the reward rises by β for each nat, so at a fixed KL its error is that of E[r] - β KL = β log Z."""
    reward, rows = rewards(prior), []
    for beta in betas:
        if not beta > 0:
            raise ValueError(f"beta={beta}; the reward's temperature must be above 0")
        w = (reward / beta).softmax(0)  # (S, B)
        relative = w * len(w)
        kl = torch.special.xlogy(w, relative).sum(0)
        se = beta * log_mean(reward / beta)[1]
        total = se.square().sum().sqrt() / len(se)
        rows.append(torch.stack([kl.mean(), (w * reward).sum(0).mean(), total, kong_ess(reward / beta).min()]))
    return torch.stack(rows, 1)


def rewards(prior: Draws) -> Float[Tensor, "S B"]:
    if "reward" not in prior.records:
        raise ValueError(f"these draws record {sorted(prior.records)}; the frontier needs the model's 'reward'")
    if not prior.from_prior:
        raise ValueError("these draws are not the prior's: draw them with importance(model, None, prompts)")
    return prior.records["reward"].flatten(0, 1).double()
