"""A language model all of whose weights are free."""

from typing import Any

import pyro
from torch import Tensor


def finetuned(prompts: Any, lm: Any) -> Tensor:
    """q(x | prompt) = lm(x | prompt), `lm` a trainable copy of the prior."""
    with pyro.plate("prompts", len(prompts)):
        return pyro.sample("x", lm(prompts))
