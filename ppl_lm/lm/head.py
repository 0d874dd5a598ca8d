"""Log-probabilities of given tokens without the logits of all: a linear head and its softmax, a few positions at a time.

Of kept implementations none gives what is needed: torch's `linear_cross_entropy` (since 2.13) adds the tokens up in its
chunked form and knows one target for a position; Liger's and Apple's cut cross-entropy are Triton, for CUDA alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 2**24  # logits at a time


def chosen_log_probs(
    hidden: Float[Tensor, "*S H"], head: nn.Linear, tokens: Int[Tensor, "*S M"]
) -> Float[Tensor, "*S M"]:
    """log softmax(hidden Wᵀ + b) at `tokens`, in float32 or wider, nats. Differentiable in `hidden` and in the head.

    Memory beside the arguments: `CHUNK` logits, and with a gradient M numbers more for each of `hidden`. A head that is trained
    finds its logits a second time, unless all are no more than `CHUNK`: then they are kept."""
    flat, chosen = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1, tokens.shape[-1])
    if len(flat) * len(head.weight) <= CHUNK and torch.is_grad_enabled() and head.weight.requires_grad:
        logits = head(flat)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (wide.gather(-1, chosen) - wide.logsumexp(-1, keepdim=True)).reshape(tokens.shape)  # to the bit as below
    found: Any = _ChosenLogProbs.apply(flat, head.weight, head.bias, chosen)
    return found.reshape(tokens.shape)


class _ChosenLogProbs(torch.autograd.Function):
    """With p = softmax(W h + b): ∂ log p(v) / ∂h = W_v - Σ_u p(u) W_u, which does not depend on what comes back, and so is
    kept; ∂ log p(v) / ∂W_u = (1[u = v] - p(u)) h, for which p is found again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = torch.empty(tokens.shape, dtype=wide, device=hidden.device)
        totals = torch.empty(len(hidden), 1, dtype=wide, device=hidden.device)
        needs_hidden = ctx.needs_input_grad[0]
        slopes = hidden.new_empty(*tokens.shape, hidden.shape[-1]) if needs_hidden else None  # (N, M, H)
        for part in _parts(hidden, weight):
            logits = nn.functional.linear(hidden[part], weight, bias).to(wide)
            totals[part] = logits.logsumexp(-1, keepdim=True)
            log_probs[part] = logits.gather(-1, tokens[part]) - totals[part]
            if slopes is not None:
                mean = logits.sub_(totals[part]).exp_().to(weight.dtype) @ weight
                slopes[part] = weight[tokens[part]] - mean.unsqueeze(1)
        ctx.save_for_backward(hidden, weight, bias, tokens, totals, slopes)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, totals, slopes = ctx.saved_tensors
        for_hidden = None if slopes is None else (grad.to(slopes.dtype).unsqueeze(-1) * slopes).sum(1)
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        for_weight = torch.zeros_like(weight) if needs_weight else None
        for_bias = torch.zeros_like(bias) if needs_bias else None
        for part in _parts(hidden, weight) if needs_weight or needs_bias else ():
            logits = nn.functional.linear(hidden[part], weight, bias).to(grad.dtype)
            slope = logits.sub_(totals[part]).exp_().mul_(-grad[part].sum(-1, keepdim=True))  # of each logit
            slope = slope.scatter_add_(-1, tokens[part], grad[part]).to(weight.dtype)
            if for_weight is not None:
                for_weight.addmm_(slope.t(), hidden[part])
            if for_bias is not None:
                for_bias += slope.sum(0)
        return for_hidden, for_weight, for_bias, None


def _parts(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK // len(weight))
    return (slice(start, start + size) for start in range(0, len(hidden), size))


@contextmanager
def entering(head: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the block, what is given to a head goes into the list, and the head answers one position of one text alone."""
    seen: list[Tensor] = []

    def take(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(given[0])
        return (given[0][:1, -1:], *given[1:])

    handle = head.register_forward_pre_hook(take)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def scaling(head: nn.Module, factor: float) -> Iterator[list[Tensor]]:
    """Inside the block, what a head is given goes into the list, and its answers are `factor` times as large."""
    seen: list[Tensor] = []

    def scale(_: nn.Module, given: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        seen.append(given[0])
        return answer * factor

    handle = head.register_forward_hook(scale)
    try:
        yield seen
    finally:
        handle.remove()
