"""What is said before a fit begins: what it will cost, whether so short a one can be of use, and whether one is needed."""

import math
import shlex
import sys
from pathlib import Path

import torch

from ppl_lm.criticism.diagnoses.diagnosis import least_draws
from ppl_lm.criticism.diagnoses.pooling import POOLED
from ppl_lm.criticism.weights import ess_se
from ppl_lm.infer.draws import Draws
from ppl_lm.infer.log_weights import kong_ess
from ppl_lm.run.fitting.best_guide import WINDOW
from ppl_lm.run.fitting.forecast import WISHED, Plan
from ppl_lm.run.settings import Settings

WORTH = 0.5  # share of the prior's draws that they are worth, weighted, above which no fit is needed
TELLING = 20  # draws of each prompt, below which nothing is said of that
STATES = 5  # copies of what is trained: gradients, two moments of Adam, the guides that are remembered


def forecast(plan: Plan, limit: float, trained: int) -> str:
    """:param trained: numbers that are fitted."""
    memory = peak_memory()
    size = "" if memory is None else f"; about {_gib(memory + 4 * STATES * trained)} of memory"
    texts = f"{plan.particles * plan.batch_size} texts ({plan.batch_size} prompts × {plan.particles})"
    measuring = "" if plan.num_samples is None else f", beside up to {plan.measuring:.0f} s for the verdict"
    return (
        f"a step of {texts} takes about {_seconds(plan.step)}: {plan.steps:,.0f} steps fit into the limit of {limit:g} s"
        f"{measuring}{size}"
    )


def warnings(plan: Plan, limit: float, prompts: int) -> list[str]:
    """What the limit does not allow, and what would.

    :raises ValueError: if not one step fits."""
    ways = [f"--time-limit {math.ceil(plan.wanted / 10) * 10:.0f}", "a shorter --max-new-tokens"]
    ways += ["fewer --particles"] if plan.particles > 4 else []
    ways += ["a smaller --batch-size"] if plan.batch_size > 4 else []
    would = f"{', '.join(ways[:-1])} or {ways[-1]} would allow more ({WISHED} steps are a beginning)"
    if plan.steps < 1:
        raise ValueError(
            f"time_limit={limit:g} s allows not one step of {plan.particles * plan.batch_size} texts, which takes about "
            f"{_seconds(plan.step)} here: {would}"
        )
    said = []
    if plan.steps < WINDOW:
        said.append(f"{plan.steps:.0f} steps are too few for a sensible fit: {would}")
    if plan.num_samples is None:
        said.append(
            f"no verdict: the least number of draws for one, {least_draws(prompts)} of each prompt, takes more than half of "
            "the limit; `ppl-lm diagnose` can give it afterwards"
            + (f", and of {POOLED} prompts or more 64 draws in all are enough" if prompts < POOLED else "")
        )
    elif plan.measured < prompts:
        said.append(
            f"the verdict will be of {plan.measured} of the {prompts} prompts, chosen by chance: draws of all take longer"
        )
    return said


def no_fit_needed(draws: Draws, settings: Settings, prompts: Path | None = None) -> str:
    """What to do instead of a fit, where the prior's draws, weighted, are worth most of what was asked; else "".

    :param draws: of the prior; `prompts`: the file that they were read from."""
    worth = worth_of_prior(draws)
    if worth is None or worth[0] - 2 * worth[1] < WORTH:
        return ""
    return (
        f"no fit is needed: 100 draws of the prior, weighted, are worth {100 * worth[0]:.0f} ± {100 * worth[1]:.0f} of the "
        f"posterior's own; `{_instead(settings, prompts)}` gives them. The fit goes on"
    )


def worth_of_prior(draws: Draws) -> tuple[float, float] | None:
    """Kong's effective sample size of the prior's draws over their number, mean over prompts, with its standard error; None of
    too few to tell."""
    log_w = draws.log_weight.flatten(0, 1)
    if len(log_w) < TELLING:
        return None
    share, se = kong_ess(log_w) / len(log_w), ess_se(log_w) / len(log_w)
    return float(share.mean()), float(se.square().sum().sqrt()) / len(se)


def peak_memory() -> int | None:
    """Bytes, the most that this process has held so far, on the GPU where there is one; None where the system does not tell."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


def _instead(settings: Settings, prompts: Path | None) -> str:
    words = ["ppl-lm", "sample", settings.model]
    words += [word for name in settings.reward for word in ("--reward", name)]
    if settings.reward_weights is not None:
        words += ["--reward-weights", ",".join(f"{w:g}" for w in settings.reward_weights)]
    words += ["--beta", f"{settings.beta:g}"]
    words += [word for name, value in settings.arguments.items() for word in ("--set", f"{name}={value}")]
    words += ["--max-new-tokens", str(settings.max_new_tokens), "--num-samples", "1000"]
    words += [] if settings.lm is None else ["--lm", settings.lm]
    words += [] if settings.dtype is None else ["--dtype", settings.dtype]
    words += ["--system", settings.system] if settings.system is not None else ["--chat"] if settings.chat else []
    if settings.prompts != [""]:
        words += ["--prompts", "FILE" if prompts is None else str(prompts)]
    return shlex.join(words)


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:,.0f} s"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
