"""f-divergences between guide and posterior, each a function of how much too probable the guide finds a text."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from ppl_lm.infer.terms import Estimate, Terms, scored


@dataclass(frozen=True)
class Divergence:
    """D_f(q ‖ p) = E_p[f(q/p)] of guide q from posterior p, with f convex, f(1) = 0, t = q(x)/p(x).

    Its gradient is E_q[f'(t) ∇ log q] (Go et al. 2023): f'(t) is a text's cost. log t = log q - log p(x, evidence) + log Z;
    only reverse KL leaves log Z out, since it moves all costs alike there; its value is then -ELBO. From a prompt of which no
    draw was possible so far nothing is learned, and its value is inf.

    :param slope: f'(t) as a function of log t; `share`: f(t)/t, whose mean under q is the divergence.
    :param needs_z: whether the expected gradient depends on log Z. The other fields are those of every `Objective`.
    """

    name: str
    slope: Callable[[Tensor], Tensor]
    share: Callable[[Tensor], Tensor]
    needs_z: bool = True
    allows_hard_constraints: bool = True
    mass_covering: bool = False

    @property
    def is_negative_elbo(self) -> bool:
        """Of `reverse_kl` as it stands, and not of one that is given another slope."""
        return self == reverse_kl

    def __call__(self, terms: Terms) -> Estimate:
        log_joint = terms.log_joint
        log_z = torch.broadcast_to(terms.log_z if self.needs_z else log_joint.new_zeros(()), log_joint.shape)
        known = log_z > -torch.inf  # else no draw was possible so far: nothing can be learned from this prompt yet
        log_t = terms.log_guide - log_joint + torch.where(known, log_z, 0.0)
        cost = torch.where(known, self.slope(log_t), 0.0)
        return scored(terms, cost, torch.where(known, self.share(log_t), torch.inf))


def _js_share(log_t: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    inverse = (-log_t).exp()  # p/q; the second term is (1 + 1/t) log((t + 1)/2)
    large = softplus(log_t) - math.log(2)
    bounded = torch.where(inverse > 0, inverse * large, 0.0)
    return 0.5 * (math.log(2) - softplus(-log_t) - bounded)


reverse_kl = Divergence(
    "reverse_kl", lambda log_t: log_t, lambda log_t: log_t, needs_z=False, allows_hard_constraints=False
)
forward_kl = Divergence(
    "forward_kl",
    lambda log_t: -(-log_t).exp(),
    lambda log_t: torch.where(log_t == torch.inf, 0.0, -log_t * (-log_t).exp()),
    mass_covering=True,
)
jensen_shannon = Divergence("jensen_shannon", lambda log_t: 0.5 * (math.log(2) - softplus(-log_t)), _js_share)
total_variation = Divergence(
    "total_variation", lambda log_t: 0.5 * log_t.sign(), lambda log_t: 0.5 * torch.expm1(-log_t).abs()
)
chi2 = Divergence(
    "chi2", lambda log_t: -torch.expm1(-2 * log_t), lambda log_t: torch.expm1(-log_t).square(), mass_covering=True
)
reverse_chi2 = Divergence(
    "reverse_chi2",
    lambda log_t: 2 * torch.expm1(log_t),
    lambda log_t: torch.expm1(log_t).square() * (-log_t).exp(),
    allows_hard_constraints=False,
)


def alpha_divergence(alpha: float = 0.5) -> Divergence:
    """D_α = (Σ p^α q^(1-α) - 1) / (α(α - 1)): reverse KL at α = 0, 4 (1 - Σ √(p q)) at ½, forward KL at 1, ½ χ² at 2.

    Fits hard constraints for α > 0."""
    if not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha}; give a finite number")

    def slope(log_t: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        return log_t if alpha == 0 else -torch.expm1(-alpha * log_t) / alpha

    def share(log_t: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        inverse = (-log_t).exp()
        if alpha == 0:
            return log_t + torch.expm1(-log_t)
        if alpha == 1:
            return torch.where(log_t == torch.inf, 1.0, 1 - inverse - log_t * inverse)
        return ((-alpha * log_t).exp() - (1 - alpha) - alpha * inverse) / (alpha * (alpha - 1))

    return Divergence("alpha", slope, share, allows_hard_constraints=alpha > 0, mass_covering=alpha >= 1)
