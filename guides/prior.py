"""The prior itself, as a proposal: nothing to train."""

from typing import Any

import pyro
from torch import Tensor


def prior(prompts: Any, prior: Any) -> Tensor:
    """q(x | prompt) = prior(x | prompt)."""
    with pyro.plate("prompts", len(prompts)):
        return pyro.sample("x", prior(prompts))
