"""Gradient checkpointing: activations of layers found a second time in the backward pass, where one text's do not fit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ppl_lm.lm.dropout import evaluating

_ONE_AT_A_TIME = Lock()  # passes that change what layers do


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """Transformers' own layers, those that lie in no other of them."""
    found: list[nn.Module] = []
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not name.startswith(tuple(names)):
            found.append(module)
            names.append(f"{name}.")
    return found


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Inside the block, autograd keeps of this thread's passes, which use no cache, what goes into each layer, and not what is
    made of it there (Chen et al. 2016). Dropout stays off in the backward pass too, whatever mode the network is in by then."""
    layers = checkpointed_layers(model)
    with _ONE_AT_A_TIME:
        before = [vars(layer).get("forward") for layer in layers]
        for layer in layers:
            layer.forward = _again(layer, get_ident())
        try:
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                del layer.forward
                if own is not None:
                    layer.forward = own


def _again(layer: nn.Module, thread: int) -> Callable[..., Any]:
    forward = layer.forward

    def run(*given: Any, **named: Any) -> Any:
        def evaluated(*given: Any) -> Any:
            with evaluating(layer):
                return forward(*given, **named)

        if get_ident() != thread:
            return forward(*given, **named)
        return checkpoint(evaluated, *given, use_reentrant=False, preserve_rng_state=False)

    return run
