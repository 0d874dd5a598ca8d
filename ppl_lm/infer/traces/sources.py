"""`Source`: the protocol of what draws a step's texts, and the `ProposalTrace` that it gives."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from pyro.poutine import Trace
from torch import Tensor

from ppl_lm.infer.terms import Terms
from ppl_lm.infer.traces.sites import Site, TextSite, is_sequence
from ppl_lm.lm.token_sequence import TokenSequence


@dataclass(frozen=True)
class ProposalTrace:
    """A trace that holds the latent sites' values, and the densities that drew them, found when they were drawn.

    :param densities: site name -> log-density of its value, nats: (K, B, T) of a text, (K, B) of another site. Not there
        where it is not known.
    :param from_guide: which particles the guide drew just now, (K, B), where others come from a memory and no density is
        known; None: the sites' own distributions drew all.
    :param repeated: whether an earlier step has seen these very draws."""

    trace: Trace
    densities: dict[str, Tensor]
    from_guide: Bool[Tensor, "K B"] | None = None
    repeated: bool = False

    @classmethod
    def of(cls, trace: Trace) -> "ProposalTrace":
        """Of a program that has just run."""
        return cls(trace, {name: _density(site) for name, site in _latent_sites(trace).items()})

    def log_density(self, name: str) -> Tensor:
        """(K, B, T) of a text, (K, B) of another site; NaN where it is not known."""
        if name in self.densities:
            return self.densities[name]
        value = _latent_sites(self.trace)[name]["value"]
        return torch.full(value.shape, math.nan, dtype=torch.float64, device=value.device)

    def texts(self) -> dict[str, TextSite]:
        return {name: TextSite.of(site) for name, site in _latent_sites(self.trace).items() if is_sequence(site)}

    def with_text(self, name: str, value: Int[Tensor, "K B T"], from_guide: Bool[Tensor, "K B"]) -> "ProposalTrace":
        """The same with another value of a text, some of which come from elsewhere: so no density is known."""
        trace: Any = self.trace.copy()
        trace.nodes[name] = {**trace.nodes[name], "value": value}
        return replace(self, trace=trace, densities={}, from_guide=from_guide)


@runtime_checkable
class Source(Protocol):
    """What draws a step's texts.

    :param updates: steps that one batch of texts serves, at least 1."""

    updates: int

    def __call__(self, draw: Callable[..., ProposalTrace], prompts: Any) -> ProposalTrace:
        """:param draw: runs a program with all particles; the guide, if none is given."""
        ...

    def update(self, terms: Terms, guide: Any) -> None:
        """Hears of the particles that it drew, and of the guide that is being fitted."""
        ...


def _latent_sites(trace: Trace) -> dict[str, Site]:
    nodes: Any = trace.nodes
    return {name: site for name, site in nodes.items() if site["type"] == "sample" and not site["is_observed"]}


@torch.no_grad()
def _density(site: Site) -> Float[Tensor, "..."]:
    fn, value = site["fn"], site["value"]
    if not isinstance(fn, TokenSequence):
        return fn.log_prob(value).detach()
    recalled = fn.sampled_log_probs(value)
    return fn.token_log_probs(value) if recalled is None else recalled
