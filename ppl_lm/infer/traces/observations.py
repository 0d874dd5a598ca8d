"""What a program observes: bounds of its likelihood, replicates, the likelihood of a given text."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from jaxtyping import Float, Int
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import get_provenance
from torch import Tensor

from ppl_lm.infer.traces.layout import prompts_first
from ppl_lm.infer.traces.particles import by_prompt
from ppl_lm.infer.traces.sites import Site, is_record, layers, log_shift, score_site, shift_of, sites_of, unwrapped
from ppl_lm.infer.traces.text_site import TextIs
from ppl_lm.likelihood.optimality import Optimality


@torch.no_grad()
def likelihood_bound(model: Callable[..., Any], prompts: Any, joint: bool = False) -> float | None:
    """Upper bound of the log-likelihood in nats, or None: the sum of what each observed site declares in
    `infer={"log_bound": ...}` or, a bounded `Optimality`, by itself; 0 of another discrete one, such as a text or a rating,
    whose likelihood is a probability. Where a latent site decides a mask it is the larger of both cases, and None where one
    decides a `poutine.scale`.

    :param joint: of all prompts together, as a latent site outside the prompt plate needs it; else the largest of any prompt.
    """
    sites = sites_of(model, prompts)
    observed = {name: site for name, site in sites.items() if site["is_observed"] and not is_record(site)}
    bounds = {name: _bound_of(name, site) for name, site in observed.items()}
    if any(bound is None for bound in bounds.values()):
        return None
    scaled = [name for name, site in observed.items() if isinstance(site["scale"], Tensor)]
    if scaled and _decided_by_latents(model, prompts, lambda site: [site["scale"]]):
        return None
    if any(_masks(site) for site in observed.values()):
        for name in _decided_by_latents(model, prompts, _masks):
            bounds[name] = _bound_of(name, observed[name], whatever_masked=True)
    total = 0.0
    for name, site in observed.items():
        bound: Any = bounds[name]
        if site["mask"] is not None:  # where it is False the site's factor is 1
            bound = bound.clamp_min(0.0)
        bound = bound * (site["scale"].detach().cpu() if name in scaled else site["scale"])
        of_prompts = any(frame.vectorized and frame.dim == -1 for frame in site["cond_indep_stack"])
        if of_prompts and not joint:
            bound = bound.flatten(0, -2).sum(0) if bound.dim() > 1 else bound  # inner plates multiply
            total += float(bound.max())
        else:
            total += float(bound.sum())
    return total


def _bound_of(name: str, site: Site, whatever_masked: bool = False) -> Tensor | None:
    """Of each element of an observed site's batch, neither scaled nor masked from outside; None where nothing declares one."""
    declared, fn = site["infer"].get("log_bound"), site["fn"]
    if declared is not None:
        if (count := torch.as_tensor(declared).numel()) != 1:
            raise ValueError(
                f"site {name!r} declares a log_bound of {count} numbers; give one, which no draw of any prompt exceeds, "
                "whatever the latent sites are"
            )
        bound = max(float(declared), 0.0) if _masks(site) else float(declared)
        return torch.full(fn.batch_shape, bound, dtype=torch.float64)
    law = unwrapped(fn)
    if isinstance(law, Optimality):
        return None if law.log_bound is None else shift_of(fn, whatever_masked).cpu()
    return torch.zeros(fn.batch_shape, dtype=torch.float64) if getattr(fn.support, "is_discrete", False) else None


def _masks(site: Site) -> list[Any]:
    """Of the site's own law."""
    return [layer._mask for layer in layers(site["fn"]) if isinstance(layer, MaskedDistribution)]


def _decided_by_latents(model: Callable[..., Any], prompts: Any, what: Callable[[Site], list[Any]]) -> list[str]:
    """Names of the observed sites of which this depends on what a latent site says, by Pyro's tracking of provenance."""
    with TrackProvenance():
        sites = sites_of(model, prompts)
    return [
        name for name, site in sites.items() if site["is_observed"] and any(get_provenance(part) for part in what(site))
    ]


@torch.no_grad()
def rules_out_texts(model: Callable[..., Any], prompts: Any) -> bool:
    """Whether an observed site says that it makes some texts impossible (`infer={"hard": True}`)."""
    return any(site["infer"].get("hard") for site in sites_of(model, prompts).values())


def power_of_prior(model: Callable[..., Any], prompts: Any) -> float | None:
    """alpha, where the only observed site says that its likelihood is the prior's of the text to the power alpha - 1
    (`infer={"prior_power": alpha}`), so that the posterior is the prior's power; else None."""
    observed = [site for site in sites_of(model, prompts).values() if site["is_observed"] and not is_record(site)]
    return observed[0]["infer"].get("prior_power") if len(observed) == 1 else None


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
    wanted = names or observed
    return {name: _replicate(name, observed[name], nesting) for name in wanted}


def _replicate(name: str, site: Site, nesting: int) -> Tensor:
    fn: Any = site["fn"]
    bound = site["infer"].get("log_bound")
    if bound is not None:
        fn = _bounded(fn, float(bound))
    try:
        return prompts_first({**site, "value": fn.sample()}, nesting)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"site {name!r} cannot be sampled, so that it predicts nothing; return_sites= names others: {error}"
        ) from error


def _bounded(fn: Any, bound: float) -> Any:
    """The same law, with this bound of an `Optimality` that has none of its own, whatever it is wrapped in."""
    if isinstance(fn, Optimality) and fn.log_bound is None:
        return Optimality(fn.log_potential, bound)
    if isinstance(fn, Independent):
        return _bounded(fn.base_dist, bound).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, ExpandedDistribution):
        return _bounded(fn.base_dist, bound).expand(fn.batch_shape)
    if isinstance(fn, MaskedDistribution):
        return _bounded(fn.base_dist, bound).mask(fn._mask)
    return fn
