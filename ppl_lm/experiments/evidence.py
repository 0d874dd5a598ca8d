"""A Z for each prompt: with one Z for all, forward KL weighs a prompt by how probable its evidence happens to be, and the
guide serves the others badly, the more so the more Z varies (Korbak et al. 2022, CDPG)."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_lm.experiments.lab import Result, panels, train
from ppl_lm.guides import tabular
from ppl_lm.infer.binding import bind
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.objectives.baselines import MovingLogZ, of_others
from ppl_lm.infer.objectives.divergences import forward_kl
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.table import TableForCausalLM, table_like, table_lm
from ppl_lm.models import tilted

SPREADS = (0.0, 1.0, 2.0, 3.0)
PROMPTS = ["a", "b"]


class Deaf(TableForCausalLM):
    """p(next | position): it does not hear the prompt, and has to compromise."""

    def rows(self, ids: Int[Tensor, "N L"], mask: Int[Tensor, "N L"]) -> Int[Tensor, "N L"]:
        return mask.long().cumsum(-1)


def one_for_all(log_w: Float[Tensor, "K B"], prompts: Prompts) -> Float[Tensor, "K B"]:
    """log of the mean weight of all prompts' particles but the k-th of each."""
    return of_others(log_w, prompts).logsumexp(1, keepdim=True).expand_as(log_w) - math.log(log_w.shape[1])


def run(seed: int) -> Result:
    torch.manual_seed(seed)
    lm = table_lm(4, 3, max_prompt=2, concentration=1.0, seed=seed)
    rows: list[dict[str, Any]] = []
    for spread in SPREADS:

        def wanted(prompts: list[str], completions: list[str], spread: float = spread) -> list[float]:
            """Its own letter for each prompt; a constant beside it changes no posterior, only Z."""
            shift = {"a": spread, "b": -spread}
            return [
                2.0 * (text.split()[:1] == [prompt]) + shift[prompt]
                for prompt, text in zip(prompts, completions, strict=True)
            ]

        target = bind(tilted, lm, reward=wanted, beta=1.0)
        with torch.no_grad():
            row: dict[str, Any] = {
                "sd of log Z": float(enumerate_posterior(target, None, PROMPTS).log_z.std(correction=0))
            }
        for name, log_z in {"a Z for each prompt": MovingLogZ(), "one Z for all": one_for_all}.items():
            guide = bind(tabular, table_like(lm, max_prompt=2, network=Deaf))
            settings = {"objective": forward_kl, "log_z": log_z, "num_particles": 128}
            row[name] = train(target, guide, PROMPTS, steps=400, rate=0.03, every=400, **settings)[-1]["KL(p‖q)"]
        rows.append(row)
    figure, (axes,) = panels(1)
    for name in ("a Z for each prompt", "one Z for all"):
        axes.plot([row["sd of log Z"] for row in rows], [row[name] for row in rows], marker="o", label=name)
    axes.set_xlabel("standard deviation of log Z over the prompts [nats]")
    axes.set_ylabel("mean KL(posterior ‖ guide) [nats]")
    axes.legend(fontsize="small")
    lost = [row["one Z for all"] - row["a Z for each prompt"] for row in rows]
    return Result(
        "Mean KL(posterior ‖ guide) of two prompts that share a guide, in nats",
        rows,
        {
            "what one Z for all loses grows with the spread": lost[-1] > lost[1] > lost[0] - 0.02 and lost[-1] > 0.1,
        },
        figure,
    )
