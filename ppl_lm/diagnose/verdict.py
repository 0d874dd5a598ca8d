"""What the figures mean, in words."""

import math
from dataclasses import dataclass

from ppl_lm.diagnose.weights import khat_threshold

GOOD_SHARE = 0.2  # of KL(prior ‖ posterior): what a good guide may leave
GOOD_NATS = 0.1  # or this much in absolute terms
CONVERGED = 1.05  # R-hat below which chains are taken to agree
FEWEST = 100  # draws by which weights or chains can be judged at all
RUNS = 8  # independent runs by which interacting draws can be judged
WORTH = 30  # independent draws that a standard error needs
DRAWN = ("exact", "good", "unknown", "unreliable", "not_converged", "impossible")  # codes of `judge_drawn`, best first


@dataclass(frozen=True)
class Verdict:
    """`code` is one of `good`, `poor`, `worse_than_prior`, `unknown`, of draws one of `DRAWN`."""

    code: str
    sentence: str


def judge(
    *,
    kl_q_p: float,
    kl_q_p_se: float,
    kl_p_q: float,
    kl_prior_p: float,
    gain: float,
    gain_se: float,
    upper_exact: bool,
    khat: float | None,
    num_samples: int,
) -> Verdict:
    """The verdict on one guide and prompt.

    :param gain: ELBO(q) - ELBO(prior) in nats; needs no log Z, and rises only if q comes closer to the posterior.
    """
    if gain < -3 * gain_se:
        return Verdict(
            "worse_than_prior",
            f"The guide is further from the posterior than the prior was (ELBO {gain:+.2f} ± {gain_se:.2f} nats against "
            "the prior), whatever the reward says. Lower the learning rate, or raise the particles.",
        )
    tail = (
        "" if khat is None or khat < khat_threshold(num_samples) else f" k-hat {khat:.2f} says that its weights have "
    )
    tail = tail and tail + "a heavy tail: it under-covers part of the posterior."
    if not upper_exact:
        return Verdict(
            "unknown",
            f"The guide's own draws put it about {max(kl_q_p, 0):.2f} nats from the posterior, but they cannot show mass "
            f"that it never visits; exact draws (a likelihood with a log_bound, enough --num-samples) would settle it.{tail}",
        )
    bound = kl_q_p + 2 * kl_q_p_se
    distance = f"KL(guide ‖ posterior) is {kl_q_p:.2f} ± {kl_q_p_se:.2f} nats, KL(posterior ‖ guide) {kl_p_q:.2f}; the "
    distance += f"prior was {kl_prior_p:.2f} nats away"
    if bound <= max(GOOD_SHARE * kl_prior_p, GOOD_NATS) and kl_p_q <= max(2 * GOOD_SHARE * kl_prior_p, 2 * GOOD_NATS):
        use = "use its draws as they are, " + ("but not weighted." if tail else "or weighted for exactness.")
        return Verdict("good", f"{distance}. Close: {use}{tail}")
    return Verdict(
        "poor",
        f"{distance}. Still some way off: {'' if tail else 'weight its draws, '}fit longer, or raise the particles.{tail}",
    )


def judge_cover(
    *, kl_p_q: float, kl_p_q_se: float, kl_p_prior: float, kl_p_prior_se: float, possible: float, upper_exact: bool
) -> Verdict:
    """The verdict where the posterior rules texts out, and KL(guide ‖ posterior) is infinite for any guide that draws one.

    :param possible: share of the guide's draws that the posterior allows."""
    distance = (
        f"{possible:.0%} of its draws meet the constraint. KL(posterior ‖ guide) is {kl_p_q:.2f} ± {kl_p_q_se:.2f} nats, the "
        f"prior's was {kl_p_prior:.2f} ± {kl_p_prior_se:.2f}"
    )
    if not upper_exact:
        return Verdict("unknown", f"{distance}, from weighted draws, which cannot show mass that they never visit.")
    if kl_p_q - kl_p_prior > 3 * (kl_p_q_se + kl_p_prior_se):
        return Verdict(
            "worse_than_prior",
            f"{distance}: the guide covers less of it. Lower the learning rate, or raise the particles.",
        )
    if kl_p_q + 2 * kl_p_q_se <= max(2 * GOOD_SHARE * kl_p_prior, 2 * GOOD_NATS):
        return Verdict("good", f"{distance}. Close: drop the draws that break it, or weight them for exactness.")
    return Verdict("poor", f"{distance}. Still some way off: weight its draws, fit longer, or raise the particles.")


def judge_drawn(
    *,
    kind: str,
    num_samples: int,
    possible: float,
    ess: float | None,
    khat: float | None,
    r_hat: float | None,
    kl_q_p: float | None,
    chains: int = 1,
) -> Verdict:
    """The verdict on the draws of one sampler and prompt: whether means over them are the posterior's.

    :param kind: `exact`, `markov`, `interacting` or `weighted`.
    :param possible: share of the draws that the posterior allows.
    :param chains: of interacting draws the independent runs, by which alone their errors are known."""
    if kind == "exact":
        return Verdict("exact", f"{num_samples} exact, independent posterior draws: use them as they are.")
    if not possible:
        return Verdict(
            "impossible",
            f"None of {num_samples} draws is possible under the posterior: nothing is known of it. Draw more, loosen the "
            "constraint, or give a closer guide.",
        )
    worth = "" if ess is None else f"worth {ess:.0f} independent ones"
    if kind == "markov":
        if r_hat is None:
            why = "too few draws a chain, or none of their numbers ever changes"
            return Verdict("unknown", f"Whether the chains agree cannot be told: {why}.")
        if not r_hat < CONVERGED:
            return Verdict(
                "not_converged",
                f"The chains do not agree (R-hat {r_hat:.2f}, to be below {CONVERGED}): these are not the posterior's draws "
                "yet. Run them longer, or give a closer guide.",
            )
        if ess is None or ess < WORTH:
            return Verdict(
                "unreliable", f"The chains agree, but their {num_samples} draws are {worth}: run them longer."
            )
        return Verdict("good", f"The chains agree (R-hat {r_hat:.2f}): {num_samples} correlated draws, {worth}.")
    far = "" if kl_q_p is None else f" Without weights their law is about {max(kl_q_p, 0):.2f} nats from the posterior."
    if possible < 1:
        far = f" Without weights {1 - possible:.0%} of them are impossible under the posterior."
    if kind == "interacting" and kl_q_p is not None:
        far = f" A text picked from a run by its weight is within {max(kl_q_p, 0):.2f} nats of the posterior."
        if kl_q_p == math.inf:
            far = " In some runs no text at all was possible."
    if kind == "interacting" and chains < RUNS:
        return Verdict("unknown", f"What {chains} runs are worth cannot be told from so few; make {RUNS} or more.")
    if kind == "interacting" and ess is None:
        return Verdict("unknown", f"None of their numbers ever changes: what {chains} runs are worth cannot be told.")
    if num_samples < FEWEST:
        return Verdict("unknown", f"{num_samples} draws are too few to judge their weights by; draw {FEWEST} or more.")
    if khat is not None and khat >= khat_threshold(num_samples):
        return Verdict(
            "unreliable",
            f"k-hat {khat:.2f} says that the weights have a heavy tail: even weighted, the draws under-cover part of the "
            f"posterior. Give a closer guide.{far}",
        )
    if ess is None or ess < WORTH:
        return Verdict(
            "unreliable", f"{num_samples} weighted draws are {worth}: draw more, or give a closer guide.{far}"
        )
    return Verdict("good", f"With their weights the {num_samples} draws are {worth} of the posterior.{far}")
