"""How long texts may be: the positions that a configuration names, and the lengths at which a network's ways may change."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

CONTEXT = (  # the names of the context length, the most telling first
    "max_position_embeddings",
    "n_positions",
    "max_positions",
    "max_target_positions",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "max_context_length",
    "context_length",
    "n_ctx",
    "ctx_len",
    "seq_len",
    "seq_length",
    "sequence_length",
    "model_max_length",
    "block_size",
)
LENGTH = re.compile("window|chunk|position|length|seq|ctx|context|block|span|topk|compress")


def context_length(config: Any) -> int | None:
    """How many positions the network has, prompt included; None where its configuration names no number above 0."""
    named = (getattr(config, name, None) for name in CONTEXT)
    return next((n for n in named if _is_length(n)), None)


def require_room(prompt_tokens: int, max_new_tokens: int, max_positions: int | None) -> None:
    """:raises ValueError: unless there are positions for the longest prompt and its completion."""
    reach = prompt_tokens + max_new_tokens
    if max_positions is not None and reach > max_positions:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and max_new_tokens={max_new_tokens} need {reach} positions; this model "
            f"has {max_positions}: shorten the prompt or lower max_new_tokens"
        )


def boundaries(config: Any) -> dict[int, str]:
    """The lengths in tokens at which the network's law may change, each with its place in the configuration: a sliding
    window, an attention chunk, the original context of a rotary embedding that is stretched beyond it, and whatever else
    is named as a length. Rather too many than too few: what happens there is found out, see `checks`.

    >>> boundaries({"rope_parameters": {"original_max_position_embeddings": 4096}, "sliding_window": 512})
    {512: 'sliding_window', 4096: 'rope_parameters.original_max_position_embeddings'}
    """
    found: dict[int, str] = {}
    for place, value in _walk(config):
        if _is_length(value) and value > 1 and LENGTH.search(place.rpartition(".")[2]):
            found.setdefault(value, place)
    return dict(sorted(found.items()))


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _walk(config: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every number in a configuration, with its dotted name; those in a list have the list's."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    elif hasattr(config, "__dict__"):
        config = vars(config)
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from _walk(value, f"{place}.{name}" if place else str(name))
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _walk(value, place)
    else:
        yield place, config
