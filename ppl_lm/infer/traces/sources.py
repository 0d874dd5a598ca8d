"""`Source`: the protocol of what draws a step's texts, and the trace that it gives."""

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from pyro.poutine import Trace
from torch import Tensor

from ppl_lm.infer.terms import Terms
from ppl_lm.infer.traces.sites import Site
from ppl_lm.lm.token_sequence import TokenSequence


class Drawn:
    """A trace that holds the latent sites' values, and the densities that drew them, found when they were drawn.

    :param fresh: which particles the guide drew just now, (K, B), where others come from a memory and no density is known;
        None: the sites' own distributions drew all.
    :param repeated: whether an earlier step has seen these very draws."""

    def __init__(self, trace: Trace, fresh: Tensor | None = None):
        self.trace, self.fresh, self.repeated = trace, fresh, False
        sites: Any = trace.nodes
        latent = {n: s for n, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
        self.densities = {n: _density(s) if fresh is None else None for n, s in latent.items()}

    def log_density(self, name: str) -> Tensor:
        """(K, B, T) of a text, (K, B) of another site; NaN where it is not known."""
        found = self.densities.get(name)
        if found is None:
            nodes: Any = self.trace.nodes
            value = nodes[name]["value"]
            return torch.full(value.shape, math.nan, dtype=torch.float64, device=value.device)
        return found


@runtime_checkable
class Source(Protocol):
    """What draws a step's texts."""

    def __call__(self, draw: Callable[..., Trace], prompts: Any) -> Drawn:
        """:param draw: traces a program with all particles; the guide, if none is given."""
        ...

    def update(self, terms: Terms, guide: Any) -> None:
        """Told of the particles that it drew, and the guide that is being fitted."""
        ...


@torch.no_grad()
def _density(site: Site) -> Tensor:
    fn, value = site["fn"], site["value"]
    if not isinstance(fn, TokenSequence):
        return fn.log_prob(value).detach()
    found = fn.drawn_log_probs(value)
    return fn.token_log_probs(value) if found is None else found
