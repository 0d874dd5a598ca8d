"""Simulation-based calibration on a real language model: exact draws pass, and draws with a known fault do not."""

from typing import Any

import numpy as np
import torch

from ppl_lm.diagnose.sbc import sbc
from ppl_lm.experiments.lab import Result, panels
from ppl_lm.infer import Draws, bind, importance, rejection
from ppl_lm.likelihood import rewards
from ppl_lm.lm import LanguageModel, product
from ppl_lm.models import tilted

REPLICATIONS, RANKED = 500, 19
POOL = 30_000  # weighted draws from which each faulty law is drawn
BETA = 0.2
FAULT = 1.2  # the temperature, and the factor on the likelihood


def run(seed: int, lm: str | None = None, time_limit: float = 60.0) -> Result:
    """VADER's sentiment at β = 0.2. The faulty draws are a pool's, drawn anew by weights that have the fault in them."""
    torch.manual_seed(seed)
    load: Any = {"max_new_tokens": 24} if lm is None else {"name_or_folder": lm, "max_new_tokens": 24}
    prior = LanguageModel.from_pretrained(**load)
    model = bind(tilted, prior, reward=rewards.vader, beta=BETA)
    warm = bind(tilted, product([prior], [1 / FAULT]), reward=rewards.vader, beta=BETA)
    exact = rejection(model, None, [""], num_samples=REPLICATIONS)
    pool = importance(model, None, [""], num_samples=POOL)
    hot = importance(warm, None, [""], num_samples=POOL)
    first = pool["x"][0, :, 0, 0]
    common = first.mode().values  # the mode that is dropped: texts that begin as most do
    tested = {
        "the posterior": _drawn(pool, pool.log_weight),
        f"its temperature {FAULT} times": _drawn(hot, hot.log_weight),
        "a mode dropped": _drawn(pool, pool.log_weight.masked_fill((first == common)[None, :, None], -torch.inf)),
        f"its likelihood {FAULT} times": _drawn(pool, FAULT * pool.log_likelihood),
    }
    found = {"exact draws": sbc(exact, rejection(model, None, [""], num_samples=REPLICATIONS * RANKED), RANKED)}
    found |= {name: sbc(exact, draws, RANKED) for name, draws in tested.items()}
    share = float(pool.log_weight[0, :, 0].softmax(0)[first == common].sum())
    rows = [
        {"draws": name, **{f"p, {k}": p for k, p in made.p_values.items()}, "p, all": made.p_value}
        for name, made in found.items()
    ]
    figure, axes = panels(3)
    for panel, key in zip(axes, found["exact draws"].ranks, strict=False):
        for name, made in found.items():
            if key in made.ranks:
                ranks = made.ranks[key].numpy()
                below = np.array([(ranks <= r).mean() for r in range(RANKED + 1)])
                panel.plot(range(RANKED + 1), below - np.arange(1, RANKED + 2) / (RANKED + 1), label=name)
        band = found["exact draws"].band.numpy() - np.arange(1, RANKED + 2) / (RANKED + 1)
        panel.fill_between(range(RANKED + 1), *band, color="0.85", zorder=0)
        panel.set(xlabel=f"rank of {key}", title=key)
    axes[0].set_ylabel("ECDF less the uniform's")
    axes[-1].legend(fontsize="x-small")
    passes = ("exact draws", "the posterior")
    return Result(
        f"Ranks of {REPLICATIONS} exact posterior draws among {RANKED} of each kind; a shift of "
        f"{found['exact draws'].detectable:.2f} standard deviations would be found 4 times of 5; the mode that is dropped has "
        f"{share:.0%} of the mass",
        rows,
        {
            **{f"{name} pass": found[name].p_value >= 0.01 for name in passes},
            **{
                f"{name}: found out (p < 0.01)": made.p_value < 0.01
                for name, made in found.items()
                if name not in passes
            },
        },
        figure,
    )


def _drawn(pool: Draws, log_w: torch.Tensor) -> Draws:
    pick = torch.multinomial(log_w[0, :, 0].softmax(0), REPLICATIONS * RANKED, True)
    return pool.map(lambda v: v[:, pick])
