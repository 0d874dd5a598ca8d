"""`leaderboard`: runs side by side, those of one posterior in one table, closest first, as a page and as rows."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ppl_lm import plot
from ppl_lm.criticism.diagnoses.draws_verdicts import CODES_OF_DRAWS
from ppl_lm.criticism.diagnoses.figures import GuideFigures
from ppl_lm.report.page import picture, pm, render
from ppl_lm.report.pictures import frontier, is_tilted, points
from ppl_lm.run.fitting.loop import Fit
from ppl_lm.run.run_record import FittedRun, Posterior, Run, SampledRun


@dataclass(frozen=True)
class Board:
    """Runs of one posterior.

    :param hard: whether it rules texts out, so that KL(posterior ‖ guide) decides.
    :param fits: closest first: by KL(guide ‖ posterior), or KL(posterior ‖ guide) if `hard`, mean over prompts;
        `worse_than_prior` runs among them, by the guide that was kept.
    :param samples: of samplers, best verdict first, and of one verdict the cheapest effective draw."""

    posterior: Posterior
    hard: bool
    fits: list[FittedRun]
    samples: list[SampledRun]


def boards(runs: Sequence[FittedRun | SampledRun]) -> list[Board]:
    """Runs by posterior, in the order in which each posterior first comes. Two runs have the same one if they have the same
    `Run.posterior`, source of the program and of the reward, prior weights and vocabulary; what the sources call is not
    compared."""
    groups: dict[str, list[FittedRun | SampledRun]] = {}
    for run in runs:
        groups.setdefault(_identity(run), []).append(run)
    return [_board(group) for group in groups.values()]


def _identity(run: Run) -> str:
    sources = run.config.sources
    return json.dumps([asdict(run.posterior), sources.model, sources.reward, run.hashes], sort_keys=True)


def _board(runs: Sequence[FittedRun | SampledRun]) -> Board:
    fits = [run for run in runs if isinstance(run, FittedRun)]
    samples = [run for run in runs if isinstance(run, SampledRun)]
    hard = any(run.diagnosis.hard for run in fits)
    closest_first = sorted(fits, key=lambda run: _distance(run, hard)[0])
    return Board(runs[0].posterior, hard, closest_first, sorted(samples, key=_worth))


def _distance(run: FittedRun, hard: bool) -> tuple[float, float]:
    """Of its guide, the one by which runs are ranked, nats, and its standard error."""
    average = run.diagnosis.average
    return (average.kl_p_q, average.kl_p_q_se) if hard else (average.kl_q_p, average.kl_q_p_se)


def _worth(run: SampledRun) -> tuple[int, float]:
    each = run.diagnosis.average.lm_tokens_per_effective_draw
    return CODES_OF_DRAWS.index(run.diagnosis.verdict.code), each or math.inf


def leaderboard(runs: Sequence[FittedRun | SampledRun]) -> str:
    """The page, HTML; what was said of `report` holds here too."""
    return render(
        "leaderboard.html",
        boards=[
            {"posterior": b.posterior, "fits": fit_rows(b), "samples": sample_rows(b), "plots": _plots(b)}
            for b in boards(runs)
        ],
        commands=[run.config.command for run in runs],
    )


def fit_rows(board: Board) -> list[dict[str, str]]:
    """Of the fits: their figures with errors, and `behind`, how far each is behind the closest."""
    rows = []
    for run in board.fits:
        average = run.diagnosis.average
        rows.append(
            {
                "name": run.name,
                "by": f"{run.settings.objective}, {run.settings.guide}",
                "verdict": run.diagnosis.verdict.code,
                "behind": _behind(board, run),
                "kl_q_p": pm(average.kl_q_p, average.kl_q_p_se),
                "kl_p_q": pm(average.kl_p_q, average.kl_p_q_se),
                "reward": pm(average.reward, average.reward_se),
                "bracket": _bracket(average),
                "khat": pm(average.khat, average.khat_se),
                "ess": f"{average.ess:,.0f} of {average.num_samples:,}",
                "cost": _cost(run),
            }
        )
    return rows


def sample_rows(board: Board) -> list[dict[str, str]]:
    """Of the samplers' draws: what they are worth, and what they cost."""
    rows = []
    for run in board.samples:
        average = run.diagnosis.average
        each, reward = average.lm_tokens_per_effective_draw, average.means.get("reward")
        rows.append(
            {
                "name": run.name,
                "sampler": run.diagnosis.sampler,
                "verdict": run.diagnosis.verdict.code,
                "log_z": pm(average.log_z, average.log_z_se),
                "reward": "–" if reward is None else pm(reward.value, reward.se),
                "ess": "–" if average.ess is None else f"{average.ess:,.0f} of {average.num_samples:,}",
                "each": "–" if each is None else f"{each:,.0f}",
                "calls": f"{average.reward_calls:,}",
            }
        )
    return rows


def _behind(board: Board, run: FittedRun) -> str:
    if run is board.fits[0]:
        return "closest"
    (distance, se), (least, least_se) = (_distance(one, board.hard) for one in (run, board.fits[0]))
    gap, error = distance - least, math.hypot(se, least_se)
    return pm(gap, error) + (" (within error)" if gap < 2 * error else "")


def _plots(board: Board) -> list[dict[str, str]]:
    if not board.fits:
        return []
    named = {f"{n + 1}. {run.name}": run for n, run in enumerate(board.fits)}
    pictures = [
        picture(
            lambda: plot.evidence({name: run.diagnosis.average.as_json() for name, run in named.items()}),
            "The evidence bracket of each run; the same figures are in the table above.",
            "The evidence from both sides by each run's guide: the narrower, the closer. The gap below log Z is "
            "KL(guide ‖ posterior).",
        )
    ]
    closest = board.fits[0]
    if is_tilted(closest):
        guides = {name: points(run.diagnosis.average)["guide"] for name, run in named.items()}
        guides["posterior"] = points(closest.diagnosis.average)["posterior"]
        pictures.append(frontier(closest, guides, "each run's guide, and the posterior on the frontier."))
    return pictures


def _bracket(average: GuideFigures) -> str:
    return f"{average.elbo:.2f} ≤ {average.log_z:.2f} ≤ {average.upper:.2f}"


def _cost(run: FittedRun) -> str:
    if not isinstance(run.fit, Fit):
        return "–"
    return f"{run.fit.seconds:.0f} s, {run.fit_tokens / 1e6:.2f} M tokens"
