"""What a program observes: bounds of its likelihood, replicates, the likelihood of a given text."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_lm.infer.traces.layout import prompts_first
from ppl_lm.infer.traces.particles import by_prompt
from ppl_lm.infer.traces.sites import Site, is_record, log_shift, score_site, sites_of, unwrapped
from ppl_lm.infer.traces.text_site import TextIs
from ppl_lm.likelihood.optimality import Optimality


@torch.no_grad()
def likelihood_bound(model: Callable[..., Any], prompts: Any, joint: bool = False) -> float | None:
    """Upper bound of the log-likelihood in nats, or None: the sum of what each observed site declares in
    `infer={"log_bound": ...}` or, a bounded `Optimality`, by itself; 0 of another discrete one, such as a text or a rating,
    whose likelihood is a probability.

    :param joint: of all prompts together, as a latent site outside the prompt plate needs it; else of each prompt.
    """
    total = 0.0
    for site in sites_of(model, prompts).values():
        if not site["is_observed"] or is_record(site):
            continue
        bound, fn = site["infer"].get("log_bound"), site["fn"]
        law = unwrapped(fn)
        if bound is None and isinstance(law, Optimality):
            bound = None if law.log_bound is None else law.log_bound * fn.event_shape.numel()
            if bound is not None and law is not fn:  # a mask is within
                bound = max(bound, 0.0)
        elif bound is None and getattr(fn.support, "is_discrete", False):
            bound = 0.0
        if bound is None:
            return None
        if (count := torch.as_tensor(bound).numel()) != 1:
            raise ValueError(
                f"site {site['name']!r} declares a log_bound of {count} numbers; give one, which no draw of any prompt "
                "exceeds, whatever the latent sites are"
            )
        if site["mask"] is not None:  # where it is False the site's factor is 1
            bound = max(float(bound), 0.0)
        copies = prod(f.size for f in site["cond_indep_stack"] if f.vectorized and (joint or f.dim != -1))
        total += float(bound) * copies * float(site["scale"])
    return total


@torch.no_grad()
def rules_out_texts(model: Callable[..., Any], prompts: Any) -> bool:
    """Whether an observed site says that it makes some texts impossible (`infer={"hard": True}`)."""
    return any(site["infer"].get("hard") for site in sites_of(model, prompts).values())


def log_likelihood_of_text(model: Callable[..., Any], prompts: Any, x: Int[Tensor, "B T"]) -> Float[Tensor, "B"]:
    """log p(evidence | x) of one text for each prompt, nats, float64, for exp(r/β)."""
    with TextIs(x):
        sites = sites_of(model, prompts)
    observed = {name: site for name, site in sites.items() if site["is_observed"] and not is_record(site)}
    terms = [score_site(name, site, {}) + log_shift(site) for name, site in observed.items()]
    return by_prompt([term.unsqueeze(0) for term in terms], 1, len(x))[0]


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
