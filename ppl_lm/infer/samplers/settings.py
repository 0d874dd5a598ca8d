"""`SMCSettings`: how texts grow in SMC, and how their populations are resampled."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index

from ppl_lm.infer.draws import Draws
from ppl_lm.infer.samplers.resampling import Rule, systematic
from ppl_lm.infer.samplers.twist import PriorPower, Twist
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
    :param at: the numbers of tokens after which a population may be resampled and is moved, and a twist that is a function is
        asked of open texts; between them its answer stands. None: after each token. `frozen` finds them in a pilot.
    :param moves: how often each text is moved after each number of tokens in `at`, whether it was resampled then or not: its
        end is drawn anew by the prior from a place uniform among its tokens, and accepted so that p0 ψ_t stays invariant.
        (Moves made only where the weights are uneven would bias the estimate of Z.)
    :param checker: the proposal's next tokens are those that it allows, by adaptive weighted rejection: it is asked of a few
        tokens of each text and never of the whole vocabulary. The model must have the
        checker as evidence.
    :raises ValueError: on numbers out of range, candidates without a twist, a checker with `expand`, or moves without `at` and
        a twist, or with a checker."""

    twist: Twist | None = None
    candidates: int | None = None
    expand: int = 1
    resample: Rule = systematic
    threshold: float = 0.5
    at: Sequence[int] | None = None
    moves: int = 0
    checker: Checker | None = None

    def __post_init__(self) -> None:
        if self.at is not None:
            object.__setattr__(self, "at", _numbers(self.at))
        for name in ("expand", "moves") if self.candidates is None else ("expand", "moves", "candidates"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}={getattr(self, name)!r}; give a whole number")
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
        if self.candidates is not None and isinstance(self.twist, PriorPower):
            raise ValueError(
                "candidates= are those of whom a twist is asked; a power of the prior is known of all tokens"
            )
        if self.at is not None and (self.expand > 1 or not all(n >= 1 for n in self.at)):
            raise ValueError(
                f"at={self.at!r} with expand={self.expand}; give numbers of tokens, at least 1, such as (8, 16, 32), and "
                "expand=1: what has expanded is chosen from at every token"
            )
        if self.moves < 0 or (self.moves and (self.at is None or self.twist is None or self.checker is not None)):
            raise ValueError(
                f"moves={self.moves}; give none, or after how many tokens (at=) and by which twist: they keep p0 ψ_t, "
                "without a checker, whose weights are random"
            )

    def after(self, tokens: int) -> bool:
        """Whether populations may be resampled after so many tokens."""
        return self.at is None or tokens in self.at

    def moves_later(self, tokens: int) -> bool:
        """Whether texts are moved after so many tokens, or more."""
        return self.moves > 0 and self.at is not None and any(n >= tokens for n in self.at)

    def frozen(self, pilot: Draws, share: float = 0.5) -> "SMCSettings":
        """These settings with `at`, the tokens after which at least this share of a pilot's runs were resampled (of their
        prompts, the most). What is fixed so for runs to come does not look at their texts.

        :param pilot: draws of `smc`.
        :raises ValueError: if the pilot has no `resampled` among its stats, or no token had that share."""
        if "resampled" not in pilot.stats:
            raise ValueError("these draws do not say when they were resampled; give those of smc()")
        rate = pilot.stats["resampled"].double().mean((0, 1)).amax(0)  # (T,)
        at = tuple((rate >= share).nonzero()[:, 0].add(1).tolist())
        if not at:
            raise ValueError(
                f"no token after which {share:.0%} of the pilot's runs were resampled; give a smaller share"
            )
        return replace(self, at=at)

    def require_fits(self, guide: object) -> None:
        """:raises ValueError: if both a guide and the twist are to propose."""
        if self.candidates is not None and guide is not None:
            raise ValueError(
                f"candidates={self.candidates} is of the proposal that a twist makes; leave it out, or the guide"
            )


def _numbers(at: Iterable[int]) -> tuple[int, ...]:
    """Numbers of tokens, whatever holds them.

    :raises ValueError: if they are none."""
    try:
        return tuple(index(n) for n in at)
    except TypeError:
        raise ValueError(f"at={at!r}; give numbers of tokens, at least 1, such as (8, 16, 32)") from None
