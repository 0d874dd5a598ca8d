"""Importance sampling: a guide's draws, weighted."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine

from ppl_lm.infer.draws import Draws, as_draws, concatenate
from ppl_lm.infer.traces.layout import ROWS, Given
from ppl_lm.infer.traces.particles import as_particles, by_prompt, run
from ppl_lm.infer.traces.sites import log_density, sample_sites
from ppl_lm.lm import meter


@torch.no_grad()
def importance(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    prompts: Any,
    *,
    num_samples: int = 1000,
    max_plate_nesting: int = 1,
) -> Draws:
    """`num_samples` draws of the guide for each prompt, with what is needed to weight them: importance sampling.

    The mean of `exp(draws.log_weight)` is an unbiased estimate of Z for each prompt.

    :param guide: None draws from the model's own prior.
    :raises ValueError: if `num_samples` is not positive, or a plate subsamples the prompts.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}; give at least 1")
    size = max(2, ROWS // max(1, len(prompts)))
    counts = [min(size, num_samples - done) for done in range(0, num_samples, size)]
    parts = []
    for n in counts:
        part = draw(model, guide, prompts, max(2, n), max_plate_nesting)  # a single particle would have no plate
        parts.append(part if n > 1 else part.map(lambda v: v[:, :1]))
    return concatenate(parts)


@torch.no_grad()
def score(guide: Callable[..., Any], draws: Draws, max_plate_nesting: int = 1) -> Draws:
    """The same draws with `log_guide` under another guide: how probable it finds them, nats."""
    flat = {name: value.flatten(0, 1) for name, value in draws.latents.items()}  # (C·S, B, ...)
    total = draws.num_samples
    size = max(1, ROWS // max(1, len(draws.prompts)))
    parts, costs = [], []
    for start in range(0, total, size):
        values = {name: value[start : start + size] for name, value in flat.items()}
        n = min(size, total - start)
        with meter.measure() as cost, Given(values, max_plate_nesting):
            sites = sample_sites(poutine.trace(as_particles(guide, n, max_plate_nesting)).get_trace(draws.prompts))
            sites = {name: site for name, site in sites.items() if not site["is_observed"]}
            if sites.keys() != flat.keys():
                raise ValueError(
                    f"the guide has the sites {sorted(sites)}, the draws {sorted(flat)}: it cannot score them"
                )
            log_q = [log_density(site) for site in sites.values()]
        parts.append(by_prompt(log_q, n, draws.log_guide.shape[-1]))
        costs.append(cost)
    log_guide = torch.cat(parts).reshape(draws.log_guide.shape)
    return replace(draws, log_guide=log_guide, cost=sum(costs, draws.cost))


def draw(model: Any, guide: Any, prompts: Any, n: int, nesting: int = 1) -> Draws:
    """n draws of the guide with their weights, in one run of guide and model; n is at least 2."""
    require_prompts(prompts)
    with meter.measure() as cost:
        p = run(model, guide, (prompts,), {}, n, nesting)
    return replace(as_draws(p, nesting), cost=cost)


def require_prompts(prompts: Any) -> None:
    if not len(prompts):
        raise ValueError("no prompt is given; give at least one, which may be empty: ['']")
