"""Whether a copy of a network is one: which weights a forward pass really reads."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Reads(TorchDispatchMode):
    """Notes the memory of every tensor that an operation inside the block is given."""

    def __init__(self):
        super().__init__()
        self.places: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.places.update(_places(tree_leaves((args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def _places(values: Any) -> Iterator[int]:
    for value in values:
        if isinstance(value, Tensor) and value.device.type != "meta" and value.numel():
            yield value.untyped_storage().data_ptr()


def require_own_weights(twin: nn.Module, original: nn.Module, forward: Callable[[], Any]) -> None:
    """Raises ValueError unless `forward`, a pass through `twin`, reads weights of `twin` and none of `original`.

    `copy.deepcopy` copies modules, but not what a function closed over: a `forward` that was put on a module or on one of
    its layers (`torch.compile`, hooks, any wrapper) goes on with the weights of the original."""
    weights = {place: name for name, weight in _tensors(original) for place in _places([weight])}
    own = {place for _, weight in _tensors(twin) for place in _places([weight])}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _Reads() as read:
        forward()
    theirs = sorted(weights[place] for place in read.places & weights.keys())
    if theirs:
        raise ValueError(
            f"this {type(original).__name__} cannot be copied: the copy's forward pass still reads the original's weights, "
            f"first {theirs[0]!r}, so training it would train nothing. A forward or a hook that was put on the network "
            "itself (torch.compile, a wrapper) is shared by its copies: copy the plain network first, and wrap the copy"
        )
    if own and not read.places & own:
        raise ValueError(
            f"this {type(original).__name__} cannot be copied: its forward pass reads none of its own weights, so training "
            "a copy would train nothing; copy the plain network, and wrap the copy"
        )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
