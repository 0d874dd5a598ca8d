"""The pictures of a run, as its pages show them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import networkx

from ppl_lm import plot
from ppl_lm.criticism.averages import over_prompts
from ppl_lm.criticism.calibration import sbc
from ppl_lm.criticism.diagnoses.diagnosis import exact_among
from ppl_lm.criticism.diagnoses.pool import pooled
from ppl_lm.criticism.evidence import log_evidence
from ppl_lm.criticism.prefix_trees import prefix_tree
from ppl_lm.infer.draws import Draws
from ppl_lm.plot.style import BOUNDS, number
from ppl_lm.report.page import picture, pm, shown
from ppl_lm.run.record import Run

PROMPTS = 3  # of which trees and tails are drawn
TREE: Any = {"max_nodes": 24, "min_mass": 0.02}
RANKED = 19  # draws among which an exact one is ranked, if there are so many


def plots(run: Run) -> list[dict[str, str]]:
    made, prior = run.diagnosis, run.prior
    assert prior is not None
    bracket = f"ELBO {pm(made['elbo'], made['elbo_se'])}, log Z {pm(made['log_z'], made['log_z_se'])}"
    bracket += f", EUBO {pm(made['upper'], made['upper_se'])} nats"
    pictures = [
        picture(
            lambda: plot.training(run.metrics, made) if run.metrics else None,
            f"The ELBO by step of fitting, and the evidence bracket at its end: {bracket}.",
            "Training: each step's ELBO, and at the end the bracket of the guide that was kept. The gap below log Z is "
            "KL(guide ‖ posterior), the gap above KL(posterior ‖ guide).",
        ),
        picture(
            lambda: plot.evidence({"prior": _evidence(prior), "guide": made}),
            f"The evidence bracket of the prior and of the guide: {bracket}.",
            "The evidence from both sides, by the prior as it was and by the guide. The narrower, the closer.",
        ),
    ]
    if is_tilted(run):
        text = f"the guide has {pm(made['reward'])} at {pm(made['kl_q_prior'])} nats, the posterior "
        text += f"{pm(made['reward_posterior'])} at {pm(made['kl_p_prior'])} nats."
        pictures.append(frontier(run, points(made), text))
    return pictures


def is_tilted(run: Run) -> bool:
    """Whether the posterior is p0 exp(r/β)/Z, so that it lies on the frontier: on the prior's draws the log likelihood is the
    reward over β, up to a constant."""
    beta, prior = run.posterior["beta"], run.prior
    if prior is None or "reward" not in prior.records or beta is None:
        return False
    rest = prior.log_likelihood - prior["reward"].double() / beta
    return bool(rest.isfinite().all()) and float(rest.max() - rest.min()) < 1e-3


def frontier(run: Run, found: Mapping[str, tuple[float, float, float, float]], text: str) -> dict[str, str]:
    """`plot.frontier` with the run's prior, and β, its double and its half marked.

    :param text: the points in words."""
    beta, prior = run.posterior["beta"], run.prior
    assert prior is not None
    return picture(
        lambda: plot.frontier(prior, found, betas=[2 * beta, beta, beta / 2]),
        f"Reward against KL from the prior: {text}",
        "Reward against distance from the prior. No law can be above the curve, and the posterior lies on it; both are "
        "estimates, and the curve ends where the prior's draws no longer show it.",
    )


def points(made: Mapping[str, Any]) -> dict[str, tuple[float, float, float, float]]:
    """For `plot.frontier`: KL from the prior and reward, each with its error, of the guide and of the posterior."""
    keys = {"guide": ("kl_q_prior", "reward"), "posterior": ("kl_p_prior", "reward_posterior")}
    return {
        name: (number(made[x]), number(made[f"{x}_se"]), number(made[y]), number(made[f"{y}_se"]))
        for name, (x, y) in keys.items()
    }


def _evidence(prior: Draws) -> Any:
    """The bracket with the prior for a guide; of several prompts each with its exact draws, averaged."""
    parts = []
    for b in range(prior.log_guide.shape[-1]):
        one = prior.of_prompt(b)
        exact = exact_among(one)
        found = log_evidence(one, None if exact is None else replace(exact, log_guide=exact.log_prior))
        bounds = {name: float(getattr(found, name)) for key in BOUNDS for name in (key, f"{key}_se")}
        parts.append(bounds | {"upper_exact": found.upper_exact, "num_samples": prior.num_samples})
    return over_prompts(parts, shared=("num_samples",))


def places(run: Run) -> list[dict[str, Any]]:
    """Of each of the first prompts: where mass moved, the tail of the weights, the ranks."""
    prior, guide = run.prior, run.draws
    assert prior is not None
    made, prompts = [], run.diagnosis["prompts"]
    for b, figures in list(enumerate(prompts))[:PROMPTS]:
        of = f" After the prompt “{shown(figures['prompt'])}”." if len(prompts) > 1 else ""
        exact = exact_among(prior.of_prompt(b))
        both = prior.of_prompt(b), guide.of_prompt(b)
        kind = "exact posterior draws" if exact is not None else "draws of prior and guide, weighted"
        trees = [
            picture(
                partial(_tree_of_the_posterior, *both, exact),
                "A tree of the texts' beginnings: the share of each under the prior, and under the posterior.",
                f"Where the mass of texts should go: the posterior by {kind}.",
            ),
            picture(
                partial(_tree_of_the_guide, *both),
                "A tree of the texts' beginnings: the share of each under the prior, and under the guide.",
                "Where the guide has put it.",
            ),
        ]
        pictures = [
            tail(guide, b, of),
            picture(
                partial(_ranks, exact, guide.of_prompt(b)),
                f"The ECDF of the ranks of exact posterior draws among the guide's, less the uniform's.{of}",
                "Calibration of the guide's own draws: ranks of exact posterior draws among them. Inside the band, nothing "
                "tells them apart. Outside of it something does, however little; a good guide is near, not the posterior "
                f"itself.{of}",
            ),
        ]
        made.append({"prompt": figures["prompt"], "trees": trees, "pictures": pictures})
    return made


def _tree_of_the_posterior(prior: Draws, guide: Draws, exact: Draws | None) -> Any:
    return plot.prefix_tree(prefix_tree(prior, guide, exact or pooled(prior, guide), **TREE))


def _tree_of_the_guide(prior: Draws, guide: Draws) -> Any:
    return plot.prefix_tree(prefix_tree(prior, guide, **TREE))


def tail(draws: Draws, b: int, of: str = "") -> dict[str, str]:
    return picture(
        lambda: plot.weight_tail(draws.of_prompt(b)),
        f"The tail of the importance weights, on two logarithmic axes, with the generalised Pareto that fits it.{of}",
        "The tail of the weights: a power law is a straight line, and the flatter it falls the less can averages by weights be "
        f"trusted.{of}",
    )


def _ranks(exact: Draws | None, guide: Draws) -> Any:
    if exact is None:
        raise ValueError("there are too few exact posterior draws to rank")
    count = min(exact.num_samples, max(20, guide.num_samples // RANKED))
    few = exact.map(lambda v: v[:, :count])
    ranked = max(1, min(RANKED, guide.num_samples // count))
    return plot.calibration(sbc(few, guide, ranked, statistics=lambda d: {"log_q": d.log_guide}))


def program(data: Any) -> dict[str, str] | None:
    if data is None:
        return None

    def draw() -> Any:
        graph = networkx.node_link_graph(data, edges="edges")
        for _, node in graph.nodes(data=True):
            node["plates"] = tuple(node["plates"])
        return plot.model(graph)

    sites = ", ".join(f"{node['id']} ({node['kind']})" for node in data["nodes"])
    alt = f"The program's sites and what depends on what: {shown(sites)}."
    return picture(draw, alt, "The program as a graph: filled sites are observed, dashed ones computed.")
