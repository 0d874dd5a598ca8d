"""`Draws`: the one result of every sampler."""

import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_lm.infer.counts import require_count
from ppl_lm.infer.tables import as_html, table_of_draws
from ppl_lm.infer.traces.layout import (
    factors,
    latent_values,
    log_density_at,
    observed_values,
    plate_names,
    pointwise_log_likelihoods,
    record_values,
    require_sound,
)
from ppl_lm.infer.traces.particles import Particles
from ppl_lm.infer.traces.structure import nesting_of
from ppl_lm.lm import meter
from ppl_lm.lm.meter import Cost
from ppl_lm.lm.prompts import Prompts

Kind = Literal["weighted", "exact", "chains", "runs", "conditional_runs", "rescored"]
EQUAL = ("exact", "chains")  # kinds whose draws are equally weighted
TOGETHER = ("runs", "conditional_runs")  # kinds whose draws of a chain depend on each other by resampling
SHOWN = 5  # draws of each prompt in a notebook
TOLERANCE = 1e-3  # nats, for the noise of float32 log-probabilities


@dataclass(frozen=True, repr=False)
class Draws:
    """Values of the latent sites with their log-probabilities; C chains, S draws, B prompts.

    :param latents: site name -> (C, S, B, *inner, *event), `inner` the plates left of the prompts'; B is 1 for a site
        outside the prompt plate. `draws["x"]` is one of them.
    :param texts: names of those latents that are completions, int64 token ids.
    :param records: what the model recorded with `pyro.deterministic`, such as the reward, likewise, float64.
    :param log_prior: log p(z | prompt) of all latent sites, nats, float64, (C, S, B); (C, S, 1) where a site lies
        outside the prompt plate, so that only the prompts' joint weight exists. Likewise:
    :param log_likelihood: of all observed sites, for exp(r/β): a bounded `Optimality`'s shift is taken out again.
    :param log_guide: log q(z | prompt), the density that drew them, whatever scale or mask stands on the guide's sites.
    :param kind: how they stand for the posterior, and which of them are independent of each other:

        - `weighted`: a guide's draws, all independent; `log_weight` makes them the posterior's.
        - `exact`: independent draws from the posterior itself.
        - `chains`: Markov chains, equally weighted and correlated, and the posterior's in the limit.
        - `runs`: weighted draws of which those of a chain came about together, by resampling: only the chains are
          independent, and the mean weight of each is an unbiased estimate of Z.
        - `conditional_runs`: likewise, each around an exact posterior draw (conditional SMC): then it is 1/Z that the inverse
          of the mean weight is unbiased for.
        - `rescored`: weighted draws or runs put under another guide (`under`), which did not draw them: they have no weights.
    :param observed: what the model observed, by site, (B, *inner, *event): `optimal` is 1 for each prompt.
    :param log_likelihoods: each observed site's share of `log_likelihood`, at each index of its plates, (C, S, B, *inner).
    :param factors: names of those observed sites whose share is no normalised log density: `Optimality`'s r/β, `pyro.factor`.
    :param plates: of each site the names of its plates, in the order of its dimensions after (C, S): "prompt", then the inner
        ones; None where there is no plate, such as first of a site outside the prompt plate.
    :param stats: how each draw came about, (C, S, B, ...), such as `acceptance_rate`; (C, 1, B, ...) where all draws of a chain
        share it, as those of an SMC run do.
    :param lacks_support: whether the guide is `truncated`: they stand for what the posterior has on its support alone.
    :param proposals: of a sampler that discards, all that it proposed (without `latents`).
    """

    prompts: Prompts
    latents: dict[str, Tensor]
    records: dict[str, Tensor]
    log_prior: Float[Tensor, "C S B"]
    log_likelihood: Float[Tensor, "C S B"]
    log_guide: Float[Tensor, "C S B"]
    cost: Cost = field(default_factory=Cost)
    kind: Kind = "weighted"
    observed: dict[str, Tensor] = field(default_factory=dict)
    log_likelihoods: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    proposals: "Draws | None" = None
    lacks_support: bool = False
    texts: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    plates: dict[str, tuple[str | None, ...]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.latents[name] if name in self.latents else self.records[name]

    @property
    def log_weight(self) -> Float[Tensor, "C S B"]:
        """log of p(z, evidence) / q(z), nats; -inf means impossible under the posterior, whatever q is."""
        log_p = self.log_prior + self.log_likelihood
        return (log_p - self.log_guide).masked_fill(log_p == -torch.inf, -torch.inf)

    @property
    def weights(self) -> Float[Tensor, "C S B"]:
        """What each draw counts in a posterior mean, normalised over all draws of each prompt, whatever their kind: equal
        weights of exact draws and chains, w / Σ w of weighted draws and of runs, and of conditional runs each run's own, since
        each has a posterior draw of its own.

        :raises NoSupportError: if all weights of a prompt are zero."""
        if self.kind == "rescored":
            raise ValueError(
                "these draws have the densities of another guide, which are not the law that drew them: no weights"
            )
        if self.kind in EQUAL:
            return torch.full_like(self.log_weight, 1 / self.num_samples)
        log_w = self.log_weight
        lost = (log_w == -torch.inf).all(1)  # (C, B)
        if bool((lost.any(0) if self.kind == "conditional_runs" else lost.all(0)).any()):
            raise NoSupportError("all weights are zero: no draw of the guide is possible under the posterior")
        if self.kind == "conditional_runs":
            return log_w.softmax(1) / len(log_w)
        return log_w.flatten(0, 1).softmax(0).reshape(log_w.shape)

    @property
    def from_prior(self) -> bool:
        """Whether they were drawn from the model's own prior, up to the noise of float32 log-probabilities."""
        return float((self.log_prior - self.log_guide).abs().max()) <= TOLERANCE

    @property
    def num_samples(self) -> int:
        return self.log_guide.shape[0] * self.log_guide.shape[1]

    @property
    def is_local(self) -> bool:
        """Whether each prompt has a weight of its own; otherwise only their joint weight exists."""
        return self.log_guide.shape[-1] == len(self.prompts)

    def __repr__(self) -> str:
        chains, draws = self.log_guide.shape[:2]
        latents = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.latents.items())
        records = "".join(f", {name}" for name in self.records)
        return f"Draws({self.kind}: {chains} × {draws}, prompts {reprlib.repr(self.prompts.texts)}; {latents}{records})"

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame` with a row for each draw and prompt: chain, draw, the prompt by name, texts, `log_prior`,
        `log_likelihood`, `log_guide` and `log_weight` in nats, records, and latent sites that are one number."""
        names = ("log_prior", "log_likelihood", "log_guide", "log_weight")
        numbers = {name: getattr(self, name) for name in names} | self.records
        return table_of_draws(self.prompts, self.texts, self.latents, numbers)

    def _repr_html_(self) -> str:
        few = self.map(lambda v: v[:1, :SHOWN])
        return as_html(few.to_dataframe(), f"{self!r}, of which these are the first")

    @property
    def text_site(self) -> str:
        """The site that is meant where none is named: `x`, or the first that is text."""
        return "x" if "x" in self.texts or not self.texts else self.texts[0]

    def text(self, name: str | None = None) -> list[list[str]]:
        """Completions of the site `name` (None: `x`, or the first that is text), as text that goes on after the prompt's: one
        list a prompt, of all its draws, chains one after the other; of all the texts of each draw where an inner plate holds
        several."""
        x = self.latents[name or self.text_site].flatten(0, 1).transpose(0, 1)  # (B, C·S, *inner, T)
        return [self.prompts[b : b + 1].decode(rows.flatten(0, -2)) for b, rows in enumerate(x)]

    def reweighted(self, num_samples: int | None = None) -> Int[Tensor, "S B"]:
        """Indices (into the C·S flattened draws) of equally weighted posterior draws, by systematic resampling with
        the normalised weights, in random order; where the draws are exact or Markov chains, every index once, or as
        many as are asked for, evenly spaced over all chains. The same at
        every call: torch's random state is neither used nor changed."""
        n = self.num_samples if num_samples is None else num_samples
        require_count("num_samples", n)
        if self.kind in EQUAL:
            if n > self.num_samples:
                raise ValueError(f"num_samples={n}, but there are {self.num_samples} draws, equally weighted")
            every = torch.linspace(0, self.num_samples - 1, n, dtype=torch.float64).round().long()
            return every.unsqueeze(-1).expand(-1, self.log_guide.shape[-1])
        mass = self.weights.flatten(0, 1).cumsum(0)  # (S, B)
        generator = torch.Generator().manual_seed(0)
        grid = (torch.arange(n, device=mass.device) + torch.rand((), dtype=torch.float64, generator=generator)) / n
        picks = torch.searchsorted((mass / mass[-1]).T.contiguous(), grid.expand(mass.shape[1], n).contiguous())
        return picks.clamp_max(len(mass) - 1)[:, torch.randperm(n, generator=generator)].T

    def flat_latents(self) -> dict[str, Tensor]:
        """The latent sites' values with all draws in one row, (C·S, B, *inner, *event)."""
        return {name: value.flatten(0, 1) for name, value in self.latents.items()}

    @torch.no_grad()
    def under(self, guide: Callable[..., Any], max_plate_nesting: int | None = None) -> "Draws":
        """The same draws with `log_guide` under another guide: how probable it finds them, nats. For `log_evidence`, and for
        posterior draws that are to be measured against a guide. Exact draws and chains stay what they are; others become
        `rescored`, since it is not this guide that drew them.

        :raises ValueError: if the guide has other latent sites."""
        with meter.measure() as cost:
            columns = self.log_guide.shape[-1]
            nesting = nesting_of(max_plate_nesting, guide, None, self.prompts)
            log_q = log_density_at(guide, self.flat_latents(), self.prompts, nesting, columns)
        kind: Kind = self.kind if self.kind in EQUAL else "rescored"
        return replace(self, log_guide=log_q.reshape(self.log_guide.shape), kind=kind, cost=self.cost + cost)

    def by_run(self) -> "Draws":
        """Each run of draws that came about together as one draw of the extended space of all that it chose at random, whose
        weight is the run's estimate of Z (Andrieu et al. 2010); exact where a posterior draw was planted. No latents."""
        log_z = self.log_weight.logsumexp(1) - math.log(self.log_weight.shape[1])  # (C, B)
        nothing = torch.zeros_like(log_z).unsqueeze(0)
        return replace(
            self,
            latents={},
            texts=(),
            records={},
            observed={},
            log_likelihoods={},
            stats={},
            log_prior=nothing,
            log_likelihood=log_z.unsqueeze(0),
            log_guide=nothing,
            kind="exact" if self.kind == "conditional_runs" else "weighted",
            proposals=None,
        )

    def of_prompt(self, b: int) -> "Draws":
        """The draws of one prompt, still with a prompt dimension; `cost` stays everyone's. All prompts where only their
        joint weight exists.

        :param b: counted from 0."""
        if not 0 <= b < len(self.prompts):
            raise ValueError(f"of_prompt({b}), but the draws are of {len(self.prompts)} prompts, counted from 0")
        if not self.is_local:
            return self
        draws = self.map(lambda v: v[:, :, b : b + 1], self.prompts[b : b + 1])
        of_prompts = {k for k, v in self.observed.items() if self.plates.get(k, ("prompt",))[0] == "prompt" and v.dim()}
        observed = {k: v[b : b + 1] if k in of_prompts else v for k, v in self.observed.items()}
        proposals = None if self.proposals is None else self.proposals.of_prompt(b)
        return replace(draws, observed=observed, proposals=proposals)

    def map(self, pick: Callable[[Tensor], Tensor], prompts: Prompts | None = None) -> "Draws":
        """The same draws with every tensor passed through `pick`."""
        return replace(
            self,
            prompts=self.prompts if prompts is None else prompts,
            latents={k: pick(v) for k, v in self.latents.items()},
            records={k: pick(v) for k, v in self.records.items()},
            log_likelihoods={k: pick(v) for k, v in self.log_likelihoods.items()},
            stats={k: _pick_stat(v, pick, self.log_guide.shape[1]) for k, v in self.stats.items()},
            log_prior=pick(self.log_prior),
            log_likelihood=pick(self.log_likelihood),
            log_guide=pick(self.log_guide),
        )


class NoSupportError(ValueError):
    """No draw was possible under the posterior: its evidence rules out all that was proposed."""


def concatenate(parts: Sequence[Draws], dim: int = 1) -> Draws:
    """Draws of several runs, one after the other along the draw dimension, or with dim=0 side by side as chains."""
    first = parts[0]
    join = lambda values: torch.cat(list(values), dim)  # noqa: E731
    return replace(
        first,
        latents={k: join(p.latents[k] for p in parts) for k in first.latents},
        records={k: join(p.records[k] for p in parts) for k in first.records},
        log_likelihoods={k: join(p.log_likelihoods[k] for p in parts) for k in first.log_likelihoods},
        stats={k: join(_of_each_draw(p, k) if dim == 1 else p.stats[k] for p in parts) for k in first.stats},
        log_prior=join(p.log_prior for p in parts),
        log_likelihood=join(p.log_likelihood for p in parts),
        log_guide=join(p.log_guide for p in parts),
        cost=sum((p.cost for p in parts), Cost()),
    )


def _of_each_draw(draws: Draws, name: str) -> Tensor:
    """A stat with what the draws of a chain share repeated, (C, S, B, ...)."""
    value = draws.stats[name]
    return value.expand(value.shape[0], draws.log_guide.shape[1], *value.shape[2:])


def _pick_stat(value: Tensor, pick: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """What all `count` draws of a chain share stays shared, as long as those that are picked agree on it."""
    if value.shape[1] == count:
        return pick(value)
    picked = pick(value.expand(value.shape[0], count, *value.shape[2:]))
    return picked[:, :1] if bool((picked == picked[:, :1]).all()) else picked


def as_draws(particles: Particles) -> Draws:
    """Particles as one chain of draws.

    :raises ValueError: if a plate subsamples or lies where the prompts' does, or if the evidence is infinitely likely."""
    require_sound(particles)
    return Draws(
        prompts=particles.prompts,
        latents={name: value.unsqueeze(0) for name, value in latent_values(particles).items()},
        records={name: value.unsqueeze(0) for name, value in record_values(particles).items()},
        log_prior=particles.log_prior().unsqueeze(0),
        log_likelihood=particles.log_likelihood().unsqueeze(0),
        log_guide=particles.log_proposal().unsqueeze(0),
        texts=tuple(particles.texts()),
        observed=observed_values(particles),
        log_likelihoods={n: v.unsqueeze(0) for n, v in pointwise_log_likelihoods(particles).items()},
        factors=factors(particles),
        plates=plate_names(particles),
        lacks_support=particles.lacks_support(),
    )
