"""Layers whose activations are found a second time in the backward pass, where those of one text alone do not fit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ppl_lm.lm import meter

Network = Any  # the `Network` whose module imports this one


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Inside the block, autograd keeps what goes into each of transformers' layers, and not what is made of it there (Chen et
    al. 2016). Only the layer itself counts as being trained, which is when transformers does this, and none of its parts:
    dropout stays off."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    names = ("gradient_checkpointing", "training", "_gradient_checkpointing_func")
    before = [{name: vars(layer)[name] for name in names if name in vars(layer)} for layer in layers]
    for layer in layers:
        vars(layer).update(zip(names, (True, True, _again), strict=True))
    try:
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name in names:
                vars(layer).pop(name)
            vars(layer).update(values)


def _again(function: Callable[..., Any], *given: Any) -> Any:
    return checkpoint(function, *given, use_reentrant=False, preserve_rng_state=False)


def may_recompute(lm: Network) -> bool:
    """Whether the network has such layers and answers the same with them; found out once. One whose layers drop something out
    by themselves does not."""
    if lm.shortcuts.layers is None:
        try:
            lm.shortcuts.layers = _answers_the_same(lm)
        except Exception:  # whatever a network does in a pass that it need not know: then it is spared it
            lm.shortcuts.layers = False
    return lm.shortcuts.layers


def _answers_the_same(lm: Network) -> bool:
    if not any(isinstance(module, GradientCheckpointingLayer) for module in lm.model.modules()):
        return False
    count = min(lm.max_positions or 9, 9)
    ids = torch.linspace(0, lm.vocabulary.size - 1, count, device=lm.device).long()[None]
    given = {"ids": ids, "mask": None, "positions": torch.arange(count, device=lm.device)[None], "keep": count}
    with meter.unmeasured(), torch.enable_grad():
        plain, again = (lm.logits(**given, recompute=recompute)[0].detach() for recompute in (False, True))
    return bool(torch.equal(plain, again))
