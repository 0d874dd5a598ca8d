"""What a program observes: bounds of its likelihood, replicates, the likelihood of a given text."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from pyro import poutine

from ppl_lm.infer.traces.sites import is_record, sample_sites
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
