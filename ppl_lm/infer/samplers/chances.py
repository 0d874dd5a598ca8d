"""What Metropolis-Hastings steps over text leave to chance: a place in a text, and whether a move is made."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppl_lm.infer.draws import Draws, concatenate


def places(n: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
    """A place uniform among n tokens of each text; 0 where there is none."""
    return (torch.rand(n.shape, dtype=torch.float64, device=n.device) * n).long()


def accepted(log_ratio: Float[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Whether each move is made, with probability min(1, exp(log_ratio))."""
    return torch.rand_like(log_ratio).log() < log_ratio


def either(state: Draws, proposal: Draws, taken: Bool[Tensor, "N B"]) -> Draws:
    """The proposal where it is taken, else the state, each (1, N, B); taken is (N, 1) where all prompts move together."""
    chain, prompt = (torch.arange(size, device=taken.device) for size in state.log_guide.shape[1:])
    rows = chain.unsqueeze(-1) + len(taken) * taken  # (N, B or 1)
    both = concatenate([state, proposal])  # (1, 2N, B)
    return both.map(lambda v: v[:, rows[:, 0]] if rows.shape[1] == 1 else v[:, rows, prompt])
