"""Exact inference by enumeration, for tiny vocabularies: the oracle that everything else is held against."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_lm.infer.traces.enumerated import EnumeratedSites, enumerate_sites


@dataclass(frozen=True)
class EnumeratedPosterior(EnumeratedSites):
    """A posterior as a table over all N values of its latent sites, for each of B prompts.

    All log-probabilities are float64, in nats, and differentiable in the weights of model and guide: the gradient of
    any objective is `torch.autograd.grad` of a formula in them.

    :param latents: site name -> (N, B, ...).
    :param log_joint: log p(z, evidence | prompt), (N, B); `log_q` likewise, under the guide, or None.
    :param records: what the model recorded, (N, B, ...).
    """

    @property
    def log_z(self) -> Float[Tensor, "B"]:
        """log Σ_z p(z, evidence), (B,)."""
        return self.log_joint.logsumexp(0)

    @property
    def log_posterior(self) -> Float[Tensor, "N B"]:
        return self.log_joint - self.log_z

    @property
    def kl_q_p(self) -> Float[Tensor, "B"]:
        """KL(q ‖ posterior), (B,)."""
        return kl(self._guide(), self.log_posterior)

    @property
    def kl_p_q(self) -> Float[Tensor, "B"]:
        """KL(posterior ‖ q), (B,)."""
        return kl(self.log_posterior, self._guide())

    @property
    def elbo(self) -> Float[Tensor, "B"]:
        """E_q[log p(z, evidence) - log q(z)] = log Z - KL(q ‖ posterior), (B,)."""
        return -kl(self._guide(), self.log_joint)

    def _guide(self) -> Float[Tensor, "N B"]:
        if self.log_q is None:
            raise ValueError("this needs a guide: enumerate_posterior(model, guide, prompts)")
        return self.log_q


def enumerate_posterior(
    model: Callable[..., Any], guide: Callable[..., Any] | None, prompts: Any
) -> EnumeratedPosterior:
    """Runs the model over every value of its latent sites, and the guide at the same values.

    The latent sites must have finite supports (texts over tiny vocabularies, Categorical, Bernoulli). All sites must lie
    in the prompt plate and in no other.

    :raises ValueError: if a latent site cannot be enumerated, or there are too many values.
    """
    return EnumeratedPosterior(**vars(enumerate_sites(model, guide, prompts)))


def kl(log_a: Float[Tensor, "N *B"], log_b: Float[Tensor, "N *B"]) -> Float[Tensor, "*B"]:
    """Σ_z a (log a - log b) over the first dimension, nats; a zero of `a` counts nothing."""
    none = log_a == -torch.inf
    share = torch.where(none, 0.0, log_a)  # its gradient, too, is nothing there, where that of 0 · log 0 is NaN
    return torch.where(none, 0.0, share.exp() * (share - torch.where(none, 0.0, log_b))).sum(0)
