"""A language model's texts as a tree of token prefixes: where prior, guide and posterior have their mass."""

import networkx
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppl_lm.criticism.effective_size import effective
from ppl_lm.criticism.expectations import expectation
from ppl_lm.infer.draws import Draws
from ppl_lm.lm.tokens.token_pieces import text_of

LAWS = ("prior", "guide", "posterior")
Prefix = tuple[int, ...]


def prefix_tree(
    prior: Draws,
    guide: Draws | None = None,
    posterior: Draws | None = None,
    *,
    prompt: int = 0,
    max_nodes: int = 40,
    min_mass: float = 0.01,
) -> networkx.DiGraph:
    """How a language model's texts branch, and where mass moved: a tree of token prefixes, under up to three laws.

    Nodes are prefixes (tuples of token ids, the root is `()`), edges lead to longer ones. Each has `text` (what it adds to its
    parent's; a character is shown once it is whole), `token` (its last id), `depth` (tokens), `over` ("end" or "truncated"
    where no token can follow, else None) and for each law given `prior`, `guide`, `posterior`: the share of its draws that
    begin like this, with a standard error `prior_se`, ..., and `rest_prior`, ...: the share that goes on from here as no child
    does. A law's children and rest sum to the node, unless the text is over. The graph has `laws`, `prompt`, `num_samples` and
    `worth`: how many independent draws each law's amount to.

    Tokens after which nothing branches are one node: what is lost on the way is below `min_mass` under each law, and is part
    of the rest of the node before them.

    Standard errors are no better than the draws: where weights have a heavy tail (`diagnose_draws` says so) or chains stand
    still for long, they are too small. A mass of 0 has the error 0, though it only says that no draw went there.

    :param prior: draws of the model's prior, `importance(model, None, prompts)`; their weights are not used.
    :param guide: draws of a guide, `importance(model, guide, prompts)`, likewise as they come.
    :param posterior: draws of any sampler; exact ones and chains count as they come, others by their normalised weights.
    :param prompt: whose completions, counted from 0.
    :param max_nodes: at most so many, those of the largest mass under any law.
    :param min_mass: share of the draws, above 0; what stays below it under every law is not shown.
    :raises ValueError: if draws are of another law, prompt or vocabulary than their place asks for, or hold
        several texts each."""
    if max_nodes < 1 or not 0 < min_mass <= 1:
        raise ValueError(
            f"max_nodes={max_nodes}, min_mass={min_mass}; give at least 1 node, and a share above 0, at most 1"
        )
    given = {name: draws for name, draws in zip(LAWS, (prior, guide, posterior), strict=True) if draws is not None}
    for name, draws in given.items():
        _require(name, draws, prior, prompt)
    vocabulary = prior.prompts.vocabulary
    rows = {name: _rows(draws, prompt) for name, draws in given.items()}  # law -> (S, T)
    weights = {name: _weights(name, draws, prompt) for name, draws in given.items()}  # law -> (C, S, 1)
    masses: dict[Prefix, dict[str, float]] = {}
    for name in given:
        for ids, w in zip(vocabulary.completion_ids(rows[name]), weights[name].flatten().tolist(), strict=True):
            for n in range(len(ids) + 1):
                mass = masses.setdefault(tuple(ids[:n]), {})
                mass[name] = mass.get(name, 0.0) + w
    mass = {prefix: max(m.values()) for prefix, m in masses.items()}
    tree = _merged({p: m for p, m in masses.items() if mass[p] >= min_mass or not p}, min_mass)
    kept = sorted(tree, key=lambda p: (-mass[p], len(p), p))
    kept = [(), *(p for p in kept if p)][:max_nodes]  # no prefix weighs more than its own beginning

    graph = networkx.DiGraph(
        laws=tuple(given),
        prompt=prior.prompts.texts[prompt],
        num_samples={name: draws.num_samples for name, draws in given.items()},
        worth={name: _worth(name, draws, prompt) for name, draws in given.items()},
    )
    context = prior.prompts.contexts[prompt]
    steps = next(iter(rows.values())).shape[-1]
    for prefix in kept:
        parent = tree[prefix]
        ended = bool(prefix) and prefix[-1] in vocabulary.end_ids
        graph.add_node(
            prefix,
            text=text_of(vocabulary, prefix, context)[len(text_of(vocabulary, parent or (), context)) :],
            token=prefix[-1] if prefix else None,
            depth=len(prefix),
            over="end" if ended else "truncated" if len(prefix) == steps else None,
        )
        if parent is not None:
            graph.add_edge(parent, prefix)
    for name, draws in given.items():
        passes = {p: _passes(rows[name], p) for p in kept}
        elsewhere = [passes[p] & ~_any([passes[c] for c in graph.successors(p)], passes[p]) for p in kept]
        both = torch.stack([*passes.values(), *elsewhere], -1).unflatten(0, draws.log_guide.shape[:2])  # (C, S, 2N)
        masses_of = expectation(_own(draws, prompt), both.unsqueeze(2), weights[name])
        shares, errors = masses_of.mean[0], masses_of.se[0]
        for n, p in enumerate(kept):
            node = graph.nodes[p]
            node[name], node[f"{name}_se"] = float(shares[n]), float(errors[n])
            node[f"rest_{name}"] = 0.0 if node["over"] else float(shares[len(kept) + n])
    return graph


def _require(name: str, draws: Draws, prior: Draws, prompt: int) -> None:
    plain = draws.kind == "weighted"
    if name != "posterior" and not (plain and (name == "guide" or draws.from_prior)):
        law = "the model's prior: importance(model, None, prompts)" if name == "prior" else "the guide: importance(...)"
        raise ValueError(f"{name}= needs draws as they come from {law}; these follow another law")
    if not 0 <= prompt < len(draws.prompts):
        raise ValueError(f"prompt={prompt}, but the {name}'s draws are of {len(draws.prompts)} prompts; counted from 0")
    if not draws.texts:
        raise ValueError(f"the {name}'s draws hold no text")
    if draws is not prior:
        draws.prompts.vocabulary.require_same(prior.prompts.vocabulary, f"{name} and prior")
        if draws.prompts.unpadded()[prompt] != prior.prompts.unpadded()[prompt]:
            raise ValueError(
                f"prompt {prompt} of the {name}'s draws is {draws.prompts.texts[prompt]!r}, of the prior's "
                f"{prior.prompts.texts[prompt]!r}; give draws for the same prompts"
            )


def _rows(draws: Draws, prompt: int) -> Int[Tensor, "S T"]:
    name = draws.text_site
    x = draws[name][:, :, prompt].flatten(0, 1)
    if x.dim() != 2:
        raise ValueError(f"site {name!r} has several texts a draw, shape {tuple(x.shape[1:-1])}; a tree needs one")
    return x.cpu()


def _own(draws: Draws, prompt: int) -> Draws:
    return draws.of_prompt(prompt).map(lambda v: v.cpu())


def _weights(name: str, draws: Draws, prompt: int) -> Float[Tensor, "C S 1"]:
    """Normalised: the posterior's, and equal ones of the prior's and the guide's draws, which count as they come."""
    own = _own(draws, prompt)
    return own.weights if name == "posterior" else torch.full_like(own.log_weight, 1 / own.num_samples)


def _worth(name: str, draws: Draws, prompt: int) -> float:
    return (effective(_own(draws, prompt)) or 1.0) if name == "posterior" else float(draws.num_samples)


def _merged(masses: dict[Prefix, dict[str, float]], lost: float) -> dict[Prefix, Prefix | None]:
    """The tree of these prefixes with its chains as one node each: prefix -> the one before it."""
    children: dict[Prefix, list[Prefix]] = {}
    for prefix in masses:
        if prefix:
            children.setdefault(prefix[:-1], []).append(prefix)
    tree: dict[Prefix, Prefix | None] = {(): None}
    todo = [((), child) for child in children.get((), [])]
    while todo:
        parent, first = todo.pop()
        last = first
        while len(following := children.get(last, [])) == 1:
            after = masses[following[0]]
            if any(m - after.get(name, 0.0) >= lost for name, m in masses[first].items()):
                break
            last = following[0]
        tree[last] = parent
        todo += [(last, child) for child in children.get(last, [])]
    return tree


def _passes(x: Int[Tensor, "S T"], prefix: Prefix) -> Bool[Tensor, "S"]:
    return (x[:, : len(prefix)] == torch.tensor(prefix, dtype=x.dtype)).all(-1)


def _any(columns: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(columns).any(0) if columns else torch.zeros_like(like)
