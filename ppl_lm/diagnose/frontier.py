"""The reward–KL frontier: the most reward that any law can have at a KL from the prior."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_lm.diagnose.evidence import FEWEST
from ppl_lm.diagnose.plots import CYCLE, GREY, SMALL, axes, number, plain, said
from ppl_lm.diagnose.weights import log_mean
from ppl_lm.infer import Draws

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_frontier(
    prior: Draws,
    points: Mapping[str, tuple[float, float, float, float]] | None = None,
    ax: "Axes | None" = None,
    betas: Sequence[float] | None = None,
) -> "Axes":
    """The most reward that any law can have at a KL from the prior: E[reward] against KL(p_β ‖ prior) of p_β ∝ p0 exp(r/β),
    mean over prompts, with two standard errors, see `frontier`.

    :param prior: draws of the prior, `importance(model, None, ...)`, with the record `reward`.
    :param points: name -> (KL from the prior, its SE, E[reward], its SE), nats and the reward's unit: how guides do.
    :param betas: temperatures to mark on the curve.
    :raises ValueError: if the draws are not the prior's or have no reward."""
    ax, notes = axes(ax), []
    reward = _rewards(prior)
    spread = float(reward.std(0).max()) if len(reward) > 1 else 0.0
    if not bool(reward.isfinite().all()):
        notes.append("some rewards are not finite: no curve")
    elif len(reward) < FEWEST:
        notes.append(f"{len(reward)} draws of the prior are too few for a curve: at least {FEWEST} are needed")
    elif spread == 0:
        notes.append("every draw of the prior has the same reward: there is nothing to trade")
    else:
        made = frontier(prior, (spread * torch.logspace(2, -3, 300, dtype=torch.float64)).tolist())
        kl, value, se, _ = made[:, made[3] >= FEWEST].cpu().numpy()
        ax.fill_between(kl, value - 2 * se, value + 2 * se, color=GREY, alpha=0.3, linewidth=0)
        ax.plot(kl, value, color="black", label=r"best at each KL: $p_β ∝ p_0\,\exp(r/β)$ ± 2 SE")
        for beta in betas or ():
            x, y, _, worth = frontier(prior, [beta])[:, 0].tolist()
            if worth < FEWEST:
                notes.append(f"β = {beta:g} is out of reach of {len(reward)} draws (ESS {worth:.0f})")
                continue
            ax.plot(x, y, "o", color="black", markerfacecolor="white", markersize=5)
            ax.annotate(f"β = {beta:g}", (x, y), (5, -5), textcoords="offset points", va="top", fontsize=SMALL)
    for n, (name, (kl, kl_se, value, se)) in enumerate((points or {}).items()):
        x, x_se, y, y_se = map(number, (kl, kl_se, value, se))
        if not (math.isfinite(x) and math.isfinite(y)):
            notes.append(f"{plain(name)} has no finite KL or reward")
            continue
        errors = [0.0 if not math.isfinite(e) else e for e in (x_se, y_se)]
        marker = "osD^v<>"[n % 7]
        ax.errorbar(
            x, y, xerr=errors[0], yerr=errors[1], fmt=marker, color=CYCLE[n % 6], capsize=3, label=plain(name) + " ± SE"
        )
    ax.set_xlabel("KL(· ‖ prior) [nats]")
    ax.set_ylabel("E[reward] [the reward's unit]")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=SMALL, loc="lower right")
    return said(ax, notes)


def frontier(prior: Draws, betas: Sequence[float]) -> Float[Tensor, "4 N"]:
    """KL(p_β ‖ prior) in nats, E[reward] under p_β, its standard error at that KL, and the effective sample size, for N
    temperatures, by weights w = softmax(r/β) of the prior's draws: KL = Σ w log(S w). Means over prompts; the least ESS.

    On the frontier the reward rises by β for each nat, so at a fixed KL its error is that of E[r] - β KL = β log Z."""
    reward, rows = _rewards(prior), []
    for beta in betas:
        if not beta > 0:
            raise ValueError(f"beta={beta}; the reward's temperature must be above 0")
        w = (reward / beta).softmax(0)  # (S, B)
        relative = w * len(w)
        kl = torch.special.xlogy(w, relative).sum(0)
        se = beta * log_mean(reward / beta)[1]
        total = se.square().sum().sqrt() / len(se)
        rows.append(torch.stack([kl.mean(), (w * reward).sum(0).mean(), total, 1 / w.square().sum(0).max()]))
    return torch.stack(rows, 1)


def _rewards(prior: Draws) -> Float[Tensor, "S B"]:
    if "reward" not in prior.records:
        raise ValueError(f"these draws record {sorted(prior.records)}; the frontier needs the model's 'reward'")
    if not prior.from_prior:
        raise ValueError("these draws are not the prior's: draw them with importance(model, None, prompts)")
    return prior.records["reward"].flatten(0, 1).double()
