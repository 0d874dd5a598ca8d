"""Log-probabilities of given tokens without the logits of all: a linear head and its softmax, a few positions at a time.

Of kept implementations none gives what is needed: torch's `linear_cross_entropy` (since 2.13) adds the tokens up in its
chunked form and knows one target for a position; Liger's and Apple's cut cross-entropy are Triton, for CUDA alone."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

CHUNK = 2**24  # logits at a time
FEW_ROWS = 128
KEPT = 2**25  # logits of a head that is trained, up to which they are kept: finding them again takes a third longer


def all_logits(hidden: Float[Tensor, "N H"], head: nn.Linear) -> Float[Tensor, "N V"]:
    """hidden Wᵀ + b, float32 or wider. Without a gradient.

    Of few rows on a processor as (W hiddenᵀ)ᵀ, which its libraries multiply 1.1 to 3 times as fast where V is large: they cut
    the product up along the many words instead of the few rows."""
    weight = head.weight
    is_plain = hidden.device.type == "cpu" and hidden.dtype == weight.dtype and weight.itemsize >= 4
    if not is_plain or len(hidden) > FEW_ROWS or torch.is_autocast_enabled("cpu"):
        return _wide(nn.functional.linear(hidden, weight, head.bias))
    product = torch.mm(weight, hidden.t()).t().contiguous()
    return product if head.bias is None else product.add_(head.bias)


def chosen_log_probs(
    hidden: Float[Tensor, "*S H"], head: nn.Linear, tokens: Int[Tensor, "*S M"]
) -> Float[Tensor, "*S M"]:
    """log softmax(hidden Wᵀ + b) at `tokens`, in float32 or wider, nats. Differentiable in `hidden` and in the head, twice too
    (`create_graph=True`, `torch.func`), then with all logits at once.

    Memory beside the arguments: a few times `CHUNK` logits. Under a frozen head the gradient of `hidden` is kept from the first
    pass, M numbers for each of `hidden`. A head that is trained finds its logits a second time, unless all are no more than
    `KEPT`: then they are kept, and a few times as much."""
    flat, chosen = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1, tokens.shape[-1])
    trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in head.parameters())
    if trained and len(flat) * len(head.weight) <= KEPT:
        logits = _wide(head(flat))
        return (logits.gather(-1, chosen) - logits.logsumexp(-1, keepdim=True)).reshape(tokens.shape)
    keeps = torch.is_grad_enabled() and hidden.requires_grad and not trained
    found: Any = _ChosenLogProbs.apply(flat, head.weight, head.bias, chosen, keeps)
    return found[0].reshape(tokens.shape)


class _ChosenLogProbs(torch.autograd.Function):
    """With p = softmax(W h + b) and logits z: ∂ log p(v) / ∂z_u = 1[u = v] - p(u), so that ∂ log p(v) / ∂h is
    W_v - Σ_u p(u) W_u, which does not depend on what comes back, and can be kept."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, keeps: bool
    ) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = torch.empty(tokens.shape, dtype=wide, device=hidden.device)
        slopes = hidden.new_empty(*tokens.shape, hidden.shape[-1]) if keeps else None  # (N, M, H)
        for part in _parts(hidden, weight):
            logits = _wide(nn.functional.linear(hidden[part], weight, bias))
            total = logits.logsumexp(-1, keepdim=True)
            log_probs[part] = logits.gather(-1, tokens[part]) - total
            if slopes is not None:
                mean = (logits - total).exp_().to(weight.dtype) @ weight
                slopes[part] = weight[tokens[part]] - mean.unsqueeze(1)
        return log_probs, slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        hidden, weight, bias, tokens, _ = inputs
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(hidden, weight, bias, tokens, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, slopes = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        again = torch.is_grad_enabled()  # a second derivative is asked for: only plain operations, of all at once
        if slopes is not None and not again:
            return (grad.to(slopes.dtype).unsqueeze(-1) * slopes).sum(1), None, None, None, None
        for_hidden, for_weight, for_bias = [], None, None
        for part in [slice(None)] if again else _parts(hidden, weight):
            given = hidden[part].to(weight.dtype)  # under autocast they may differ
            p = _wide(nn.functional.linear(given, weight, bias)).softmax(-1)
            slope = (-p * grad[part].sum(-1, keepdim=True)).scatter_add(-1, tokens[part], grad[part])  # of each logit
            if needs_hidden:
                for_hidden.append(slope.to(weight.dtype) @ weight)
            if needs_weight:
                found = _wide(slope.to(weight.dtype).t() @ given)
                for_weight = found if for_weight is None else for_weight.add_(found)
            if needs_bias:
                for_bias = slope.sum(0) if for_bias is None else for_bias + slope.sum(0)
        return (
            torch.cat(for_hidden).to(hidden.dtype) if needs_hidden else None,
            None if for_weight is None else for_weight.to(weight.dtype),
            None if for_bias is None or bias is None else for_bias.to(bias.dtype),
            None,
            None,
        )


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _parts(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK // len(weight))
    return (slice(start, start + size) for start in range(0, max(1, len(hidden)), size))
