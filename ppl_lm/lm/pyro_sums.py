"""Pyro's sums over enumerated sites, for log-probabilities of two dtypes.

Those of texts and of `Optimality` are float64, those of Pyro's own distributions are of torch's default dtype. torch's
arithmetic joins them in the wider one; the contractions by which `TraceEnum_ELBO` and its kin sum over enumerated sites refuse
two dtypes. Here they, too, take the wider one. What they have been able to sum so far, they sum as before."""

from collections.abc import Callable
from functools import reduce, wraps
from typing import Any

import opt_einsum.backends.dispatch
import pyro.infer.util
import pyro.ops.einsum.torch_log
import torch
from torch import Tensor


def _widened(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    dtypes = {t.dtype for t in tensors if isinstance(t, Tensor)}
    if len(dtypes) < 2:
        return tensors
    widest = reduce(torch.promote_types, dtypes)
    return tuple(t.to(widest) if isinstance(t, Tensor) else t for t in tensors)


def _install() -> None:
    """In the two places where Pyro contracts tensors."""
    einsum: Callable[..., Any] = pyro.ops.einsum.torch_log.einsum
    dot: Callable[..., Tensor] = pyro.infer.util._fulldot
    if getattr(einsum, "__module__", __name__) == __name__:
        return

    @wraps(einsum, assigned=("__name__", "__doc__"))
    def einsum_of_widest(equation: str, *operands: Tensor) -> Tensor:
        return einsum(equation, *_widened(operands))

    @wraps(dot, assigned=("__name__", "__doc__"))
    def dot_of_widest(x: Tensor, y: Tensor) -> Tensor:
        return dot(*_widened((x, y)))

    pyro.ops.einsum.torch_log.einsum = einsum_of_widest
    pyro.ops.einsum.torch_log.tensordot.einsum = einsum_of_widest
    pyro.infer.util._fulldot = dot_of_widest
    # opt_einsum remembers the functions of a backend once it has called them
    known: dict[Any, Any] = getattr(opt_einsum.backends.dispatch, "_cached_funcs", {})
    known.pop(("einsum", "pyro.ops.einsum.torch_log"), None)


_install()
