"""`evaluating`: a network with its dropout off."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from torch import nn

_LOCK = Lock()
_INSIDE: WeakKeyDictionary[nn.Module, int] = (
    WeakKeyDictionary()
)  # modules in training, and how many blocks evaluate each


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; the mode of every submodule restored on the way out, also on exceptions. Of several blocks
    at once, in threads, the last one restores it."""
    with _LOCK:
        mine = [m for m in module.modules() if m.training or m in _INSIDE]
        for m in mine:
            _INSIDE[m] = _INSIDE.get(m, 0) + 1
            m.training = False
    try:
        yield
    finally:
        with _LOCK:
            for m in mine:
                _INSIDE[m] -= 1
                if not _INSIDE[m]:
                    del _INSIDE[m]
                    m.training = True
