"""Sequential Monte Carlo over text: K texts grow token by token, and the promising ones multiply."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppl_lm.infer.binding import read_once
from ppl_lm.infer.counts import require_count
from ppl_lm.infer.draws import Draws, NoSupportError, as_draws, concatenate
from ppl_lm.infer.log_weights import kong_ess
from ppl_lm.infer.samplers.constraints.bound_checkers import prompts_of, require_evidence
from ppl_lm.infer.samplers.importance_sampling import require_prompts
from ppl_lm.infer.samplers.in_pieces import Progress, texts_a_piece
from ppl_lm.infer.samplers.population import grow, log_z_increment
from ppl_lm.infer.samplers.population_state import History, Population
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.traces.particles import run
from ppl_lm.infer.traces.sites import lacks_support
from ppl_lm.infer.traces.structure import nesting_of
from ppl_lm.infer.traces.text_site import TextIs, text_law
from ppl_lm.lm import meter
from ppl_lm.lm.token_sequence import TokenSequence

PLAIN = SMCSettings()


@torch.no_grad()
def smc(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    prompts: Any,
    *,
    num_samples: int = 256,
    num_runs: int = 1,
    settings: SMCSettings = PLAIN,
    max_plate_nesting: int | None = None,
    on_progress: Progress | None = None,
) -> Draws:
    """`num_samples` weighted texts for each prompt that grew together: sequential Monte Carlo (Doucet et al. 2001; twisted:
    Zhao et al. 2024).

    At every token each text is weighted by p0 ψ_t / (q ψ_t-1) of its new token, and where the weights have become uneven the
    population is resampled. The mean of `exp(draws.log_weight)` over a run is an unbiased estimate of Z, whatever the twist,
    the proposal and the resampling. Each prompt is forwarded once a network, and one token a step for each text still open;
    a text that has ended keeps its weight and takes part in the resampling.

    `stats` says how each run went, token by token, (C, 1, B, T), since all draws of a run share it: `ess`, the effective sample
    size before resampling; `resampled`; `log_z_increment`, nats, which sum to the log of the run's mean weight. The last
    token's hold what the evidence does to the whole texts, too. `ppl_lm.plot.smc_steps` shows them.

    :param guide: proposes; without a twist its own law is the intermediate target, so that weights arise at the end alone.
        None: the twist-induced proposal, q ∝ p0 ψ_t; the prior where there is no twist to ask.
    :param num_runs: independent runs, the chains of the draws; `log_evidence` takes its bounds from them.
    :param settings: the twist, and when and how to resample.
    :param on_progress: called after each few runs with the share that is done, 0 to 1, and words.
    :raises NoSupportError: if every text of a prompt is impossible under the posterior in all runs.
    :raises ValueError: if the model has another latent site than one text a prompt, or a weight is NaN; or if a text that
        the settings' checker rules out is possible under it, or one that it allows begins as it says that none does.
    """
    require_counts(num_samples, num_runs)
    settings.require_fits(guide)
    prompts = read_once(prompts, model, guide)
    with meter.measure() as cost:
        prior, proposal = laws(model, guide, prompts)
        if settings.checker is not None:
            require_evidence(model, prompts_of(prompts, prior), prior, settings.checker)
        nesting = nesting_of(max_plate_nesting, model, guide, prompts)
        batch, parts, done = len(prior.prompts), [], 0
        texts = texts_a_piece(prompts, model, guide)
        size = max(1, texts // (num_samples * settings.expand * batch))  # runs at a time
        while done < num_runs:
            runs = min(size, num_runs - done)
            population, history = grow(prior, proposal, settings, num_samples, runs)
            parts.append(finish(model, prompts, population, history, batch, nesting))
            done += runs
            if on_progress is not None:
                on_progress(done / num_runs, f"{done} of {num_runs} runs")
    lacks = proposal is not None and lacks_support(proposal, prior)
    draws = replace(concatenate(parts, dim=0), cost=cost, lacks_support=lacks)
    require_support(draws)
    return draws


def require_counts(num_samples: int, num_runs: int) -> None:
    """:raises ValueError: by name, if there are too few."""
    require_count("num_samples", num_samples, 2)
    require_count("num_runs", num_runs)


def laws(model: Any, guide: Any, prompts: Any) -> tuple[TokenSequence, TokenSequence | None]:
    """What the model and the guide draw their text from; None where there is no guide."""
    require_prompts(prompts)
    prior = text_law(model, prompts)
    proposal = None if guide is None else text_law(guide, prompts)
    if proposal is not None:
        proposal.lm.vocabulary.require_same(prior.lm.vocabulary, "guide and target")
        if proposal.event_shape != prior.event_shape:
            raise ValueError(
                f"the guide's texts have {proposal.event_shape[0]} tokens, the model's {prior.event_shape[0]}; give both the "
                "same max_new_tokens"
            )
    return prior, proposal


def finish(model: Any, prompts: Any, population: Population, history: History, batch: int, nesting: int) -> Draws:
    """Grown texts as draws, (runs, K, B): the model's own joint density takes the place of the last intermediate target."""
    count, populations, steps = population.x.shape
    runs = populations // batch

    def by_particle(v: Tensor) -> Tensor:  # (K, runs · B, ...) -> (K · runs, B, ...)
        return v.reshape(count * runs, batch, *v.shape[2:])

    x, token_log_p = by_particle(population.x), by_particle(population.token_log_p)
    plates = (len(x), *[1] * (nesting - 1), *x.shape[1:])  # the program's, between particles and prompts
    with TextIs(x.reshape(plates), token_log_p.reshape(plates)):
        particles = run(model, None, (prompts,), {}, count * runs, nesting)
    draws = as_draws(particles)
    require_text_alone(draws)
    log_joint = draws.log_prior[0] + draws.log_likelihood[0]
    before = by_particle(population.log_w)
    log_w = before + log_joint - by_particle(population.log_target)
    log_w = torch.where((before == -torch.inf) | (log_joint == -torch.inf), -torch.inf, log_w)
    if bool(log_w.isnan().any()):
        raise ValueError("a weight is NaN; check the program, its reward and the twist")
    log_guide = torch.where(log_w == -torch.inf, torch.inf, log_joint - log_w)  # such that log_w is the weight
    draws = replace(
        draws,
        log_guide=log_guide.unsqueeze(0),
        kind="runs",
        stats={"log_weight_before_evidence": before.unsqueeze(0)},
    )
    draws = draws.map(lambda v: v[0].unflatten(0, (count, runs)).transpose(0, 1))
    return replace(draws, stats=draws.stats | _by_token(population.log_w, log_w.reshape(count, -1), history, batch))


def require_text_alone(draws: Draws) -> None:
    """:raises ValueError: unless each prompt's text is the only latent site, with a weight of its own."""
    if len(draws.latents) != 1:
        raise ValueError(
            f"this sampler grows one text a prompt; this program has the latent sites {sorted(draws.latents)}: use "
            f"importance() "
            "or mcmc(kernel=independence), which move them all"
        )
    if not draws.is_local:
        raise ValueError(
            "this sampler weighs each prompt's texts for themselves; this program has a site outside the prompts' plate, so "
            "that "
            "only the joint weight of all prompts exists: use importance() or mcmc(kernel=independence)"
        )


def require_own_law(state: Draws) -> None:
    """:raises ValueError: unless draws without a guide come from the model's prior as it weighs them."""
    if not state.from_prior:
        raise ValueError(
            "a scale or mask makes another law of the model's prior than its text is drawn from: use importance() or smc()"
        )


def _by_token(before: Tensor, after: Tensor, history: History, batch: int) -> dict[str, Tensor]:
    """The history of each run, (runs, 1, B, T), with what the evidence does to the weights, (K, P), at its last token."""
    ess, increment = history.ess.clone(), history.log_z_increment.clone()
    ess[:, -1] = kong_ess(after)
    increment[:, -1] += log_z_increment(before, after)
    stats = {"ess": ess, "resampled": history.resampled, "log_z_increment": increment}
    return {name: value.unflatten(0, (-1, batch)).unsqueeze(1) for name, value in stats.items()}


def require_support(draws: Draws) -> None:
    """:raises NoSupportError: if no text of a prompt is possible."""
    log_w = draws.log_weight.flatten(0, 1)
    if bool((log_w == -torch.inf).all(0).any()):
        worst = int((log_w == -torch.inf).all(0).nonzero()[0])
        raise NoSupportError(
            f"prompt {worst}: all {len(log_w)} texts are impossible under the posterior: their weights are zero (the best log "
            f"weight before the evidence was {float(draws.stats['log_weight_before_evidence'][..., worst].max()):.2f} nats); "
            "give more num_samples or num_runs, or a twist that knows what is impossible"
        )
