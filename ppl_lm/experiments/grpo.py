"""GRPO's two departures from KL-regularised RL, each of which moves its fixed point away from the posterior: advantages
divided by the group's standard deviation, and k3 in the loss."""

import torch

from ppl_lm.experiments.lab import Result, curves, letters, panels, train
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.objectives.rl import GRPO
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted

BETA = 0.5
GROUPS, GROUP = 16, 8  # groups a step, texts a group


def run(seed: int) -> Result:
    torch.manual_seed(seed)
    lm = table_lm(4, 3, concentration=1.0, seed=seed)
    target = bind(tilted, lm, reward=letters, beta=BETA)
    variants = {
        "GRPO: ÷ std, k3 in the loss": GRPO(BETA),
        "÷ std, KL in the reward": GRPO(BETA, kl_in_reward=True),
        "no ÷ std, k3 in the loss": GRPO(BETA, normalise=False),
        "no ÷ std, KL in the reward": GRPO(BETA, normalise=False, kl_in_reward=True),
    }
    traces, rows = {}, []
    for name, objective in variants.items():
        guide = bind(finetuned, lm.copy())
        traces[name] = train(
            target, guide, [""] * GROUPS, objective=objective, num_particles=GROUP, steps=800, rate=0.03
        )
        rows.append({"variant": name, **traces[name][-1]})
    figure, (left, right) = panels(2)
    curves(left, traces, "KL(q‖p)", log=True)
    curves(right, traces, "E[r]")
    *biased, plain = rows
    return Result(
        "Where GRPO and its parts converge to",
        rows,
        {
            "without both, the posterior is reached (KL(q‖p) < 0.002 nats)": plain["KL(q‖p)"] < 0.002,
            "with either, it is not (KL(q‖p) > 0.015 nats)": all(row["KL(q‖p)"] > 0.015 for row in biased),
        },
        figure,
    )
