"""One run of guide and model with K particles."""

import reprlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import pyro
import torch
from jaxtyping import Bool, Float64
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match
from torch import Tensor

from ppl_lm.infer.binding import require_separate
from ppl_lm.infer.counts import require_count
from ppl_lm.infer.traces.sites import (
    Site,
    TextSite,
    check_shape,
    is_record,
    is_sequence,
    lacks_support,
    log_density,
    log_shift,
    same_law,
    sample_sites,
    score_site,
)
from ppl_lm.infer.traces.sources import ProposalTrace, Source
from ppl_lm.lm.prompts import Prompts

PLATE = "particles"


@dataclass
class Particles:
    """Guide and model traces of K particles, every latent site's value drawn once, every log-probability found once.

    Sequence sites are scored without autograd (`token_log_probs`, (K, B, T)); ordinary sites keep their graph.

    :param log_p: site name -> scaled and masked log-probability under the model, observed sites included.
    :param log_q: site name -> the same under the guide.
    :param token_log_p: sequence site name -> (K, B, T) scaled and masked; likewise `token_log_q`. Their pad positions
        are 0, and a completion that is not canonical has -inf in `log_p` alone.
    :param again: the model on other values of its latent sites.
    :param proposal_log_q: site name -> density that drew its values, by token for texts, NaN where not known; None: the
        guide's.
    :param from_guide: then which particles the guide drew as it is, (K, B), where that is all that is known.
    :param repeated: whether an earlier step has seen these very draws.
    :param given: what the programs were given first; `nesting`: how many plates lie within each other, without the particles';
        `rows`: of each plate that subsamples, which of its members this run is of.
    """

    count: int
    guide_sites: dict[str, Site]
    model_sites: dict[str, Site]
    log_p: dict[str, Tensor]
    log_q: dict[str, Tensor]
    token_log_p: dict[str, Tensor]
    token_log_q: dict[str, Tensor]
    again: Callable[[Trace, int], Trace]
    guide: Any
    proposal_log_q: dict[str, Tensor] | None = None
    from_guide: Bool[Tensor, "K B"] | None = None
    repeated: bool = False
    given: Any = None
    nesting: int = 1
    rows: dict[str, Tensor] = field(default_factory=dict)

    @property
    def latents(self) -> dict[str, Tensor]:
        return {name: site["value"] for name, site in self.guide_sites.items()}

    @property
    def records(self) -> dict[str, Tensor]:
        """What the model recorded with `pyro.deterministic`."""
        return {name: site["value"] for name, site in self.model_sites.items() if is_record(site)}

    @cached_property
    def prompts(self) -> Prompts:
        """What the programs were given, batch shape (B,), whatever their texts go on from."""
        text = self.first_text()
        law, size = text["fn"], text["fn"].batch_shape[-1]
        try:
            given = Prompts.make(self.given, law.lm.vocabulary, law.prompts.ids.device)
        except (TypeError, ValueError):  # what a program makes its prompts of by itself
            given = law.prompts
        here = [self.rows[f.name] for f in text["cond_indep_stack"] if f.dim == -1 and f.name in self.rows]
        if here and len(given.batch_shape) == 1 and len(given) > size:
            given = given.take(here[0])
        for prompts in (given, law.prompts):
            if prompts.batch_shape == (size,):
                return prompts
        raise ValueError(
            f"the programs' first argument is {reprlib.repr(self.given)}, and site {text['name']!r} holds {size} texts along "
            "its last dimension: give the prompts first, one for each of them"
        )

    def first_text(self) -> Site:
        """The first latent text that goes on from a prompt, or from whatever else; where none is latent, an observed one."""
        latent = [site for site in self.guide_sites.values() if is_sequence(site)]
        plain = [site for site in latent if len(site["fn"].prompts.batch_shape) == 1]
        for site in (*plain, *latent, *filter(is_sequence, self.model_sites.values())):
            return site
        raise ValueError(
            f"no site of these programs is a text, neither of the guide's {sorted(self.guide_sites)} nor of the model's "
            f"{sorted(self.model_sites)}: use Pyro's own inference for them"
        )

    def texts(self) -> dict[str, TextSite]:
        """The guide's texts by the name of their site, (K, *plates, B, T)."""
        return {name: TextSite.of(site) for name, site in self.guide_sites.items() if is_sequence(site)}

    def model_texts(self) -> dict[str, TextSite]:
        """The same sites as the model has them."""
        return {name: TextSite.of(site) for name, site in self.model_sites.items() if is_sequence(site)}

    def log_prior(self) -> Float64[Tensor, "K B"]:
        """log p of all latent sites, detached, float64, nats: (K, B), or (K, 1) where a site lies outside the prompt
        plate, so that only a joint value of all prompts exists. Likewise `log_likelihood`, `log_guide`, `log_proposal`."""
        return self._by_prompt(self.log_p[name] for name in self.guide_sites if name in self.log_p)

    def log_likelihood(self) -> Float64[Tensor, "K B"]:
        """log p of all observed sites, for exp(r/β): what a bounded `Optimality` subtracts is added again."""
        return self._by_prompt(self.log_p[n] + log_shift(s) for n, s in self.observed_sites.items())

    @property
    def observed_sites(self) -> dict[str, Site]:
        return {name: self.model_sites[name] for name in self.log_p if name not in self.guide_sites}

    def log_evidence(self) -> Float64[Tensor, "K B"]:
        """log p of all observed sites as Pyro has it: `log_likelihood` less what a bounded `Optimality` subtracts."""
        return self._by_prompt(log_p for name, log_p in self.log_p.items() if name not in self.guide_sites)

    def log_guide(self) -> Float64[Tensor, "K B"]:
        return self._by_prompt(self.log_q.values())

    @torch.no_grad()
    def log_proposal(self) -> Float64[Tensor, "K B"]:
        """The density that drew the values: `log_guide` without what `poutine.scale` and `mask` make of it."""
        if self.proposal_log_q is not None:
            return self._by_prompt(
                log_q.sum(-1) if is_sequence(self.guide_sites[name]) else log_q
                for name, log_q in self.proposal_log_q.items()
            )
        return self._by_prompt(log_density(site) for site in self.guide_sites.values())

    def share(self) -> Float64[Tensor, "K B"]:
        """What each particle counts in a mean under the guide, (K, B): 1/K, or self-normalised importance ratios."""
        if self.from_guide is not None:
            return self.from_guide.double() / self.from_guide.sum(0)
        if self.proposal_log_q is None:
            return torch.full_like(self.log_guide(), 1 / self.count)
        return (self.log_guide() - self.log_proposal()).softmax(0)

    def _by_prompt(self, terms: Iterable[Tensor]) -> Float64[Tensor, "K B"]:
        return by_prompt(terms, self.count, len(self.prompts) if self.is_local else 1)

    @property
    def prompt_plates(self) -> set[str]:
        """Names of the plate of the prompts, in guide and model, which may name theirs differently."""
        name = self.first_text()["name"]
        of_model = _last_plate(self.model_sites[name]) if name in self.model_sites else set()
        twins = [name, *(n for n, s in self.model_sites.items() if of_model & _last_plate(s))]
        return of_model.union(*(_last_plate(self.guide_sites[n]) for n in twins if n in self.guide_sites))

    @property
    def is_local(self) -> bool:
        """Whether every site lies in the prompt plate, so that each prompt has a weight of its own."""
        plates = self.prompt_plates
        sites = (*self.guide_sites.values(), *self.model_sites.values())
        return all(plates & _last_plate(site) for site in sites if not is_record(site))

    def is_hard(self) -> bool:
        """Whether the evidence rules texts out: a site says so, or one that was drawn is impossible."""
        declared = any(site["infer"].get("hard") for site in self.model_sites.values())
        return declared or any(bool((log_p == -torch.inf).any()) for log_p in self.log_p.values())

    def lacks_support(self) -> bool:
        """Whether the guide cannot draw all texts that the model's prior can, its law being truncated."""
        model = {name: text.law for name, text in self.model_texts().items()}
        return any(lacks_support(text.law, model.get(name)) for name, text in self.texts().items())

    def subsampled(self) -> str | None:
        """Name of a plate that subsamples, if one does."""
        for site in (*self.guide_sites.values(), *self.model_sites.values()):
            for f in site["cond_indep_stack"]:
                if f.full_size is not None and f.full_size != f.size:
                    return f.name
        return None


def run(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_particles: int,
    max_plate_nesting: int,
    source: Source | None = None,
    pathwise: bool = True,
) -> Particles:
    """Runs the guide, then the model on the guide's values, once, with all particles in an outermost plate.

    Without a guide the model's own prior draws its latent sites, and serves as their guide. With a source, it draws, and
    the guide is replayed on what it drew.

    :param pathwise: whether values keep the graph of a reparameterised draw."""

    def trace_of(program: Callable[..., Any], values: Trace | None = None, count: int = num_particles) -> Trace:
        program = as_particles(program, count, max_plate_nesting)
        program = program if values is None else poutine.replay(program, trace=values)
        with nullcontext() if pathwise else _Detached():
            return poutine.trace(program).get_trace(*args, **kwargs)

    require_count("max_plate_nesting", max_plate_nesting)
    nesting, proposed, traces = max_plate_nesting + 1, None, []
    if guide is None:
        model_trace = trace_of(model)
        model_sites = sample_sites(model_trace)
        guide_sites = {n: s for n, s in model_sites.items() if not s["is_observed"]}
    else:
        require_separate(model, guide)
        if source is not None:
            proposed = source(lambda program=None: ProposalTrace.of(trace_of(program or guide)), args[0])
        guide_trace = trace_of(guide, None if proposed is None else proposed.trace)
        if proposed is not None and (lacks := set(sample_sites(guide_trace)) - set(sample_sites(proposed.trace))):
            raise ValueError(f"the source draws no site {min(lacks)!r}; it must draw every latent site of the guide")
        model_trace = trace_of(model, guide_trace)
        traces.append(guide_trace)
        guide_sites = {n: s for n, s in sample_sites(guide_trace).items() if not s["is_observed"]}
        model_sites = sample_sites(model_trace)
        missing = [n for n, s in model_sites.items() if not s["is_observed"] and n not in guide_sites]
        if missing:
            raise ValueError(f"the guide has no site {missing[0]!r}; it must draw every latent site of the model")
        check_model_guide_match(prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace), nesting)
    particles = Particles(num_particles, guide_sites, model_sites, {}, {}, {}, {}, partial(trace_of, model), guide)
    particles.given, particles.nesting = args[0] if args else None, max_plate_nesting
    for trace in (*traces, model_trace):
        nodes: Any = trace.nodes
        particles.rows |= {n: s["value"] for n, s in nodes.items() if site_is_subsample(s)}
    if proposed is not None:
        particles.proposal_log_q = {name: proposed.log_density(name) for name in guide_sites}
        particles.from_guide, particles.repeated = proposed.from_guide, proposed.repeated
    for name, site in guide_sites.items():
        particles.log_q[name] = score_site(name, site, particles.token_log_q)
        check_shape(site, particles.log_q[name], nesting)
    for name, site in model_sites.items():
        if is_record(site):
            continue
        twin = guide_sites.get(name)
        if twin is site or (
            twin is not None and same_law(site, twin)
        ):  # the prior as its own proposal: one pass serves both
            particles.log_p[name] = particles.log_q[name]
            if name in particles.token_log_q:
                particles.token_log_p[name] = particles.token_log_q[name]
            continue
        particles.log_p[name] = score_site(name, site, particles.token_log_p)
        check_shape(site, particles.log_p[name], nesting)
    for name, value in (*particles.log_q.items(), *particles.log_p.items()):
        if bool(torch.isnan(value.detach()).any()):
            raise ValueError(f"site {name!r} has a log-probability that is NaN; check the program and its reward")
    return particles


def _last_plate(site: Site) -> set[str]:
    return {f.name for f in site["cond_indep_stack"] if f.dim == -1}


class _Detached(Messenger):
    """Values without the graph of their draw: later sites' densities then depend on parameters of their own alone."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


def by_prompt(terms: Iterable[Tensor], count: int, batch: int) -> Float64[Tensor, "{count} {batch}"]:
    """Sums sites' log-probabilities, each over the dimensions between particles and prompts, to (count, batch)."""
    total: Any = torch.zeros(count, batch, dtype=torch.float64)
    for term in terms:
        term = term.detach().double()
        term = term.expand(count) if term.dim() == 0 else term
        term = term.reshape(count, -1, term.shape[-1]) if term.dim() > 1 or count == 1 else term.reshape(count, 1, 1)
        term = term.sum(1)
        total = total.to(term.device) + (term if term.shape[-1] == batch else term.sum(-1, keepdim=True))
    return total


def as_particles(program: Callable[..., Any], num_particles: int, max_plate_nesting: int) -> Callable[..., Any]:
    """The program with all its sites in an outermost plate of `num_particles`. To be replayed from outside, so that the
    plate broadcasts replayed sites too."""
    return pyro.plate(PLATE, num_particles, dim=-max_plate_nesting - 1)(program)
