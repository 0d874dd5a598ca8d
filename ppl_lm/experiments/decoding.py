"""Decoding is inference too: samplers without a fit, and with a fitted guide, give the same posterior of a real language model;
what a draw costs by each, and from how many on a fit has paid for itself."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ppl_lm.criticism.diagnoses.draws_diagnosis import diagnose_draws
from ppl_lm.criticism.statistics import numbers
from ppl_lm.experiments.lab import Result, load, panels
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import Bound, bind
from ppl_lm.infer.draws import Draws
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.log_weights import mean
from ppl_lm.infer.objectives import catalogue as objectives
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.kernels import independence, particle_gibbs, suffix
from ppl_lm.infer.samplers.markov_chains import mcmc
from ppl_lm.infer.samplers.quasi_rejection_sampling import quality, quasi_rejection
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.traces.text_site import text_law
from ppl_lm.infer.twists.functions import prefix_likelihood, tempered
from ppl_lm.likelihood import rewards
from ppl_lm.lm import meter
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts
from ppl_lm.models import constrained, tilted
from ppl_lm.run.fitting.loop import fit

WORD = "cake"
EXACT = (6000, 200)  # exact draws of each posterior, that all others are held against
PILOT = 4000  # draws of the prior, whose deviation is the unit of errors
AGREES = ("rejection", "importance, prior", "SMC, prior", "importance, guide", "independence MH, guide")
NUMBERS = ("reward", "length", "log_prior")
Sample = tuple[Draws, str]  # with the sampler's own word that they are not the posterior's, where it has one
Sampler = Callable[[Bound, Bound | None, Prompts], Sample]


@dataclass(frozen=True)
class Task:
    """A posterior, and a guide that was fitted to propose for it.

    :param tokens: forwarded by the fit, in `seconds`.
    :param samplers: by name; those that end in "guide" propose from the guide.
    :param exact: how many exact draws the others are held against."""

    name: str
    target: Bound
    guide: Bound
    tokens: int
    seconds: float
    samplers: dict[str, Sampler]
    exact: int


def run(seed: int, lm: str | None = None, time_limit: float = 60.0) -> Result:
    """VADER's sentiment, at β = 0.2 with the language model that ships and at β = 0.1 with another; and a word that one text
    in a hundred has, which is where a fit pays."""
    prior, beta = load(lm, 40 if lm is None else 48), 0.2 if lm is None else 0.1
    prompts = prior.prompts([""])
    soft = bind(tilted, prior, reward=rewards.vader, beta=beta)
    hard = bind(constrained, prior, constraint=rewards.contains(WORD))
    runs = 64 if lm is None else 320  # of longer texts, which share more of their beginnings, a run is worth less
    samplers = SOFT | {"SMC, prior": _smc(runs)}
    tasks = [
        _fitted(f"sentiment, β = {beta:g}", soft, prior, prompts, time_limit, seed, samplers, EXACT[0]),
        _fitted(f"the word {WORD}", hard, prior, prompts, time_limit, seed, HARD, EXACT[1]),
    ]
    rows = [row for task in tasks for row in _rows(task, prompts)]
    sentiment, word = ({row["by"]: row for row in rows if row["posterior"] == task.name} for task in tasks)
    agreeing = [sentiment[name] for name in AGREES]
    cost = " and ".join(f"{task.seconds:.0f} s, {task.tokens / 1e6:.1f} million tokens" for task in tasks)
    return Result(
        f"Draws of two posteriors; the guides were fitted by forward KL: {cost}",
        rows,
        {
            f"{'; '.join(AGREES)}: agree with exact draws (|z| < 4 in reward, length and log p0)": all(
                row["largest |z|"] < 4 for row in agreeing
            ),
            "and know each to 2% of the prior's deviation": all(row["error, % of sd"] < 2 for row in agreeing),
            "the others agree, or say that they do not": all(row["largest |z|"] < 4 or row["says"] for row in rows),
            "a fitted guide takes fewer texts a draw than the prior, for both": all(
                of["importance, guide"]["texts a draw"] < of["importance, prior"]["texts a draw"]
                for of in (sentiment, word)
            ),
            "for the word the fit has paid before 100,000 draws": any(
                row["pays from"] != "never" and float(row["pays from"].replace(",", "")) < 1e5
                for row in word.values()
                if row["pays from"]
            ),
        },
        _figure(tasks, sentiment, word),
    )


def _fitted(
    name: str,
    target: Bound,
    prior: LanguageModel,
    prompts: Prompts,
    limit: float,
    seed: int,
    samplers: dict[str, Sampler],
    exact: int,
) -> Task:
    """With a guide fitted by forward KL: one that is to propose must cover, which reverse KL does not ask for."""
    guide = bind(finetuned, prior.copy())
    with meter.measure() as cost:
        loss = SequenceELBO(num_particles=128, objective=objectives.forward_kl)
        fitted = fit(target, guide, prompts, loss, time_limit=limit, seed=seed)
    return Task(name, target, guide, cost.lm_tokens, fitted.seconds, samplers, exact)


def _quasi(target: Bound, guide: Bound | None, prompts: Prompts) -> Sample:
    """As they come, without the weights that would correct them."""
    bound = importance(target, guide, prompts, num_samples=2000).log_weight.flatten(0, 1).quantile(0.995, 0)
    draws = quasi_rejection(target, guide, prompts, num_samples=4000, log_bound=bound)
    assert draws.proposals is not None
    tv = float(quality(draws.proposals, bound).total_variation.max())
    return replace(draws, kind="exact"), "" if tv < 0.005 else f"TV {tv:.2g}"


def _smc(num_runs: int) -> Sampler:
    """Of 256 texts each, resampled by the sentiment of what is written, which counts in full at the end."""

    def sampler(target: Bound, _: Bound | None, prompts: Prompts) -> Sample:
        twist = tempered(prefix_likelihood(target), text_law(target, prompts).event_shape[0])
        settings = SMCSettings(twist=twist, threshold=0.25)  # what is written says little of what will be
        return smc(target, None, prompts, num_samples=256, num_runs=num_runs, settings=settings), ""

    return sampler


def chains(kernel: Callable[..., Any], count: int, steps: int) -> Sampler:
    return lambda model, guide, prompts: (
        mcmc(model, guide, prompts, num_samples=steps, warmup=steps // 2, num_chains=count, kernel=kernel),
        "",
    )


def with_settings(sampler: Callable[..., Draws], **settings: int) -> Sampler:
    return lambda model, guide, prompts: (sampler(model, guide, prompts, **settings), "")


SOFT = {
    "rejection": with_settings(rejection, num_samples=4000),
    "importance, prior": with_settings(importance, num_samples=16384),
    "suffix MH, prior": chains(suffix, 64, 200),
    "particle Gibbs, prior": chains(particle_gibbs(16), 16, 40),
    "SMC, prior": _smc(64),
    "importance, guide": with_settings(importance, num_samples=16384),
    "independence MH, guide": chains(independence, 64, 400),
    "quasi-rejection, guide": _quasi,
}
HARD = {
    "rejection": with_settings(rejection, num_samples=100),
    "importance, prior": with_settings(importance, num_samples=16384),
    "importance, guide": with_settings(importance, num_samples=8192),
}


def _rows(task: Task, prompts: Prompts) -> list[dict[str, Any]]:
    reference = rejection(task.target, None, prompts, num_samples=task.exact)
    from_prior = numbers(importance(task.target, None, prompts, num_samples=PILOT))
    spread = {name: float(value.std()) for name, value in from_prior.items()}
    rows = []
    for name, sampler in task.samplers.items():
        began = time.monotonic()
        draws, says = sampler(task.target, task.guide if name.endswith("guide") else None, prompts)
        seconds = time.monotonic() - began
        rows.append({"posterior": task.name, "by": name, **_row(draws, seconds, says, reference, spread)})
    cheapest = min(row["tokens a draw"] for row in rows if not row["by"].endswith("guide"))
    for row in rows:
        saved = cheapest - row["tokens a draw"]  # with each draw, against the cheapest way without a fit
        pays = f"{task.tokens / saved:,.0f}" if saved > 0 else "never"
        row["pays from"] = pays if row["by"].endswith("guide") else ""
    return rows


def _row(draws: Draws, seconds: float, says: str, reference: Draws, spread: dict[str, float]) -> dict[str, Any]:
    """:param spread: standard deviations under the prior, the unit of errors."""
    figures, far, error, worth = diagnose_draws(draws), 0.0, 0.0, math.inf
    for key, there in numbers(reference).items():
        if key not in NUMBERS or float(there.var()) == 0:  # a reward that a hard constraint fixes
            continue
        centre, se = figures[key], figures[f"{key}_se"]
        exact, exact_se = (float(v) for v in mean(there.flatten(0, 1)))
        far = max(far, abs(centre - exact) / math.hypot(se, exact_se))
        error = max(error, 100 * se / spread[key])
        worth = min(worth, float(there.var()) / se**2)
    texts = draws.proposals.num_samples if draws.proposals is not None else draws.num_samples
    verdict = "" if figures["verdict"] in ("exact", "good") else figures["verdict"].replace("_", " ")
    return {
        "E[r]": figures.get("reward", 1.0), "± E[r]": figures.get("reward_se", 0.0), "largest |z|": far,
        "error, % of sd": error,
        "says": says or verdict, "draws' worth": round(worth), "texts a draw": texts / worth,
        "tokens a draw": draws.cost.lm_tokens / worth, "ms a draw": 1000 * seconds / worth,
    }  # fmt: skip


def _figure(tasks: list[Task], *rows_by_task: dict[str, dict[str, Any]]) -> Figure:
    figure, (left, *others) = panels(3)
    for name, row in rows_by_task[0].items():
        colour = "C1" if row["says"] else "C0"
        left.errorbar(row["E[r]"], name, xerr=2 * row["± E[r]"], marker="o", capsize=3, color=colour)
    left.axvline(rows_by_task[0]["rejection"]["E[r]"], color="black", linewidth=1)
    left.invert_yaxis()
    left.set(xlabel="posterior E[reward], ± 2 SE", title=tasks[0].name)
    count = np.geomspace(10, 1e6, 100)
    for axes, task, rows in zip(others, tasks, rows_by_task, strict=True):
        for name, row in rows.items():
            guided = name.endswith("guide")
            tokens = row["tokens a draw"] * count + (task.tokens if guided else 0)
            axes.plot(count, tokens, label=name, linestyle="-" if guided else "--")
        axes.set(xscale="log", yscale="log", xlabel="independent posterior draws", title=task.name)
        axes.legend(fontsize="x-small")
    others[0].set_ylabel("tokens forwarded, with the fit's")
    return figure
