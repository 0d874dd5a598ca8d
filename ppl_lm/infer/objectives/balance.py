"""Balance losses of generative flow networks: log q against log p, text by text or prefix by prefix."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ppl_lm.infer.terms import Estimate, Terms


class TrajectoryBalance:
    """½ E[δ²], δ = log Zθ + log q - log p(x, evidence) (Malkin et al. 2022; for language models Hu et al. 2024).

    0 where the guide is the posterior and Zθ its evidence, whatever drew the texts: off-policy draws take no importance
    ratio. On-policy the expected gradient is that of KL(q ‖ posterior) for any Zθ. log Zθ is learned for each prompt by
    gradient descent on the same loss, which moves it by `rate` · E[δ].

    :param rate: of learning log Zθ, in (0, 1].
    """

    name = "trajectory_balance"
    allows_hard_constraints = mass_covering = is_negative_elbo = False

    def __init__(self, rate: float = 0.1):
        if not 0 < rate <= 1:
            raise ValueError(f"rate={rate}; give a number above 0, at most 1")
        self.rate = rate
        self.log_z: dict[tuple[Any, ...], float] = {}

    def __call__(self, terms: Terms) -> Estimate:
        gap = terms.log_guide - terms.log_joint
        keys = terms.prompts.identities()
        known = [self.log_z.get(key, math.nan) for key in keys]
        log_z = torch.tensor(known, dtype=gap.dtype, device=gap.device)
        others = (gap.mean(0) - gap / len(gap)) * len(gap) / max(1, len(gap) - 1)  # a prompt's first step
        delta = gap + torch.where(log_z.isnan(), -others, log_z)
        for key, mean in zip(keys, gap.mean(0).tolist(), strict=True):
            now = self.log_z.get(key, -mean)
            self.log_z[key] = now - self.rate * (mean + now)
        return Estimate(0.5 * delta.square().mean(0), delta)


def vargrad(terms: Terms) -> Estimate:
    """Half the variance of log q - log p(x, evidence) over the particles (Richter et al. 2020): trajectory balance with
    the particles' mean for log Zθ. Off-policy draws take no importance ratio.

    With the K/(K - 1) of the unbiased variance its on-policy gradient is, draw by draw, that of reverse KL with the
    leave-one-out baseline."""
    terms.require_particles("vargrad")
    gap = terms.log_guide - terms.log_joint
    centred = (gap - gap.mean(0)) * (len(gap) / (len(gap) - 1))
    return Estimate(0.5 * gap.var(0), centred)


@dataclass(frozen=True)
class SubTB:
    """Sub-trajectory balance (Madan et al. 2023) for texts that may end anywhere (Hu et al. 2024): the mean of (u_i - u_j)²
    over all pairs of prefixes of a text, u_i = log p(x_≤i ⊤, evidence) - log q(x_≤i ⊤), ⊤ being the end.

    0 where the guide is the posterior, whatever drew the texts. It learns from the reward of every prefix, and so asks for
    T + 2 rewards a text, T = max_new_tokens.

    :param decay: weight decay^(j - i - 1) of a pair; 1 weights all alike.
    """

    name: ClassVar[str] = "subtb"
    allows_hard_constraints: ClassVar[bool] = False
    mass_covering: ClassVar[bool] = False
    is_negative_elbo: ClassVar[bool] = False
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay}; give a number above 0, at most 1")

    def __call__(self, terms: Terms) -> Estimate:
        if terms.prefixes is None:
            raise ValueError(
                "subtb is defined for one text without other latent sites, and max_plate_nesting=1; use trajectory_balance"
            )
        prefixes = terms.prefixes()
        if not bool(prefixes.log_weight[prefixes.valid].isfinite().all()):
            raise ValueError("subtb: a prefix of a text is impossible as a text of its own; use trajectory_balance")
        u, n = prefixes.log_weight, prefixes.log_weight.shape[-1]
        apart = (torch.arange(n)[:, None] - torch.arange(n)).abs().to(u.device)
        pair = prefixes.valid.unsqueeze(-1) & prefixes.valid.unsqueeze(-2) & (apart > 0)
        weight = torch.where(pair, u.new_tensor(self.decay) ** (apart - 1).clamp_min(0), 0.0)
        weight = weight / weight.sum((-1, -2), keepdim=True).clamp_min(1e-300)  # a text of no tokens has no pairs
        difference = u.unsqueeze(-1) - u.unsqueeze(-2)
        value = (weight * difference.square()).sum((-1, -2))
        slope = 4 * (weight * difference).sum(-1)  # by u_i, (K, B, T + 1)
        from_here = slope.flip(-1).cumsum(-1).flip(-1)  # token t is in the prefixes that are longer than t
        return Estimate(value.mean(0), -from_here[..., 1:], -slope[..., :-1])
