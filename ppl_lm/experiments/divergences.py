"""Reverse KL, Jensen-Shannon and forward KL, fitted to one posterior of a real language model for the same time; standard RL
beside them."""

import math
import time
from typing import Any

import pyro
import torch

from ppl_lm.criticism.diagnoses.diagnosis import diagnose
from ppl_lm.experiments.lab import Result, load, panels
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import Bound, bind
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.log_weights import mean
from ppl_lm.infer.objectives.divergences import forward_kl, jensen_shannon, reverse_kl
from ppl_lm.infer.objectives.rl import expected_reward
from ppl_lm.likelihood import rewards
from ppl_lm.models import tilted
from ppl_lm.run.fitting.loop import fit

OBJECTIVES = {"reverse KL": reverse_kl, "Jensen-Shannon": jensen_shannon, "forward KL": forward_kl}
MADE_OF = {"reverse KL": ("KL(q‖p)",), "Jensen-Shannon": ("KL(q‖p)", "KL(p‖q)"), "forward KL": ("KL(p‖q)",)}


def run(seed: int, lm: str | None = None, time_limit: float = 60.0) -> Result:
    """VADER's sentiment: at β = 0.2 with the language model that ships, at β = 0.1 with another, as `ppl-lm fit tilted`."""
    prior, beta = load(lm, 40 if lm is None else 48), 0.2 if lm is None else 0.1
    target, rows, rate = bind(tilted, prior, reward=rewards.vader, beta=beta), [], 1e-4
    for name in ("the prior", *OBJECTIVES, "standard RL"):
        guide, steps = bind(finetuned, prior.copy()), 0
        if name in OBJECTIVES:
            loss = SequenceELBO(num_particles=128, objective=OBJECTIVES[name])
            fit_record = fit(target, guide, [""], loss, time_limit=time_limit, seed=seed)
            steps, rate = fit_record.steps, max(row["learning_rate"] for row in fit_record.metrics)
        elif name == "standard RL":
            steps = reinforce(target, guide, rate, time_limit, seed)
        torch.manual_seed(seed + 1)
        rows.append({"fitted by": name, "steps": steps, **measure(target, guide)})
    figure, (left, right) = panels(2)
    for row in rows:
        errors = {"xerr": 2 * row["± KL(q‖p)"], "yerr": 2 * row["± KL(p‖q)"]}
        left.errorbar(row["KL(q‖p)"], row["KL(p‖q)"], marker="o", capsize=2, label=row["fitted by"], **errors)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("KL(guide ‖ posterior) [nats], ± 2 SE")
    left.set_ylabel("KL(posterior ‖ guide) [nats], ± 2 SE")
    left.legend(fontsize="small")
    right.barh([row["fitted by"] for row in rows], [row["entropy"] for row in rows])
    right.set_xlabel("entropy of the guide [nats]")
    start, *fitted, rl = rows
    return Result(
        f"Fitted for {time_limit:g} s each to VADER's sentiment at β = {beta:g}",
        rows,
        {
            "each comes closer than the prior, in the KLs that it is made of, by more than two errors": all(
                start[key] - row[key] > 2 * math.hypot(start[f"± {key}"], row[f"± {key}"])
                for row in fitted
                for key in MADE_OF[row["fitted by"]]
            ),
            "standard RL has the highest reward": rl["E[r]"] > max(row["E[r]"] for row in rows[:-1]),
            "and is further from the posterior than the prior was": rl["KL(q‖p)"] > start["KL(q‖p)"],
        },
        figure,
    )


def reinforce(target: Bound, guide: Bound, rate: float, seconds: float, seed: int) -> int:
    """Stock SVI on the expected reward alone, at the largest of the rates that `fit` found. `fit` itself would keep the prior,
    which is closer to the posterior."""
    torch.manual_seed(seed)
    elbo, steps, began = SequenceELBO(128, objective=expected_reward), 0, time.monotonic()
    svi = pyro.infer.SVI(target, guide, pyro.optim.ClippedAdam({"lr": rate, "betas": (0.9, 0.99)}), loss=elbo)  # type: ignore[attr-defined]
    while time.monotonic() - began < seconds:
        svi.step([""])
        steps += 1
    return steps


def measure(target: Bound, guide: Bound) -> dict[str, Any]:
    diagnosis = diagnose(target, guide, [""])
    figures, (entropy, entropy_se) = diagnosis.average, mean(-diagnosis.guide.log_guide.flatten(0, 1))
    return {
        "KL(q‖p)": figures.kl_q_p, "± KL(q‖p)": figures.kl_q_p_se,
        "KL(p‖q)": figures.kl_p_q, "± KL(p‖q)": figures.kl_p_q_se,
        "entropy": float(entropy), "± entropy": float(entropy_se), "E[r]": figures.reward, "ESS": round(figures.ess),
    }  # fmt: skip
