"""The samplers of `ppl-lm sample` by name: each gives its draws, chains whole, and says how they came about."""

import math
from collections.abc import Callable
from typing import Any

import torch

from ppl_lm.criticism.chains import r_hat
from ppl_lm.infer.draws import Draws
from ppl_lm.infer.samplers.best_of_n_sampling import best_of_n
from ppl_lm.infer.samplers.constraints.adaptive_rejection_sampling import adaptive_rejection
from ppl_lm.infer.samplers.constraints.bound_checkers import checkers_of
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.in_pieces import Progress
from ppl_lm.infer.samplers.kernels import Kernel, independence, particle_gibbs, suffix
from ppl_lm.infer.samplers.markov_chains import mcmc
from ppl_lm.infer.samplers.quasi_rejection_sampling import quality, quasi_rejection
from ppl_lm.infer.samplers.rare_events.annealing import annealed_smc
from ppl_lm.infer.samplers.rare_events.splitting_levels import splitting
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.samplers.twist import PriorPower, Twist
from ppl_lm.infer.traces.observations import power_of_prior, rules_out_texts
from ppl_lm.infer.traces.text_site import text_law
from ppl_lm.infer.twists.functions import prefix_likelihood, prior_power, tempered
from ppl_lm.lm import meter
from ppl_lm.lm.prompts import Prompts

CHAINS, STEPS, WARMUP = 32, 100, 100
PILOT = 1000  # draws by which quasi-rejection chooses its bound: their largest weight
RUNS, PARTICLES = 16, 64  # of SMC
THRESHOLD = 0.25  # not 0.5: what is written says little of what will be, and resampling by it costs more than it gives
GIBBS = 16  # particles of particle Gibbs
PATH = (0.125, 0.25, 0.5, 1.0)  # of annealed SMC
LEAST = 128  # bests of n, from whose draws their own law is estimated


def _importance(*what: Any, num_samples: int, on_progress: Progress | None = None) -> tuple[Draws, str]:
    """the guide's draws, each with its log weight"""
    draws = importance(*what, num_samples=num_samples, on_progress=on_progress)
    return draws, "the guide's draws, as they come; the log weight (nats) is what makes them the posterior's"


def _rejection(
    model: Any, _: Any, prompts: Prompts, num_samples: int, on_progress: Progress | None = None
) -> tuple[Draws, str]:
    """exact posterior draws, from prior draws and the reward's bound"""
    draws = rejection(model, None, prompts, num_samples=num_samples, on_progress=on_progress)
    assert draws.proposals is not None
    return draws, f"exact posterior draws, from {draws.proposals.num_samples} proposals of the prior for each prompt"


def _adaptive_rejection(
    model: Any, _: Any, prompts: Prompts, num_samples: int, on_progress: Progress | None = None
) -> tuple[Draws, str]:
    """exact posterior draws under a checker, by rejection that remembers what led nowhere"""
    draws = adaptive_rejection(model, prompts, num_samples=num_samples, on_progress=on_progress)
    assert draws.proposals is not None
    lower, upper = (draws.stats[name][0, 0] for name in ("log_z_lower", "log_z_upper"))
    return draws, (
        f"exact posterior draws, from {draws.proposals.num_samples} trials for each prompt, left where the checker said no; "
        f"{draws.cost.checker_calls:,} questions to it; log Z lies between {float(lower.min()):.2f} and "
        f"{float(upper.max()):.2f}"
    )


def _quasi_rejection(*what: Any, num_samples: int, on_progress: Progress | None = None) -> tuple[Draws, str]:
    """the guide's draws, kept up to a bound that some weights may exceed"""
    bound = importance(*what, num_samples=PILOT).log_weight.flatten(0, 1).amax(0)
    draws = quasi_rejection(*what, num_samples=num_samples, log_bound=bound, on_progress=on_progress)
    assert draws.proposals is not None
    bounded = quality(draws.proposals, bound)
    distance, rate = float(bounded.total_variation_bound.max()), float(bounded.acceptance_rate.min())
    return draws, (
        f"nearly the posterior's draws: their total variation from it is at most {distance:.2g} by these weights, "
        f"{rate:.1%} of {draws.proposals.num_samples} proposals accepted; the log weight (nats) corrects what is left"
    )


def _best_of_n(*what: Any, num_samples: int, on_progress: Progress | None = None) -> tuple[Draws, str]:
    """of 8 draws of the guide the one with the best evidence"""
    draws = best_of_n(*what, num_samples=max(num_samples, LEAST), on_progress=on_progress)
    draws = draws.map(lambda v: v[:, :num_samples])
    return draws, "each the best of 8 draws of the guide: not the posterior; the log weight (nats) corrects them"


def _markov(kernel: Kernel, least: int = STEPS, warmup: int = WARMUP) -> Callable[..., tuple[Draws, str]]:
    def chains(*what: Any, num_samples: int, on_progress: Progress | None = None) -> tuple[Draws, str]:
        steps = max(least, math.ceil(num_samples / CHAINS))
        draws = mcmc(*what, num_samples=steps, warmup=warmup, num_chains=CHAINS, kernel=kernel, on_progress=on_progress)
        worst, rate = r_hat(draws), float(draws.stats["acceptance_rate"].mean())
        how = (
            f"{CHAINS} Markov chains, the last {steps} of {warmup + steps} steps each; {rate:.0%} accepted; largest R-hat "
            f"{worst:.2f}"
        )
        return draws, how

    return chains


def _smc(
    model: Any, guide: Any, prompts: Prompts, num_samples: int, on_progress: Progress | None = None
) -> tuple[Draws, str]:
    """texts that grow together: sequential Monte Carlo"""
    runs = max(RUNS, math.ceil(num_samples / PARTICLES))
    twist: Twist | None = None
    hard = rules_out_texts(model, prompts[:1])
    checkers = checkers_of(model) if hard else []
    alpha = power_of_prior(model, prompts[:1])
    if guide is None and alpha is not None:
        twist = prior_power(alpha)
    elif guide is None and not hard and not evidence_asks_a_network(model, prompts):
        twist = tempered(prefix_likelihood(model), text_law(model, prompts).event_shape[0])
    settings = SMCSettings(twist=twist, threshold=THRESHOLD, checker=checkers[0] if len(checkers) == 1 else None)
    draws = smc(model, guide, prompts, num_samples=PARTICLES, num_runs=runs, settings=settings, on_progress=on_progress)
    how = f"{runs} runs of {PARTICLES} texts"
    if settings.checker is not None:
        how += " that grew together by tokens that the checker allows"
    elif isinstance(twist, PriorPower):
        how += f" that grew together, each token proposed by its law to the power {twist.alpha:g}"
    elif twist is not None:
        how += " that grew together, resampled by the evidence of what is written, tempered"
    else:  # of half a text a yes or no says nothing, and a fitted guide knows more of what is to come than its reward
        how += ", none resampled as it grew: only whole texts are weighed here, as by importance"
    return draws, f"{how}; the log weight (nats) makes them the posterior's"


def _annealed_smc(
    model: Any, _: Any, prompts: Prompts, num_samples: int, on_progress: Progress | None = None
) -> tuple[Draws, str]:
    """texts that come along a path of temperatures from the prior"""
    runs = max(RUNS, math.ceil(num_samples / PARTICLES))
    draws = annealed_smc(model, prompts, path=PATH, num_samples=PARTICLES, num_runs=runs, on_progress=on_progress)
    steps = ", ".join(f"{power:g}" for power in PATH)
    return draws, (
        f"{runs} runs of {PARTICLES} whole texts along likelihood^u, u = {steps}, resampled and moved at each; the log weight "
        "(nats) makes them the posterior's"
    )


def _splitting(
    model: Any, _: Any, prompts: Prompts, num_samples: int, on_progress: Progress | None = None
) -> tuple[Draws, str]:
    """texts of a rare event, by way of less rare ones"""
    runs = max(RUNS, math.ceil(num_samples / PARTICLES))
    draws = splitting(model, prompts, num_samples=PARTICLES, num_runs=runs, on_progress=on_progress)
    levels = draws.stats["levels"].shape[-1]
    return draws, (
        f"{runs} runs of {PARTICLES} texts that climbed {levels} levels, found by a pilot; those of the event have a weight, "
        "and its mean over a run is an estimate of how probable the event is"
    )


def evidence_asks_a_network(model: Any, prompts: Prompts) -> bool:
    """Whether a text's likelihood takes a forward pass: too much to ask of every text at every token."""
    some = text_law(model, prompts[:1]).sample((1,))[:, 0]
    with meter.measure() as cost:
        prefix_likelihood(model)(prompts[:1], some, torch.ones(1, dtype=torch.int64, device=some.device))
    return cost.lm_tokens > 0


SAMPLERS: dict[str, Callable[..., tuple[Draws, str]]] = {
    "importance": _importance,
    "rejection": _rejection,
    "adaptive_rejection": _adaptive_rejection,
    "quasi_rejection": _quasi_rejection,
    "best_of_n": _best_of_n,
    "independence_mh": _markov(independence),
    "suffix_mh": _markov(suffix),
    "particle_gibbs": _markov(particle_gibbs(GIBBS), 30, 10),
    "smc": _smc,
    "annealed_smc": _annealed_smc,
    "splitting": _splitting,
}
