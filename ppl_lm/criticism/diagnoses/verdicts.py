"""Verdicts: what the figures amount to, in a word, a sentence and something to do."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppl_lm.criticism.weights import khat_threshold
from ppl_lm.infer.tables import as_html

GOOD_SHARE = 0.15  # of the prior's distance from the posterior that a good guide may be away, error included
GOOD_NATS = 0.125  # or this much in absolute terms
COVER = 2.0  # times as far KL(posterior ‖ guide) may be
MISSED = 0.03  # posterior mass, error included, above which a guide that hardly ever draws it misses it
REST = 0.25  # share of a guide's distance that the mass it misses does not explain, below which it only misses mass
LOST = 0.1  # that a collapsed guide has lost at the least
COLLAPSED = (
    0.15,
    0.5,
)  # share of the posterior's entropy below which the guide's is a collapse; where it has lost MOST, too
MOST = 0.6
SEEN = 30  # posterior draws that the prior's must be worth before any guide can be called good
FAILED = ("collapsed", "misses_mass", "worse_than_prior")
CODES = ("good", "poor", "collapsed", "misses_mass", "worse_than_prior", "unknown")


@dataclass(frozen=True, repr=False)
class Verdict:
    """:param code: of a guide one of `CODES`, of draws one of `CODES_OF_DRAWS`.
    :param sentence: what was found, with its figures.
    :param remedy: what to do about it; "" where nothing needs to be done."""

    code: str
    sentence: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.code}: {self.sentence} {self.remedy}".rstrip()

    def __repr__(self) -> str:
        return f"Verdict({self})"

    def _repr_html_(self) -> str:
        import pandas as pd

        row = {"found": self.sentence, "what to do": self.remedy}
        return as_html(pd.DataFrame([row], index=pd.Index([self.code], name="verdict")), "Verdict")


def good_limit(was: float) -> float:
    """Nats that a good guide may be away, error included, where the prior is `was` nats away: KL(guide ‖ posterior), and COVER
    times as much KL(posterior ‖ guide), which alone decides under a hard constraint."""
    return max(GOOD_SHARE * was, GOOD_NATS)


def judge(
    *,
    kl_q_p: float,
    kl_q_p_se: float,
    kl_p_q: float,
    kl_p_q_se: float,
    kl_prior_p: float,
    kl_prior_p_se: float,
    kl_p_prior: float,
    kl_p_prior_se: float,
    elbo_gain: float | None,
    elbo_gain_se: float | None,
    missing: float,
    missing_se: float,
    entropy: float,
    entropy_posterior: float,
    log_likelihood: float,
    log_likelihood_se: float,
    log_likelihood_prior: float,
    log_likelihood_posterior: float,
    possible: float,
    seen: float,
    khat: float | None,
    num_samples: int,
    bounded: bool = True,
    **_: object,
) -> Verdict:
    """The verdict on one guide and prompt, from the figures of `diagnosis.json`, all in nats.

    In this order: `collapsed`, with a seventh of the posterior's entropy, or half where it has lost most of the mass, and the
    evidence at least as likely; `worse_than_prior`, with ELBO(q) < ELBO(prior), which needs no log Z, unless all that is wrong
    is the mass that it misses: a guide that is right but for a mass m is -log(1 - m) from the posterior; `misses_mass`,
    also where a text of the posterior is impossible to the guide, whatever its mass;
    `unknown`, where the prior's draws do not show the posterior, so that nothing would show what the guide misses, unless it is
    too far off whatever that is; `good`, where KL(guide ‖ posterior) + 2 SE is below 15% of the prior's distance or 0.125 nats,
    KL(posterior ‖ guide) below twice that, and the mass missed, error included, below a tenth (else `unknown`); else `poor`.

    What is stated rests on what the draws show. A text that neither N draws of the guide nor N of the prior hold is not in it:
    one in N of the guide's may be arbitrarily bad, and where the likelihood has no declared bound one in N of the prior's may
    have most of the posterior's mass.

    Where the posterior rules texts out, KL(guide ‖ posterior) is infinite for any guide that draws one: then the distances are
    KL(posterior ‖ ·).

    :param missing: posterior mass that the guide hardly ever draws, see `Pool.missing`.
    :param log_likelihood: mean of the guide's draws, those that are possible; likewise of the prior's and of the posterior.
    :param seen: how many posterior draws the prior's are worth, see `Pool.seen`.
    :param bounded: whether the likelihood has a declared bound: without one, `seen` is an effective sample size."""
    hard = kl_prior_p == math.inf
    if hard:
        near, was = (kl_p_q, kl_p_q_se), (kl_p_prior, kl_p_prior_se)
        name, further = "KL(posterior ‖ guide)", kl_p_q - kl_p_prior > 3 * math.hypot(kl_p_q_se, kl_p_prior_se)
        distance = f"{possible:.0%} of its draws meet the constraint. "
    else:
        near, was = (kl_q_p, kl_q_p_se), (kl_prior_p, kl_prior_p_se)
        name, distance = "KL(guide ‖ posterior)", ""
        further = elbo_gain is not None and elbo_gain_se is not None and elbo_gain < -3 * elbo_gain_se
    distance += f"{name} is {_pm(*near)} nats, the prior's was {_pm(*was)}"
    lost = missing - 2 * missing_se
    mass = (
        f"{missing:.0%} of the posterior's mass is in texts that it draws less than a hundredth as often as it should"
    )
    low = COLLAPSED[missing > MOST] * entropy_posterior
    if entropy < low and lost > LOST and log_likelihood >= log_likelihood_posterior:
        return Verdict(
            "collapsed",
            f"The guide draws few texts over and over: its entropy is {entropy:.2f} nats, the posterior's "
            f"{entropy_posterior:.2f}; {mass}. {distance}.",
            "Fit it to the posterior (reverse or forward KL), not to the reward alone, with a lower learning rate.",
        )
    rest = near[0] + math.log1p(-min(missing, 1 - 1e-9))
    away = log_likelihood < log_likelihood_prior - 3 * log_likelihood_se or rest > was[0]
    if further and away and rest >= REST * near[0]:
        return _worse(distance, elbo_gain, elbo_gain_se, hard)
    if kl_p_q == math.inf:
        return Verdict(
            "misses_mass",
            f"The guide's support is truncated: it can never draw some of the posterior's texts, so that KL(posterior ‖ guide) "
            f"is infinite; {mass}. {distance}.",
            "Give it without the truncation (top-p, min-p, top-k, a mask), or beside the prior (--guide mixture).",
        )
    if lost > MISSED:
        return Verdict(
            "misses_mass",
            f"The guide misses mass: {mass}. {distance}.",
            "Fit it by forward KL (--objective forward_kl), with more particles; or draw with smc, or with rejection where the "
            "likelihood has a bound.",
        )
    if further:
        return _worse(distance, elbo_gain, elbo_gain_se, hard)
    tail = ""
    if khat is not None and khat >= khat_threshold(num_samples):
        tail = f" k-hat {khat:.2f} says that its weights have a heavy tail: do not use them weighted."
    limit = good_limit(was[0])
    bound, cover = near[0] + 2 * near[1], kl_p_q + 2 * kl_p_q_se
    far = (
        not hard and near[0] - 2 * near[1] > limit
    )  # what was not seen can only add to log Z, and with it to this distance
    if seen < SEEN and not far:
        return Verdict(
            "unknown",
            f"{distance}, as far as can be seen: the prior's {num_samples} draws are worth {seen:.0f} of the posterior's, too "
            f"few to show what the guide never visits.{tail}",
            f"Give about {math.ceil(num_samples * SEEN / max(seen, 1))} draws (--num-samples), or compare it with smc's.",
        )
    close, unseen = (hard or bound <= limit) and cover <= COVER * limit, missing + 2 * missing_se
    if close and unseen > LOST:
        return Verdict(
            "unknown",
            f"{distance}, but up to {unseen:.0%} of the posterior's mass may be in texts that it hardly ever draws: too few "
            f"draws to tell.{tail}",
            f"Give {4 * num_samples} draws (--num-samples), or compare it with smc's.",
        )
    if close:
        use = "Drop the draws that break the constraint." if possible < 1 else "Use its draws as they are."
        but = f", as far as {num_samples} draws of the prior show: no bound of the likelihood is declared" * (
            not bounded
        )
        return Verdict(
            "good",
            f"{distance}: at most {max(0, bound):.{2 if near[1] >= 0.005 else 3}f} nats, with 97.5% confidence{but}.{tail}",
            use,
        )
    if seen < SEEN:
        tail = f" More may lie where the prior's draws, worth {seen:.0f} of the posterior's, did not show it.{tail}"
    return Verdict(
        "poor",
        f"{distance}; KL(posterior ‖ guide) {kl_p_q:.2f}. Still some way off.{tail}",
        "Fit longer, or with more particles" + ("." if tail else "; until then weight its draws (importance)."),
    )


def _pm(value: float, error: float) -> str:
    digits = 3 if error < 0.005 else 2
    return f"{round(value, digits) + 0.0:.{digits}f} ± {error:.{digits}f}"  # + 0.0: no minus before a zero


def of_prompts(average: Verdict, verdicts: Sequence[Verdict], names: Sequence[str]) -> Verdict:
    """The verdict on several prompts: that on the averages of their figures; but what fails on one of them is not good.

    :param names: the prompts, in words."""
    failed = [i for i, verdict in enumerate(verdicts) if verdict.code in FAILED]
    if average.code != "good" or not failed:
        return average
    which = verdicts[failed[0]]
    return Verdict(
        "poor",
        f"On average good ({average.sentence}) But of {len(verdicts)} prompts {len(failed)} went wrong, first "
        f"{names[failed[0]]!r}: {which.code}. {which.sentence}",
        which.remedy,
    )


def doubt(diagnosis: Mapping[str, Any]) -> str:
    """Why figures are worth less than their standard errors say, in a sentence; "" where they are not.

    :param diagnosis: `diagnosis.json`, of a guide or of draws."""
    if "kind" in diagnosis:
        if diagnosis["verdict"] not in ("unknown", "unreliable", "not_converged"):
            return ""
        return (
            "These draws are not to be relied on: what is said of the posterior below, with its errors, is not either."
        )
    seen = diagnosis.get("seen")
    if seen is None or seen >= SEEN:
        return ""
    where = "After one of the prompts the" if len(diagnosis.get("prompts", ())) > 1 else "The"
    return (
        f"{where} prior's draws are worth {seen:.0f} of the posterior's: log Z and every distance, with their errors, are of "
        "what these draws show, and the posterior may have more."
    )


def _worse(distance: str, gain: float | None, gain_se: float | None, hard: bool) -> Verdict:
    by = (
        ""
        if hard or gain is None or gain_se is None
        else f" (ELBO {gain:+.2f} ± {gain_se:.2f} nats against the prior's)"
    )
    return Verdict(
        "worse_than_prior",
        f"The guide is further from the posterior than the prior was{by}, whatever the reward says. {distance}.",
        "Lower the learning rate, raise the particles, and check the reward's sign.",
    )
