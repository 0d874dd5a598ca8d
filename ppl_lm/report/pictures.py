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
from ppl_lm.criticism.diagnoses.figures import GuideFigures
from ppl_lm.criticism.diagnoses.pool import pooled
from ppl_lm.criticism.evidence import log_evidence
from ppl_lm.criticism.prefix_trees import prefix_tree
from ppl_lm.infer.draws import Draws
from ppl_lm.plot.style import BOUNDS, number
from ppl_lm.report.page import picture, pm, shown
from ppl_lm.run.run_record import FittedRun

PROMPTS = 3  # of which trees and tails are shown
TREE: Any = {"max_nodes": 24, "min_mass": 0.02}
RANKED = 19  # draws among which an exact one is ranked, if there are so many


def plots(run: FittedRun) -> list[dict[str, str]]:
    """Training, the evidence from both sides, and the frontier where the posterior lies on it."""
    average = run.diagnosis.average
    bracket = f"ELBO {pm(average.elbo, average.elbo_se)}, log Z {pm(average.log_z, average.log_z_se)}"
    bracket += f", EUBO {pm(average.upper, average.upper_se)} nats"
    pictures = [
        picture(
            lambda: plot.training(run.metrics, average.as_json()) if run.metrics else None,
            f"The ELBO by step of fitting, and the evidence bracket at its end: {bracket}.",
            "Training: each step's ELBO, and at the end the bracket of the guide that was kept. The gap below log Z is "
            "KL(guide ‖ posterior), the gap above KL(posterior ‖ guide).",
        ),
        picture(
            lambda: plot.evidence({"prior": _evidence(run.prior, average), "guide": average.as_json()}),
            f"The evidence bracket of the prior and of the guide: {bracket}.",
            "The evidence from both sides, by the prior as it was and by the guide. The narrower, the closer.",
        ),
    ]
    if is_tilted(run):
        text = f"the guide has {pm(average.reward)} at {pm(average.kl_q_prior)} nats, the posterior "
        text += f"{pm(average.reward_posterior)} at {pm(average.kl_p_prior)} nats."
        pictures.append(frontier(run, points(average), text))
    return pictures


def is_tilted(run: FittedRun) -> bool:
    """Whether the posterior is p0 exp(r/β)/Z, so that it lies on the frontier: on the prior's draws the log likelihood is the
    reward over β, up to a constant."""
    beta, prior = run.posterior.beta, run.prior
    if "reward" not in prior.records or beta is None:
        return False
    rest = prior.log_likelihood - prior["reward"].double() / beta
    return bool(rest.isfinite().all()) and float(rest.max() - rest.min()) < 1e-3


def frontier(run: FittedRun, laws: Mapping[str, tuple[float, float, float, float]], text: str) -> dict[str, str]:
    """`plot.frontier` with the prior of a run `is_tilted`, and β, its double and its half marked.

    :param laws: their points, by name; `text`: the same in words."""
    beta = run.posterior.beta
    assert beta is not None
    return picture(
        lambda: plot.frontier(run.prior, laws, betas=[2 * beta, beta, beta / 2]),
        f"Reward against KL from the prior: {text}",
        "Reward against distance from the prior. No law can be above the curve, and the posterior lies on it; both are "
        "estimates, and the curve ends where the prior's draws no longer show it.",
    )


def points(average: GuideFigures) -> dict[str, tuple[float, float, float, float]]:
    """For `plot.frontier`: KL from the prior and reward, each with its error, of the guide and of the posterior."""
    f = average
    guide = (f.kl_q_prior, f.kl_q_prior_se, number(f.reward), number(f.reward_se))
    posterior = (f.kl_p_prior, f.kl_p_prior_se, number(f.reward_posterior), number(f.reward_posterior_se))
    return {"guide": guide, "posterior": posterior}


def _evidence(prior: Draws, average: GuideFigures) -> dict[str, Any]:
    """The bracket with the prior for a guide; of several prompts averaged. Its bounds by several weights take each prompt's
    exact draws; the others are the distances that the figures tell."""
    parts = []
    for b in range(prior.log_guide.shape[-1]):
        one = prior.of_prompt(b)
        exact = exact_among(one)
        evidence = log_evidence(one, None if exact is None else replace(exact, log_guide=exact.log_prior))
        bounds = {name: float(getattr(evidence, name)) for key in BOUNDS for name in (key, f"{key}_se")}
        parts.append(bounds | {"iwae_upper_exact": evidence.upper_exact, "num_samples": prior.num_samples})
    bracket = {"log_z": average.log_z, "log_z_se": average.log_z_se, "elbo": average.log_z - average.kl_prior_p}
    bracket |= {"upper": average.log_z + average.kl_p_prior, "upper_se": average.kl_p_prior_se}
    return over_prompts(parts, shared=("num_samples",)) | bracket


def places(run: FittedRun) -> list[dict[str, Any]]:
    """Of each of the first prompts: where mass moved, the tail of the weights, the ranks."""
    prior, guide = run.prior, run.draws
    by_prompt, prompts = [], run.diagnosis.prompts
    for b, figures in list(enumerate(prompts))[:PROMPTS]:
        after = f" After the prompt “{shown(figures.prompt)}”." if len(prompts) > 1 else ""
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
            tail(guide, b, after),
            picture(
                partial(_ranks, exact, guide.of_prompt(b)),
                f"The ECDF of the ranks of exact posterior draws among the guide's, less the uniform's.{after}",
                "Calibration of the guide's own draws: ranks of exact posterior draws among them. Inside the band, nothing "
                "tells them apart. Outside of it something does, however little; a good guide is near, not the posterior "
                f"itself.{after}",
            ),
        ]
        by_prompt.append({"prompt": figures.prompt, "trees": trees, "pictures": pictures})
    return by_prompt


def _tree_of_the_posterior(prior: Draws, guide: Draws, exact: Draws | None) -> Any:
    return plot.prefix_tree(prefix_tree(prior, guide, exact or pooled(prior, guide), **TREE))


def _tree_of_the_guide(prior: Draws, guide: Draws) -> Any:
    return plot.prefix_tree(prefix_tree(prior, guide, **TREE))


def tail(draws: Draws, b: int, after: str = "") -> dict[str, str]:
    """:param after: which prompt, number `b`, in words."""
    return picture(
        lambda: plot.weight_tail(draws.of_prompt(b)),
        f"The tail of the importance weights, on two logarithmic axes, with the generalised Pareto that fits it.{after}",
        "The tail of the weights: a power law is a straight line, and the flatter it falls the less can averages by weights be "
        f"trusted.{after}",
    )


def _ranks(exact: Draws | None, guide: Draws) -> Any:
    if exact is None:
        raise ValueError("there are too few exact posterior draws to rank")
    count = min(exact.num_samples, max(20, guide.num_samples // RANKED))
    few = exact.map(lambda v: v[:, :count])
    ranked = max(1, min(RANKED, guide.num_samples // count))
    return plot.calibration(sbc(few, guide, ranked, statistics=lambda d: {"log_q": d.log_guide}))


def program(data: dict[str, Any] | None) -> dict[str, str] | None:
    """The graph of `config.json`; None where there is none."""
    if data is None:
        return None

    def diagram() -> Any:
        graph = networkx.node_link_graph(data, edges="edges")
        for _, node in graph.nodes(data=True):
            node["plates"] = tuple(node["plates"])
        return plot.model(graph)

    sites = ", ".join(f"{node['id']} ({node['kind']})" for node in data["nodes"])
    alt = f"The program's sites and what depends on what: {shown(sites)}."
    return picture(diagram, alt, "The program as a graph: filled sites are observed, dashed ones computed.")
