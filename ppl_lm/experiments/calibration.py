"""Simulation-based calibration on a real language model: exact draws pass, and draws with a known fault do not."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from ppl_lm.criticism.calibration import Calibration, sbc
from ppl_lm.experiments.lab import Result, load, panels
from ppl_lm.guides import prior as of_prior
from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import Draws
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.likelihood import rewards
from ppl_lm.lm.experts import product
from ppl_lm.models import tilted

REPLICATIONS, RANKED = 500, 19
REPEATED = RANKED + 1  # times, for the power
POOL = 60_000  # weighted draws from which each faulty law is drawn
BETA, MOST = 2.0, 12.0  # of the valence
FAULT = 1.2  # the temperature, and the factor on the likelihood


def valence(completions: Sequence[str], **_: Any) -> list[float]:
    """The sum over its words of how good each is, about -4 to 4, by VADER's lexicon and rules, at most 12: what `compound` is
    made of, s/√(s² + 15)."""
    compound = np.clip(rewards.vader(completions), -0.9999, 0.9999)
    return np.minimum(compound * np.sqrt(15 / (1 - compound**2)), MOST).tolist()


valence.r_max = MOST  # pyright: ignore[reportFunctionMemberAccess]


def run(seed: int, lm: str | None = None, time_limit: float = 60.0) -> Result:
    """The sum of valences at β = 2. The draws of each law are a pool's, drawn anew by weights that have its fault in them.

    A likelihood to the power 1 + s moves its own mean by about s times its standard deviation σ under the posterior, in units
    of σ and with σ in nats. Here σ is 1.5, and 500 ranks show what a fifth of that does; of VADER's bounded sentiment at
    β = 0.2 it is 0.8, and they show it about every second time.

    The power is by repetition: with each 500 of the exact draws in turn, ranked among new draws from the same pool, or for
    exact ones among all others."""
    torch.manual_seed(seed)
    prior = load(lm, 24)
    tempered = product([prior], [1 / FAULT])
    model, warm = (bind(tilted, p, reward=valence, beta=BETA) for p in (prior, tempered))
    pool, hot = (importance(m, None, [""], num_samples=POOL) for m in (model, warm))
    exact = rejection(model, None, [""], num_samples=REPLICATIONS * REPEATED)
    common = pool["x"][0, :, 0, 0].mode().values  # the mode that is dropped: texts that begin as most do
    dropped = lambda d: (d["x"][..., 0] == common).to(d.log_prior)  # noqa: E731

    # Each law's log q, up to a constant: what draws it, and what it ranks texts by.
    laws: dict[str, tuple[Draws, Callable[[Draws], torch.Tensor]]] = {
        "the posterior": (pool, lambda d: d.log_prior + d.log_likelihood),
        f"its temperature {FAULT} times": (
            hot,
            lambda d: d.under(bind(of_prior, tempered)).log_guide + d.log_likelihood,
        ),
        "a mode dropped": (pool, lambda d: (d.log_prior + d.log_likelihood).masked_fill(dropped(d) > 0, -torch.inf)),
        f"its likelihood {FAULT} times": (pool, lambda d: d.log_prior + FAULT * d.log_likelihood),
    }
    known = {name: (_ranked(source, log_q), _ranked(exact, log_q)) for name, (source, log_q) in laws.items()}
    tried: dict[str, list[Calibration]] = {name: [] for name in (*laws, "exact draws")}
    row = torch.arange(REPLICATIONS * REPEATED) // REPLICATIONS
    for repetition in range(REPEATED):  # each exact draw is a replication once
        for name, (source, truth) in known.items():
            one = truth.map(lambda v, keep=row == repetition: v[:, keep])
            tried[name].append(sbc(one, _resampled(source, source["log_q"] - source.log_guide), RANKED))
        _, truth = known["the posterior"]
        one, others = (truth.map(lambda v, keep=keep: v[:, keep]) for keep in (row == repetition, row != repetition))
        tried["exact draws"].append(sbc(one, others, RANKED))
    first = {name: calibrations[0] for name, calibrations in tried.items()}
    share = float((pool.log_weight.softmax(1) * dropped(pool)).sum())
    rows = [
        {
            "draws": name,
            **{f"p, {k}": p for k, p in calibration.p_values.items()},
            "p, all": calibration.p_value,
            f"p, all < 0.01, of {REPEATED}": sum(again.p_value < 0.01 for again in tried[name]),
        }
        for name, calibration in first.items()
    ]
    figure, axes = panels(4)
    for panel, key in zip(axes, first["exact draws"].ranks, strict=True):
        for name, calibration in first.items():
            if key in calibration.ranks:
                ranks = calibration.ranks[key].numpy()
                below = np.array([(ranks <= r).mean() for r in range(RANKED + 1)])
                panel.plot(range(RANKED + 1), below - np.arange(1, RANKED + 2) / (RANKED + 1), label=name)
        band = first["exact draws"].band.numpy() - np.arange(1, RANKED + 2) / (RANKED + 1)
        panel.fill_between(range(RANKED + 1), *band, color="0.85", zorder=0)
        panel.set(xlabel=f"rank of {key}", title=key)
    axes[0].set_ylabel("ECDF less the uniform's")
    axes[-1].legend(fontsize="x-small")
    passes = ("exact draws", "the posterior")
    return Result(
        f"Ranks of {REPLICATIONS} exact posterior draws among {RANKED} of each kind; a shift of "
        f"{first['exact draws'].detectable:.2f} standard deviations would be found (p < 0.05) 4 times of 5; the mode that is "
        f"dropped has {share:.0%} of the mass",
        rows,
        {
            **{f"{name} pass": first[name].p_value >= 0.01 for name in passes},
            **{
                f"{name}: found out (p < 0.01), 9 times of 10": calibrations[0].p_value < 0.01
                and sum(again.p_value < 0.01 for again in calibrations) >= 0.9 * REPEATED
                for name, calibrations in tried.items()
                if name not in passes
            },
        },
        figure,
    )


def _ranked(draws: Draws, log_q: Callable[[Draws], torch.Tensor]) -> Draws:
    """With log q of a law among the numbers by which `sbc` ranks."""
    return replace(draws, records=draws.records | {"log_q": log_q(draws)})


def _resampled(pool: Draws, log_w: Float[torch.Tensor, "1 S 1"]) -> Draws:
    pick = torch.multinomial(log_w[0, :, 0].softmax(0), REPLICATIONS * RANKED, True)
    return pool.map(lambda v: v[:, pick])
