"""Three posteriors, every way to draw from each, at the same number of tokens forwarded: how far the texts that come out are
from the truth, and what no budget mends."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from ppl_lm.experiments.lab import Result, panels, train
from ppl_lm.guides import twisted
from ppl_lm.infer.binding import Bound, bind
from ppl_lm.infer.draws import EQUAL, Draws, NoSupportError
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.best_of_n_sampling import best_of_n
from ppl_lm.infer.samplers.constraints.adaptive_rejection_sampling import adaptive_rejection
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.kernels import independence, particle_gibbs, suffix
from ppl_lm.infer.samplers.markov_chains import mcmc
from ppl_lm.infer.samplers.quasi_rejection_sampling import quasi_rejection
from ppl_lm.infer.samplers.rare_events.annealing import annealed_smc
from ppl_lm.infer.samplers.rare_events.splitting_levels import splitting
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.twists.fitting import fit_twist
from ppl_lm.infer.twists.functions import exact_twist, look_ahead, prefix_likelihood
from ppl_lm.likelihood.checker import Checker
from ppl_lm.lm import meter
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.table import table_like, table_lm
from ppl_lm.models import at_least, constrained, tilted

BETA, BUDGET, REPEATS, CHAINS, PARTICLES = 0.2, 6000, 12, 16, 64
STEPS, SIZE, LENGTH, RARE = 600, 4, 5, 1e-3
NOT_THE_POSTERIOR = ("best of 8", "soft best of 8", "the guide alone", "local twist alone")
MOVED = (2, 4)  # after how many tokens texts are moved


@dataclass(frozen=True)
class Task:
    """A posterior, and by the name of each method the tokens that were spent on fitting, and draws of it from how many."""

    name: str
    target: Bound
    methods: dict[str, tuple[int, Callable[[int], Draws]]]


def balance(completions: list[str], **_: object) -> list[float]:
    """2 for as many a as b, less for each that is not matched; c is worth nothing."""
    return [2.0 - abs(text.count("a") - text.count("b")) - 0.5 * text.count("c") for text in completions]


def alphabetical(text: str, whole: bool) -> bool:
    """Each letter after those before it in the alphabet, none twice, and at least two."""
    letters = text.split()
    rises = all(one < other for one, other in zip(letters, letters[1:], strict=False))
    return rises and (len(letters) > 1 or not whole)


def many_a(completions: list[str], **_: object) -> list[float]:
    """How many a more than others."""
    return [2.0 * text.count("a") - len(text.split()) for text in completions]


balance.r_max = 2.0  # pyright: ignore[reportFunctionMemberAccess]


def run(seed: int) -> Result:
    torch.manual_seed(seed)
    lm = table_lm(SIZE, LENGTH, concentration=1.0, seed=seed)
    rows: list[dict[str, Any]] = []
    for task in (_wish(lm), _rule(lm), _event(lm)):
        rows += sorted(_rows(task), key=lambda row: row["TV"])
    by = {(row["task"], row["method"]): row for row in rows}
    wish, rule, event = (
        {m: row for (t, m), row in by.items() if t == name} for name in ("a wish", "a rule", "an event")
    )
    consistent = [row for row in wish.values() if row["method"] not in NOT_THE_POSTERIOR]
    return Result(
        f"Ways to draw from three posteriors with {BUDGET:,} forward tokens each",
        rows,
        {
            "the best of n, hard or soft, has a bias, and more of it than each method that is meant to be the posterior": min(
                wish[name]["bias"] for name in NOT_THE_POSTERIOR[:2]
            )
            > max(row["bias"] for row in consistent),
            "SMC with a learned twist comes nearer than importance from the prior": (
                wish["SMC, learned twist"]["TV"] < wish["importance"]["TV"]
            ),
            "weights mend a fitted guide's bias": wish["importance, fitted guide"]["bias"]
            < wish["the guide alone"]["bias"],
            "and a locally applied twist's": wish["SMC, learned twist"]["bias"] < wish["local twist alone"]["bias"],
            "and the exact one nearest of all": min(wish, key=lambda m: wish[m]["TV"]) == "SMC, exact twist",
            "under a rule, adaptive rejection comes nearer than rejection, SMC with the checker than SMC without": (
                rule["adaptive rejection"]["TV"] < rule["rejection"]["TV"]
                and rule["SMC, checker"]["TV"] < rule["SMC"]["TV"]
            ),
            "of a rare event, SMC by the reward's own twist comes at least as near as importance and as rejection": (
                event["SMC, the reward's own twist"]["TV"] <= min(event["importance"]["TV"], event["rejection"]["TV"])
            ),
        },
        _figure(rows),
    )


def _chains(target: Bound, proposal: Bound | None, kernel: Callable[..., Any]) -> Callable[[int], Draws]:
    return lambda n: mcmc(
        target, proposal, [""], num_samples=max(2, n), warmup=max(1, n // 4), num_chains=CHAINS, kernel=kernel
    )


def _smc(target: Bound, **settings: Any) -> Callable[[int], Draws]:
    return lambda n: smc(target, None, [""], num_samples=PARTICLES, num_runs=n, settings=SMCSettings(**settings))


def _common(target: Bound) -> dict[str, tuple[int, Callable[[int], Draws]]]:
    """What needs nothing but the posterior."""
    return {
        "importance": (0, lambda n: importance(target, None, [""], num_samples=n)),
        "rejection": (0, lambda n: rejection(target, None, [""], num_samples=n)),
        "independence MH": (0, _chains(target, None, independence)),
        "suffix MH": (0, _chains(target, None, suffix)),
        "particle Gibbs": (0, _chains(target, None, particle_gibbs(8))),
        "SMC, look-ahead": (0, _smc(target, twist=look_ahead(target, 2), at=MOVED)),
        "SMC, exact twist": (0, _smc(target, twist=exact_twist(target, [""]), candidates=SIZE)),
    }


def _wish(lm: LanguageModel) -> Task:
    target = bind(tilted, lm, reward=balance, beta=BETA)
    guide, twist, bound = bind(twisted, lm, table_like(lm)), table_like(lm), 2 / BETA
    with meter.measure() as fitting:  # few steps: a guide and a twist that are close, and not exact
        train(target, guide, [""], steps=STEPS, rate=0.05, num_particles=64, every=STEPS)
    with meter.measure() as learning:
        fit_twist(target, twist, [""], steps=STEPS, num_samples=64, learning_rate=0.05)
    alone, likelihood = bind(twisted, lm, twist), prefix_likelihood(target)

    def by_guide(proposal: Bound) -> Callable[[int], Draws]:
        return lambda n: importance(target, proposal, [""], num_samples=n)

    return Task(
        "a wish",
        target,
        _common(target)
        | {
            "quasi-rejection": (0, lambda n: quasi_rejection(target, None, [""], num_samples=n, log_bound=bound - 2)),
            "best of 8": (0, lambda n: _unweighted(best_of_n(target, None, [""], num_samples=n))),
            "soft best of 8": (0, lambda n: _unweighted(best_of_n(target, None, [""], num_samples=n + 1, soft=True))),
            "annealed SMC": (
                0,
                lambda n: annealed_smc(target, [""], path=[0.25, 0.5, 1.0], num_samples=PARTICLES, num_runs=max(2, n)),
            ),
            "SMC, likelihood": (0, _smc(target, twist=likelihood)),
            "SMC, likelihood, moves": (0, _smc(target, twist=likelihood, at=MOVED, moves=1)),
            "SMC, learned twist": (learning.lm_tokens, _smc(target, twist=twist)),
            "local twist alone": (learning.lm_tokens, lambda n: _unweighted(by_guide(alone)(n))),
            "the guide alone": (fitting.lm_tokens, lambda n: _unweighted(by_guide(guide)(n))),
            "importance, fitted guide": (fitting.lm_tokens, by_guide(guide)),
        },
    )


def _rule(lm: LanguageModel) -> Task:
    checker = Checker(alphabetical, cut_off=True)
    target = bind(constrained, lm, constraint=checker)
    return Task(
        "a rule",
        target,
        _common(target)
        | {
            "adaptive rejection": (0, lambda n: adaptive_rejection(target, [""], num_samples=n)),
            "SMC": (0, _smc(target)),
            "SMC, checker": (0, _smc(target, checker=checker)),
        },
    )


def _event(lm: LanguageModel) -> Task:
    every = enumerate_posterior(bind(tilted, lm, reward=many_a, beta=math.inf), None, [""])
    score, log_p = every.records["reward"][:, 0], every.log_joint[:, 0]
    levels = [float(c) for c in score.unique() if float(log_p[score >= c].logsumexp(0)) < math.log(RARE)]
    level = min(levels, default=float(score.max()))
    target = bind(at_least, lm, reward=many_a, level=level)
    soft = prefix_likelihood(bind(tilted, lm, reward=many_a, beta=1.0))
    methods = _common(target) | {
        "splitting": (0, lambda n: splitting(target, [""], num_samples=PARTICLES, num_runs=n)),
        "SMC, the reward's own twist": (0, _smc(target, twist=soft)),
    }
    del methods["SMC, exact twist"]  # knows the answer
    return Task("an event", target, methods)


def _rows(task: Task) -> list[dict[str, Any]]:
    truth = enumerate_posterior(task.target, None, [""])
    p, x = truth.log_posterior[:, 0].exp(), truth.latents["x"][:, 0]
    rows = []
    for name, (spent, draw) in task.methods.items():
        count = _affordable(draw)
        laws, tokens = [], 0
        for _ in range(REPEATS):
            with meter.measure() as cost:
                try:
                    laws.append(_law(draw(count), x))
                except NoSupportError:  # nothing was found: no text has any share
                    laws.append(torch.zeros_like(p))
            tokens += cost.lm_tokens
        each = torch.stack(laws)  # (repeats, N)
        tv = torch.where(each.sum(1) > 0, 0.5 * (each - p).abs().sum(1), 1.0)
        rows.append(
            {
                "task": task.name, "method": name, "TV": float(tv.mean()), "± TV": float(tv.std() / math.sqrt(REPEATS)),
                "bias": _bias(each, p), "tokens": tokens // REPEATS, "tokens for fitting": spent,
            }
        )  # fmt: skip
    return rows


def _figure(rows: list[dict[str, Any]]) -> Figure:
    names = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = panels(len(names))
    figure.set_size_inches(15, 5)
    for ax, task in zip(axes, names, strict=True):
        mine = [row for row in rows if row["task"] == task][::-1]
        methods = [row["method"] for row in mine]
        ax.barh(methods, [row["TV"] for row in mine], label="a budget's texts")
        ax.barh(methods, [row["bias"] for row in mine], label="of which no budget mends")
        ax.set(xlabel=f"total variation, {BUDGET:,} tokens", title=task)
    axes[0].legend(fontsize="small")
    return figure


def _affordable(draw: Callable[[int], Draws]) -> int:
    """How many to ask for within the budget: by what a few, and then more, have cost."""
    count = 8
    for _ in range(3):
        with meter.measure() as cost, suppress(NoSupportError):
            draw(count)
        count = max(1, round(count * BUDGET / cost.lm_tokens))
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
        else draws.log_weight.flatten().softmax(0).nan_to_num(0.0)  # 0 where none is possible
    )
    return torch.zeros(len(x), dtype=torch.float64).index_add(0, which, share)


def _bias(laws: Float[Tensor, "repeats N"], p: Float[Tensor, "N"]) -> float:
    """½ Σ |E law - p| less what chance alone would make of a mean of so many: the square of each text's deviation, less that of
    its standard error."""
    gap = (laws.mean(0) - p).square() - laws.var(0) / len(laws)
    return float(0.5 * gap.clamp_min(0).sqrt().sum())
