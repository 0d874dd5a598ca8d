"""Standard RL collapses, even from the law in which every next token is as likely as any, and with a perfect reward;
KL-regularised RL has the posterior's entropy at every β (Korbak et al. 2022, §§2-3)."""

import torch

from ppl_lm.experiments.lab import Result, curves, entropy, letters, panels, train
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.objectives.divergences import reverse_kl
from ppl_lm.infer.objectives.rl import expected_reward
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted

BETAS = (0.1, 0.5, 2.0, 20.0)


def run(seed: int) -> Result:
    torch.manual_seed(seed)
    lm = table_lm(4, 3)  # every next token is as likely as any other
    runs = {"standard RL": (expected_reward, 1.0), **{f"KL-RL, β = {beta:g}": (reverse_kl, beta) for beta in BETAS}}
    traces, rows = {}, []
    for name, (objective, beta) in runs.items():
        target, guide = bind(tilted, lm, reward=letters, beta=beta), bind(finetuned, lm.copy())
        traces[name] = train(target, guide, [""], objective=objective, steps=500, rate=0.05)
        end = traces[name][-1]
        wanted = entropy(target, [""]) if objective is reverse_kl else 0.0
        rows.append({"objective": name, "E[r]": end["E[r]"], "entropy": end["entropy"], "of its optimum": wanted})
    figure, (left, right) = panels(2)
    curves(left, traces, "entropy")
    curves(right, traces, "E[r]")
    (rl, *tilts), start = rows, traces["standard RL"][0]["entropy"]
    return Result(
        "What standard RL and KL-regularised RL converge to, every next token being as likely as any at first",
        rows,
        {
            "standard RL keeps less than 5% of the entropy it starts with": rl["entropy"] < 0.05 * start,
            "KL-RL ends within 0.1 nats of the posterior's entropy at every β": all(
                abs(row["entropy"] - row["of its optimum"]) < 0.1 for row in tilts
            ),
            "β → 0 recovers the collapse": tilts[0]["entropy"] < 0.1 * start,
            "β → ∞ recovers the prior": abs(tilts[-1]["entropy"] - start) < 0.05,
        },
        figure,
    )
