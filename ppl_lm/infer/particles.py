"""One run of guide and model with K particles: where Pyro's traces are read, and nowhere else."""

from collections.abc import Callable, Iterable
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
from ppl_lm.likelihood import Optimality
from ppl_lm.lm import Prompts, TokenSequence

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
        return {name: site["value"] for name, site in self.model_sites.items() if is_record(site)}

    @property
    def prompts(self) -> Prompts:
        """Of the text that continues no other: batch shape (B,)."""
        return self._first_text()["fn"].prompts

    def _first_text(self) -> Site:
        for site in self.guide_sites.values():
            if is_sequence(site) and len(site["fn"].prompts.batch_shape) == 1:
                return site
        raise ValueError("the guide has no text among its sites: use Pyro's own inference for such programs")

    def log_prior(self) -> Tensor:
        """log p of all latent sites, detached, float64, nats: (K, B), or (K, 1) where a site lies outside the prompt
        plate, so that only a joint value of all prompts exists. Likewise `log_likelihood`, `log_guide`, `log_drawn`."""
        return self._by_prompt(self.log_p[name] for name in self.guide_sites if name in self.log_p)

    def log_likelihood(self) -> Tensor:
        """log p of all observed sites, for exp(r/β): what a bounded `Optimality` subtracts is added again."""
        terms = []
        for name, log_p in self.log_p.items():
            fn = self.model_sites[name]["fn"]
            if name not in self.guide_sites:
                shift = (fn.log_bound or 0.0) if isinstance(fn, Optimality) else 0.0
                site = self.model_sites[name]
                terms.append(log_p + scale_and_mask(torch.full_like(log_p, shift), site["scale"], site["mask"]))
        return self._by_prompt(terms)

    def log_guide(self) -> Tensor:
        return self._by_prompt(self.log_q.values())

    @torch.no_grad()
    def log_drawn(self) -> Tensor:
        """The density that drew the values: `log_guide` without what `poutine.scale` and `mask` make of it."""
        return self._by_prompt(log_density(site) for site in self.guide_sites.values())

    def _by_prompt(self, terms: Iterable[Tensor]) -> Tensor:
        return by_prompt(terms, self.count, len(self.prompts) if self.is_local else 1)

    @property
    def prompt_plates(self) -> set[str]:
        """Names of the plate of the prompts, in guide and model."""
        name = self._first_text()["name"]
        sites = (self.guide_sites[name], self.model_sites[name])
        return {f.name for site in sites for f in site["cond_indep_stack"] if f.dim == -1}

    @property
    def is_local(self) -> bool:
        """Whether every site lies in the prompt plate, so that each prompt has a weight of its own."""
        name = self._first_text()["name"]

        def local(sites: dict[str, Site]) -> bool:  # guide and model may name their plates differently
            plates = [
                {f.name for f in s["cond_indep_stack"] if f.dim == -1} for s in sites.values() if not is_record(s)
            ]
            return all(plate & {f.name for f in sites[name]["cond_indep_stack"] if f.dim == -1} for plate in plates)

        return local(self.guide_sites) and local(self.model_sites)

    def subsampled(self) -> str | None:
        """Name of a plate that subsamples, if one does."""
        for site in (*self.guide_sites.values(), *self.model_sites.values()):
            for f in site["cond_indep_stack"]:
                if f.full_size is not None and f.full_size != f.size:
                    return f.name
        return None

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
    guide: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_particles: int,
    max_plate_nesting: int = 1,
) -> Particles:
    """Runs the guide, then the model on the guide's values, once, with all particles in an outermost plate.

    Without a guide the model's own prior draws its latent sites, and serves as their guide."""
    nesting = max_plate_nesting + (num_particles > 1)
    if guide is None:
        model_trace = poutine.trace(as_particles(model, num_particles, max_plate_nesting)).get_trace(*args, **kwargs)
        model_sites = sample_sites(model_trace)
        guide_sites = {n: s for n, s in model_sites.items() if not s["is_observed"]}
    else:
        require_separate(model, guide)
        guide = as_particles(guide, num_particles, max_plate_nesting)
        model = as_particles(model, num_particles, max_plate_nesting)
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        guide_sites = {n: s for n, s in sample_sites(guide_trace).items() if not s["is_observed"]}
        model_sites = sample_sites(model_trace)
        missing = [n for n, s in model_sites.items() if not s["is_observed"] and n not in guide_sites]
        if missing:
            raise ValueError(f"the guide has no site {missing[0]!r}; it must draw every latent site of the model")
        check_model_guide_match(prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace), nesting)
    made = Particles(num_particles, guide_sites, model_sites, {}, {}, {}, {})
    for name, site in guide_sites.items():
        made.log_q[name] = _log_prob(name, site, made.token_log_q)
        if pyro.settings.get("validate_poutine"):
            _check_shape(site, made.log_q[name], nesting)
    for name, site in model_sites.items():
        if is_record(site):
            continue
        twin = guide_sites.get(name)
        if twin is site or (
            twin is not None and _same_law(site, twin)
        ):  # the prior as its own proposal: one pass serves both
            made.log_p[name] = made.log_q[name]
            if name in made.token_log_q:
                made.token_log_p[name] = made.token_log_q[name]
            continue
        made.log_p[name] = _log_prob(name, site, made.token_log_p)
        if pyro.settings.get("validate_poutine"):
            _check_shape(site, made.log_p[name], nesting)
    for name, value in (*made.log_q.items(), *made.log_p.items()):
        if bool(torch.isnan(value.detach()).any()):
            raise ValueError(f"site {name!r} has a log-probability that is NaN; check the program and its reward")
    return made


def by_prompt(terms: Iterable[Tensor], count: int, batch: int) -> Tensor:
    """Sums sites' log-probabilities, each over the dimensions between particles and prompts, to (count, batch)."""
    total: Any = torch.zeros(count, batch, dtype=torch.float64)
    for term in terms:
        term = term.detach().double()
        term = term.expand(count) if term.dim() == 0 else term
        term = term.reshape(count, -1, term.shape[-1]) if term.dim() > 1 or count == 1 else term.reshape(count, 1, 1)
        term = term.sum(1)
        total = total.to(term.device) + (term if term.shape[-1] == batch else term.sum(-1, keepdim=True))
    return total


def as_particles(program: Callable[..., Any], num_particles: int, max_plate_nesting: int = 1) -> Callable[..., Any]:
    """The program with all its sites in an outermost plate of `num_particles`, none for a single one. To be replayed
    from outside, so that the plate broadcasts replayed sites too."""
    return pyro.plate(PLATE, num_particles, dim=-max_plate_nesting - 1)(program) if num_particles > 1 else program


def sample_sites(trace: Any) -> dict[str, Site]:
    """The sample sites of a Pyro trace by name, without those that plates make to subsample."""
    nodes: Any = prune_subsample_sites(trace).nodes
    return {n: s for n, s in nodes.items() if s["type"] == "sample"}


def is_sequence(site: Site) -> bool:
    return isinstance(site["fn"], TokenSequence)


def _check_shape(site: Site, log_prob: Tensor, nesting: int) -> None:
    shaped: Any = {**site, "log_prob": log_prob}
    check_site_shape(shaped, nesting)


def log_density(site: Site) -> Tensor:
    """Log-probability of a site's value as its distribution has it, unscaled and unmasked, without autograd for texts."""
    return _log_prob("", {**site, "scale": 1.0, "mask": None}, {})


def _log_prob(name: str, site: Site, tokens: dict[str, Tensor]) -> Tensor:
    fn, value, mask = site["fn"], site["value"], site["mask"]
    scale: Any = site["scale"]  # a tensor under poutine.scale(scale=tensor)
    if not is_sequence(site):
        return scale_and_mask(fn.log_prob(value, *site["args"], **site["kwargs"]), scale, mask)
    with torch.no_grad():
        by_token = fn.drawn_log_probs(value)
        if by_token is None:
            by_token = fn.token_log_probs(value)
        wide: Any = scale.unsqueeze(-1) if isinstance(scale, Tensor) and scale.dim() else scale
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


def is_record(site: Site) -> bool:
    return bool(site["infer"].get("_deterministic"))
