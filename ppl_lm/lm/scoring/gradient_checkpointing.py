"""Gradient checkpointing: activations of layers found a second time in the backward pass, where one text's do not fit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ppl_lm.lm import meter
from ppl_lm.lm.dropout import evaluating

Network = Any  # the `Network` whose module imports this one
_ONE_AT_A_TIME = Lock()  # passes that change what layers do


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Inside the block, autograd keeps what goes into each of transformers' layers, and not what is made of it there (Chen et
    al. 2016). A layer counts as being trained while it is called, which is when transformers does this, but neither it nor its
    parts do while it is at work, here or in the backward pass: dropout stays off, whatever mode the network is in by then."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    names = ("gradient_checkpointing", "training", "_gradient_checkpointing_func")
    with _ONE_AT_A_TIME:
        before = [{name: vars(layer)[name] for name in names if name in vars(layer)} for layer in layers]
        for layer in layers:
            vars(layer).update(zip(names, (True, True, partial(_again, layer)), strict=True))
        try:
            yield
        finally:
            for layer, values in zip(layers, before, strict=True):
                for name in names:
                    vars(layer).pop(name)
                vars(layer).update(values)


def _again(layer: nn.Module, function: Callable[..., Any], *given: Any) -> Any:
    def evaluated(*given: Any) -> Any:
        with evaluating(layer):
            return function(*given)

    return checkpoint(evaluated, *given, use_reentrant=False, preserve_rng_state=False)


def may_recompute(lm: Network) -> bool:
    """Whether the network has such layers and answers the same with them; found out once."""
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
