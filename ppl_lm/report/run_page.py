"""`report`: a run as one page: the verdict first, then what was asked, texts side by side, plots, figures, and how to repeat
it."""

import ast
import math
from collections.abc import Sequence
from typing import Any

from ppl_lm.criticism.diagnoses.figures import GuideFigures, PromptFigures
from ppl_lm.criticism.diagnoses.side_by_side import recorded, some
from ppl_lm.criticism.diagnoses.verdicts import COVER, doubt, good_limit
from ppl_lm.criticism.weights import khat_threshold
from ppl_lm.infer.draws import EQUAL, Draws
from ppl_lm.report import words
from ppl_lm.report.page import pm, render, rows, shown
from ppl_lm.report.pictures import places, plots, program, tail
from ppl_lm.run.fitting.loop import Fit
from ppl_lm.run.run_record import FittedRun, SampledRun
from ppl_lm.run.typed_diagnosis import DrawsDiagnosis, GuideDiagnosis

PROMPTS, TEXTS = 3, 16  # that are shown of draws without a fit
GUIDE_LABELS = {  # of verdicts on guides, in words
    "good": "Close to the posterior",
    "poor": "Still some way off",
    "collapsed": "Collapsed",
    "misses_mass": "Misses part of the posterior",
    "worse_than_prior": "Further off than the prior was",
    "unknown": "Cannot be told from these draws",
}
DRAWS_LABELS = {  # of verdicts on draws
    "exact": "Exact posterior draws",
    "good": "Posterior draws, as they should be used",
    "unknown": "Too few to tell",
    "unreliable": "Not to be relied on",
    "not_converged": "Not converged",
    "impossible": "Impossible",
}


def report(run: FittedRun | SampledRun) -> str:
    """The page, HTML. Text of the model, the reward and the user is escaped; nothing is fetched, and no script can run."""
    return render("report.html", **_shared(run), **(_of_fit(run) if isinstance(run, FittedRun) else _of_sample(run)))


def _shared(run: FittedRun | SampledRun) -> dict[str, Any]:
    diagnosis = run.diagnosis
    return {
        "run": run,
        "diagnosis": diagnosis,
        "verdict": diagnosis.verdict,
        "doubt": doubt(diagnosis.as_json()),
        "formula": formula(run.config.sources.model),
        "graph": program(run.config.graph),
        "others": [_other(name, other) for name, other in run.others.items()],
        "cost": _cost(run),
        "threshold": khat_threshold(diagnosis.average.num_samples),
    }


def _of_fit(run: FittedRun) -> dict[str, Any]:
    diagnosis = run.diagnosis
    return {
        "fitted": True,
        "label": GUIDE_LABELS[diagnosis.verdict.code],
        "distances": bars(diagnosis.average),
        "tables": _guide_tables(diagnosis.average),
        "variety": _variety(diagnosis.diversity),
        "plots": plots(run),
        "places": places(run),
        "texts": run.texts,
        "by_prompt": _by_prompt(diagnosis.prompts) if len(diagnosis.prompts) > 1 else [],
    }


def _of_sample(run: SampledRun) -> dict[str, Any]:
    return {
        "fitted": False,
        "label": DRAWS_LABELS[run.diagnosis.verdict.code],
        "distances": [],
        "tables": _draws_tables(run.diagnosis),
        "variety": None,
        "plots": [tail(run.draws, 0)],
        "places": [],
        "texts": _texts(run.draws),
        "by_prompt": [],
    }


def formula(source: str | None) -> str:
    """The first line of a program's docstring, which is its formula; "" where there is none.

    >>> formula('def f(x):\\n    "p(x) ∝ exp(x)"')
    'p(x) ∝ exp(x)'
    """
    if source is None:
        return ""
    try:
        body = ast.parse(source).body[0]
    except (SyntaxError, IndexError):  # a lambda in the middle of a call
        return ""
    documented = isinstance(body, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    return (ast.get_docstring(body) or "").partition("\n")[0] if documented else ""


def bars(average: GuideFigures) -> list[dict[str, Any]]:
    """How far the prior was, how far the guide is, and what would be good; of the measure that the verdict went by."""
    f, hard = average, average.kl_prior_p == math.inf
    before, after = ("kl_p_prior", "kl_p_q") if hard else ("kl_prior_p", "kl_q_p")
    prior, guide = (f.kl_p_prior, f.kl_p_prior_se), (f.kl_p_q, f.kl_p_q_se)
    if not hard:
        prior, guide = (f.kl_prior_p, f.kl_prior_p_se), (f.kl_q_p, f.kl_q_p_se)
    limit = good_limit(prior[0]) * (COVER if hard else 1.0)
    longest = max([limit, *(value for value, _ in (prior, guide) if math.isfinite(value))])
    lines = [
        (words.DISTANCES[before][0], *prior, "prior"),
        (words.DISTANCES[after][0], *guide, "guide"),
        ("a good guide is below", limit, None, "limit"),
    ]
    return [
        {
            "name": name,
            "value": pm(value, se),
            "width": f"{100 * min(1.0, max(0.0, value) / longest):.1f}",
            "kind": kind,
        }
        for name, value, se, kind in lines
        if math.isfinite(value)
    ]


def _guide_tables(average: GuideFigures) -> list[tuple[str, list[dict[str, str]]]]:
    figures = average.as_json()
    tables = {
        "Distances": rows(figures, words.DISTANCES),
        "Evidence": rows(figures, words.BRACKET),
        "Reward": [*rows(figures, words.REWARDS), *_recorded(average)],
        "Weights and draws": rows(figures, words.WEIGHTS),
    }
    if not average.iwae_upper_exact:
        for row in tables["Evidence"]:
            if row["name"] == "reverse IWAE":
                row["meaning"] += "; here only approximate, from the guide's own draws"
    return [(title, lines) for title, lines in tables.items() if lines]


def _recorded(average: GuideFigures) -> list[dict[str, str]]:
    """What else the model records, such as the parts of a sum of rewards."""
    return [
        {"name": f"E[{shown(name)}] of the {law}", "unit": "", "meaning": "", "value": pm(*of_law)}
        for name, m in average.recorded.items()
        for law, of_law in {
            "prior": (m.prior, m.prior_se),
            "guide": (m.guide, m.guide_se),
            "posterior": (m.posterior, m.posterior_se),
        }.items()
    ]


def _draws_tables(diagnosis: DrawsDiagnosis) -> list[tuple[str, list[dict[str, str]]]]:
    """Whatever the model recorded has a mean, too."""
    average = diagnosis.average
    recorded = {name: (f"E[{shown(name)}]", "", "") for name in average.means if name not in words.DRAWS_FIGURES}
    return [("What the draws say", rows(average.as_json(), words.DRAWS_FIGURES | recorded))]


def _variety(diversity: dict[str, dict[str, Any] | None]) -> tuple[list[str], list[dict[str, Any]]] | None:
    """Laws and rows: how varied the texts of each law are."""
    known = {law: figures for law, figures in diversity.items() if figures is not None}
    if not known:
        return None
    body = []
    for key, (name, unit, meaning) in words.VARIETY.items():
        by_law = [rows(figures, {key: (name, unit, meaning)}) for figures in known.values()]
        cells = [lines[0]["value"] if lines else "–" for lines in by_law]
        if set(cells) != {"–"}:
            body.append({"name": name, "unit": unit, "meaning": meaning, "cells": cells})
    return list(known), body


def _texts(draws: Draws) -> list[dict[str, Any]]:
    """Of draws without a fit beside them: the first of each prompt, as they come."""
    shown_texts, few = [], some(draws, TEXTS)
    for b, texts in list(enumerate(few.text()))[:PROMPTS]:
        reward = few.records.get("reward")
        values = [None] * len(texts) if reward is None else reward[0, :, b].tolist()
        log_w = few.log_weight[0, :, min(b, few.log_weight.shape[-1] - 1)].tolist()
        lines = [
            {"tokens": [text], "gains": None, "reward": r, "recorded": recorded(few, s, b)}
            | ({} if draws.kind in EQUAL else {"log_weight": w if math.isfinite(w) else None})
            for s, (text, r, w) in enumerate(zip(texts, values, log_w, strict=True))
        ]
        shown_texts.append({"prompt": draws.prompts.texts[b], "exact": draws.kind == "exact", "draws": lines})
    return shown_texts


def _by_prompt(prompts: Sequence[PromptFigures]) -> list[dict[str, str]]:
    return [
        {
            "prompt": shown(p.prompt),
            "kl_q_p": pm(p.kl_q_p, p.kl_q_p_se),
            "kl_p_q": pm(p.kl_p_q, p.kl_p_q_se),
            "kl_prior_p": pm(p.kl_prior_p, p.kl_prior_p_se),
            "bracket": f"{pm(p.elbo, p.elbo_se)} to {pm(p.upper, p.upper_se)}",
            "reward": pm(p.reward, p.reward_se),
            "verdict": p.verdict,
        }
        for p in prompts
    ]


def _other(name: str, diagnosis: GuideDiagnosis | DrawsDiagnosis) -> dict[str, str]:
    average = diagnosis.average
    return {
        "name": shown(name),
        "verdict": diagnosis.verdict.code,
        "log_z": pm(average.log_z, average.log_z_se),
        "ess": "–" if average.ess is None else f"{average.ess:,.0f}",
        "of": str(average.num_samples),
        "sentence": diagnosis.verdict.sentence,
    }


def _cost(run: FittedRun | SampledRun) -> list[tuple[str, str]]:
    average, lines = run.diagnosis.average, []
    if isinstance(run, FittedRun) and isinstance(run.fit, Fit):
        much = f"{run.fit.steps:,} steps in {run.fit.seconds:.0f} s, {run.fit_tokens:,} LM tokens"
        lines.append(("fitting", much))
    what = "measuring" if isinstance(run, FittedRun) else "drawing"
    return [*lines, (what, f"{average.lm_tokens:,} LM tokens, {average.reward_calls:,} reward calls")]
