"""Means of importance weights, and weighted means, of independent draws, with their standard errors; log weights in nats."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def log_mean(log_w: Float[Tensor, "S *B"]) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """log of the mean weight and its standard error (delta method), nats."""
    n = len(log_w)
    value = log_w.logsumexp(0) - math.log(n)
    relative = (log_w - value).exp()
    return value, relative.std(0) / math.sqrt(n)


def mean(values: Float[Tensor, "S *B"]) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """Mean over draws and its standard error, inf of a mean that is infinite: it is known to be nothing.

    :raises ValueError: of fewer than 2 draws."""
    if len(values) < 2:
        raise ValueError("one draw has no standard error; give at least 2")
    se = values.std(0) / math.sqrt(len(values))
    return values.mean(0), se.nan_to_num(math.inf, math.inf)


def weighted_mean(
    log_w: Float[Tensor, "S *B"], values: Float[Tensor, "S *B"]
) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """Self-normalised mean Σ w v / Σ w and its standard error: of the influence w (v - mean) / Σ w of each draw, the delta
    method. Values of draws without weight may be anything; NaN where no draw has any. The error is inf of weights that are
    not `settled`."""
    n, w = len(log_w), log_w.softmax(0)
    values = torch.where(w > 0, values, 0.0)
    centre = (w * values).sum(0)
    influence = torch.where(w > 0, w * (values - centre), 0.0)
    scale = n / (n - 1) if n > 1 else math.inf
    se = (influence.square().sum(0) * scale).sqrt()
    return centre, se.where(settled(w), math.inf).nan_to_num(math.inf, math.inf)


def settled(share: Float[Tensor, "S *B"]) -> Bool[Tensor, "*B"]:
    """Whether shares of the total weight are worth at least two independent draws (1/Σ share², Kong 1992): with fewer the
    largest decides the mean, and its own distance from that mean says nothing of the error."""
    return share.square().sum(0) <= 0.5 + 1e-9


def kong_ess(log_w: Float[Tensor, "S *B"]) -> Float[Tensor, "*B"]:
    """Effective sample size (Σw)²/Σw² in draws (Kong 1992); 0 where all weights are zero."""
    value = (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()
    return torch.where((log_w == -torch.inf).all(0), 0.0, value)
