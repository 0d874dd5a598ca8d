"""`expectation`, `Draws.weights` and `ess`: one mean, one error and one worth for draws of every kind.

| what | against | within |
|---|---|---|
| means of every kind of draws | enumeration | 4.5 of their standard errors |
| standard errors of every kind | the spread of the means over many repetitions | 30% |
| weights of every kind | their definition; normalised | 1e-12 |
| effective draws of every kind | variance over squared spread of the means | a factor of 2 above, 3 below |

Mutants, each rejected below: chains or runs whose draws are taken for independent ones, `log_weight` used on exact draws,
Kong's effective sample size of chains.
"""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from ppl_lm.criticism.effective_size import ess
from ppl_lm.criticism.evidence import log_evidence
from ppl_lm.criticism.expectations import expectation
from ppl_lm.criticism.sensitivity import power_scale
from ppl_lm.criticism.summaries import summary
from ppl_lm.guides import prior as prior_guide
from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import NoSupportError
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.conditional import conditional_smc
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.kernels import suffix
from ppl_lm.infer.samplers.markov_chains import mcmc
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.twists.functions import prefix_likelihood
from ppl_lm.likelihood.reward import Reward
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted

PROMPTS, REPEATS = ["", "a"], 80


@cache
def posterior():
    """Three letters, four tokens; the reward asks for b and for long texts."""

    def reward(completions, completion_ids, **_):
        return [0.7 * text.count("b") + 0.2 * len(ids) for text, ids in zip(completions, completion_ids, strict=True)]

    lm = table_lm(4, 4, max_prompt=2, concentration=1.0, seed=5)
    return bind(tilted, lm, reward=Reward(reward, r_max=3.6), beta=0.8), bind(prior_guide, lm.copy())


def smc_(num_runs, seed):
    model, _ = posterior()
    torch.manual_seed(seed)
    return smc(
        model, None, PROMPTS, num_samples=6, num_runs=num_runs, settings=SMCSettings(twist=prefix_likelihood(model))
    )


def conditional_(count, seed):
    model, _ = posterior()
    torch.manual_seed(seed)
    planted = rejection(model, None, PROMPTS, num_samples=count)
    return conditional_smc(model, None, planted, num_samples=6, settings=SMCSettings(twist=prefix_likelihood(model)))


@cache
def parts(kind):
    """`REPEATS` independent sets of draws, cut from one large one."""
    model, guide = posterior()
    torch.manual_seed(11)
    if kind in ("weighted", "exact"):
        draw = rejection if kind == "exact" else importance
        pool = draw(model, None if kind == "exact" else guide, PROMPTS, num_samples=REPEATS * 150)
        return [pool.map(lambda v, i=i: v[:, i * 150 : (i + 1) * 150]) for i in range(REPEATS)]
    if kind == "chains":
        pool, size = mcmc(model, None, PROMPTS, num_samples=200, warmup=20, num_chains=4 * REPEATS, kernel=suffix), 4
    else:
        pool, size = (smc_ if kind == "runs" else conditional_)(40 * REPEATS, 12), 40
    return [pool.map(lambda v, i=i: v[i * size : (i + 1) * size]) for i in range(REPEATS)]


KINDS = ["weighted", "exact", "chains", "runs", "conditional_runs"]


def rewards(draws):
    """The reward and its square: two numbers at once."""
    return torch.stack([draws["reward"], draws["reward"] ** 2], -1)  # (C, S, B, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_means_errors_and_worth_of_every_kind(kind):
    pieces = parts(kind)
    assert {piece.kind for piece in pieces} == {kind}
    truth = enumerate_posterior(*posterior(), PROMPTS)
    p, reward = truth.log_posterior.detach().exp(), truth.records["reward"].detach()
    exactly = torch.stack([(p * reward).sum(0), (p * reward**2).sum(0)], -1)  # (B, 2)
    estimates = [expectation(piece, rewards(piece)) for piece in pieces]
    means, errors = torch.stack([e.mean for e in estimates]), torch.stack([e.se for e in estimates])
    spread = means.std(0)
    assert bool(
        ((means.mean(0) - exactly).abs() < 4.5 * spread / REPEATS**0.5 + 2e-3).all()
    )  # self-normalised: bias 1/n
    told = errors.mean(0)
    assert bool(((told / spread - 1).abs() < 0.3).all()), told / spread  # the spread is known to 8%
    worth = torch.stack([ess(piece) for piece in pieces]).mean(0)
    really = ((p * reward**2).sum(0) - (p * reward).sum(0) ** 2) / spread[:, 0].square()
    assert bool((worth < 2 * really).all()) and bool((worth > really / 3).all()), (worth, really)
    for piece in pieces[:3]:
        torch.testing.assert_close(piece.weights.sum((0, 1)), torch.ones(2, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["chains", "runs"])
def test_draws_that_depend_on_each_other_are_not_taken_for_independent_ones(kind):
    """The mutant: errors as of independent draws, and Kong's effective sample size."""
    pieces = parts(kind)
    estimates = [expectation(piece, piece["reward"]) for piece in pieces]
    spread = torch.stack([e.mean for e in estimates]).std(0)
    alone = [replace(piece, kind="exact" if kind == "chains" else "weighted") for piece in pieces]
    wrong = torch.stack([expectation(piece, piece["reward"]).se for piece in alone]).square().mean(0).sqrt()
    assert float((wrong / spread).min()) < 0.75, wrong / spread
    assert float(ess(alone[0]).max()) > 1.5 * float(ess(pieces[0]).min())


def test_weights_are_right_where_log_weights_are_not():
    (exact, *_), (chains, *_) = parts("exact"), parts("chains")
    for draws in (exact, chains):
        assert torch.equal(draws.weights, torch.full_like(draws.log_weight, 1 / draws.num_samples))
        assert float(draws.log_weight.std()) > 0.1  # the mutant: they are not equal
    truth = enumerate_posterior(*posterior(), PROMPTS)
    exactly = (truth.log_posterior.detach().exp() * truth.records["reward"].detach()).sum(0)
    pool = rejection(posterior()[0], None, PROMPTS, num_samples=2000)
    weighted = pool.log_weight.flatten(0, 1).softmax(0)
    right, wrong = expectation(pool, pool["reward"]), (weighted * pool["reward"][0]).sum(0)
    assert bool(((right.mean - exactly).abs() < 4.5 * right.se).all())
    assert bool(((wrong - exactly).abs() > 6 * right.se).all())
    draws = importance(*posterior(), PROMPTS, num_samples=50)
    torch.testing.assert_close(draws.weights[0], draws.log_weight[0].softmax(0), atol=1e-12, rtol=0)
    with pytest.raises(NoSupportError, match="all weights are zero"):
        _ = replace(draws, log_likelihood=torch.full_like(draws.log_likelihood, -torch.inf)).weights


def test_runs_are_weighted_together_and_conditional_ones_each_alone():
    runs, conditional = smc_(5, 1), conditional_(5, 1)
    log_w = runs.log_weight
    torch.testing.assert_close(runs.weights, (log_w - log_w.logsumexp((0, 1))).exp(), atol=1e-12, rtol=0)
    torch.testing.assert_close(conditional.weights, conditional.log_weight.softmax(1) / 5, atol=1e-12, rtol=0)


def test_what_cannot_be_told_is_infinite_or_nan():
    draws = importance(*posterior(), PROMPTS, num_samples=30)
    one = draws.map(lambda v: v[:, :1])
    assert bool((expectation(one, one["reward"]).se == math.inf).all())
    run = smc_(1, 2)
    assert bool((expectation(run, run["reward"]).se == math.inf).all()) and bool(ess(run).isnan().all())
    lost = torch.where(torch.arange(30).reshape(1, 30, 1) == 3, -torch.inf, draws["reward"])
    assert bool((expectation(draws, lost).mean == -torch.inf).all())
    assert bool((expectation(draws, lost).se == math.inf).all())
    impossible = replace(draws, log_likelihood=torch.where(lost == -torch.inf, -torch.inf, draws.log_likelihood))
    assert bool(expectation(impossible, lost).mean.isfinite().all())  # a draw without weight may be anything
    still = expectation(parts("chains")[0], torch.ones(4, 200, 2))
    assert still.mean.tolist() == pytest.approx([1.0, 1.0], abs=1e-12) and float(still.se.max()) < 1e-12
    assert str(expectation(draws, torch.zeros(1, 30, 2))) == "0 ± 0, 0 ± 0"


def test_what_has_another_shape_is_refused(unchecked):
    """Without the check a number a text broadcasts to as many means; log weights of chains pass for one draw each."""
    draws = importance(*posterior(), PROMPTS, num_samples=30)
    for values in (torch.ones(30), torch.ones(30, 2), torch.ones(1, 29, 2), torch.ones(2, 30, 2)):
        with pytest.raises(ValueError, match="number for each draw"):
            expectation(draws, values)
    with pytest.raises(ValueError, match="the draws themselves"):
        ess(draws.log_weight)


@pytest.mark.parametrize("alpha", [0.7, 1.4])
def test_power_scaling_of_runs_is_the_enumerated_one(alpha):
    """Of conditional runs too, each of which has a posterior draw of its own: the mutant weights them by their Ẑ."""
    truth = enumerate_posterior(*posterior(), PROMPTS)
    log_likelihood = truth.log_joint - (truth.log_joint - truth.records["reward"] / 0.8)
    p = (truth.log_joint + (alpha - 1) * log_likelihood)[:, 0].detach().softmax(0)
    exactly = float((p * truth.records["reward"][:, 0]).sum())
    for draws in (smc_(800, 3), conditional_(800, 3)):
        (likelihood, _) = power_scale(draws.of_prompt(0), [alpha]).scaled
        mean, se = likelihood.means["reward"]
        assert abs(mean - exactly) < 4.5 * se < 0.2, draws.kind


def test_draws_under_another_guide_have_no_weights():
    """The mutant: weights p/q of draws that q did not draw, which look as good as any."""
    model, guide = posterior()
    for draws in (importance(model, guide, PROMPTS, num_samples=50), smc_(4, 1), conditional_(4, 1)):
        moved = draws.under(guide)
        assert moved.kind == "rescored" and torch.equal(moved["x"], draws["x"])
        with pytest.raises(ValueError, match="which are not the law that drew them"):
            _ = moved.weights
        with pytest.raises(ValueError, match="which are not the law that drew them"):
            ess(moved)
    assert rejection(model, None, PROMPTS, num_samples=20).under(guide).kind == "exact"


def test_other_weights_are_another_law():
    draws = importance(*posterior(), PROMPTS, num_samples=4000)
    equal = torch.full_like(draws.log_weight, 1 / 4000)
    as_they_come = expectation(draws, draws["reward"], equal)
    torch.testing.assert_close(as_they_come.mean, draws["reward"][0].mean(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(as_they_come.se, draws["reward"][0].std(0) / 4000**0.5, atol=1e-12, rtol=0)


def test_one_draw_with_all_the_weight_tells_no_error():
    """Once, "1 ± 0", and 0 more draws for any error."""
    model = bind(
        tilted,
        table_lm(4, 3, max_prompt=3, concentration=1.0, seed=1),
        reward=lambda completions, **_: [0.0] * len(completions),
    )
    draws = importance(model, None, ["a"], num_samples=40)
    w = torch.full_like(draws.log_likelihood, -torch.inf)
    w[0, 3] = 0.0
    alone = replace(draws, log_likelihood=w)
    nearly = replace(draws, log_likelihood=w.clamp_min(-180.0))
    for some in (alone, nearly):
        assert float(expectation(some, some["reward"]).se) == math.inf
        table = summary(some, error=0.01)
        assert (
            bool(table["se"].eq(math.inf).all())
            and bool(table["more_draws"].isna().all())
            and bool((table["ess"] == 0).all())
        )
        assert float(log_evidence(some).upper_se) == math.inf
    w = w.clone()
    w[0, :5] = 0.0
    assert math.isfinite(float(expectation(replace(draws, log_likelihood=w), draws.log_prior).se))


def test_chains_are_thinned_over_all_of_them():
    lm = table_lm(3, 2, concentration=1.0)
    model = bind(tilted, lm, reward=lambda completions, **_: [0.0] * len(completions))
    chains = mcmc(model, None, [""], num_samples=10, num_chains=4, warmup=1)
    picks = chains.reweighted(8)[:, 0]
    assert {int(i) // 10 for i in picks} == {0, 1, 2, 3} and len(set(picks.tolist())) == 8
    assert torch.equal(chains.reweighted()[:, 0], torch.arange(40))
