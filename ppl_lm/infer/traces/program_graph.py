"""`model_graph`: a program's sites, and what depends on what."""

import sys
from collections.abc import Callable
from typing import Any, no_type_check

import networkx
import pyro
import torch
from pyro import poutine
from pyro.distributions import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import get_provenance
from torch.overrides import TorchFunctionMode

from ppl_lm.infer.traces.sites import is_record, sample_sites


@torch.no_grad()
def model_graph(model: Callable[..., Any], prompts: Any) -> networkx.DiGraph:
    """Sites of a Pyro program in the order in which one run meets them, an edge from each to those that depend on it directly.

    Nodes: `kind` ("latent", "observed" or "deterministic"), `distribution` (its class's name, without what plates and masks
    wrap around it), `plates` (names, outermost first). The graph's `plates` are name -> size.

    Edges have `known`: True where tensors carry the dependence, as they do through texts, `Prompts.append` and rewards (Pyro's
    provenance; Wingate et al. 2011). A value that leaves the tensors, as `int(z)` or `if z > 0` make it, may reach every later
    site: then `known` is False, and there is such an edge only where no path leads there anyway. A reward depends on the texts
    in its prompts, too, whether or not its function reads them. What no tensor and no number carries is not seen: a text that
    the program decodes, and a branch that this run did not take."""
    track = _Track()
    with torch.random.fork_rng(), pyro.validation_enabled(False), track, _Watch(track):
        trace = poutine.trace(model).get_trace(prompts)
    sites = sample_sites(trace)
    graph = networkx.DiGraph(plates={})
    for name, site in sites.items():
        record = is_record(site)
        graph.add_node(
            name,
            kind="deterministic" if record else "observed" if site["is_observed"] else "latent",
            distribution=type(_unwrapped(site["fn"])).__name__,
            plates=tuple(f.name for f in site["cond_indep_stack"]),
        )
        graph.graph["plates"] |= {f.name: f.full_size or f.size for f in site["cond_indep_stack"]}
        law = _unwrapped(site["fn"]) if record else site["fn"]
        parents = get_provenance(law.log_prob(site["value"])) - {name}
        graph.add_edges_from(((parent, name) for parent in sites if parent in parents), known=True)
    for name in sites:
        for parent, when in track.left.items():
            if parent in sites and when <= track.met.index(name) and not networkx.has_path(graph, parent, name):
                graph.add_edge(parent, name, known=False)
    return graph


class _Track(TrackProvenance):
    """Also keeps the order of sites, and how many were met when a site's value first left the tensors."""

    def __init__(self):
        super().__init__(include_deterministic=True)
        self.met: list[str] = []
        self.left: dict[str, int] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        super()._pyro_post_sample(msg)
        self.met.append(msg["name"])


class _Watch(TorchFunctionMode):
    """Sees values become Python's or NumPy's. Not what libraries do inside, where ours carry the provenance themselves."""

    NAMES = (
        *("item", "tolist", "numpy", "equal", "allclose", "is_nonzero"),
        *("__array__", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__format__", "__repr__"),
    )

    def __init__(self, track: _Track):
        super().__init__()
        self.track = track

    @no_type_check  # a check would stand between this frame and the one that it looks at
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.NAMES:
            frame = sys._getframe(1)
            while frame.f_back and frame.f_globals.get("__name__") in ("torch.overrides", "torch._tensor"):
                frame = frame.f_back
            where = str(frame.f_globals.get("__name__")) + "."
            if not where.startswith(("torch.", "pyro.", "ppl_lm.lm.", "ppl_lm.likelihood.")):
                for name in get_provenance([*args]):
                    self.track.left.setdefault(name, len(self.track.met))
        return func(*args, **(kwargs or {}))


def _unwrapped(law: Any) -> Any:
    """A distribution without what plates, masks and `.to_event` put around it."""
    while isinstance(law, (Independent, MaskedDistribution, ExpandedDistribution)):
        law = law.base_dist
    return law
