"""The tail of importance weights: whether their mean can be trusted, as a plot."""

import math

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from scipy.optimize import brentq
from scipy.stats import beta, genpareto
from torch import Tensor

from ppl_lm.criticism.weights import khat_threshold, psis_khat
from ppl_lm.infer.draws import EQUAL, Draws
from ppl_lm.infer.log_weights import kong_ess
from ppl_lm.plot.style import ORANGE, RED, SKY, axes, legend_below, with_notes


def weight_tail(draws: Draws | Float[Tensor, "S"], ax: Axes | None = None) -> Axes:
    """Share of draws whose importance weight is at least so many times the mean one, on two log axes: a power law is a line.
    With the generalised Pareto of shape k-hat (ArviZ) that fits the largest, and where 95% of its draws would lie.

    :param draws: of one prompt, or their log weights; of SMC's those of all runs together, as `diagnose_draws` judges them.
    :raises ValueError: on several prompts, or draws that have no weights."""
    from matplotlib.ticker import LogLocator

    ax = axes(ax)
    if isinstance(draws, Draws):
        if draws.kind in EQUAL:
            raise ValueError("exact draws and Markov chains are equally weighted: they have no tail of weights")
        draws = draws.log_weight.flatten(0, 1).squeeze(-1)
    if draws.dim() != 1:
        raise ValueError(f"log weights of shape {tuple(draws.shape)}; give one prompt's, draws.of_prompt(b)")
    count, log_w = len(draws), draws[draws != -torch.inf].double().cpu().sort(descending=True).values
    ax.set(
        xscale="log", yscale="log", xlabel="importance weight / mean weight", ylabel="share of draws at least so heavy"
    )
    if not len(log_w) or not bool(log_w.isfinite().all()):
        return with_notes(
            ax, [f"none of {count} draws has a weight above zero" if not len(log_w) else "weights are not finite"]
        )
    w = (log_w - log_w.logsumexp(0) + math.log(count)).exp().numpy()
    share = np.arange(1, len(w) + 1) / count
    label = f"{len(w)} of {count} draws" + (" (the others weigh nothing)" if len(w) < count else "")
    ax.plot(w, share, ".", color=SKY, markersize=4, label=label)
    khat, ess_of_all = psis_khat(log_w), f"ESS {float(kong_ess(log_w)):.0f} of {count}"
    if khat is None:
        why = f"{len(w)} weights are too few" if len(w) < 25 else "the largest weights are tied (bounded weights)"
        legend_below(ax, *ax.get_legend_handles_labels())
        return with_notes(ax, [f"k-hat does not apply: {why}; {ess_of_all} decides"])
    tail = math.ceil(min(len(w) / 5, 3 * math.sqrt(len(w))))  # as in psis_khat
    cutoff = w[tail]
    rank = np.arange(1, tail + 1)
    survival = beta.ppf([[0.975], [0.5], [0.025]], rank, tail + 1 - rank)  # of the i-th largest of so many draws
    lightest, middle, heaviest = cutoff + genpareto.isf(survival, khat, scale=pareto_scale(w[:tail] - cutoff, khat))
    ax.fill_betweenx(share[:tail], lightest, heaviest, color=ORANGE, alpha=0.25, linewidth=0)
    ax.plot(middle, share[:tail], color=RED, label=f"generalised Pareto of the {tail} largest, with 95% band")
    ax.set_xlim(max(w.min(), 1e-4) / 1.3, max(w[0], middle[0]) * 2)
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # 4 × 10⁻¹ takes the place of three labels
    ax.xaxis.set_minor_formatter("")
    legend_below(ax, *ax.get_legend_handles_labels())
    return with_notes(ax, [f"k-hat {round(khat, 2) + 0.0:.2f}, fine below {khat_threshold(count):.2f}; {ess_of_all}"])


def pareto_scale(excess: Float[np.ndarray, "N"], shape: float) -> float:
    """The likeliest scale σ of a generalised Pareto of that shape k: Σ (k + 1) x / (σ + k x) = n; for k ≤ -1 the smallest, by
    which the largest x lies at the end."""
    largest = float(excess.max())
    low = max(1e-300, -shape * (1 + 1e-12)) * largest
    if shape <= -1:
        return low

    def slope(log_scale: float) -> float:
        return float(((shape + 1) * excess / (math.exp(log_scale) + shape * excess)).sum()) - len(excess)

    high = low + 4 * (1 + abs(shape)) * largest
    return math.exp(brentq(slope, math.log(low), math.log(high)))  # pyright: ignore[reportArgumentType]
