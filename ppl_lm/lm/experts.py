"""Language models put together; `product`: token by token."""

import copy
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ppl_lm.lm import meter
from ppl_lm.lm.decoding.cache import new_cache
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.network import Answer, DivergedError, inputs_of, past_of
from ppl_lm.lm.scoring.shared_body import given_to, head_on, read_by, same_body

C = TypeVar("C", bound="Caches")


def product(lms: Sequence[LanguageModel], powers: Sequence[float] | None = None) -> LanguageModel:
    """q(x_t | prompt, x_<t) ∝ Π_k p_k(x_t | prompt, x_<t)^power_k: a product of experts, token by token.

    With one expert a temperature of 1/power; with a prior and a twist weighted decoding and FUDGE's guidance; with an
    automaton's mask local masking. Each token is normalised by itself, so this is *not* the product of the texts'
    probabilities: as a proposal, its weights make up the difference.

    :param lms: of one vocabulary; prompts and end tokens are the first one's; of one `max_new_tokens`.
    :param powers: 1 each, by default.
    :raises ValueError: if vocabularies or `max_new_tokens` differ, or there is not one power for each.
    :raises DivergedError: when it is asked for a token and all are impossible to one expert or another.
    """
    powers = [1.0] * len(lms) if powers is None else [float(power) for power in powers]
    if not lms or len(lms) != len(powers):
        raise ValueError(f"{len(lms)} language models and {len(powers)} powers; give one power for each, at least one")
    network = _Product([lm.model for lm in lms], powers)
    network.share(lms)
    return combined(network, lms)


def combined(network: nn.Module, lms: Sequence[LanguageModel]) -> LanguageModel:
    """A language model around a network that is made of those of others; what is trainable of them stays so.

    :raises ValueError: if their vocabularies or `max_new_tokens` differ."""
    first = lms[0]
    for other in lms[1:]:
        other.vocabulary.require_same(first.vocabulary, "language models that are put together")
        if other.max_new_tokens != first.max_new_tokens:  # an automaton's mask knows what can still be ended
            raise ValueError(
                f"max_new_tokens are {first.max_new_tokens} and {other.max_new_tokens}; put those of the same together"
            )
    trainable = [weight for lm in lms for weight in lm.parameters() if weight.requires_grad]
    whole = LanguageModel(  # born frozen
        network, first.vocabulary.tokenizer, first.max_new_tokens, end_ids=first.vocabulary.end_ids
    )
    reading = network.reading if isinstance(network, Experts) else {}
    whole.vocabulary = first.vocabulary
    whole.networks = sum(lm.networks for k, lm in enumerate(lms) if k not in reading)
    for weight in trainable:
        weight.requires_grad_(True)
    rooms = [lm.max_positions for lm in lms if lm.max_positions is not None]
    whole.max_positions, whole.width = min(rooms, default=None), sum(lm.width for lm in lms)
    whole.boundaries = dict(sorted({n: name for lm in lms for n, name in lm.boundaries.items()}.items()))
    whole.compute_dtype = next((lm.compute_dtype for lm in lms if lm.compute_dtype is not None), None)
    whole.noise = sum(lm.noise for lm in lms)
    if all(lm.is_checked and lm.tolerance is not None for lm in lms):
        whole.is_checked, whole.tolerance = True, max(lm.tolerance or 0.0 for lm in lms)
        whole.parts, whole.shortcuts.prompts = tuple(lms), all(lm.shortcuts.prompts for lm in lms)
        whole.crossed = _crossed(lms)
    return whole


def _crossed(lms: Sequence[LanguageModel]) -> dict[tuple[int, bool, bool], str]:
    """What was found out where texts cross a boundary, by all that have it."""
    found = {key for lm in lms for key in lm.crossed}
    having = {key: [lm for lm in lms if key[0] in lm.boundaries] for key in found}
    known = {key: some for key, some in having.items() if all(key in lm.crossed for lm in some)}
    return {key: next((lm.crossed[key] for lm in some if lm.crossed[key]), "") for key, some in known.items()}


class Experts(nn.Module):
    """Several networks, each of which is asked for its logits."""

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        self.models, self.inputs = nn.ModuleList(models), [inputs_of(model) for model in models]
        self.config: Any = copy.deepcopy(models[0].config)
        self.generation_config = getattr(models[0], "generation_config", None)
        self.reading: dict[int, int] = {}  # which of them read the pass of another one, around whose body they are

    def share(self, lms: Sequence[LanguageModel]) -> None:
        """Has those around the body of another one read that one's pass, as far as they can."""
        for k, lm in enumerate(lms):
            hosts = (j for j in range(k) if j not in self.reading)
            for j in hosts:
                if head_on(lms[j], lm) is not None:
                    self.reading[k] = j
                    break

    def new_cache(self) -> "Caches":
        return Caches.of(self.models)

    def each(self, past: "Caches | None", **given: Any) -> tuple[list[Tensor], list[Any]]:
        """The networks' logits, in float32 or wider, and their caches.

        :param past: their caches, or None."""
        logits: list[Tensor] = []
        moved, hidden = [], {}
        caches = [None] * len(self.models) if past is None else past.caches
        reading = {k: j for k, j in self.reading.items() if self._reads(k, j, caches)}
        for k, (model, inputs, cache) in enumerate(zip(self.models, self.inputs, caches, strict=True)):
            if k in reading:
                flat = hidden[reading[k]]
                logits.append(read_by(flat.flatten(0, 1), _head_of(model)).unflatten(0, flat.shape[:2]))
                moved.append(cache)
                continue
            if k in self.reading:
                meter.add(lm_tokens=given["input_ids"].numel())  # a pass that was not counted on
            named = {"past_key_values": cache, **given}
            head = _head_of(model) if k in reading.values() else None
            with nullcontext([]) if head is None else given_to(head) as seen:
                out = model(**{theirs: named[name] for name, theirs in inputs.items()})
            if head is not None:
                (hidden[k],) = seen
            logits.append(out.logits.to(torch.promote_types(out.logits.dtype, torch.float32)))
            moved.append(past_of(out))
        return logits, moved

    def _reads(self, k: int, j: int, caches: list[Any]) -> bool:
        """Whether the k-th reads the pass of the j-th: while both lie around one body, found out at a text's first pass."""
        begun = caches[j] is not None and caches[j].get_seq_length() > 0
        if begun and caches[k].get_seq_length() > 0:
            return False  # its own passes have come so far
        return begun or same_body(self.models[j], self.models[k])


def _head_of(model: Any) -> Any:
    return model.get_output_embeddings()


def cuts_of(model: nn.Module) -> frozenset[int]:
    """Which truncations (`ppl_lm.lm.truncated`) a network's law has gone through, by identity: texts that they cut off are
    impossible to it. Empty of a network whose law has its whole support."""
    return getattr(model, "cuts", frozenset())


class Caches:
    """The caches of several networks, moved together."""

    def __init__(self, caches: list[Any]):
        self.caches = caches

    @classmethod
    def of(cls: type[C], models: Iterable[nn.Module]) -> C:
        """Empty ones."""
        return cls([new_cache(model) for model in models])

    def batch_select_indices(self, rows: Int[Tensor, "M"]) -> None:
        for cache in self.caches:
            cache.batch_select_indices(rows)


class _Product(Experts):
    """Σ_k power_k · logits_k. Where a power is 0 the expert says nothing, also of what it finds impossible."""

    def __init__(self, models: Sequence[nn.Module], powers: list[float]):
        super().__init__(models)
        self.powers = powers

    @property
    def cuts(self) -> frozenset[int]:
        pairs = zip(self.powers, self.models, strict=True)
        return frozenset().union(*(cuts_of(model) for power, model in pairs if power))

    def forward(self, past_key_values: Caches | None = None, **inputs: Any) -> Answer:
        each, moved = self.each(past_key_values, **inputs)
        parts = zip(self.powers, each, strict=True)
        logits: Any = sum(power * one if power else torch.zeros_like(one) for power, one in parts)
        if bool((logits == -torch.inf).all(-1).any()):
            raise DivergedError(
                "a product of language models has no next token to give: after some text each token that one of them finds "
                "possible is impossible to another, so this product is no distribution; a mask does so where the prior gives "
                "all that the mask allows probability 0"
            )
        return Answer(logits, Caches(moved))
