"""The parameters that programs register as they run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_lm.infer.traces.particles import run


@contextmanager
def trainable_of_block() -> Iterator[list[Tensor]]:
    """A list that holds, once the block has ended, every trainable parameter that programs registered in it, unconstrained,
    each once."""
    parameters: list[Tensor] = []
    with poutine.trace(param_only=True) as capture:
        yield parameters
    nodes: Any = capture.trace.nodes
    registered = [site["value"].unconstrained() for site in nodes.values() if site["type"] == "param"]
    parameters += {id(parameter): parameter for parameter in registered if parameter.requires_grad}.values()


@torch.no_grad()
def trainable_parameters(
    model: Callable[..., Any], guide: Callable[..., Any], prompts: Any, max_plate_nesting: int
) -> list[Tensor]:
    """Every trainable parameter of two programs: of their networks, and what they make with `pyro.param`. Runs both once."""
    with trainable_of_block() as parameters:
        run(model, guide, (prompts,), {}, 1, max_plate_nesting)
    return parameters
