"""Random integers from 0 to 100, all alike (Hu et al. 2024): rewards that are equal for all valid numbers give RL no reason
to mend the language model's taste; the posterior that is uniform over them does."""

import math
from dataclasses import replace
from typing import Any

import pyro
import torch
from jaxtyping import Int
from torch import Tensor

from ppl_lm.experiments.lab import Result, panels, train
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.objectives.balance import SubTB, TrajectoryBalance, vargrad
from ppl_lm.infer.objectives.divergences import reverse_kl
from ppl_lm.infer.objectives.rl import expected_reward
from ppl_lm.infer.terms import Estimate, Terms
from ppl_lm.likelihood.optimality import Optimality
from ppl_lm.likelihood.reward import Reward
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.table import table_lm

DIGITS = "abcdefghij"
STRENGTH = 8.0  # log-odds of a valid number against another text, nats
SHOWN = ("the LM", "standard RL", "VarGrad")


def number(text: str) -> str:
    return "".join(str(DIGITS.index(letter)) for letter in text.split())


def valid(completions: list[str], **_: object) -> list[float]:
    """1 for a number from 0 to 100 without leading zeros; the letters a to j are the digits."""
    return [float(n.isdigit() and str(int(n)) == n and int(n) <= 100) for n in map(number, completions)]


def uniform(prompts: Prompts, prior: LanguageModel, reward: Reward) -> Int[Tensor, "*S T"]:
    """p(x) ∝ exp(STRENGTH · valid(x)): the prior's own taste is divided out."""
    with pyro.plate("prompts", len(prompts)):
        law = prior(prompts)
        x = pyro.sample("x", law)
        r = pyro.deterministic("reward", reward(prompts, x), event_dim=0)
        pyro.sample("valid", Optimality(STRENGTH * r - law.log_prob(x)), obs=torch.ones(r.shape))
    return x


def standard_rl(terms: Terms) -> Estimate:
    """The reward alone: what `uniform` divides out is put back into its likelihood."""
    return expected_reward(replace(terms, log_likelihood=terms.log_joint))


def run(seed: int) -> Result:
    torch.manual_seed(seed)
    lm = table_lm(11, 3, concentration=3.0, seed=seed)
    target = bind(uniform, lm, reward=valid)
    objectives = {
        "standard RL": standard_rl,
        "reverse KL": reverse_kl,
        "trajectory balance": TrajectoryBalance(),
        "VarGrad": vargrad,
        "SubTB": SubTB(),
    }
    rows: list[dict[str, Any]] = []
    figure, axes = panels(len(SHOWN))
    for name in ("the LM", *objectives):
        guide = bind(finetuned, lm.copy())
        if name in objectives:
            settings = {"objective": objectives[name], "num_particles": 256}
            train(target, guide, [""], steps=1000, rate=0.05, every=1000, **settings)
        with torch.no_grad():
            truth = enumerate_posterior(target, guide, [""])
        assert truth.log_q is not None
        good = truth.records["reward"][:, 0] > 0
        share = truth.log_q[good, 0].exp()  # (101,)
        law = share / share.sum()
        skew = math.log(len(law)) + float(torch.where(law > 0, law * law.log(), 0.0).sum())
        rows.append({"fitted by": name, "valid": float(share.sum()), "KL(valid ones‖uniform)": skew})
        if name in SHOWN:
            plot, values = axes[SHOWN.index(name)], lm.vocabulary.decode(truth.latents["x"][good, 0])
            plot.bar([int(number(text)) for text in values], law.tolist(), width=1.0)
            plot.axhline(1 / len(law), color="black", linewidth=0.8)
            plot.set_title(f"{name}: {rows[-1]['valid']:.0%} valid", fontsize="small")
            plot.set_xlabel("number")
            plot.set_ylabel("probability among the valid")
    _, rl, *matched = rows
    return Result(
        "Integers from 0 to 100, asked to be uniform",
        rows,
        {
            "standard RL writes valid numbers (more than 95%)": rl["valid"] > 0.95,
            "but moves away from uniform, by more than 2 nats": rl["KL(valid ones‖uniform)"] > 2,
            "all that match the posterior are valid, and within 0.2 nats of uniform": all(
                row["valid"] > 0.95 and row["KL(valid ones‖uniform)"] < 0.2 for row in matched
            ),
        },
        figure,
    )
