"""`report`: a run as one page: the verdict first, then what was asked, texts side by side, plots, figures, and how to repeat
it."""

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import networkx

from ppl_lm.diagnose import figures as words
from ppl_lm.diagnose.draw_graphs import draw_model
from ppl_lm.diagnose.draw_tree import draw_prefix_tree
from ppl_lm.diagnose.evidence import log_evidence
from ppl_lm.diagnose.frontier import plot_frontier
from ppl_lm.diagnose.page import picture, pm, render, rows, shown
from ppl_lm.diagnose.plots import number, plot_evidence, plot_sbc, plot_training
from ppl_lm.diagnose.prefix_tree import prefix_tree
from ppl_lm.diagnose.sbc import sbc
from ppl_lm.diagnose.summary import exact_among
from ppl_lm.diagnose.tail import plot_weight_tail
from ppl_lm.diagnose.verdict import GOOD_NATS, GOOD_SHARE
from ppl_lm.diagnose.weights import khat_threshold
from ppl_lm.infer import Draws

PROMPTS = 3  # of which trees and tails are drawn
RANKED = 19  # draws among which an exact one is ranked, if there are so many
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


@dataclass(frozen=True)
class Run:
    """A run, as its folder holds it.

    :param asked: `config.json`: `settings`, `sources`, `graph`, `command`, `versions`.
    :param diagnosis: `diagnosis.json`, of a fit or of draws.
    :param draws: the guide's, or whatever a sampler made.
    :param prior: those of the prior beside them, as `Diagnosis.prior` has them; None of a sampler's.
    :param samples: as `samples` gives them.
    :param fit: `fit.json`, and `metrics`: `metrics.jsonl`.
    :param hashes: of the prior's weights and of the vocabulary.
    :param others: further diagnoses in the folder, of other prompts or samplers, by name."""

    name: str
    asked: dict[str, Any]
    diagnosis: dict[str, Any]
    draws: Draws
    prior: Draws | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    fit: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    others: dict[str, dict[str, Any]] = field(default_factory=dict)


def report(run: Run) -> str:
    """The page, HTML. Text of the model, the reward and the user is escaped; nothing is fetched, and no script can run."""
    made, settings = run.diagnosis, run.asked["settings"]
    fitted = "kl_prior_p" in made
    return render(
        "report.html",
        run=run,
        settings=settings,
        made=made,
        remedy=made.get("remedy", ""),
        label=(LABELS if fitted else OF_DRAWS)[made["verdict"]],
        formula=formula(run.asked["sources"].get("model")),
        graph=_graph(run.asked.get("graph")),
        distances=_distances(made) if fitted else [],
        tables=_tables(made, fitted),
        variety=_variety(made.get("diversity")),
        plots=_plots(run) if fitted else [_tail(run.draws, 0)],
        places=_places(run) if fitted else [],
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
    limit = max(GOOD_SHARE * values[prior][0], GOOD_NATS)
    longest = max([v for v, _ in values.values() if math.isfinite(v)], default=1.0)
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
    if not fitted:
        return [("What the draws say", rows(made, words.DRAWN))]
    titles = ("Distances", "Evidence", "Reward", "Weights and draws")
    tables = (words.DISTANCES, words.BRACKET, words.REWARDS, words.WEIGHTS)
    return [(title, found) for title, table in zip(titles, tables, strict=True) if (found := rows(made, table))]


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


def _plots(run: Run) -> list[dict[str, str]]:
    made, prior = run.diagnosis, run.prior
    assert prior is not None
    bracket = f"ELBO {pm(made['elbo'], made['elbo_se'])}, log Z {pm(made['log_z'], made['log_z_se'])}"
    bracket += f", EUBO {pm(made['upper'], made['upper_se'])} nats"
    pictures = [
        picture(
            lambda: plot_training(run.metrics, made) if run.metrics else None,
            f"The ELBO by step of fitting, and the evidence bracket at its end: {bracket}.",
            "Training: each step's ELBO, and at the end the bracket of the guide that was kept. The gap below log Z is "
            "KL(guide ‖ posterior), the gap above KL(posterior ‖ guide).",
        ),
        picture(
            lambda: plot_evidence({"prior": _evidence(prior, prior), "guide": made}),
            f"The evidence bracket of the prior and of the guide: {bracket}.",
            "The evidence from both sides, by the prior as it was and by the guide. The narrower, the closer.",
        ),
    ]
    if "reward" in made:
        beta = run.asked["settings"]["beta"]
        pictures.append(
            picture(
                lambda: plot_frontier(prior, points(made), betas=[2 * beta, beta, beta / 2]),
                f"Reward against KL from the prior: the guide has {pm(made['reward'])} at {pm(made['kl_q_prior'])} nats, the "
                f"posterior {pm(made['reward_posterior'])} at {pm(made['kl_p_prior'])} nats.",
                "Reward against distance from the prior. No law can be above the curve; the posterior lies on it.",
            )
        )
    return pictures


def points(made: Mapping[str, Any]) -> dict[str, tuple[float, float, float, float]]:
    """For `plot_frontier`: KL from the prior and reward, each with its error, of the guide and of the posterior."""
    keys = {"guide": ("kl_q_prior", "reward"), "posterior": ("kl_p_prior", "reward_posterior")}
    return {
        name: (number(made[x]), number(made[f"{x}_se"]), number(made[y]), number(made[f"{y}_se"]))
        for name, (x, y) in keys.items()
    }


def _evidence(draws: Draws, prior: Draws) -> Any:
    """The bracket with the prior for a guide; of several prompts each with its exact draws, averaged."""
    parts = []
    for b in range(prior.log_guide.shape[-1]):
        exact = exact_among(prior.of_prompt(b))
        own = None if exact is None else replace(exact, log_guide=exact.log_prior)
        parts.append(log_evidence(draws.of_prompt(b), own))
    mean = {}
    for key in ("elbo", "iwae", "log_z", "iwae_upper", "upper"):
        mean[key] = sum(float(getattr(p, key)) for p in parts) / len(parts)
        mean[f"{key}_se"] = math.hypot(*(float(getattr(p, f"{key}_se")) for p in parts)) / len(parts)
    return mean | {"upper_exact": all(p.upper_exact for p in parts), "num_samples": prior.num_samples}


def _places(run: Run) -> list[dict[str, Any]]:
    """Of each of the first prompts: where mass moved, the tail of the weights, the ranks."""
    prior, guide = run.prior, run.draws
    assert prior is not None
    made = []
    for b, figures in list(enumerate(run.diagnosis["prompts"]))[:PROMPTS]:
        exact = exact_among(prior.of_prompt(b))
        tree = partial(_tree, prior.of_prompt(b), guide.of_prompt(b), exact)
        kind = "exact posterior draws" if exact is not None else "the guide's draws, weighted"
        pictures = [
            picture(
                tree,
                "A tree of the texts' beginnings: the share of each under the prior, and under the posterior.",
                f"Where the mass of texts moved: the posterior by {kind}.",
            ),
            _tail(guide, b),
            picture(
                partial(_ranks, exact, guide.of_prompt(b)),
                "The ECDF of the ranks of exact posterior draws among the guide's, less the uniform's.",
                "Calibration of the guide's own draws: ranks of exact posterior draws among them. Inside the band, nothing "
                "tells them apart.",
            ),
        ]
        made.append({"prompt": figures["prompt"], "pictures": pictures})
    return made


def _tree(prior: Draws, guide: Draws, exact: Draws | None) -> Any:
    return draw_prefix_tree(prefix_tree(prior, guide, exact or guide, max_nodes=24, min_mass=0.02))


def _tail(draws: Draws, b: int) -> dict[str, str]:
    return picture(
        lambda: plot_weight_tail(draws.of_prompt(b)),
        "The tail of the importance weights, on two logarithmic axes, with the generalised Pareto that fits it.",
        "The tail of the weights: a power law is a straight line, and the flatter it falls the less can averages by weights be "
        "trusted.",
    )


def _ranks(exact: Draws | None, guide: Draws) -> Any:
    if exact is None:
        raise ValueError("there are too few exact posterior draws to rank")
    count = min(exact.num_samples, max(20, guide.num_samples // RANKED))
    few = exact.map(lambda v: v[:, :count])
    ranked = max(1, min(RANKED, guide.num_samples // count))
    return plot_sbc(sbc(few, guide, ranked, statistics=lambda d: {"log_q": d.log_guide}))


def _graph(data: Any) -> dict[str, str] | None:
    if data is None:
        return None

    def draw() -> Any:
        graph = networkx.node_link_graph(data, edges="edges")
        for _, node in graph.nodes(data=True):
            node["plates"] = tuple(node["plates"])
        return draw_model(graph)

    sites = ", ".join(f"{node['id']} ({node['kind']})" for node in data["nodes"])
    alt = f"The program's sites and what depends on what: {shown(sites)}."
    return picture(draw, alt, "The program as a graph: filled sites are observed, dashed ones computed.")


def _texts(draws: Draws) -> list[dict[str, Any]]:
    """Of draws without a fit beside them: the first of each prompt, as they come."""
    made = []
    for b, texts in list(enumerate(draws.text()))[:PROMPTS]:
        reward = draws.records.get("reward")
        values = [None] * len(texts) if reward is None else reward.flatten(0, 1)[:, b].tolist()
        log_w = draws.log_weight.flatten(0, 1)[:, min(b, draws.log_weight.shape[-1] - 1)].tolist()
        kept = [
            {"tokens": [text], "gains": None, "reward": r}
            | ({} if draws.exact or draws.markov else {"log_weight": w if math.isfinite(w) else None})
            for text, r, w in list(zip(texts, values, log_w, strict=True))[:16]
        ]
        made.append({"prompt": draws.prompts.texts[b], "exact": draws.exact, "draws": kept})
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
        "ess": pm(made.get("ess")),
        "of": str(made["num_samples"]),
        "sentence": made["sentence"],
    }


def _cost(run: Run) -> list[tuple[str, str]]:
    made, found = run.diagnosis, []
    if run.fit is not None and "steps" in run.fit:
        tokens = sum(row["lm_tokens"] for row in run.metrics)
        found.append(("fitting", f"{run.fit['steps']:,} steps in {run.fit['seconds']:.0f} s, {tokens:,} LM tokens"))
    what = "measuring" if run.prior is not None else "drawing"
    found.append((what, f"{made['lm_tokens']:,} LM tokens, {made['reward_calls']:,} reward calls"))
    return found
