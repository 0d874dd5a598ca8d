"""The trainable parameters of a model and its guide, read from one run of both."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_lm.infer.traces.particles import run


@torch.no_grad()
def trainable_parameters(
    model: Callable[..., Any], guide: Callable[..., Any], prompts: Any, max_plate_nesting: int
) -> list[Tensor]:
    """Each once, as the optimiser sees it (unconstrained): those of the networks, and what the programs themselves make with
    `pyro.param`."""
    with poutine.trace(param_only=True) as capture:
        run(model, guide, (prompts,), {}, 1, max_plate_nesting)
    sites: Any = capture.trace.nodes.values()
    parameters = [site["value"].unconstrained() for site in sites if site["type"] == "param"]
    return list({id(p): p for p in parameters if p.requires_grad}.values())
