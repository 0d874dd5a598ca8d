"""The key-value cache, of which only the rows that change are copied when rows are reordered."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class Cache(DynamicCache):
    """transformers' cache, with another `batch_select_indices`: the same rows, copied only where row i is not `rows[i]`.

    Layers that hold more than keys and values (the states of convolutions and recurrences) move all of it in
    `reorder_cache`, and some of them none of it in their own `batch_select_indices`."""

    def batch_select_indices(self, indices: Int[Tensor, "M"]) -> None:
        changed = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        source = indices[changed]
        for layer in self.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if type(layer) is DynamicLayer and keys is not None and values is not None and len(indices) <= len(keys):
                layer.keys, layer.values = (
                    kept[: len(indices)].index_copy_(0, changed, kept.index_select(0, source))
                    for kept in (keys, values)
                )
            else:
                layer.reorder_cache(indices)  # pyright: ignore[reportArgumentType]


def new_cache(model: nn.Module) -> Any:
    """An empty cache for `model`: what its own method `new_cache` gives; one with the layers that its configuration names;
    else one that grows a layer of keys and values wherever one is filled."""
    own = getattr(model, "new_cache", None)
    config: Any = getattr(model, "config", None)
    if own is not None:
        return own()
    described = hasattr(config, "get_text_config") and hasattr(config.get_text_config(), "num_hidden_layers")
    return Cache(config=config) if described else Cache()


def place(slot: Int[Tensor, "N"], rows: Int[Tensor, "M"]) -> tuple[Int[Tensor, "M"], Int[Tensor, "M"]]:
    """Where M rows go that continue `rows` of N rows, which stand at `slot`: each where what it continues stands, as far as
    that place is among the first M and not taken, so that little has to be copied.

    :return: what each of the M places holds from now on, as a place before; and the place of each row."""
    count, source = len(rows), slot[rows]
    each = torch.arange(count, device=rows.device)
    first = torch.full((max(count, len(slot)),), count, device=rows.device)
    first = first.scatter_reduce(0, source, each, "amin")[:count]  # which row stays at each place, or count
    held = first < count
    stays = torch.zeros(count + 1, dtype=torch.bool, device=rows.device).scatter(0, first, held)[:count]
    # Rows that stay, then the others; their places, then those that are free: in order, and of sizes that the host knows.
    ordered = torch.where(stays, source, count + each).argsort()
    place = torch.empty_like(rows).scatter(0, ordered, torch.where(held, each, count + each).argsort())
    return torch.empty_like(rows).scatter(0, place, source), place
