"""How runs of SMC went, token by token."""

from matplotlib.axes import Axes

from ppl_lm.infer.draws import Draws
from ppl_lm.plot.style import BLUE, GREY, ORANGE, RED, SKY, axes, legend_below, with_notes

MOST = 40  # runs of which each has a line


def smc_steps(draws: Draws, ax: Axes | None = None) -> Axes:
    """Effective sample size of each run by token, as a share of its texts, with a mark where it was resampled; on the right
    axis log Ẑ so far, nats, which ends at the run's estimate. The last token's also hold the evidence: a fall there alone is
    what no resampling has seen coming.

    :param draws: of `smc` or `conditional_smc`, of one prompt.
    :raises ValueError: on other draws, or several prompts."""
    from matplotlib.ticker import MaxNLocator

    if not {"ess", "resampled", "log_z_increment"} <= draws.stats.keys():
        raise ValueError(f"these draws ({draws.kind}) have no steps; give those of smc or conditional_smc")
    if len(draws.prompts) != 1:
        raise ValueError(f"draws of {len(draws.prompts)} prompts; give one prompt's, draws.of_prompt(b)")
    ax, count = axes(ax), draws.log_guide.shape[1]
    ess, resampled, increment = (
        draws.stats[name][:, 0, 0].cpu().numpy() for name in ("ess", "resampled", "log_z_increment")
    )  # (C, T) each
    share, log_z = ess / count, increment.cumsum(1)
    token, runs = range(1, ess.shape[1] + 1), min(len(ess), MOST)
    right = ax.twinx()
    for run in range(runs):
        first = run == 0
        right.plot(token, log_z[run], color=ORANGE, alpha=0.35, linewidth=0.8, label="log Ẑ so far" if first else None)
        ax.plot(token, share[run], color=SKY, alpha=0.5, linewidth=0.8, label="ESS of a run" if first else None)
        at = resampled[run].nonzero()[0]
        ax.plot(at + 1, share[run][at], "|", color=RED, markersize=7, label="resampled" if first else None)
    ax.plot(token, share.mean(0), color=BLUE, linewidth=2, label=f"mean ESS of {len(ess)} runs")
    ax.axhline(1, color=GREY, linewidth=0.8)
    ax.set_ylim(0, max(1.05, 1.05 * float(share[:runs].max())))
    ax.set_xlabel("token; the last with the evidence")
    ax.set_ylabel(f"effective sample size / {count} texts")
    right.set_ylabel("log Ẑ so far [nats]")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    (left_handles, left_labels), (handles, labels) = (side.get_legend_handles_labels() for side in (ax, right))
    legend_below(ax, [*left_handles, *handles], [*left_labels, *labels])
    notes = [] if runs == len(ess) else [f"lines of the first {runs} of {len(ess)} runs"]
    lost = int((log_z[:, -1] == -float("inf")).sum())
    return with_notes(
        ax, [*notes, *([f"{lost} of {len(ess)} runs have lost all weight: their log Ẑ is -inf"] if lost else [])]
    )
