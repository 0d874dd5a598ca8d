"""What `ppl-lm sample` does: its samplers by name, and how their draws are shown."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console

from ppl_lm.diagnose import show, to_arviz
from ppl_lm.infer import Draws, best_of_n, importance, mcmc, quality, quasi_rejection, rejection
from ppl_lm.infer.mcmc import Kernel, independence, suffix
from ppl_lm.lm import Prompts

CHAINS, STEPS, WARMUP = 32, 100, 100
PILOT = 1000  # draws by which quasi-rejection chooses its bound: their largest weight
LEAST = 128  # bests of n, from whose draws their own law is estimated
CONVERGED = 1.05  # R-hat below which chains are taken to agree


def _importance(*what: Any, num_samples: int) -> tuple[Draws, str]:
    """the guide's draws, each with its log weight"""
    made = importance(*what, num_samples=num_samples)
    return made, "the guide's draws, as they come; the log weight (nats) is what makes them the posterior's"


def _rejection(model: Any, _: Any, prompts: Prompts, num_samples: int) -> tuple[Draws, str]:
    """exact posterior draws, from prior draws and the reward's bound"""
    made = rejection(model, None, prompts, num_samples=num_samples)
    assert made.proposals is not None
    return made, f"exact posterior draws, from {made.proposals.num_samples} proposals of the prior for each prompt"


def _quasi_rejection(*what: Any, num_samples: int) -> tuple[Draws, str]:
    """the guide's draws, kept up to a bound that some weights may exceed"""
    bound = importance(*what, num_samples=PILOT).log_weight.flatten(0, 1).amax(0)
    made = quasi_rejection(*what, num_samples=num_samples, log_bound=bound)
    assert made.proposals is not None
    found = quality(made.proposals, bound)
    return made, (
        f"nearly the posterior's draws: their total variation from it is at most "
        f"{float(found.total_variation_bound.max()):.2g} by these weights, "
        f"{float(found.acceptance_rate.min()):.1%} of {made.proposals.num_samples} proposals accepted; the log weight (nats) "
        "corrects what is left"
    )


def _best_of_n(*what: Any, num_samples: int) -> tuple[Draws, str]:
    """of 8 draws of the guide the one with the best evidence"""
    made = best_of_n(*what, num_samples=max(num_samples, LEAST)).map(lambda v: v[:, :num_samples])
    return made, "each the best of 8 draws of the guide: not the posterior; the log weight (nats) corrects them"


def _markov(kernel: Kernel) -> Callable[..., tuple[Draws, str]]:
    def made(*what: Any, num_samples: int) -> tuple[Draws, str]:
        steps = max(STEPS, math.ceil(num_samples / CHAINS))
        draws = mcmc(*what, num_samples=steps, warmup=WARMUP, num_chains=CHAINS, kernel=kernel)
        worst, rate = r_hat(draws), float(draws.stats["acceptance_rate"].mean())
        verdict = (
            "they agree"
            if worst < CONVERGED
            else "they do not agree: not the posterior's draws yet; use a closer guide"
        )
        how = (
            f"the last draws of {CHAINS} Markov chains, {WARMUP + steps} steps each; {rate:.0%} accepted; largest R-hat "
            f"{worst:.2f}: {verdict}"
        )
        last = draws.map(
            lambda v: v.transpose(0, 1).flatten(0, 1)[-num_samples:].unsqueeze(0)
        )  # the newest of all chains
        return last, how

    return made


SAMPLERS: dict[str, Callable[..., tuple[Draws, str]]] = {
    "importance": _importance,
    "rejection": _rejection,
    "quasi_rejection": _quasi_rejection,
    "best_of_n": _best_of_n,
    "independence_mh": _markov(independence),
    "suffix_mh": _markov(suffix),
}


def r_hat(draws: Draws) -> float:
    """The largest split R-hat of the numbers that chains are summarised by: rewards, lengths, log p of the prior."""
    import arviz as az

    with np.errstate(invalid="ignore", divide="ignore"):  # a number that never changes has none
        found: Any = az.rhat(to_arviz(draws).posterior)
    values = [float(found[name].max()) for name in found.data_vars]
    return max((v for v in values if not math.isnan(v)), default=math.nan)


def draw(model: Any, guide: Any, prompts: Prompts, sampler: str, num_samples: int, out: Console | None) -> None:
    """Prints draws, and how they came about.

    :param guide: None draws from the model's own prior.
    :param out: None prints one JSON object a line instead."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r} is unknown; give one of {', '.join(SAMPLERS)}")
    draws, how = SAMPLERS[sampler](model, guide, prompts, num_samples=num_samples)
    if out is not None:
        out.print(how, markup=False)
    columns = {name: value[0] for name, value in draws.records.items()}  # (S, B)
    if not (draws.exact or draws.markov):
        columns["log_weight"] = draws.log_weight[0].expand(-1, len(draws.prompts))
    if out is not None:
        out.print("  ".join([*columns, "prompt │ completion"]), markup=False, style="bold")
    for b, texts in enumerate(draws.text()):
        for s, text in enumerate(texts):
            prompt, figures = draws.prompts.texts[b], {k: float(v[s, b]) for k, v in columns.items()}
            if out is None:
                known = {k: round(v, 4) if math.isfinite(v) else None for k, v in figures.items()}  # JSON has no -inf
                print(json.dumps({"prompt": prompt, "completion": text, **known}))
            else:
                numbers = "  ".join(f"{v:+{len(k)}.2f}" for k, v in figures.items())
                out.print(numbers, show.clean(f"{prompt} │ {text}"), soft_wrap=True)
