"""DPG, which fits forward KL from texts of a proposal: the baseline Z·q/b lowers its gradient's variance near the posterior
(Korbak et al. 2022, GDC++), and a proposal that follows the guide where that is measurably better beats one that never does
(Khalifa et al. 2021)."""

import copy
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_lm.experiments.lab import Result, Trace, curves, letters, panels, train
from ppl_lm.guides import finetuned, prior
from ppl_lm.infer.binding import Bound, bind
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.objectives.baselines import constant, known, no_baseline
from ppl_lm.infer.objectives.divergences import forward_kl
from ppl_lm.infer.off_policy import Proposal
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted

BETA, PARTICLES = 0.5, 32
GRADIENTS, FITS, STEPS = 200, 6, 300  # gradients whose variance is taken; fits that are averaged, and their steps
BASELINES = {"none": no_baseline, "Z·q/b": constant(-1.0)}
FOLLOWS: dict[str, Callable[[Bound], Proposal | None]] = {
    "never": lambda guide: Proposal(copy.deepcopy(guide)),
    "when better": lambda guide: Proposal.like(guide, every=10),
    "always": lambda guide: None,
}


def variance(target: Bound, guide: Bound, log_z: Float[Tensor, "B"], **settings: Any) -> float:
    """Of one step's gradient, summed over the parameters."""
    elbo, gradients = SequenceELBO(PARTICLES, objective=forward_kl, log_z=known(log_z), **settings), []
    parameters = [p for p in guide.parameters() if p.requires_grad]
    for _ in range(GRADIENTS):
        loss = elbo.differentiable_loss(target, guide, [""])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return float(torch.stack(gradients).var(0).sum())


def run(seed: int) -> Result:
    torch.manual_seed(seed)
    lm = table_lm(4, 3, concentration=3.0, seed=seed)
    target, start, near = bind(tilted, lm, reward=letters, beta=BETA), bind(prior, lm), bind(finetuned, lm.copy())
    log_z = enumerate_posterior(target, None, [""]).log_z
    settings: dict[str, Any] = {"objective": forward_kl, "num_particles": PARTICLES, "rate": 0.03}
    train(target, near, [""], log_z=known(log_z), steps=300, every=300, **{**settings, "num_particles": 128})
    rows: list[dict[str, Any]] = []
    for where, guide in {"the prior": bind(finetuned, lm.copy()), "near the posterior": near}.items():
        for drawn_by, source in {"the guide": None, "the prior": Proposal(start)}.items():
            spread = [variance(target, guide, log_z, baseline=b, source=source) for b in BASELINES.values()]
            what = f"gradient variance; guide: {where}, texts of {drawn_by}"
            rows.append({"what": what, **dict(zip(BASELINES, spread, strict=True)), "ratio": spread[1] / spread[0]})
    traces: dict[tuple[str, str], Trace] = {}
    ends: dict[tuple[str, str], tuple[float, float]] = {}
    for follows, make in FOLLOWS.items():
        for name, baseline in BASELINES.items():
            fits = []
            for _ in range(FITS):
                guide = bind(finetuned, lm.copy())
                source = make(guide)
                fits.append(train(target, guide, [""], steps=STEPS, baseline=baseline, source=source, **settings))
            traces[follows, name] = [
                {"step": at[0]["step"], "KL(p‖q)": statistics.mean(row["KL(p‖q)"] for row in at)}
                for at in zip(*fits, strict=True)
            ]
            last = [trace[-1]["KL(p‖q)"] for trace in fits]
            ends[follows, name] = statistics.mean(last), statistics.stdev(last) / math.sqrt(FITS)
        what = f"KL(p‖q) after {STEPS} steps, mean of {FITS}; the proposal follows {follows}"
        columns: dict[str, float] = {}
        for name in BASELINES:
            columns[name], columns[f"± {name}"] = ends[follows, name]
        rows.append({"what": what, **columns, "ratio": columns["Z·q/b"] / columns["none"]})
    figure, (left, right) = panels(2)
    curves(left, {key[0]: trace for key, trace in traces.items() if key[1] == "none"}, "KL(p‖q)", log=True)
    curves(right, {key[1]: trace for key, trace in traces.items() if key[0] == "never"}, "KL(p‖q)", log=True)
    left.set_title("when the proposal follows the guide, without a baseline", fontsize="small")
    right.set_title("the baseline, for a proposal that never does", fontsize="small")
    plain, better = ends["never", "none"], ends["never", "Z·q/b"]
    return Result(
        "DPG's baseline and its proposal",
        rows,
        {
            "texts of the prior, guide near the posterior: the baseline takes away 80% of the variance": rows[3][
                "ratio"
            ]
            < 0.2,
            "and the guide ends no further (within two errors)": better[0]
            < plain[0] + 2 * math.hypot(plain[1], better[1]),
            "without it, a proposal that follows when that is better ends closer than one that never does": (
                ends["when better", "none"][0] < plain[0]
            ),
        },
        figure,
    )
