"""A guide that cannot be the posterior must choose what to lose: reverse KL drops modes, forward KL covers them at the
price of texts that are none, Jensen-Shannon lies between (Go et al. 2023)."""

import torch
from jaxtyping import Int
from torch import Tensor

from ppl_lm.experiments.lab import Result, curves, entropy, panels, train
from ppl_lm.guides import tabular
from ppl_lm.infer.binding import bind
from ppl_lm.infer.objectives.divergences import alpha_divergence, forward_kl, jensen_shannon, reverse_kl
from ppl_lm.lm.table import TableForCausalLM, table_like, table_lm
from ppl_lm.models import tilted

BETA = 0.2
OBJECTIVES = {
    "reverse KL": reverse_kl, "Jensen-Shannon": jensen_shannon, "α = ½": alpha_divergence(0.5), "forward KL": forward_kl
}  # fmt: skip


class Bigram(TableForCausalLM):
    """p(next | last token): it cannot remember how a text began."""

    def rows(self, ids: Int[Tensor, "N L"], mask: Int[Tensor, "N L"]) -> Int[Tensor, "N L"]:
        return ids


def palindrome(completions: list[str], **_: object) -> list[float]:
    """1 for three letters of which the last is the first."""
    words = [text.split() for text in completions]
    return [float(len(word) == 3 and word[0] == word[2]) for word in words]


def run(seed: int) -> Result:
    torch.manual_seed(seed)
    lm = table_lm(5, 3, concentration=3.0, seed=seed)
    target = bind(tilted, lm, reward=palindrome, beta=BETA)
    rows, traces = [], {}
    for name, objective in OBJECTIVES.items():
        guide = bind(tabular, table_like(lm, network=Bigram))
        traces[name] = train(target, guide, [""], objective=objective, steps=800, rate=0.03, num_particles=128)
        rows.append({"objective": name, **traces[name][-1]})
    able = bind(tabular, table_like(lm))
    traces["reverse KL, a guide that can"] = train(target, able, [""], steps=800, rate=0.03, num_particles=128)
    figure, (left, right) = panels(2)
    for row in rows:
        left.scatter(row["KL(q‖p)"], row["KL(p‖q)"], label=row["objective"])
    left.set_xlabel("KL(guide ‖ posterior) [nats]")
    left.set_ylabel("KL(posterior ‖ guide) [nats]")
    left.legend(fontsize="small")
    curves(right, traces, "entropy")
    right.axhline(entropy(target, [""]), color="black", linestyle="dotted", linewidth=1)
    reverse, js, _, forward = rows
    return Result(
        "A guide with the memory of one token, fitted to palindromes",
        rows,
        {
            "each KL is smallest where it is what is minimised": reverse["KL(q‖p)"]
            < min(r["KL(q‖p)"] for r in rows[1:])
            and forward["KL(p‖q)"] < min(r["KL(p‖q)"] for r in rows[:-1]),
            "Jensen-Shannon lies between in both": reverse["KL(q‖p)"] < js["KL(q‖p)"] < forward["KL(q‖p)"]
            and forward["KL(p‖q)"] < js["KL(p‖q)"] < reverse["KL(p‖q)"],
            "reverse KL keeps less entropy than forward KL": reverse["entropy"] < forward["entropy"],
            "a guide that can be the posterior becomes it": traces["reverse KL, a guide that can"][-1]["KL(q‖p)"]
            < 0.05,
        },
        figure,
    )
