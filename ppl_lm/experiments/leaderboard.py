"""One posterior, every way to draw from it, at the same number of tokens forwarded: how far the texts that come out are from
the truth, and what no budget mends."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_lm.experiments.lab import Result, panels, train
from ppl_lm.guides import twisted
from ppl_lm.infer.binding import Bound, bind
from ppl_lm.infer.draws import EQUAL, Draws
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.best_of_n_sampling import best_of_n
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.kernels import independence, particle_gibbs, suffix
from ppl_lm.infer.samplers.markov_chains import mcmc
from ppl_lm.infer.samplers.quasi_rejection_sampling import quasi_rejection
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.twists.fitting import fit_twist
from ppl_lm.infer.twists.functions import exact_twist, prefix_likelihood
from ppl_lm.lm import meter
from ppl_lm.lm.table import table_like, table_lm
from ppl_lm.models import tilted

BETA, BUDGET, REPEATS, CHAINS, PARTICLES = 0.2, 6000, 20, 16, 64
STEPS, SIZE, LENGTH = 600, 4, 5
NOT_THE_POSTERIOR = ("best of 8", "soft best of 8", "the guide alone", "local twist alone")


def balance(completions: list[str], **_: object) -> list[float]:
    """2 for as many a as b, less for each that is not matched; c is worth nothing."""
    return [2.0 - abs(text.count("a") - text.count("b")) - 0.5 * text.count("c") for text in completions]


def run(seed: int) -> Result:
    torch.manual_seed(seed)
    lm = table_lm(SIZE, LENGTH, concentration=1.0, seed=seed)
    target = bind(tilted, lm, reward=balance, beta=BETA)
    guide, twist = bind(twisted, lm, table_like(lm)), table_like(lm)
    with meter.measure() as fitting:  # few steps: a guide and a twist that are close, and not exact
        train(target, guide, [""], steps=STEPS, rate=0.05, num_particles=64, every=STEPS)
    with meter.measure() as learning:
        fit_twist(target, twist, [""], steps=STEPS, num_samples=64, learning_rate=0.05)
    alone = bind(twisted, lm, twist)
    truth = enumerate_posterior(target, None, [""])
    log_p, x, bound = truth.log_posterior[:, 0], truth.latents["x"][:, 0], 2 / BETA
    likelihood = prefix_likelihood(target)

    def chains(proposal: Bound | None, kernel: Callable[..., Any]) -> Callable[[int], Draws]:
        return lambda n: mcmc(
            target, proposal, [""], num_samples=max(2, n), warmup=max(1, n // 4), num_chains=CHAINS, kernel=kernel
        )

    def by_smc(**settings: Any) -> Callable[[int], Draws]:
        return lambda n: smc(target, None, [""], num_samples=PARTICLES, num_runs=n, settings=SMCSettings(**settings))

    methods: dict[str, tuple[int, Callable[[int], Draws]]] = {  # tokens spent on fitting, and draws from n
        "importance": (0, lambda n: importance(target, None, [""], num_samples=n)),
        "rejection": (0, lambda n: rejection(target, None, [""], num_samples=n, log_bound=bound)),
        "quasi-rejection": (0, lambda n: quasi_rejection(target, None, [""], num_samples=n, log_bound=bound - 2)),
        "best of 8": (0, lambda n: _unweighted(best_of_n(target, None, [""], num_samples=n))),
        "soft best of 8": (0, lambda n: _unweighted(best_of_n(target, None, [""], num_samples=n + 1, soft=True))),
        "independence MH": (0, chains(None, independence)),
        "suffix MH": (0, chains(None, suffix)),
        "particle Gibbs": (0, chains(None, particle_gibbs(8, SMCSettings(twist=likelihood)))),
        "SMC, likelihood": (0, by_smc(twist=likelihood)),
        "SMC, exact twist": (0, by_smc(twist=exact_twist(target, [""]), candidates=SIZE)),
        "SMC, learned twist": (learning.lm_tokens, by_smc(twist=twist)),
        "local twist alone": (
            learning.lm_tokens,
            lambda n: _unweighted(importance(target, alone, [""], num_samples=n)),
        ),
        "the guide alone": (fitting.lm_tokens, lambda n: _unweighted(importance(target, guide, [""], num_samples=n))),
        "importance, fitted guide": (fitting.lm_tokens, lambda n: importance(target, guide, [""], num_samples=n)),
    }
    rows = []
    for name, (spent, draw) in methods.items():
        count = _affordable(draw)
        laws, tokens = [], 0
        for _ in range(REPEATS):
            draws = draw(count)
            tokens += draws.cost.lm_tokens
            laws.append(_law(draws, x))
        each = torch.stack(laws)  # (repeats, N)
        tv = 0.5 * (each - log_p.exp()).abs().sum(1)
        rows.append(
            {
                "method": name, "TV": float(tv.mean()), "± TV": float(tv.std() / math.sqrt(REPEATS)),
                "bias": _bias(each, log_p.exp()), "tokens": tokens // REPEATS, "tokens for fitting": spent,
            }
        )  # fmt: skip
    rows.sort(key=lambda row: row["TV"])
    by_method = {row["method"]: row for row in rows}
    consistent = [row for row in rows if row["method"] not in NOT_THE_POSTERIOR]
    figure, (left,) = panels(1)
    figure.set_size_inches(8, 5)
    left.barh([r["method"] for r in rows][::-1], [r["TV"] for r in rows][::-1], label="a budget's texts")
    left.barh([r["method"] for r in rows][::-1], [r["bias"] for r in rows][::-1], label="of which no budget mends")
    left.set_xlabel(f"total variation from the posterior, {BUDGET:,} tokens")
    left.legend(fontsize="small")
    return Result(
        f"Ways to draw from one posterior with {BUDGET:,} forward tokens each",
        rows,
        {
            "the best of n, hard or soft, has a bias, and more of it than each method that is meant to be the posterior": min(
                by_method[name]["bias"] for name in NOT_THE_POSTERIOR[:2]
            )
            > max(row["bias"] for row in consistent),
            "SMC with a learned twist comes nearer than importance from the prior": (
                by_method["SMC, learned twist"]["TV"] < by_method["importance"]["TV"]
            ),
            "weights mend a fitted guide's bias": by_method["importance, fitted guide"]["bias"]
            < by_method["the guide alone"]["bias"],
            "and a locally applied twist's": by_method["SMC, learned twist"]["bias"]
            < by_method["local twist alone"]["bias"],
            "and the exact one nearest of all": rows[0] is by_method["SMC, exact twist"],
        },
        figure,
    )


def _affordable(draw: Callable[[int], Draws]) -> int:
    """How many to ask for within the budget: by what a few, and then more, have cost."""
    count = 8
    for _ in range(3):
        count = max(1, round(count * BUDGET / draw(count).cost.lm_tokens))
    return count


def _unweighted(draws: Draws) -> Draws:
    """As they come, which is how such texts are used: as if each were worth the same."""
    return replace(draws, kind="chains")


def _law(draws: Draws, x: Int[Tensor, "N T"]) -> Float[Tensor, "N"]:
    """The share of each of the N texts among the draws."""
    texts = draws.latents["x"][:, :, 0].flatten(0, 1)  # (S, T)
    which = (texts.unsqueeze(1) == x).all(-1).long().argmax(-1)
    equal = draws.kind in EQUAL
    share = (
        torch.full((len(texts),), 1 / len(texts), dtype=torch.float64)
        if equal
        else draws.log_weight.flatten().softmax(0)
    )
    return torch.zeros(len(x), dtype=torch.float64).index_add(0, which, share)


def _bias(laws: Float[Tensor, "repeats N"], p: Float[Tensor, "N"]) -> float:
    """½ Σ |E law - p| less what chance alone would make of a mean of so many: the square of each text's deviation, less that of
    its standard error."""
    gap = (laws.mean(0) - p).square() - laws.var(0) / len(laws)
    return float(0.5 * gap.clamp_min(0).sqrt().sum())
