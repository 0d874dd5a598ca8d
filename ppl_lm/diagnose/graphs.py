"""Plain networkx graphs of what a user works with: a program's sites, a constraint's automaton, the prefixes of texts."""

import sys
import unicodedata
from collections.abc import Callable
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

import networkx
import pyro
import torch
from pyro import poutine
from pyro.distributions import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import get_provenance
from torch.overrides import TorchFunctionMode

from ppl_lm.diagnose.prefix_tree import prefix_tree, text_of
from ppl_lm.infer.sites import is_record, sample_sites
from ppl_lm.likelihood import Automaton
from ppl_lm.lm.token_bytes import token_bytes

__all__ = ["automaton_graph", "model_graph", "prefix_tree"]


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


def automaton_graph(automaton: Automaton) -> networkx.DiGraph:
    """The states of a constraint and what leads from one to the next.

    Nodes are the states, 0 the start; they have `start`, `accepting` (a text may end here) and `left` (tokens to the nearest
    such state). Each can be reached, and from each an accepting one can. Edges have `tokens` (ids) and `label`, printable.

    A token of several bytes that only takes a short cut, to where its bytes as tokens of their own lead too, is left out:
    over a byte-level vocabulary that leaves the automaton over bytes, of which all the others follow."""
    vocabulary, nowhere = automaton.vocabulary, len(automaton.accepting) - 1
    try:
        pieces = token_bytes(vocabulary)
    except ValueError:  # what a token writes depends on its neighbours
        pieces = {}
    single = {piece: token for token, piece in pieces.items() if len(piece) == 1}
    by_byte = {piece: automaton.to[:, token].tolist() for piece, token in single.items()}  # byte -> state -> next state

    def spelled(state: int, piece: bytes) -> int:
        for i in range(len(piece)):
            state = by_byte[piece[i : i + 1]][state] if piece[i : i + 1] in by_byte else nowhere
        return state

    graph = networkx.DiGraph()
    for state in range(nowhere):
        ends = bool(automaton.accepting[state])
        graph.add_node(state, start=state == 0, accepting=ends, left=int(automaton.left[state]))
    for state in range(nowhere):
        edges: dict[int, list[int]] = {}
        row = automaton.to[state]
        for token in (row < nowhere).nonzero().flatten().tolist():
            following, piece = int(row[token]), pieces.get(token, b"")
            if len(piece) < 2 or spelled(state, piece) != following:
                edges.setdefault(following, []).append(token)
        for following, tokens in edges.items():
            written = [pieces.get(t) or text_of(vocabulary, (t,)).encode() or f"token {t}".encode() for t in tokens]
            graph.add_edge(state, following, tokens=tokens, label=label(written))
    return graph


def label(pieces: list[bytes], most: int = 6) -> str:
    """Pieces of text as a short line: runs of single characters as `a–z`, the others by name, all printable.

    >>> label([b"a", b"b", b"c", b"!", b" ", b"good"])
    'a–c, ␣, !, good'
    """
    alone = sorted({p[0] for p in pieces if len(p) == 1})
    longer = sorted({p for p in pieces if len(p) > 1}, key=lambda p: (len(p), p))
    shown: list[str] = []
    if len(alone) > 128:
        missing = _runs([b for b in range(256) if b not in alone])
        shown.append("any byte" + (f" but {' '.join(missing[:most])}{' …' * (len(missing) > most)}" if missing else ""))
    else:
        shown += _runs(alone)
    shown += ["".join(map(_name, p.decode(errors="backslashreplace"))) for p in longer]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def _runs(values: list[int]) -> list[str]:
    """Bytes in words, those of one kind that follow each other as a range; letters first."""
    runs: list[list[int]] = []
    for b in values:
        if runs and b == runs[-1][-1] + 1 and _kind(b) == _kind(runs[-1][-1]):
            runs[-1].append(b)
        else:
            runs.append([b])
    runs = [part for run in runs for part in ([run] if len(run) > 2 else [[b] for b in run])]
    runs.sort(key=lambda run: (_kind(run[0]), run[0]))
    return [_byte(run[0]) if len(run) == 1 else f"{_byte(run[0])}–{_byte(run[-1])}" for run in runs]


def _kind(b: int) -> int:
    c = chr(b)
    return 0 if c in ascii_lowercase else 1 if c in ascii_uppercase else 2 if c in digits else 4 if b > 127 else 3


def _byte(b: int) -> str:
    return f"0x{b:02X}" if b > 127 else _name(chr(b))


def _name(c: str) -> str:
    """A character as what can be seen and cannot move anything; a comma in words, since commas separate."""
    if c == " ":
        return "␣"
    if c == ",":
        return "comma"
    return c if unicodedata.category(c)[0] not in "CZ" else repr(c)[1:-1] if ord(c) < 128 else f"U+{ord(c):04X}"
