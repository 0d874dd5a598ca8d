"""`SMCSettings`: how texts grow in SMC, and how their populations are resampled."""

from dataclasses import dataclass

from ppl_lm.infer.samplers.resampling import Rule, systematic
from ppl_lm.infer.samplers.twist import Twist
from ppl_lm.likelihood.checker import Checker


@dataclass(frozen=True)
class SMCSettings:
    """What `smc`, `conditional_smc` and `kernels.particle_gibbs` have in common; with none of them a particle's weight arises
    at its end alone, from the evidence.

    :param twist: a network from `twist_like` (its logits are log ψ_t), an automaton's mask, or a function such as
        `prefix_likelihood(model)`; see `ppl_lm.twists`.
    :param candidates: without a guide, of how many of the prior's likeliest tokens the proposal asks the twist; the others are
        proposed as the prior has them. None: all tokens of a network, none of a function.
    :param expand: how many next tokens each text is continued by before as many texts as there were are chosen among them: SMC
        steering, with resample=without_replacement (Lew et al. 2023).
    :param resample: multinomial, stratified, systematic or without_replacement, from `ppl_lm.resampling`.
    :param threshold: resample where the effective sample size is below this share of the particles: 0 never, above 1 always.
    :param checker: the proposal's next tokens are those that it allows, by adaptive weighted rejection: it is asked of a few
        tokens of each text and never of the whole vocabulary. The model must have the
        checker as evidence.
    :raises ValueError: on numbers out of range, candidates without a twist, or a checker with `expand`."""

    twist: Twist | None = None
    candidates: int | None = None
    expand: int = 1
    resample: Rule = systematic
    threshold: float = 0.5
    checker: Checker | None = None

    def __post_init__(self) -> None:
        if self.expand < 1:
            raise ValueError(f"expand={self.expand}; give at least 1")
        if self.checker is not None and (self.expand > 1 or not isinstance(self.checker, Checker)):
            raise ValueError(
                f"checker={self.checker!r} with expand={self.expand}; give a ppl_lm.likelihood.Checker, and expand=1: it "
                f"finds one "
                "next token of each text"
            )
        if not self.threshold >= 0:
            raise ValueError(
                f"threshold={self.threshold}; give a share of the particles: 0 never resamples, above 1 always"
            )
        if self.candidates is not None and (self.candidates < 1 or self.twist is None):
            raise ValueError(f"candidates={self.candidates}; give at least 1, and a twist to ask")

    def require_fits(self, guide: object) -> None:
        """:raises ValueError: if both a guide and the twist are to propose."""
        if self.candidates is not None and guide is not None:
            raise ValueError(
                f"candidates={self.candidates} is of the proposal that a twist makes; leave it out, or the guide"
            )
