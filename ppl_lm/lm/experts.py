"""`product`: language models put together token by token."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ppl_lm.lm.cache import new_cache
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.network import Answer, DivergedError, inputs_of, past_of


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
    first = lms[0]
    for other in lms[1:]:
        other.vocabulary.require_same(first.vocabulary, "the experts of a product")
        if other.max_new_tokens != first.max_new_tokens:  # an automaton's mask knows what can still be ended
            raise ValueError(
                f"the experts' max_new_tokens are {first.max_new_tokens} and {other.max_new_tokens}; give all the same"
            )
    trainable = [weight for lm in lms for weight in lm.parameters() if weight.requires_grad]
    combined = LanguageModel(  # born frozen
        _Product([lm.model for lm in lms], powers),
        first.vocabulary.tokenizer,
        first.max_new_tokens,
        end_ids=first.vocabulary.end_ids,
    )
    combined.vocabulary, combined.networks = first.vocabulary, sum(lm.networks for lm in lms)
    for weight in trainable:
        weight.requires_grad_(True)
    rooms = [lm.max_positions for lm in lms if lm.max_positions is not None]
    combined.max_positions, combined.width = min(rooms, default=None), sum(lm.width for lm in lms)
    combined.boundaries = dict(sorted({n: name for lm in lms for n, name in lm.boundaries.items()}.items()))
    return combined


class _Product(nn.Module):
    """Σ_k power_k · logits_k. Where a power is 0 the expert says nothing, also of what it finds impossible."""

    def __init__(self, models: Sequence[nn.Module], powers: list[float]):
        super().__init__()
        self.models, self.powers = nn.ModuleList(models), powers
        self.inputs = [inputs_of(model) for model in models]
        config: Any = models[0].config
        self.config = copy.deepcopy(config)
        self.generation_config = getattr(models[0], "generation_config", None)

    def new_cache(self) -> "_Caches":
        return _Caches([new_cache(model) for model in self.models])

    def forward(self, past_key_values: "_Caches | None" = None, **inputs: Any) -> Answer:
        caches = [None] * len(self.models) if past_key_values is None else past_key_values.caches
        logits: Any = 0.0
        moved = []
        for model, power, cache, names in zip(self.models, self.powers, caches, self.inputs, strict=True):
            given = {"past_key_values": cache, **inputs}
            out = model(**{theirs: given[name] for name, theirs in names.items()})
            wide = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))
            logits = logits + (power * wide if power else torch.zeros_like(wide))
            moved.append(past_of(out))
        if bool((logits == -torch.inf).all(-1).any()):
            raise DivergedError(
                "a product of language models has no next token to give: after some text each token that one of them finds "
                "possible is impossible to another, so this product is no distribution; a mask does so where the prior gives "
                "all that the mask allows probability 0"
            )
        return Answer(logits, _Caches(moved))


class _Caches:
    """The experts' caches, moved together."""

    def __init__(self, caches: list[Any]):
        self.caches = caches

    def batch_select_indices(self, rows: Int[Tensor, "M"]) -> None:
        for cache in self.caches:
            cache.batch_select_indices(rows)
