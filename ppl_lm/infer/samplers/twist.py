"""`Twist`: what SMC asks of texts begun."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts

Function = Callable[[Prompts, Int[Tensor, "N T"], Int[Tensor, "N"]], Float[Tensor, "N"]]
"""(prompts, x, n) -> log ψ_n, nats: of N texts, of which the first n tokens are known, one prompt each. x is canonical: a
text still open is given as if it ended there (n is then less than its length). -inf: nothing possible begins so. It may be
random, as `twists.look_ahead` is: the same number stands in the weight as the target that is left and as the one that is gone
on from."""


@dataclass(frozen=True)
class PriorPower:
    """log ψ_t(x_≤t) = (alpha - 1) log p0(x_≤t): the intermediate targets are the prior's power p0(x_≤t)^alpha, and without a
    guide a token is proposed by q(v | s) ∝ p0(v | s)^alpha, so that a text's weight grows by Σ_v p0(v | s)^alpha. No
    network is asked for it.

    :raises ValueError: unless alpha is above 0 and finite."""

    alpha: float

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}; the prior's power must be above 0, and finite")

    def log_psi(self, log_p0: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Of texts begun by their log p0; -inf of those that are impossible, which a guide may propose."""
        return torch.where(log_p0 == -torch.inf, -torch.inf, (self.alpha - 1) * log_p0)


Twist = LanguageModel | PriorPower | Function
