"""Decoding is inference too: samplers without a fit, and with a fitted guide, give the same posterior of a real language model;
what a draw costs by each, and from how many on a fit has paid for itself."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_lm.diagnose.drawn import numbers, r_hat
from ppl_lm.diagnose.verdict import CONVERGED
from ppl_lm.diagnose.weights import mean, weighted_mean
from ppl_lm.experiments.lab import Result, panels
from ppl_lm.guides import finetuned
from ppl_lm.infer import (
    Draws,
    bind,
    importance,
    mcmc,
    particle_gibbs,
    prefix_likelihood,
    quality,
    quasi_rejection,
    rejection,
    smc,
    tempered,
)
from ppl_lm.infer.mcmc import independence, suffix
from ppl_lm.likelihood import rewards
from ppl_lm.lm import LanguageModel, meter
from ppl_lm.models import tilted
from ppl_lm.run import fit

EXACT = 6000  # exact draws that all others are held against
AGREES = ("rejection", "importance, prior", "importance, guide", "independence MH, guide", "SMC, guide", "SMC, prior")
NUMBERS = ("reward", "length", "log_prior")


@dataclass(frozen=True)
class Made:
    """Draws by one sampler, and what they took.

    :param excuse: the sampler's own word that these are not the posterior's draws; empty where it says they are.
    :param guided: whether a fitted guide proposed."""

    draws: Draws
    seconds: float
    excuse: str
    guided: bool


def run(seed: int, lm: str | None = None, time_limit: float = 60.0) -> Result:
    """VADER's sentiment: at β = 0.2 with the language model that ships, at β = 0.1 with another, as `ppl-lm fit tilted`."""
    load: Any = {"max_new_tokens": 40} if lm is None else {"name_or_folder": lm, "max_new_tokens": 48}
    prior, beta = LanguageModel.from_pretrained(**load), 0.2 if lm is None else 0.1
    target, prompts = bind(tilted, prior, reward=rewards.vader, beta=beta), prior.prompts([""])
    guide = bind(finetuned, prior.copy())
    with meter.measure() as fitting:
        fitted = fit(target, guide, prompts, time_limit=time_limit, seed=seed)
    torch.manual_seed(seed + 1)
    reference = rejection(target, None, prompts, num_samples=EXACT)
    assert reference.proposals is not None
    from_prior = numbers(importance(target, None, prompts, num_samples=4000))
    spread = {name: float(value.std()) for name, value in from_prior.items()}
    twist = tempered(prefix_likelihood(target), prior.max_new_tokens)
    samplers: dict[str, tuple[bool, Callable[[], tuple[Draws, str]]]] = {
        "rejection": (False, lambda: (rejection(target, None, prompts, num_samples=4000), "")),
        "importance, prior": (False, lambda: (importance(target, None, prompts, num_samples=16384), "")),
        "suffix MH, prior": (False, lambda: _chains(target, None, suffix, prompts)),
        "particle Gibbs, prior": (False, lambda: _chains(target, None, particle_gibbs(16), prompts, 16, 40)),
        "SMC, prior": (False, lambda: (smc(target, None, prompts, num_samples=256, num_runs=64, twist=twist), "")),
        "importance, guide": (True, lambda: (importance(target, guide, prompts, num_samples=12288), "")),
        "independence MH, guide": (True, lambda: _chains(target, guide, independence, prompts, 128, 80)),
        "quasi-rejection, guide": (True, lambda: _quasi(target, guide, prompts)),
        "SMC, guide": (True, lambda: (smc(target, guide, prompts, num_samples=256, num_runs=48), "")),
    }
    rows: list[dict[str, Any]] = []
    for name, (guided, draw) in samplers.items():
        began = time.monotonic()
        draws, excuse = draw()
        rows.append(_row(name, Made(draws, time.monotonic() - began, excuse, guided), reference, spread))
    for row in rows:
        row["pays from"] = _pays(row, rows, fitting.lm_tokens)
    found = {row["by"]: row for row in rows}
    held = [found[name] for name in AGREES]
    figure, (left, right) = panels(2)
    for row in rows:
        left.errorbar(
            row["by"], row["E[r]"], yerr=2 * row["± E[r]"], marker="o", capsize=3, color="C1" if row["says"] else "C0"
        )
    truth, _ = mean(reference["reward"].flatten(0, 1))
    left.axhline(float(truth), color="black", linewidth=1)
    left.tick_params(axis="x", rotation=90)
    left.set_ylabel("posterior E[reward], ± 2 SE")
    count = np.geomspace(10, 1e6, 100)
    for row in rows:
        spent = fitting.lm_tokens if row["guided"] else 0
        right.plot(
            count, spent + row["tokens a draw"] * count, label=row["by"], linestyle="-" if row["guided"] else "--"
        )
    right.set(
        xscale="log", yscale="log", xlabel="independent posterior draws", ylabel="tokens forwarded, fitting among them"
    )
    right.legend(fontsize="x-small")
    for row in rows:
        del row["guided"]
    return Result(
        f"Draws of one posterior, VADER's sentiment at β = {beta:g}; the guide was fitted for {fitted.seconds:.0f} s and "
        f"{fitting.lm_tokens / 1e6:.1f} million tokens",
        rows,
        {
            f"{', '.join(AGREES)} agree with exact draws (|z| < 4 in reward, length and log p0)": all(
                row["largest |z|"] < 4 for row in held
            ),
            "and know each to 2% of the prior's deviation": all(row["error, % of sd"] < 2 for row in held),
            "the others agree, or say that they do not": all(row["largest |z|"] < 4 or row["says"] for row in rows),
            "with the fitted guide importance sampling takes fewer texts a draw": found["importance, guide"][
                "texts a draw"
            ]
            < found["importance, prior"]["texts a draw"],
        },
        figure,
    )


def _chains(
    target: Any, guide: Any, kernel: Any, prompts: Any, chains: int = 64, steps: int = 200
) -> tuple[Draws, str]:
    made = mcmc(target, guide, prompts, num_samples=steps, warmup=steps // 2, num_chains=chains, kernel=kernel)
    worst = r_hat(made)
    return made, "" if worst < CONVERGED else f"R-hat {worst:.2f}"


def _quasi(target: Any, guide: Any, prompts: Any) -> tuple[Draws, str]:
    """As they come, without the weights that would correct them."""
    bound = importance(target, guide, prompts, num_samples=2000).log_weight.flatten(0, 1).quantile(0.995, 0)
    made = quasi_rejection(target, guide, prompts, num_samples=4000, log_bound=bound)
    assert made.proposals is not None
    tv = float(quality(made.proposals, bound).total_variation.max())
    return replace(made, exact=True), "" if tv < 0.005 else f"TV {tv:.2g}"


def _row(name: str, made: Made, reference: Draws, spread: dict[str, float]) -> dict[str, Any]:
    """:param spread: standard deviations under the prior, the unit of errors."""
    far, error, worth = 0.0, 0.0, math.inf
    here, there = numbers(made.draws), numbers(reference)
    row: dict[str, Any] = {"by": name, "guided": made.guided}
    for key in NUMBERS:
        centre, se = _mean(here[key], made.draws)
        exact, exact_se = (float(v) for v in mean(there[key].flatten(0, 1)))
        far = max(far, abs(centre - exact) / math.hypot(se, exact_se))
        error = max(error, 100 * se / spread[key])
        worth = min(worth, float(there[key].var()) / se**2)
        if key == "reward":
            row |= {"E[r]": centre, "± E[r]": se}
    cost = made.draws.cost
    texts = made.draws.proposals.num_samples if made.draws.proposals is not None else made.draws.num_samples
    return row | {
        "largest |z|": far, "error, % of sd": error, "says": made.excuse, "draws' worth": round(worth),
        "texts a draw": texts / worth, "tokens a draw": cost.lm_tokens / worth, "ms a draw": 1000 * made.seconds / worth,
    }  # fmt: skip


def _mean(value: Tensor, draws: Draws) -> tuple[float, float]:
    import arviz as az

    flat = value.flatten(0, 1)
    if draws.markov:
        mcse: Any = az.mcse(value[..., 0].numpy())
        return float(flat.mean()), float(mcse)
    centre, se = weighted_mean(flat, draws)
    return float(centre), float(se)


def _pays(row: dict[str, Any], rows: list[dict[str, Any]], fitting: int) -> str:
    """From how many draws on fitting and drawing so takes fewer tokens than the cheapest way without a fit."""
    cheapest = min(r["tokens a draw"] for r in rows if not r["guided"])
    if not row["guided"]:
        return ""
    saved = cheapest - row["tokens a draw"]
    return f"{fitting / saved:,.0f} draws" if saved > 0 else "never"
