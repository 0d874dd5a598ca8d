"""What is put together token by token is not what it is for whole texts: masking by an automaton is not conditioning on it, a
product of language models not the product of their texts, and a low temperature not a power of the prior. Importance weights
make up for the normalisers, with more draws the better (Lew et al. 2023; Loula et al. 2025; Karan and Du 2025)."""

import math
from typing import Any

import networkx
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from ppl_lm.experiments.lab import Result, panels
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import Draws
from ppl_lm.infer.enumeration import enumerate_posterior, kl
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.likelihood.automata import Automaton
from ppl_lm.lm.experts import product
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.table import table_lm
from ppl_lm.lm.vocabulary import Vocabulary
from ppl_lm.models import constrained

COUNTS = (1, 4, 16, 64)  # draws, of which one is picked by its weight
RUNS, PARTICLES = 4000, 16  # of SMC
POWER = 2.0
GRID = 4000  # points of the quadrature
SHOWN = 8  # texts in the figure
AUTOMATON, TRUTH, TOKENS = "texts of an automaton", "text by text: the truth", "token by token"


def answers(vocabulary: Vocabulary) -> Automaton:
    """Texts that end in b, in which b follows each a."""
    graph = networkx.DiGraph()
    graph.add_edge("other", "other", token="c")
    for node in ("other", "b"):
        graph.add_edge(node, "a", token="a")
    for node in ("other", "a", "b"):
        graph.add_edge(node, "b", token="b")
    graph.add_edge("b", "other", token="c")
    return Automaton.graph(graph, "other", ["b"], vocabulary)


def resampled(log_q: Float[Tensor, "N"], log_w: Float[Tensor, "N"], count: int) -> Float[Tensor, "N"]:
    """log of the law of a text that is picked by its weight from `count` draws of q, nats: q(x) K E[w / (w + Σ w_j)] over
    K - 1 others, with 1 / (w + Σ w_j) as ∫ exp(-s (w + Σ w_j)) ds, and E exp(-s Σ w_j) = (Σ_x q exp(-s w))^(K-1).

    :param log_w: finite where q is not 0; up to a constant."""
    possible = log_q > -torch.inf
    log_w = log_w[possible] - (log_q + log_w)[possible].logsumexp(0)
    u = torch.linspace(float(-log_w.max()) - 37, float(-log_w.min()) + 7, GRID, dtype=torch.float64)  # log s
    decay = -(u + log_w.unsqueeze(-1)).exp()  # (N, grid), -s w
    others = (count - 1) * (log_q[possible].unsqueeze(-1) + decay).logsumexp(0)  # (grid,)
    integral = (decay + others + u).logsumexp(-1) + math.log(float(u[1] - u[0]))
    log_law = torch.full_like(log_q, -torch.inf)
    log_law[possible] = log_q[possible] + log_w + math.log(count) + integral
    return log_law


def picked(draws: Draws, texts: Int[Tensor, "N T"]) -> Float[Tensor, "N"]:
    """log of the law of a text that is picked by its weight from a run, as these runs estimate it, nats."""
    (name,) = draws.texts
    share = draws.log_weight[..., 0].softmax(1).flatten()  # runs that lost every text were refused
    same = (draws.latents[name].flatten(0, 2)[:, None] == texts).all(-1).to(share.dtype)  # (runs · K, N)
    return (share @ same / len(draws.log_weight)).log()


def distances(log_p: Float[Tensor, "N"], log_law: Float[Tensor, "N"]) -> dict[str, float]:
    tv = 0.5 * (log_p.exp() - log_law.exp()).abs().sum()
    return {"KL(law‖truth)": float(kl(log_law, log_p)), "KL(truth‖law)": float(kl(log_p, log_law)), "TV": float(tv)}


@torch.no_grad()
def run(seed: int) -> Result:
    torch.manual_seed(seed)
    lm, other = (table_lm(4, 5, concentration=3.0, seed=2 * seed + n) for n in (0, 1))
    automaton = answers(lm.vocabulary)
    model = bind(constrained, lm, constraint=automaton)
    guide = bind(finetuned, product([lm, automaton.mask(lm)]))
    masked = enumerate_posterior(model, guide, [""])
    assert masked.log_q is not None
    x = masked.latents["x"][:, 0]

    def log_prob(of: LanguageModel) -> Float[Tensor, "N"]:
        return of([""]).log_prob(x.unsqueeze(1))[:, 0]

    # What each is meant to be, as a log joint density of whole texts; and what it is, made token by token.
    targets = {
        AUTOMATON: (masked.log_joint[:, 0], masked.log_q[:, 0]),
        "product of two LMs": (log_prob(lm) + log_prob(other), log_prob(product([lm, other]))),
        f"power {POWER:g} of the prior": (POWER * log_prob(lm), log_prob(product([lm], [POWER]))),
    }
    rows: list[dict[str, Any]] = []
    laws: dict[str, dict[str, Tensor]] = {}
    for target, (log_joint, log_q) in targets.items():
        log_p = log_joint - log_joint.logsumexp(0)
        weighted = {f"{count} weighted, one picked": resampled(log_q, log_joint - log_q, count) for count in COUNTS[1:]}
        laws[target] = {TRUTH: log_p, TOKENS: log_q, **weighted}
        rows += [{"target": target, "law": law, **distances(log_p, log_law)} for law, log_law in laws[target].items()]
    mask = SMCSettings(twist=automaton.mask(lm))
    by_smc = smc(model, None, [""], num_samples=PARTICLES, num_runs=RUNS, settings=mask)
    smc_distances = distances(laws[AUTOMATON][TRUTH], picked(by_smc, x))
    of_smc = f"SMC of {PARTICLES}, the mask its twist (estimated)"
    tv = {target: [row["TV"] for row in rows if row["target"] == target and row["law"] != TRUTH] for target in targets}
    return Result(
        "Token by token is not text by text, and what importance weights make of it",
        [*rows, {"target": AUTOMATON, "law": of_smc, **smc_distances}],
        {
            "masking token by token is not conditioning on the automaton (TV > 0.1)": tv[AUTOMATON][0] > 0.1,
            "nor are products and powers of each token those of texts (TV > 0.1)": min(v[0] for v in tv.values()) > 0.1,
            "picked by its weight from more draws, a text's law comes nearer, for each of the three": all(
                more < fewer for values in tv.values() for fewer, more in zip(values, values[1:], strict=False)
            ),
            f"SMC of {PARTICLES} texts whose twist is the mask is at least three times nearer than masking alone": (
                smc_distances["TV"] < tv[AUTOMATON][0] / 3
            ),
            f"from {COUNTS[-1]} draws it is at least ten times nearer": all(v[-1] < v[0] / 10 for v in tv.values()),
        },
        _figure(tv, laws[AUTOMATON], lm.vocabulary.decode(x)),
    )


def _figure(tv: dict[str, list[float]], laws: dict[str, Tensor], texts: list[str]) -> Figure:
    figure, (left, right) = panels(2)
    for target, distance in tv.items():
        left.plot(COUNTS, distance, marker="o", label=target)
    left.set(
        xscale="log", yscale="log", xlabel="draws, of which one is picked by its weight", ylabel="TV from the truth"
    )
    left.set_xticks(COUNTS, [str(count) for count in COUNTS])
    left.minorticks_off()
    left.legend(fontsize="small")
    likeliest = laws[TRUTH].argsort(descending=True)[:SHOWN]
    width = 0.8 / len(shown := [law for law in laws if law in (TRUTH, TOKENS) or str(COUNTS[2]) in law])
    for n, law in enumerate(shown):
        at = torch.arange(len(likeliest)) + width * (n - (len(shown) - 1) / 2)
        right.bar(at.tolist(), laws[law][likeliest].exp().tolist(), width, label=law)
    right.set_xticks(range(len(likeliest)), [texts[i].replace(" ", "") for i in likeliest.tolist()])
    right.set(xlabel="the likeliest texts of the automaton", ylabel="probability")
    right.legend(fontsize="small")
    return figure
