"""`Terms`: what an objective sees of a step's particles, and the `Estimate` that it makes of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_lm.lm.prompts import Prompts


@dataclass(frozen=True)
class Terms:
    """Log-probabilities of K texts for each of B prompts; nats, float64, detached.

    :param log_prior: log p0(x | prompt), (K, B); further latent sites included.
    :param log_likelihood: log p(evidence | x), (K, B), r/β for `tilted`; -inf where a hard constraint rules the text out.
    :param log_guide: log q(x | prompt), (K, B).
    :param log_proposal: log-probability under what drew the texts, NaN where it is not known; None on-policy, the guide
        as it is having drawn them. Likewise `token_log_proposal`.
    :param estimate_log_z: from log weights under what drew the texts, (K, B): see `ppl_lm.baselines`.
    :param baseline: from the costs of all particles and their importance ratios, (K, B) both, to what is subtracted
        from each, (K, B): must not depend on the particle's own cost, or the gradient is biased.
    :param max_ratio: at which importance ratios are truncated (Ionides 2008); a bias against less variance.
    :param clip_ratio: ε of PPO's clipped ratios (Schulman et al. 2017), see `weighted`; None: not clipped.
    :param token_log_prior: log p0 of each token of the text, (K, B, T), 0 after the end; likewise `token_log_guide`. None
        if the programs have another number of texts than one.
    :param prefixes: scores all prefixes of the texts; costs a reward call for each. None likewise.
    """

    prompts: Prompts
    log_prior: Float[Tensor, "K B"]
    log_likelihood: Float[Tensor, "K B"]
    log_guide: Float[Tensor, "K B"]
    log_proposal: Float[Tensor, "K B"] | None
    estimate_log_z: Callable[[Tensor, Prompts], Tensor]
    baseline: Callable[[Tensor, Tensor], Tensor]
    max_ratio: float = math.inf
    clip_ratio: float | None = None
    token_log_prior: Float[Tensor, "K B T"] | None = None
    token_log_guide: Float[Tensor, "K B T"] | None = None
    token_log_proposal: Float[Tensor, "K B T"] | None = None
    prefixes: "Callable[[], Prefixes] | None" = None

    @property
    def log_joint(self) -> Float[Tensor, "K B"]:
        return self.log_prior + self.log_likelihood

    @property
    def log_weight(self) -> Float[Tensor, "K B"]:
        """log of p(x, evidence) / q(x)."""
        return self.log_joint - self.log_guide

    @cached_property
    def log_z(self) -> Float[Tensor, "*K B"]:
        """Estimate of log Z, (B,) or (K, B); -inf where no draw was possible so far. Asking for it moves a moving one."""
        log_proposal = self.log_guide if self.log_proposal is None else self._known(self.log_proposal)
        return self.estimate_log_z(self.log_joint - log_proposal, self.prompts)

    @cached_property
    def ratio(self) -> Float[Tensor, "K B"]:
        """Importance ratio q/b of guide and proposal, truncated; 1 on-policy."""
        if self.log_proposal is None:
            return torch.ones_like(self.log_guide)
        return (self.log_guide - self._known(self.log_proposal)).exp().clamp_max(self.max_ratio)

    @cached_property
    def token_ratio(self) -> Float[Tensor, "K B T"]:
        """The same of each token given those before it."""
        assert self.token_log_guide is not None
        if self.token_log_proposal is None:
            return torch.ones_like(self.token_log_guide)
        return (self.token_log_guide - self._known(self.token_log_proposal)).exp().clamp_max(self.max_ratio)

    def weighted(self, ratio: Float[Tensor, "*K"], cost: Float[Tensor, "*K"]) -> Float[Tensor, "*K"]:
        """ratio · cost, but 0 where the ratio has already moved by more than `clip_ratio` the way that the cost asks for: the
        gradient of PPO's min(ratio · A, clip(ratio) · A) with A = -cost."""
        if self.clip_ratio is None:
            return ratio * cost
        moved = torch.where(cost < 0, ratio > 1 + self.clip_ratio, ratio < 1 - self.clip_ratio)
        return torch.where(moved, 0.0, ratio * cost)

    def _known(self, log_proposal: Float[Tensor, "*K"]) -> Float[Tensor, "*K"]:
        if bool(log_proposal.isnan().any()):
            raise ValueError(
                "this objective needs importance ratios, and the probability under which replayed texts were drawn is not "
                "known: use trajectory_balance, vargrad or subtb with a Replay"
            )
        return log_proposal

    def require_particles(self, name: str) -> None:
        if len(self.log_guide) < 2:
            raise ValueError(
                f"{name} compares the texts of a prompt with each other: give num_particles of at least 2, or use "
                "trajectory_balance or reverse_kl with baseline=MovingAverage()"
            )

    def require_on_policy(self, name: str) -> None:
        if self.log_proposal is not None:
            raise ValueError(
                f"{name} is defined for the guide's own draws and cannot use others; off-policy use an f-divergence, "
                "trajectory_balance or vargrad"
            )


@dataclass(frozen=True)
class Estimate:
    """An objective's value and gradient, as estimated from K particles.

    :param value: of each prompt, (B,); what is minimised is their sum.
    :param coefficient: of the score function: ∇ value_b = mean_k coefficient_kb · ∇ log q(x_kb), (K, B), or of each token's
        own, (K, B, T).
    :param end_coefficient: the same of the log-probability that the text ends at each position instead, or None.
    """

    value: Float[Tensor, "B"]
    coefficient: Float[Tensor, "K B *T"]
    end_coefficient: Float[Tensor, "K B T"] | None = None


@dataclass(frozen=True)
class Prefixes:
    """The outcomes that end a text after its first i tokens, i = 0 ... T, each with its log weight.

    :param log_weight: log of p(x_≤i ⊤, evidence) / q(x_≤i ⊤), (K, B, T + 1), nats; the last is of the whole, truncated text.
    :param valid: (K, B, T + 1), False beyond the text's end.
    """

    log_weight: Float[Tensor, "K B T1"]
    valid: Bool[Tensor, "K B T1"]


def scored(terms: Terms, cost: Float[Tensor, "K B"], value: Float[Tensor, "K B"]) -> Estimate:
    """The estimate E_q[cost · ∇ log q] less a baseline, off-policy by importance ratios.

    :param value: whose mean under q is the objective's value, (K, B)."""
    ratio = terms.ratio
    return Estimate((ratio * value).mean(0), terms.weighted(ratio, cost - terms.baseline(cost, ratio)))
