"""Verdicts on draws: whether means over them are the posterior's."""

import math

from ppl_lm.criticism.diagnoses.verdicts import Verdict
from ppl_lm.criticism.weights import khat_threshold
from ppl_lm.infer.draws import TOGETHER

CONVERGED = 1.05  # R-hat below which chains are taken to agree
MIN_DRAWS = 100  # draws by which weights or chains can be judged at all
MIN_RUNS = 8  # independent runs by which draws that came about together can be judged
MIN_ESS = 30  # independent draws that a standard error needs
CODES_OF_DRAWS = (
    "exact",
    "good",
    "unknown",
    "unreliable",
    "not_converged",
    "impossible",
)  # codes of `judge_draws`, best first


def judge_draws(
    *,
    kind: str,
    num_samples: int,
    possible: float,
    ess: float | None,
    khat: float | None,
    r_hat: float | None,
    kl_q_p: float | None,
    chains: int = 1,
    lacks_support: bool = False,
) -> Verdict:
    """The verdict on the draws of one sampler and prompt: whether means over them are the posterior's.

    :param kind: of `Draws`.
    :param possible: share of the draws that the posterior allows.
    :param lacks_support: of `Draws`.
    :param chains: of runs how many there are, which alone are independent, by which alone their errors are known."""
    if kind == "exact":
        return Verdict("exact", f"{num_samples} exact, independent posterior draws: use them as they are.")
    if not possible:
        return Verdict(
            "impossible",
            f"None of {num_samples} draws is possible under the posterior: nothing is known of it. Draw more, loosen the "
            "constraint, or give a closer guide.",
        )
    worth = "" if ess is None else f"worth {ess:.0f} independent ones"
    if kind == "chains":
        if r_hat is None:
            why = "too few draws a chain, or none of their numbers ever changes"
            return Verdict("unknown", f"Whether the chains agree cannot be told: {why}.")
        if not r_hat < CONVERGED:
            return Verdict(
                "not_converged",
                f"The chains do not agree (R-hat {r_hat:.2f}, to be below {CONVERGED}): these are not the posterior's draws "
                "yet. Run them longer, or give a closer guide.",
            )
        if ess is None or ess < MIN_ESS:
            return Verdict(
                "unreliable", f"The chains agree, but their {num_samples} draws are {worth}: run them longer."
            )
        return Verdict("good", f"The chains agree (R-hat {r_hat:.2f}): {num_samples} correlated draws, {worth}.")
    about = "at least" if lacks_support else "about"
    far = (
        "" if kl_q_p is None else f" Without weights their law is {about} {max(kl_q_p, 0):.2f} nats from the posterior."
    )
    if possible < 1:
        far = f" Without weights {1 - possible:.0%} of them are impossible under the posterior."
    if kind in TOGETHER and kl_q_p is not None:
        far = f" A text picked from a run by its weight is within {max(kl_q_p, 0):.2f} nats of the posterior."
        if kl_q_p == math.inf:
            far = " In some runs no text at all was possible."
    if kind in TOGETHER and chains < MIN_RUNS:
        return Verdict("unknown", f"What {chains} runs are worth cannot be told from so few; make {MIN_RUNS} or more.")
    if kind in TOGETHER and ess is None:
        return Verdict("unknown", f"None of their numbers ever changes: what {chains} runs are worth cannot be told.")
    if num_samples < MIN_DRAWS:
        return Verdict(
            "unknown", f"{num_samples} draws are too few to judge their weights by; draw {MIN_DRAWS} or more."
        )
    if khat is not None and khat >= khat_threshold(num_samples):
        return Verdict(
            "unreliable",
            f"k-hat {khat:.2f} says that the weights have a heavy tail: even weighted, the draws under-cover part of the "
            f"posterior. Give a closer guide.{far}",
        )
    if ess is None or ess < MIN_ESS:
        return Verdict(
            "unreliable", f"{num_samples} weighted draws are {worth}: draw more, or give a closer guide.{far}"
        )
    if lacks_support:
        return Verdict(
            "unknown",
            "The guide's support is truncated (top-p, min-p or top-k): by their weights these draws stand for what the "
            "posterior has there, how much that is they do not show, and log Z is a lower bound. Diagnose the guide, or give "
            f"one without the truncation.{far}",
        )
    return Verdict("good", f"With their weights the {num_samples} draws are {worth} of the posterior.{far}")
