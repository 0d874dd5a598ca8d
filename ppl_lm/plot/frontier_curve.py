"""The reward–KL frontier, with guides as points."""

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes

from ppl_lm.criticism.evidence import MIN_MEANS
from ppl_lm.criticism.reward_frontier import reward_kl_frontier, rewards
from ppl_lm.infer.draws import Draws
from ppl_lm.plot.style import CYCLE, GREY, SMALL, axes, number, with_notes
from ppl_lm.plot.untrusted import plain


def frontier(
    prior: Draws,
    points: Mapping[str, tuple[float | None, float | None, float | None, float | None]] | None = None,
    ax: Axes | None = None,
    betas: Sequence[float] | None = None,
) -> Axes:
    """The most reward that any law can have at a KL from the prior: E[reward] against KL(p_β ‖ prior) of p_β ∝ p0 exp(r/β),
    mean over prompts, with two standard errors, see `reward_kl_frontier`.

    :param prior: draws of the prior, `importance(model, None, ...)`, with the record `reward`.
    :param points: name -> (KL from the prior, its SE, E[reward], its SE), nats and the reward's unit: how guides do;
        None where it is not known.
    :param betas: temperatures to mark on the curve.
    :raises ValueError: if the draws are not the prior's or have no reward."""
    ax, notes = axes(ax), []
    reward = rewards(prior)
    spread = float(reward.std(0).max()) if len(reward) > 1 else 0.0
    if not bool(reward.isfinite().all()):
        notes.append("some rewards are not finite: no curve")
    elif len(reward) < MIN_MEANS:
        notes.append(f"{len(reward)} draws of the prior are too few for a curve: at least {MIN_MEANS} are needed")
    elif spread == 0:
        notes.append("every draw of the prior has the same reward: there is nothing to trade")
    else:
        curve = reward_kl_frontier(prior, (spread * torch.logspace(2, -3, 300, dtype=torch.float64)).tolist())
        kl, value, se, _ = curve[:, curve[3] >= MIN_MEANS].cpu().numpy()
        ax.fill_between(kl, value - 2 * se, value + 2 * se, color=GREY, alpha=0.3, linewidth=0)
        ax.plot(kl, value, color="black", label=r"best at each KL: $p_β ∝ p_0\,\exp(r/β)$ ± 2 SE")
        for beta in betas or ():
            x, y, _, ess = reward_kl_frontier(prior, [beta])[:, 0].tolist()
            if ess < MIN_MEANS:
                notes.append(f"β = {beta:g} is out of reach of {len(reward)} draws (ESS {ess:.0f})")
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
    return with_notes(ax, notes)
