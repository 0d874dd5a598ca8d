"""Losses whose optimum is a twist: what a text begun is expected to be worth.

ψ*_t(x_≤t) ∝ E_p0[φ(x) | x_≤t], φ the likelihood of the evidence, σ = p0 φ / Z the posterior (Zhao et al. 2024, table 1).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Rollouts:
    """K texts of B prompts at every length t = 1 … T, as a twist sees them. Nats, float64.

    :param prior: weights that make them p0's, log, normalised over K; `posterior` likewise σ's.
    :param log_phi: log φ(x) less a constant; -inf where impossible.
    :param log_psi: log ψ_t(x_≤t), differentiable; after a text's end that of its end, since an ended text keeps its weight.
    :param log_value: log Σ_v p0(v | x_<t) ψ_t(x_<t, v), differentiable; 0 after the end.
    :param alive: whether the text has a t-th token.
    """

    prior: Float[Tensor, "K B"]
    posterior: Float[Tensor, "K B"]
    log_phi: Float[Tensor, "K B"]
    log_psi: Float[Tensor, "K B T"]
    log_value: Float[Tensor, "K B T"]
    alive: Bool[Tensor, "K B T"]


Loss = Callable[[Rollouts], Tensor]


def ctl(r: Rollouts) -> Float[Tensor, ""]:
    """Contrastive twist learning: Σ_t KL(σ(x_≤t) ‖ π_t), π_t ∝ p0 ψ_t, by its gradient -(E_σ ∇log ψ_t - E_π_t ∇log ψ_t). Its
    value means nothing. Bias of order 1/K, from weights that are normalised over K texts."""
    under_twist = (r.prior.unsqueeze(-1) + r.log_psi.detach()).softmax(0)
    return _sum((under_twist - r.posterior.exp().unsqueeze(-1)) * r.log_psi)


def sixo(r: Rollouts) -> Float[Tensor, ""]:
    """Noise-contrastive, posterior against prior: -Σ_t E_σ log s(log ψ_t) + E_p0 log s(-log ψ_t), s the logistic function.
    Optimum ψ_t = σ(x_≤t) / p0(x_≤t) (Lawson et al. 2022)."""
    log_true, log_false = torch.nn.functional.logsigmoid(r.log_psi), torch.nn.functional.logsigmoid(-r.log_psi)
    return -_sum(r.posterior.exp().unsqueeze(-1) * log_true + r.prior.exp().unsqueeze(-1) * log_false)


def soft_rl(r: Rollouts) -> Float[Tensor, ""]:
    """Soft Q-learning, path consistency of one step: E_p0 Σ_t (log Σ_v p0(v | x_≤t) ψ_t+1(x_≤t, v) - log ψ_t)², the sum over
    v held fixed, and (log φ - log ψ)² at the end.

    :raises ValueError: where a text is impossible: log φ = -inf has no square."""
    _require_soft(r, "soft_rl")
    ahead = torch.nn.functional.pad(r.log_value.detach(), (0, 1))[..., 1:]
    last = r.alive & ~torch.nn.functional.pad(r.alive, (0, 1))[..., 1:]
    wanted = torch.where(last, r.log_phi.unsqueeze(-1), ahead)
    return _sum(r.prior.exp().unsqueeze(-1) * torch.where(r.alive, (wanted - r.log_psi).square(), 0.0))


def fudge(r: Rollouts) -> Float[Tensor, ""]:
    """E_p0 Σ_t [ψ_t - φ log ψ_t], with the gradient E_p0 Σ_t (ψ_t - φ) ∇log ψ_t: FUDGE's cross-entropy of what a text will be
    worth (Yang & Klein 2021), with a logarithm for its link so that φ may exceed 1. Optimum ψ_t = E_p0[φ | x_≤t]."""
    phi = r.log_phi.exp().unsqueeze(-1)
    return _sum(r.prior.exp().unsqueeze(-1) * torch.where(r.alive, r.log_psi.exp() - phi * r.log_psi, 0.0))


def log_variance(r: Rollouts) -> Float[Tensor, ""]:
    """½ Var_p0[log φ + log p0 - log q], q ∝ p0 ψ token by token: path consistency of whole texts, the constant log Z dropped
    (Richter et al. 2020). Zero where q is the posterior.

    :raises ValueError: where a text is impossible."""
    _require_soft(r, "log_variance")
    surplus = r.log_phi + torch.where(r.alive, r.log_value - r.log_psi, 0.0).sum(-1)  # (K, B)
    share = r.prior.exp()
    return 0.5 * _sum(share * (surplus - (share * surplus).sum(0)).square())


def _require_soft(r: Rollouts, name: str) -> None:
    if bool((r.log_phi[r.prior > -torch.inf] == -torch.inf).any()):
        raise ValueError(
            f"{name} needs texts that are all possible, and the evidence rules some out: use ctl, sixo or fudge"
        )


def _sum(terms: Float[Tensor, "K B *T"]) -> Float[Tensor, ""]:
    """Over texts and lengths, mean over prompts."""
    return terms.sum() / terms.shape[1]
