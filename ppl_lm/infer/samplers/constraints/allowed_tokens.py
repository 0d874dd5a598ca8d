"""Adaptive weighted rejection: a next token among those that are allowed, found by asking of few."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

Allowed = Callable[[Int[Tensor, "m"], Int[Tensor, "m"]], Bool[Tensor, "m"]]  # of (rows, tokens)
Draw = Callable[
    [Float64[Tensor, "m V"], Int[Tensor, "m"]], Int[Tensor, "m"]
]  # of (log-probabilities up to a constant, rows)


def draw_allowed(
    log_q: Float[Tensor, "n V"], allowed: Allowed, draw: Draw
) -> tuple[Int[Tensor, "n"], Float64[Tensor, "n"]]:
    """A token x of each row from q(· | C), where C are the tokens that are allowed, and log ŵ, nats, with
    E[ŵ | x] = q(C): properly weighted draws of q(x) 1[x ∈ C] (Lipkin et al. 2025).

    Tokens are drawn without replacement until one, x, is allowed, then once more, x'. With P the mass of all that was drawn
    before x', x among it,

        ŵ = q(x) + (1 - P) 1[x' ∈ C].

    Whether a token is allowed is asked 2 + Σ_{v ∉ C} q_v / (q_v + q(C)) times at most on average. Where none is, ŵ = 0 and
    the token is any.
    """
    left = torch.log_softmax(log_q.double(), -1)  # of what has not been drawn
    left = torch.where(left.exp() > 0, left, -torch.inf)
    chosen = left.argmax(-1)
    weight = torch.zeros(len(left), dtype=torch.float64, device=left.device)
    found = torch.zeros_like(chosen, dtype=torch.bool)
    searching = torch.arange(len(left), device=left.device)
    while len(searching := searching[(left[searching] > -torch.inf).any(-1)]):
        tokens = draw(left[searching], searching)
        hit = allowed(searching, tokens)
        rows, chosen[searching[hit]] = searching[hit], tokens[hit]
        weight[rows], found[rows] = left[rows, tokens[hit]].exp(), True
        left[searching, tokens] = -torch.inf
        searching = searching[~hit]
    rest = left.exp().sum(-1)
    again = (found & (rest > 0)).nonzero()[:, 0]
    if len(again):
        tokens = draw(left[again], again)
        weight[again] += torch.where(allowed(again, tokens), rest[again], 0.0)
    return chosen, weight.log()
