"""What a program observes: bounds of its likelihood, replicates, the likelihood of a given text."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from jaxtyping import Float, Int
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import get_provenance
from torch import Tensor

from ppl_lm.infer.traces.layout import prompts_first
from ppl_lm.infer.traces.particles import by_prompt
from ppl_lm.infer.traces.sites import Site, is_record, log_shift, score_site, shift_of, sites_of, unwrapped
from ppl_lm.infer.traces.text_site import TextIs
from ppl_lm.likelihood.optimality import Optimality


@torch.no_grad()
def likelihood_bound(model: Callable[..., Any], prompts: Any, joint: bool = False) -> float | None:
    """Upper bound of the log-likelihood in nats, or None: the sum of what each observed site declares in
    `infer={"log_bound": ...}` or, a bounded `Optimality`, by itself; 0 of another discrete one, such as a text or a rating,
    whose likelihood is a probability. None too where `poutine.scale` scales a site by what a latent site says.

    :param joint: of all prompts together, as a latent site outside the prompt plate needs it; else the largest of any prompt.
    """
    total, scaled = 0.0, False
    for name, site in sites_of(model, prompts).items():
        if not site["is_observed"] or is_record(site):
            continue
        bound = _bound_of(name, site)
        if bound is None:
            return None
        bound = (
            bound if site["mask"] is None else bound.clamp_min(0.0)
        )  # where the mask is False the site's factor is 1
        if isinstance(scale := site["scale"], Tensor):
            scale, scaled = scale.detach().cpu(), True
        bound = bound * scale
        of_prompts = any(frame.vectorized and frame.dim == -1 for frame in site["cond_indep_stack"])
        if of_prompts and not joint:
            bound = bound.flatten(0, -2).sum(0) if bound.dim() > 1 else bound  # inner plates multiply
            total += float(bound.max())
        else:
            total += float(bound.sum())
    return None if scaled and _scales_by_latents(model, prompts) else total


def _bound_of(name: str, site: Site) -> Tensor | None:
    """Of each element of an observed site's batch, neither scaled nor masked; None where nothing declares one."""
    declared, fn = site["infer"].get("log_bound"), site["fn"]
    if declared is not None:
        if (count := torch.as_tensor(declared).numel()) != 1:
            raise ValueError(
                f"site {name!r} declares a log_bound of {count} numbers; give one, which no draw of any prompt exceeds, "
                "whatever the latent sites are"
            )
        return torch.full(fn.batch_shape, float(declared), dtype=torch.float64)
    law = unwrapped(fn)
    if isinstance(law, Optimality):
        return None if law.log_bound is None else shift_of(fn).cpu()
    return torch.zeros(fn.batch_shape, dtype=torch.float64) if getattr(fn.support, "is_discrete", False) else None


def _scales_by_latents(model: Callable[..., Any], prompts: Any) -> bool:
    """Whether the scale of an observed site depends on what a latent site says, by Pyro's tracking of provenance."""
    with TrackProvenance():
        sites = sites_of(model, prompts).values()
    return any(get_provenance(site["scale"]) for site in sites if site["is_observed"])


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


def replicates(sites: dict[str, Site], nesting: int, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """A new value of each observed site, or of those with these names, (n, B, *inner, *event), as latent sites are.

    :raises ValueError: if one is not observed or cannot be sampled, by name."""
    observed = {name: site for name, site in sites.items() if site["is_observed"] and not is_record(site)}
    if unknown := sorted(set(names or ()) - set(observed)):
        raise ValueError(f"{unknown[0]!r} is no observed site; the program observes {', '.join(observed) or 'none'}")
    wanted = observed if names is None else names
    return {name: _replicate(name, observed[name], nesting) for name in wanted}


def _replicate(name: str, site: Site, nesting: int) -> Tensor:
    fn: Any = site["fn"]
    bound = site["infer"].get("log_bound")
    if isinstance(fn, Optimality) and fn.log_bound is None and bound is not None:
        fn = Optimality(fn.log_potential, float(bound))
    try:
        return prompts_first({**site, "value": fn.sample()}, nesting)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"site {name!r} cannot be sampled, so that it predicts nothing; return_sites= names others: {error}"
        ) from error
