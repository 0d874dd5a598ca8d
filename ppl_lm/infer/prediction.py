"""`predictive`: what the observed sites would show if they were observed anew."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ppl_lm.infer.draws import Draws
from ppl_lm.infer.traces.layout import sites_at
from ppl_lm.infer.traces.observations import replicates
from ppl_lm.infer.traces.structure import nesting_of


@torch.no_grad()
def predictive(
    model: Callable[..., Any],
    draws: Draws,
    max_plate_nesting: int | None = None,
    return_sites: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """A replicate of each observed site for every draw, as they come, (C, S, B, ...): of a prior's draws the prior predictive;
    of exact draws or chains the posterior predictive, and of weighted draws with their weights. As `pyro.infer.Predictive`
    does, it runs the model once more on the draws, rewards included.

    :param return_sites: the observed sites that are wanted, as in Pyro; None, or none named: all of them.
    :raises ValueError: if a wanted site is not observed, or cannot be sampled, such as an `Optimality` without a bound."""
    nesting = nesting_of(max_plate_nesting, model, None, draws.prompts)
    runs = sites_at(model, draws.flat_latents(), draws.prompts, nesting)
    parts = [replicates(sites, nesting, return_sites) for _, sites in runs]
    return {k: torch.cat([p[k] for p in parts]).unflatten(0, draws.log_guide.shape[:2]) for k in parts[0]}
