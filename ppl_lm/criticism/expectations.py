"""`expectation`: posterior means with their Monte Carlo standard errors, by draws of every kind."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ppl_lm.criticism.array_statistics import array_statistic
from ppl_lm.infer.draws import TOGETHER, Draws
from ppl_lm.infer.log_weights import settled


@dataclass(frozen=True)
class Expectation:
    """:param mean: of each number, for each prompt, float64.
    :param se: its Monte Carlo standard error; inf where it cannot be told (one draw, one run, weights that are worth fewer than
        two draws, as those of two runs are, a mean that is infinite)."""

    mean: Float[Tensor, "B *E"]
    se: Float[Tensor, "B *E"]

    def item(self) -> tuple[float, float]:
        """Mean and standard error of the only number, of the only prompt."""
        return float(self.mean), float(self.se)

    def __str__(self) -> str:
        pairs = zip(self.mean.flatten().tolist(), self.se.flatten().tolist(), strict=True)
        return ", ".join(f"{mean:.4g} ± {se:.2g}" for mean, se in pairs)


def expectation(
    draws: Draws, values: Shaped[Tensor, "C S B *E"], weights: Float[Tensor, "C S _"] | None = None
) -> Expectation:
    """E[values] = Σ w v under the posterior that the draws stand for, w = `draws.weights`, for each prompt:

        expectation(draws, draws["reward"])

    The error is that of the influence w (v - mean) of each independent part: of each draw where all are independent; summed
    over a run where draws came about together, since only the runs are independent; of Markov chains ArviZ's `mcse` of the
    mean along them (Vehtari et al. 2021). Of weighted draws this is the delta method of self-normalised importance sampling,
    whose bias is O(1/S); heavy tails make it too small, see `psis_khat`. `ppl_lm.criticism.pareto_smooth(draws)` has
    less variance and a little more bias.

    :param values: one number or more of each draw, in any unit, such as a record; of a draw without weight it may be anything.
    :param weights: what each draw counts instead, normalised over all draws: equal ones give the mean under the law that drew
        them, others another posterior.
    :raises NoSupportError: if all weights of a prompt are zero.
    :raises ValueError: if the values are not of the shape (C, S, B, ...) of these draws."""
    shape = draws.log_weight.shape
    if not isinstance(values, Tensor) or values.dim() < 3 or values.shape[:2] != shape[:2]:
        given = f"of shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)[:60]
        raise ValueError(
            f"values {given}; give a tensor with a number for each draw and prompt, (C, S, B, ...) = {tuple(shape)}, such as "
            'draws["reward"]'
        )
    weights = draws.weights if weights is None else weights
    w = weights.reshape(*weights.shape, *[1] * (values.dim() - weights.dim())).to(values.device)
    values = torch.where(w > 0, values.double(), 0.0)
    mean = (w * values).sum((0, 1))
    influence = w * (values - mean)
    if draws.kind == "chains":
        return Expectation(mean, _along_chains(influence * influence.shape[0] * influence.shape[1]))
    parts = influence.sum(1) if draws.kind in TOGETHER else influence.flatten(0, 1)
    if len(parts) < 2:
        return Expectation(mean, torch.full_like(mean, math.inf))
    se = (parts.square().sum(0) * len(parts) / (len(parts) - 1)).sqrt()
    share = w.sum(1) if draws.kind in TOGETHER else w.flatten(0, 1)
    return Expectation(mean, se.where(settled(share), math.inf).nan_to_num(math.inf, math.inf))


def _along_chains(influence: Float[Tensor, "C S B *E"]) -> Float[Tensor, "B *E"]:
    mcse = array_statistic("mcse")
    columns = influence.flatten(2).movedim(-1, 0).cpu().numpy()  # (B·E, C, S)
    errors = [float(mcse(column)) if column.max() > column.min() else 0.0 for column in columns]
    se = torch.tensor(errors, dtype=torch.float64).reshape(influence.shape[2:])
    return se.nan_to_num(math.inf, math.inf).to(influence.device)
