"""`report`: a run as one page: the verdict first, then what was asked, texts side by side, plots, figures, and how to repeat
it."""

import ast
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ppl_lm.criticism.diagnoses.side_by_side import some
from ppl_lm.criticism.diagnoses.verdicts import COVER, doubt, good_limit
from ppl_lm.criticism.weights import khat_threshold
from ppl_lm.infer.draws import Draws
from ppl_lm.plot.style import number
from ppl_lm.report import words
from ppl_lm.report.page import pm, render, rows, shown
from ppl_lm.report.pictures import places, plots, program, tail
from ppl_lm.run.record import Run

PROMPTS, TEXTS = 3, 16  # that are shown of draws without a fit
LABELS = {  # of verdicts on guides, in words
    "good": "Close to the posterior",
    "poor": "Still some way off",
    "collapsed": "Collapsed",
    "misses_mass": "Misses part of the posterior",
    "worse_than_prior": "Further off than the prior was",
    "unknown": "Cannot be told from these draws",
}
OF_DRAWS = {  # of verdicts on draws
    "exact": "Exact posterior draws",
    "good": "Posterior draws, as they should be used",
    "unknown": "Too few to tell",
    "unreliable": "Not to be relied on",
    "not_converged": "Not converged",
    "impossible": "Impossible",
}


def report(run: Run) -> str:
    """The page, HTML. Text of the model, the reward and the user is escaped; nothing is fetched, and no script can run."""
    made, fitted = run.diagnosis, run.prior is not None
    return render(
        "report.html",
        run=run,
        fitted=fitted,
        settings=run.asked["settings"] | run.posterior,
        made=made,
        remedy=made.get("remedy", ""),
        doubt=doubt(made),
        label=(LABELS if fitted else OF_DRAWS)[made["verdict"]],
        formula=formula(run.asked["sources"]["model"]),
        graph=program(run.asked["graph"]),
        distances=_distances(made) if fitted else [],
        tables=_tables(made, fitted),
        variety=_variety(made.get("diversity")),
        plots=plots(run) if fitted else [tail(run.draws, 0)],
        places=places(run) if fitted else [],
        texts=run.samples or _texts(run.draws),
        by_prompt=_by_prompt(made["prompts"]) if fitted and len(made["prompts"]) > 1 else [],
        others=[_other(name, other) for name, other in run.others.items()],
        cost=_cost(run),
        threshold=khat_threshold(made["num_samples"]),
    )


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


def _distances(made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bars: how far the prior was, how far the guide is, and what would be good; of the measure that the verdict went by."""
    hard = made["kl_prior_p"] == math.inf
    prior, guide = ("kl_p_prior", "kl_p_q") if hard else ("kl_prior_p", "kl_q_p")
    values = {name: (number(made[name]), number(made[f"{name}_se"])) for name in (prior, guide)}
    limit = good_limit(values[prior][0]) * (COVER if hard else 1.0)
    longest = max([limit, *(v for v, _ in values.values() if math.isfinite(v))])
    bars = [
        (words.DISTANCES[prior][0], *values[prior], "prior"),
        (words.DISTANCES[guide][0], *values[guide], "guide"),
        ("a good guide is below", limit, None, "limit"),
    ]
    return [
        {
            "name": name,
            "value": pm(value, se),
            "width": f"{100 * min(1.0, max(0.0, value) / longest):.1f}",
            "kind": kind,
        }
        for name, value, se, kind in bars
        if math.isfinite(value)
    ]


def _tables(made: Mapping[str, Any], fitted: bool) -> list[tuple[str, list[dict[str, str]]]]:
    if not fitted:  # whatever the model recorded has a mean, too
        taken = [k for k in made if f"{k}_se" in made and k not in words.DRAWN]
        return [("What the draws say", rows(made, words.DRAWN | {k: (f"E[{shown(k)}]", "", "") for k in taken}))]
    titles = ("Distances", "Evidence", "Reward", "Weights and draws")
    tables = (words.DISTANCES, words.BRACKET, words.REWARDS, words.WEIGHTS)
    made = dict(zip(titles, (rows(made, table) for table in tables), strict=True)) | {"exact": made["upper_exact"]}
    if not made.pop("exact"):
        for row in made["Evidence"]:
            if row["name"] in ("EUBO", "reverse IWAE"):
                row["meaning"] += "; here only approximate, from the guide's own draws"
    return [(title, found) for title, found in made.items() if found]


def _variety(found: Mapping[str, Any] | None) -> tuple[list[str], list[dict[str, Any]]] | None:
    """Laws and rows: how varied the texts of each law are."""
    known = {law: made for law, made in (found or {}).items() if made is not None}
    if not known:
        return None
    body = []
    for key, (name, unit, meaning) in words.VARIETY.items():
        of = {law: rows(made, {key: (name, unit, meaning)}) for law, made in known.items()}
        cells = [row[0]["value"] if row else "–" for row in of.values()]
        if set(cells) != {"–"}:
            body.append({"name": name, "unit": unit, "meaning": meaning, "cells": cells})
    return list(known), body


def _texts(draws: Draws) -> list[dict[str, Any]]:
    """Of draws without a fit beside them: the first of each prompt, as they come."""
    made, few = [], some(draws, TEXTS)
    for b, texts in list(enumerate(few.text()))[:PROMPTS]:
        reward = few.records.get("reward")
        values = [None] * len(texts) if reward is None else reward[0, :, b].tolist()
        log_w = few.log_weight[0, :, min(b, few.log_weight.shape[-1] - 1)].tolist()
        kept = [
            {"tokens": [text], "gains": None, "reward": r}
            | ({} if draws.kind in ("exact", "chains") else {"log_weight": w if math.isfinite(w) else None})
            for text, r, w in zip(texts, values, log_w, strict=True)
        ]
        made.append({"prompt": draws.prompts.texts[b], "exact": draws.kind == "exact", "draws": kept})
    return made


def _by_prompt(prompts: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "prompt": shown(p["prompt"]),
            "kl_q_p": pm(p["kl_q_p"], p["kl_q_p_se"]),
            "kl_p_q": pm(p["kl_p_q"], p["kl_p_q_se"]),
            "kl_prior_p": pm(p["kl_prior_p"], p["kl_prior_p_se"]),
            "bracket": f"{pm(p['elbo'], p['elbo_se'])} to {pm(p['upper'], p['upper_se'])}",
            "reward": pm(p.get("reward"), p.get("reward_se")),
            "verdict": p["verdict"],
        }
        for p in prompts
    ]


def _other(name: str, made: Mapping[str, Any]) -> dict[str, str]:
    return {
        "name": shown(name),
        "verdict": made["verdict"],
        "log_z": pm(made.get("log_z"), made.get("log_z_se")),
        "ess": "–" if made.get("ess") is None else f"{made['ess']:,.0f}",
        "of": str(made["num_samples"]),
        "sentence": made["sentence"],
    }


def _cost(run: Run) -> list[tuple[str, str]]:
    made, found = run.diagnosis, []
    if run.fit is not None and "steps" in run.fit:
        much = f"{run.fit['steps']:,} steps in {run.fit['seconds']:.0f} s, {run.fit_tokens:,} LM tokens"
        found.append(("fitting", much))
    what = "measuring" if run.prior is not None else "drawing"
    found.append((what, f"{made['lm_tokens']:,} LM tokens, {made['reward_calls']:,} reward calls"))
    return found
