"""The order of resampled draws: ArviZ's effective sizes and errors are the weights' own, and the draws stay the same ones."""

import math
from dataclasses import replace

import arviz as az
import numpy as np
import pytest
import torch

from ppl_lm.criticism.effective_size import moments
from ppl_lm.criticism.inference_data.arviz_groups import to_arviz
from ppl_lm.criticism.inference_data.resampled_order import arranged, ess_of_rows
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import Draws
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted


def letters(completions, **_):
    return [min(1.0, 0.5 * text.count("a")) for text in completions]


letters.r_max = 1.0


def weighted(spread: float, count: int, seed: int, runs: int = 0) -> Draws:
    """Log-normal weights, with a number that goes with them and one that does not."""
    lm = table_lm(3, 2)
    generator = torch.Generator().manual_seed(seed)
    log_w, a, b = torch.randn(3, 1, count, 2, dtype=torch.float64, generator=generator)
    if runs:  # the draws of a run have much in common
        log_w, a, b = (v[:, :runs].transpose(0, 1) + 0.3 * v.reshape(runs, -1, 2) for v in (log_w, a, b))
    log_w = spread * log_w
    records = {"with": (0.5 * log_w + a).round(decimals=1), "without": b}
    zeros = torch.zeros_like(log_w)
    kind = "runs" if runs else "weighted"
    return Draws(lm.prompts(["", "a"]), {}, records, log_w, zeros, zeros, kind=kind)


@pytest.mark.parametrize("spread, count", [(0.3, 1000), (0.8, 4096), (1.3, 4096), (1.3, 1000)])
def test_arvizs_error_of_the_mean_is_the_weights(spread, count):
    """Copies apart from each other would give the error of as many independent draws: 0.4 of the true one at the widest."""
    for seed in range(3):
        draws = weighted(spread, count, seed)
        posterior = to_arviz(draws).posterior
        table = az.summary(posterior, var_names=["with", "without"], round_to="none")
        own = [moments(draws, draws[name]) for name in ("with", "without")]
        for column, wanted in (("mcse_mean", [m.se for m in own]), ("ess_bulk", [m.ess for m in own])):
            ratio = table[column].to_numpy() / torch.cat(wanted).numpy()
            assert abs(np.log(ratio)).max() < math.log(1.2), (seed, column, ratio)
    if spread > 1:
        shuffled = draws.reweighted()
        column = draws["without"][0, :, 0][shuffled[:, 0]].numpy()
        assert float(az.ess(column[None])) > 1.5 * float(own[1].ess[0]), "the fault that this mends"


def test_the_draws_are_the_same_ones_and_their_error_is_that_of_their_means():
    """Over many repetitions means of the resampled draws scatter as their mcse says, and around the truth."""
    means, errors = [], []
    for seed in range(60):
        draws = weighted(1.0, 400, seed)
        picks = draws.reweighted()
        assert torch.equal(arranged(draws, picks).sort(0).values, picks.sort(0).values)
        table = az.summary(to_arviz(draws).posterior, var_names=["with"], round_to="none")
        means.extend(table["mean"])
        errors.extend(table["mcse_mean"])
    scores = (np.array(means) - 0.5) / np.array(errors)  # E[with] = 0.5 E_w[log_w] = 0.5 spread²
    assert abs(scores.mean()) < 4 / math.sqrt(120)
    assert 0.8 < scores.std() < 1.25  # the standard deviation of 120 normal scores is 1 ± 0.065


def test_resampling_adds_no_noise_of_its_own():
    """Weights near 1, and numbers that go with them: one copy or none of a draw would make the error of the mean 1.2 times
    as large."""
    draws = weighted(0.3, 2000, 5)
    value = draws["with"] + 3 * draws.log_weight
    own = moments(draws, value)
    means = value[0][draws.reweighted(4 * 2000), torch.arange(2)].mean(0)
    assert bool(((means - own.mean).abs() < 0.5 * own.se).all())
    posterior = to_arviz(replace(draws, records={"value": value})).posterior
    errors = az.summary(posterior, var_names=["value"], round_to="none")["mcse_mean"]
    assert abs(np.log(errors.to_numpy() / own.se.numpy())).max() < math.log(1.1)


def test_runs_stand_together():
    draws = weighted(0.5, 4000, 0, runs=80)
    picks = arranged(draws, draws.reweighted())
    run = picks // draws.log_guide.shape[1]
    assert all(len(column.unique_consecutive()) == len(column.unique()) for column in run.unbind(1))
    table = az.summary(to_arviz(draws).posterior, var_names=["without"], round_to="none")
    ratio = table["mcse_mean"].to_numpy() / moments(draws, draws["without"]).se.numpy()
    assert abs(np.log(ratio)).max() < math.log(1.25), ratio


@pytest.mark.filterwarnings("ignore:these draws are of 1 SMC run")
def test_exact_draws_keep_their_order_and_few_draws_need_none():
    lm = table_lm(5, 4, concentration=1.0, seed=3)
    target, guide = bind(tilted, lm, reward=letters, beta=0.3), bind(finetuned, lm.copy())
    exact = rejection(target, None, ["", "a"], num_samples=40)
    assert (to_arviz(exact).posterior["reward"].values == exact["reward"].numpy()).all()
    for draws in (
        importance(target, guide, ["", "a"], num_samples=3),
        smc(target, None, ["", "a"], num_samples=8, num_runs=3),
        smc(target, None, ["", "a"], num_samples=30, num_runs=1),
    ):
        assert to_arviz(draws).posterior["reward"].shape == (1, 4 * draws.num_samples, 2)
    assert to_arviz(exact, num_samples=7).posterior["reward"].shape == (1, 7, 2)


def test_the_estimate_is_arvizs():
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((6, 2000))
    for row, k in zip(rows, (1, 2, 5, 10, 20, 50), strict=True):
        row[:] = np.repeat(row[: 2000 // k], k)[:2000]
    of_arviz = [float(az.ess(row[None], method="mean")) for row in rows]
    assert abs(np.log(ess_of_rows(rows) / of_arviz)).max() < 0.1
