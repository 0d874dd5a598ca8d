"""Estimators of reinforcement learning whose optimum is no posterior, here to be compared with."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ppl_lm.infer.terms import Estimate, Terms, scored


def expected_reward(terms: Terms) -> Estimate:
    """-E_q[log-likelihood]: standard RL (REINFORCE), here to be compared with. Its optimum is no posterior but the text of
    the highest reward, alone (Korbak et al. 2022, eq. 2)."""
    return scored(terms, -terms.log_likelihood, -terms.log_likelihood)


@dataclass(frozen=True)
class GRPO:
    """Group-relative policy optimisation (Shao et al. 2024), here to be compared with: its fixed point is not the
    posterior.

    The advantage of a text is its reward less the group's mean, divided by the group's standard deviation; the loss adds
    beta · k3, k3 = ρ - 1 - log ρ with ρ = p0/q for each token, whose gradient is that of KL(p0 ‖ q), not of KL(q ‖ p0). Each
    of the two shifts the fixed point; with `normalise=False, kl_in_reward=True` neither is done and the gradient is
    beta · ∇KL(q ‖ posterior) times (K - 1)/K, the mean being the group's own. Off-policy each token's advantage takes the
    token's own importance ratio, as in PPO; the paper clips it with `SequenceELBO(clip_ratio=0.2)`. The paper's mean over the
    tokens of a text, a third departure, is left out: tokens are summed.

    :param beta: the likelihood's temperature, which turns nats back into the reward's unit.
    :param normalise: whether advantages are divided by the standard deviation.
    :param kl_in_reward: beta · log(q/p0) of the whole text is taken from its advantage, not normalised, instead of k3.
    """

    name: ClassVar[str] = "grpo"
    allows_hard_constraints: ClassVar[bool] = False
    mass_covering: ClassVar[bool] = False
    is_negative_elbo: ClassVar[bool] = False
    beta: float
    normalise: bool = True
    kl_in_reward: bool = False

    def __post_init__(self) -> None:
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta={self.beta}; give a number above 0")

    def __call__(self, terms: Terms) -> Estimate:
        terms.require_particles("grpo")
        if terms.token_log_guide is None or terms.token_log_prior is None:
            raise ValueError("grpo is defined for one text, without other latent sites; use reverse_kl")
        reward = self.beta * terms.log_likelihood
        advantage = reward - reward.mean(0)
        if self.normalise:
            advantage = advantage / (reward.std(0) + 1e-4)
        if self.kl_in_reward:
            penalty = self.beta * (terms.log_guide - terms.log_prior)
            cost = (penalty - penalty.mean(0) - advantage).unsqueeze(-1).expand_as(terms.token_ratio)
            return Estimate((penalty - reward).mean(0), terms.weighted(terms.token_ratio, cost))
        log_rho = terms.token_log_prior - terms.token_log_guide  # 0 after the end
        k3 = torch.expm1(log_rho) - log_rho
        value = -reward.mean(0) + self.beta * k3.sum(-1).mean(0)
        cost = -advantage.unsqueeze(-1).expand_as(log_rho)
        return Estimate(value, terms.weighted(terms.token_ratio, cost) - self.beta * torch.expm1(log_rho))
