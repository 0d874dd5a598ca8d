"""It is matching a distribution that prevents collapse, not RL or its absence (Korbak et al. 2022, §5: the double
dissociation)."""

from typing import Any

import torch

from ppl_lm.experiments.lab import Result, Trace, curves, letters, measure, panels, train
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import Bound, bind
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.objectives.divergences import forward_kl, reverse_kl
from ppl_lm.infer.objectives.rl import expected_reward
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted

STEPS, RATE = 600, 0.03


def likeliest(target: Bound, guide: Bound) -> Trace:
    """Maximum likelihood of the text with the highest reward, as supervised fine-tuning on the best text would do."""
    with torch.no_grad():
        truth = enumerate_posterior(target, guide, [""])
    best = truth.latents["x"][truth.records["reward"][:, 0].argmax(), 0]
    adam, trace = torch.optim.Adam(guide.parameters(), lr=RATE), []
    for step in range(STEPS + 1):
        if step % 25 == 0:
            trace.append({"step": step, **measure(target, guide, [""])})
        adam.zero_grad()
        (-guide.networks["lm"]([""]).log_prob(best)).sum().backward()
        adam.step()
    return trace


def run(seed: int) -> Result:
    torch.manual_seed(seed)
    lm = table_lm(4, 3, concentration=3.0, seed=seed)
    target = bind(tilted, lm, reward=letters, beta=1.0)
    guides = [bind(finetuned, lm.copy()) for _ in range(4)]
    settings: Any = {"steps": STEPS, "rate": RATE, "num_particles": 128}
    traces = {
        "RL, no matching": train(target, guides[0], [""], objective=expected_reward, **settings),
        "RL, matching": train(target, guides[1], [""], objective=reverse_kl, **settings),
        "no RL, no matching": likeliest(target, guides[2]),
        "no RL, matching": train(target, guides[3], [""], objective=forward_kl, **settings),
    }
    what = ["E[r]", "E[r] - β KL(q‖prior)", "log q(best text)", "-KL(p‖q)"]
    rows = [
        {"cell": name, "maximised": m, **{k: v for k, v in traces[name][-1].items() if k != "step"}}
        for name, m in zip(traces, what, strict=True)
    ]
    figure, (left, right) = panels(2)
    curves(left, traces, "entropy")
    right.barh([row["cell"] for row in rows], [row["KL(q‖p)"] for row in rows])
    right.set_xlabel("KL(guide ‖ posterior) at the end [nats]")
    rl, matched, supervised, dpg = rows
    return Result(
        "Two ways to fit (RL or not), with and without a distribution to match",
        rows,
        {
            "both that match reach the posterior (both KLs < 0.05 nats)": all(
                max(row["KL(q‖p)"], row["KL(p‖q)"]) < 0.05 for row in (matched, dpg)
            ),
            "both that do not lose more than 90% of the entropy": max(rl["entropy"], supervised["entropy"])
            < 0.1 * traces["RL, no matching"][0]["entropy"],
            "and both that match keep more than half": min(matched["entropy"], dpg["entropy"])
            > 0.5 * traces["RL, no matching"][0]["entropy"],
        },
        figure,
    )
