"""`leaderboard`: runs side by side, those of one posterior in one table, closest first, as a page and as rows."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ppl_lm import plot
from ppl_lm.criticism.diagnoses.draws_verdicts import CODES_OF_DRAWS
from ppl_lm.plot.style import number
from ppl_lm.report.page import picture, pm, render
from ppl_lm.report.pictures import frontier, is_tilted, points
from ppl_lm.run.record import Run


@dataclass(frozen=True)
class Board:
    """Runs of one posterior.

    :param settings: `Run.posterior` of each of them.
    :param fits: closest first: by KL(guide ‖ posterior), or KL(posterior ‖ guide) under a hard constraint (`hard`), mean over
        prompts; `worse_than_prior` runs among them, by the guide that was kept.
    :param draws: of samplers, best verdict first, and of one verdict the cheapest effective draw."""

    settings: dict[str, Any]
    hard: bool
    fits: list[Run]
    draws: list[Run]


def boards(runs: Sequence[Run]) -> list[Board]:
    """Runs by posterior, in the order in which each posterior first comes. Two runs have the same one if they have the same
    `Run.posterior`, source of the program and of the reward, prior weights and vocabulary; what the sources call is not
    compared."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        sources = {name: run.asked["sources"][name] for name in ("model", "reward")}
        groups.setdefault(json.dumps([run.posterior, sources, run.hashes], sort_keys=True), []).append(run)
    made = []
    for group in groups.values():
        fits = [run for run in group if run.prior is not None]
        hard = any(run.diagnosis["kl_prior_p"] == math.inf for run in fits)
        key = "kl_p_q" if hard else "kl_q_p"
        fits.sort(key=lambda run: run.diagnosis[key])
        draws = sorted((run for run in group if run.prior is None), key=_worth)
        made.append(Board(group[0].posterior, hard, fits, draws))
    return made


def _worth(run: Run) -> tuple[int, float]:
    each = run.diagnosis["lm_tokens_per_effective_draw"]
    return CODES_OF_DRAWS.index(run.diagnosis["verdict"]), each or math.inf


def leaderboard(runs: Sequence[Run]) -> str:
    """The page, HTML; what was said of `report` holds here too."""
    found = boards(runs)
    return render(
        "leaderboard.html",
        boards=[{"settings": b.settings, "fits": rows(b), "draws": drawn_rows(b), "plots": _plots(b)} for b in found],
        commands=[run.asked["command"] for run in runs],
    )


def rows(board: Board) -> list[dict[str, str]]:
    """Of the fits: their figures with errors, and `behind`, how far each is behind the closest."""
    key, made = "kl_p_q" if board.hard else "kl_q_p", []
    for run in board.fits:
        d, best = run.diagnosis, board.fits[0].diagnosis
        gap = number(d[key]) - number(best[key])
        error = math.hypot(number(d[f"{key}_se"]), number(best[f"{key}_se"]))
        behind = "closest" if run is board.fits[0] else pm(gap, error) + (" (within error)" if gap < 2 * error else "")
        made.append(
            {
                "name": run.name,
                "by": f"{run.asked['settings']['objective']}, {run.asked['settings']['guide']}",
                "verdict": d["verdict"],
                "behind": behind,
                **{k: pm(d.get(k), d.get(f"{k}_se")) for k in ("kl_q_p", "kl_p_q", "reward")},
                "bracket": _bracket(d),
                "khat": pm(d["khat"], d.get("khat_se")),
                "ess": f"{d['ess']:,.0f} of {d['num_samples']:,}",
                "cost": _cost(run),
            }
        )
    return made


def drawn_rows(board: Board) -> list[dict[str, str]]:
    return [
        {
            "name": run.name,
            "sampler": d.get("sampler", ""),
            "verdict": d["verdict"],
            "log_z": pm(d["log_z"], d["log_z_se"]),
            "reward": pm(d.get("reward"), d.get("reward_se")),
            "ess": "–" if d["ess"] is None else f"{d['ess']:,.0f} of {d['num_samples']:,}",
            "each": "–" if each is None else f"{each:,.0f}",
            "calls": f"{d['reward_calls']:,}",
        }
        for run in board.draws
        for d, each in [(run.diagnosis, run.diagnosis["lm_tokens_per_effective_draw"])]
    ]


def _plots(board: Board) -> list[dict[str, str]]:
    if not board.fits:
        return []
    named = {f"{n + 1}. {run.name}": run for n, run in enumerate(board.fits)}
    made = [
        picture(
            lambda: plot.evidence({name: run.diagnosis for name, run in named.items()}),
            "The evidence bracket of each run; the same figures are in the table above.",
            "The evidence from both sides by each run's guide: the narrower, the closer. The gap below log Z is "
            "KL(guide ‖ posterior).",
        )
    ]
    if is_tilted(board.fits[0]):
        found = {name: points(run.diagnosis)["guide"] for name, run in named.items()}
        found["posterior"] = points(board.fits[0].diagnosis)["posterior"]
        made.append(frontier(board.fits[0], found, "each run's guide, and the posterior on the frontier."))
    return made


def _bracket(d: dict[str, Any]) -> str:
    low, middle, high = (f"{number(d[key]):.2f}" for key in ("elbo", "log_z", "upper"))
    return f"{low} ≤ {middle} {'≤' if d['upper_exact'] else '≲'} {high}"


def _cost(run: Run) -> str:
    if run.fit is None or "steps" not in run.fit:
        return "–"
    return f"{run.fit['seconds']:.0f} s, {run.fit_tokens / 1e6:.2f} M tokens"
