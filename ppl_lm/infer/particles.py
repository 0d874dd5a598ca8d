"""One run of guide and model with K particles: where Pyro's traces are read, and nowhere else."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import MultiFrameTensor
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from ppl_lm.infer.bind import require_separate
from ppl_lm.lm import TokenSequence

Site = dict[str, Any]
PLATE = "particles"


@dataclass
class Particles:
    """Guide and model traces of K particles, every latent site's value drawn once, every log-probability found once.

    Sequence sites are scored without autograd (`token_log_probs`, (K, B, T)); ordinary sites keep their graph.

    :param log_p: site name -> scaled and masked log-probability under the model, observed sites included.
    :param log_q: site name -> the same under the guide.
    :param token_log_p: sequence site name -> (K, B, T) scaled and masked; likewise `token_log_q`. Their pad positions
        are 0, and a completion that is not canonical has -inf in `log_p` alone.
    """

    count: int
    guide_sites: dict[str, Site]
    model_sites: dict[str, Site]
    log_p: dict[str, Tensor]
    log_q: dict[str, Tensor]
    token_log_p: dict[str, Tensor]
    token_log_q: dict[str, Tensor]

    @property
    def latents(self) -> dict[str, Tensor]:
        return {name: site["value"] for name, site in self.guide_sites.items()}

    @property
    def records(self) -> dict[str, Tensor]:
        """What the model recorded with `pyro.deterministic`."""
        return {name: site["value"] for name, site in self.model_sites.items() if _is_record(site)}

    def observed(self) -> Iterator[str]:
        """Names of the likelihood's sites."""
        for name, site in self.model_sites.items():
            if site["is_observed"] and not _is_record(site):
                yield name

    def cost(self) -> MultiFrameTensor:
        """log q - log p of every site, detached, summed by plates (Schulman et al. 2015: what lies in other cells of a
        plate does not depend on this one)."""
        terms = MultiFrameTensor()
        for name, log_q in self.log_q.items():
            terms.add((self.guide_sites[name]["cond_indep_stack"], log_q.detach()))
        for name, log_p in self.log_p.items():
            terms.add((self.model_sites[name]["cond_indep_stack"], -log_p.detach()))
        return terms


def run(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_particles: int,
    max_plate_nesting: int = 1,
) -> Particles:
    """Runs the guide, then the model on the guide's values, once, with all particles in an outermost plate."""
    require_separate(model, guide)
    if num_particles > 1:  # inside replay, so that the plate broadcasts replayed sites too
        model, guide = (pyro.plate(PLATE, num_particles, dim=-max_plate_nesting - 1)(f) for f in (model, guide))
    guide_trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    model_trace = prune_subsample_sites(model_trace)
    nesting = max_plate_nesting + (num_particles > 1)
    check_model_guide_match(model_trace, guide_trace, nesting)

    guide_sites = {n: s for n, s in guide_trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
    model_sites = {n: s for n, s in model_trace.nodes.items() if s["type"] == "sample"}
    made = Particles(num_particles, guide_sites, model_sites, {}, {}, {}, {})
    for name, site in guide_sites.items():
        made.log_q[name] = _log_prob(name, site, made.token_log_q)
        if pyro.settings.get("validate_poutine"):
            check_site_shape({**site, "log_prob": made.log_q[name]}, nesting)
    for name, site in model_sites.items():
        if _is_record(site):
            continue
        twin = guide_sites.get(name)
        if twin is not None and _same_law(site, twin):  # the prior as its own proposal: one pass serves both
            made.token_log_p[name], made.log_p[name] = made.token_log_q[name], made.log_q[name]
            continue
        made.log_p[name] = _log_prob(name, site, made.token_log_p)
        if pyro.settings.get("validate_poutine"):
            check_site_shape({**site, "log_prob": made.log_p[name]}, nesting)
    for name, value in (*made.log_q.items(), *made.log_p.items()):
        if bool(torch.isnan(value.detach()).any()):
            raise ValueError(f"site {name!r} has a log-probability that is NaN; check the program and its reward")
    return made


def is_sequence(site: Site) -> bool:
    return isinstance(site["fn"], TokenSequence)


def _log_prob(name: str, site: Site, tokens: dict[str, Tensor]) -> Tensor:
    fn, value, scale, mask = site["fn"], site["value"], site["scale"], site["mask"]
    if not is_sequence(site):
        return scale_and_mask(fn.log_prob(value, *site["args"], **site["kwargs"]), scale, mask)
    with torch.no_grad():
        by_token = fn.drawn_log_probs(value)
        if by_token is None:
            by_token = fn.token_log_probs(value)
        wide = scale.unsqueeze(-1) if isinstance(scale, Tensor) and scale.dim() else scale
        tokens[name] = scale_and_mask(by_token, wide, mask.unsqueeze(-1) if isinstance(mask, Tensor) else mask)
        canonical = fn.lm.vocabulary.is_canonical(value)
        total = tokens[name].sum(-1)
        return total if bool(canonical.all()) else total.masked_fill(~canonical, -torch.inf)


def _same_law(site: Site, twin: Site) -> bool:
    """Whether model and guide draw a sequence site from the same network, prompts, scale and mask."""
    if not (is_sequence(site) and is_sequence(twin)):
        return False
    a, b = site["fn"], twin["fn"]
    same_prompts = a.prompts is b.prompts or (
        torch.equal(a.prompts.ids, b.prompts.ids) and torch.equal(a.prompts.lengths, b.prompts.lengths)
    )
    same_scale = all(type(site[k]) is not Tensor and site[k] == twin[k] for k in ("scale", "mask"))
    if not same_prompts:
        a.prompts.vocabulary.require_same(b.prompts.vocabulary, "guide and target")
    return a.lm is b.lm and same_prompts and same_scale


def _is_record(site: Site) -> bool:
    return bool(site["infer"].get("_deterministic"))
