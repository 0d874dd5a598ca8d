"""Replicates: what the observed sites would show if they were observed anew."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_lm.infer.draws import Draws
from ppl_lm.infer.traces.layout import ROWS, Given, prompts_first
from ppl_lm.infer.traces.particles import as_particles
from ppl_lm.infer.traces.sites import Site, is_record, sample_sites
from ppl_lm.likelihood.optimality import Optimality


@torch.no_grad()
def predictive(model: Callable[..., Any], draws: Draws, max_plate_nesting: int = 1) -> dict[str, Tensor]:
    """A replicate of each observed site for every draw, as they come, (C, S, B, ...): of a prior's draws the prior predictive;
    of exact draws or chains the posterior predictive, and of weighted draws with their weights.

    Runs the model once more on the draws, rewards included.

    :raises ValueError: if a site cannot be sampled, such as an `Optimality` without a bound."""
    flat = {name: value.flatten(0, 1) for name, value in draws.latents.items()}  # (C·S, B, ...)
    total, size = draws.num_samples, max(1, ROWS // max(1, len(draws.prompts)))
    parts: list[dict[str, Tensor]] = []
    for start in range(0, total, size):
        n = min(size, total - start)
        values = {name: value[start : start + size] for name, value in flat.items()}
        with Given(values, max_plate_nesting):
            sites = sample_sites(poutine.trace(as_particles(model, n, max_plate_nesting)).get_trace(draws.prompts))
        observed = {k: s for k, s in sites.items() if s["is_observed"] and not is_record(s)}
        parts.append({k: _replicate(k, s, max_plate_nesting) for k, s in observed.items()})
    return {k: torch.cat([p[k] for p in parts]).unflatten(0, draws.log_guide.shape[:2]) for k in parts[0]}


def _replicate(name: str, site: Site, nesting: int) -> Tensor:
    """(n, B, *inner, *event), as latent sites are."""
    fn: Any = site["fn"]
    bound = site["infer"].get("log_bound")
    if isinstance(fn, Optimality) and fn.log_bound is None and bound is not None:
        fn = Optimality(fn.log_potential, float(bound))
    try:
        return prompts_first({**site, "value": fn.sample()}, nesting)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"site {name!r} cannot be sampled, so that it predicts nothing: {error}") from error
