"""Importance weights: how many draws they are worth, and whether their tail can be trusted."""

import math
import sys
import warnings
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_lm.criticism.array_statistics import psis
from ppl_lm.infer.draws import Draws


def ess_se(log_w: Float[Tensor, "S *B"]) -> Float[Tensor, "*B"]:
    """Standard error of Kong's effective sample size, in draws; 0 where all weights are the same, or zero.

    With m1 and m2 the means of w and w², ESS = S m1²/m2 changes by ESS/S · [2 (w/m1 - 1) - (w²/m2 - 1)] with each draw: the
    delta method (van der Vaart 1998, section 3.1). It needs a finite E w⁴, k̂ below 1/4: of heavier weights it is too small.

    :raises ValueError: of fewer than 2 draws."""
    n = len(log_w)
    if n < 2:
        raise ValueError("one draw has no standard error; give at least 2")
    w = n * log_w.softmax(0)  # w/m1
    m2 = w.square().mean(0)
    influence = 2 * (w - 1) - (w.square() / m2 - 1)
    return torch.where((log_w == -torch.inf).all(0), 0.0, math.sqrt(n) / m2 * influence.std(0))


def max_weight(log_w: Float[Tensor, "S *B"]) -> Float[Tensor, "*B"]:
    """The largest weight's share of their sum, 0 to 1; 0 where all weights are zero. 1/S where all are the same.

    It has no standard error: no property of the weights' law, whose largest share goes to 0 with more draws, but of these
    draws: how far a mean over them is the value of a single one."""
    return torch.where((log_w == -torch.inf).all(0), 0.0, log_w.softmax(0).amax(0))


def psis_khat(log_w: Float[Tensor, "S"]) -> float | None:
    """Shape k̂ of a generalised Pareto fitted to the largest weights (Vehtari et al. 2024); below
    `khat_threshold(S)` importance sampling can be trusted.

    None where the tail is tied, as it is when weights are bounded, or has fewer than 5 weights: k̂ does not apply, and
    the ESS decides."""
    fit = _pareto(log_w)
    return None if fit is None else fit[0]


def khat_se(log_w: Float[Tensor, "S"]) -> float | None:
    """Standard error of `psis_khat`, for a tail that is a generalised Pareto; None where k̂ does not apply.

    Of the M weights of the tail the likeliest shape has the variance (1 + k)²/M for k > -1/2 (Smith 1987); below, where the
    upper end is known faster than the shape, k²/M (Smith 1985). ArviZ adds to it 10 observations of 1/2: its k̂ is
    (M k + 5) / (M + 10), and its standard error M/(M + 10) of the likeliest one's. Around -1/2, where k̂ is far below any
    threshold, up to half of the error is left out."""
    fit = _pareto(log_w)
    if fit is None:
        return None
    khat, m, _ = fit
    k = ((m + 10) * khat - 5) / m
    return m / (m + 10) * max(1 + k, -k) / math.sqrt(m)


def khat_threshold(num_samples: int) -> float:
    """min(1 - 1/log10 S, 0.7), as ArviZ has it."""
    return min(1 - 1 / math.log10(max(num_samples, 2)), 0.7)


def pareto_smooth(draws: Draws) -> Draws:
    """The same draws with Pareto-smoothed weights, for means of less variance and a little more bias: the largest weights
    are replaced by the order statistics of the generalised Pareto that fits them (Vehtari et al. 2024), and all are
    scaled so that their sum, and with it log Ẑ, stays.

    `log_guide` is what changes, so that `log_weight` is smoothed: it is the density of no program any more. Weights stay as
    they are where k̂ does not apply (see `psis_khat`), in exact draws, in Markov chains and in draws that came about together;
    zeros stay zeros."""
    if draws.kind != "weighted":
        return draws
    change = draws.log_weight - smooth(draws.log_weight.flatten(0, 1)).reshape(draws.log_weight.shape)
    possible = draws.log_weight > -torch.inf
    return replace(draws, log_guide=torch.where(possible, draws.log_guide + change, draws.log_guide))


def smooth(log_w: Float[Tensor, "S B"]) -> Float[Tensor, "S B"]:
    """Pareto-smoothed log weights of each column, nats; see `pareto_smooth`."""
    return torch.stack([_smooth(column) for column in log_w.unbind(-1)], -1)


def _smooth(log_w: Float[Tensor, "S"]) -> Float[Tensor, "S"]:
    fit = _pareto(log_w)
    if fit is None:
        return log_w
    smoothed = log_w.clone()
    smoothed[log_w > -torch.inf] = fit[2].to(log_w) + log_w.logsumexp(0)
    return smoothed


def _pareto(log_w: Float[Tensor, "S"]) -> tuple[float, int, Tensor] | None:
    """ArviZ's fit: k̂, the number M of weights that it is fitted to, and the smoothed log weights of what is possible, whose
    sum is 1. None where k̂ does not apply."""
    if log_w.dim() != 1:
        raise ValueError(f"log weights of shape {tuple(log_w.shape)}; k-hat is that of one prompt's weights, (S,)")
    w = log_w[log_w > -torch.inf].double()
    if len(w) < 25:
        return None
    tail = math.ceil(min(len(w) / 5, 3 * math.sqrt(len(w))))
    largest = w.sort().values[-tail - 1 :]
    lowest = torch.maximum(largest[0], largest[-1] + math.log(sys.float_info.min))  # below that a share is 0 to ArviZ
    largest = largest[largest > lowest]  # ArviZ fits those above the tail's lower end, and fails where they are tied
    if len(largest) < 5 or float(largest[-1] - largest[0]) < 1e-6:
        return None
    with warnings.catch_warnings():  # a high k̂ is reported, not warned about
        warnings.simplefilter("ignore")
        smoothed, khat = psis(w.cpu().numpy(), len(largest))
    smoothed = torch.as_tensor(smoothed)
    return (khat, len(largest), smoothed - smoothed.logsumexp(0)) if math.isfinite(khat) else None
