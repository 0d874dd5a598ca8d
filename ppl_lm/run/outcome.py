"""How a fit ended, in words, and the verdict on a fit that went wrong."""

import math
from dataclasses import replace

from ppl_lm.criticism.diagnoses.verdicts import Verdict
from ppl_lm.run.fitting.best_guide import WINDOW
from ppl_lm.run.fitting.loop import Fit
from ppl_lm.run.run_record import FailedFit

REMEDY = "Lower --learning-rate, or raise --particles."
OF_RATES = ("worse_than_prior", "collapsed")  # verdicts whose remedies speak of the learning rate


def remedy(fit: Fit) -> str:
    """What to do about a fit that went wrong: of so few steps as the mean of the gain is taken over nothing can be said."""
    if fit.steps >= WINDOW:
        return REMEDY
    if fit.outcome == "diverged":
        return "Check the size of the reward, and of --beta: after so few steps no more can be said."
    return (
        f"{fit.steps} steps are too few to tell what is wrong: give {WINDOW} or more (--time-limit, --max-steps), or make them "
        "faster with fewer prompts, shorter texts or fewer --particles."
    )


def in_words(fit: Fit) -> str:
    if fit.outcome == "diverged":
        return f"diverged: {_duration(fit)} a gradient was not finite. Kept is the best guide seen, {_kept(fit)}. {remedy(fit)}"
    if fit.outcome == "worse_than_prior":
        return f"worse_than_prior: {_worse(fit)} {remedy(fit)}"
    ended = "interrupted" if fit.outcome == "interrupted" else "fitted"
    return f"{ended} {_duration(fit)}; the guide kept is {_kept(fit)}"


def verdict_after(fit: Fit | FailedFit, verdict: Verdict) -> Verdict:
    """The verdict on a fit and its guide: that on the guide, `verdict`, unless the fit ended further from the posterior than
    the prior was: that it did, with what is said of the guide that was kept. After a handful of steps no remedy speaks of
    learning rates."""
    if isinstance(fit, FailedFit):
        return verdict
    if fit.outcome != "worse_than_prior":
        few = fit.steps < WINDOW and verdict.code in OF_RATES
        return replace(verdict, remedy=remedy(replace(fit, outcome="finished"))) if few else verdict
    worse = _worse(fit)
    sentence = f"{worse[:1].upper()}{worse[1:]} Of the guide that was kept: {verdict.code}. {verdict.sentence}"
    return Verdict("worse_than_prior", sentence, remedy(fit))


def _worse(fit: Fit) -> str:
    what_fell, gain = _measured(fit, fit.last_gain)
    lost = f"has {what_fell} {gain:+.2f} nats against the prior's" if math.isfinite(gain) else "is lost"
    return (
        f"{_duration(fit)} the last guide is further from the posterior than the prior: it {lost}. Kept is the best guide "
        f"seen, {_which(fit)}."
    )


def _kept(fit: Fit) -> str:
    what_fell, gain = _measured(fit, fit.gain)
    return f"{_which(fit)}, {what_fell} {gain:+.2f} ± {fit.gain_se:.2f} nats a prompt against the prior's"


def _measured(fit: Fit, gain: float) -> tuple[str, float]:
    """What was watched, and how it differs from the prior's: an ELBO rises, a KL falls."""
    return ("KL(posterior ‖ guide)", -gain) if fit.covers else ("ELBO", gain)


def _which(fit: Fit) -> str:
    return {"last": "the last one", "best": f"that of step {fit.kept_step}", "start": "the one that it began with"}[
        fit.kept
    ]


def _duration(fit: Fit) -> str:
    return f"after {fit.steps} steps in {fit.seconds:.0f} s"
