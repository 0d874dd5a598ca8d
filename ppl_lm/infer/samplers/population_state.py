"""What a population of texts is between two tokens, and what each token did to it."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Population:
    """K texts in each of P populations, a population being one run for one prompt: what the next step needs.

    :param live: whether a text is still open.
    :param log_w: γ_t(x_≤t) / q, whose mean over a population is an unbiased estimate of Σ γ_t; nats.
    :param log_target: log γ_t(x_≤t), γ_t = p0(x_≤t) ψ_t(x_≤t) the intermediate target that the weight is for, nats.
    :param token_log_p: log p0 of each token.
    :param slot: where a planted text is, (P,); None where there is none.
    """

    x: Int[Tensor, "K P T"]
    live: Bool[Tensor, "K P"]
    log_w: Float[Tensor, "K P"]
    log_target: Float[Tensor, "K P"]
    token_log_p: Float[Tensor, "K P T"]
    slot: Int[Tensor, "P"] | None = None


@dataclass(frozen=True)
class StepInfo:
    """What one step did: what a diagnostic needs.

    :param ess: effective sample size (Σ w)² / Σ w² of the weights with the new token, before they are resampled; with `expand`,
        of all continuations. 0 of a population without any weight.
    :param resampled: whether the population was resampled then.
    :param log_z_increment: log of its mean weight after the step less that before it, nats.
    :param row: of each text that is still open, in order, which of the texts that were open before the step it goes on from."""

    ess: Float[Tensor, "P"]
    resampled: Bool[Tensor, "P"]
    log_z_increment: Float[Tensor, "P"]
    row: Int[Tensor, "n"]


@dataclass(frozen=True)
class History:
    """`StepInfo` of every token; once all texts have ended, that of a step that changes nothing."""

    ess: Float[Tensor, "P T"]
    resampled: Bool[Tensor, "P T"]
    log_z_increment: Float[Tensor, "P T"]
