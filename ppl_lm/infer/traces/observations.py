"""What a program observes: bounds of its likelihood, replicates, the likelihood of a given text."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_lm.infer.traces.layout import prompts_first
from ppl_lm.infer.traces.sites import Site, is_record, sample_sites
from ppl_lm.likelihood.optimality import Optimality


@torch.no_grad()
def likelihood_bound(model: Callable[..., Any], prompts: Any, joint: bool = False) -> float | None:
    """Upper bound of the log-likelihood in nats, or None: the sum of what each observed site declares in
    `infer={"log_bound": ...}` or, a bounded `Optimality`, by itself.

    :param joint: of all prompts together, as a latent site outside the prompt plate needs it; else of each prompt.
    """
    total = 0.0
    for site in sample_sites(poutine.trace(model).get_trace(prompts)).values():
        if not site["is_observed"] or is_record(site):
            continue
        bound = site["infer"].get("log_bound")
        if bound is None and isinstance(site["fn"], Optimality):
            bound = site["fn"].log_bound
        if bound is None:
            return None
        if site["mask"] is not None:  # where it is False the site's factor is 1
            bound = max(float(bound), 0.0)
        copies = prod(f.size for f in site["cond_indep_stack"] if f.vectorized and (joint or f.dim != -1))
        total += float(bound) * copies * float(site["scale"])
    return total


def replicates(sites: dict[str, Site], nesting: int) -> dict[str, Tensor]:
    """A new value of each observed site, (n, B, *inner, *event), as latent sites are.

    :raises ValueError: if one cannot be sampled, by name."""
    observed = {name: site for name, site in sites.items() if site["is_observed"] and not is_record(site)}
    return {name: _replicate(name, site, nesting) for name, site in observed.items()}


def _replicate(name: str, site: Site, nesting: int) -> Tensor:
    fn: Any = site["fn"]
    bound = site["infer"].get("log_bound")
    if isinstance(fn, Optimality) and fn.log_bound is None and bound is not None:
        fn = Optimality(fn.log_potential, float(bound))
    try:
        return prompts_first({**site, "value": fn.sample()}, nesting)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"site {name!r} cannot be sampled, so that it predicts nothing: {error}") from error
