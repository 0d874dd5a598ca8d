"""Predictive checks: uniform p-values where the observed texts have the draws' law, small ones where they do not.

| what | property | tolerance |
|---|---|---|
| p-values of the mean, 300 repetitions, exact and weighted draws | P(p < level) = level | 3 standard errors |
| p-values of the PIT, likewise | P(p < level) at most the level | 3 standard errors |
| mean, PIT | enumeration | 4 standard errors |
| tails | by hand | 1e-12 |

Mutants that are rejected: weights left out; a mean whose Monte Carlo error is left out of the p-value.
"""

from dataclasses import replace

import pytest
import torch

from ppl_lm.criticism import predictive_checks as predictive
from ppl_lm.criticism.predictive_checks import against, predictive_check, shares, uniform
from ppl_lm.criticism.statistics import evaluate
from ppl_lm.criticism.weights import pareto_smooth
from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import NoSupportError
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.markov_chains import mcmc
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.lm.table import table_lm
from ppl_lm.models import constrained, tilted

LM = table_lm(5, 5, concentration=1.0, seed=3)
R, N, S = 300, 20, 60
LEVELS = torch.tensor([0.05, 0.2, 0.5], dtype=torch.float64)


def reward(completions, **_):
    return [min(1.0, 0.4 * text.count("a") + 0.1 * text.count("b")) for text in completions]


reward.r_max = 1.0


def target(beta=0.5):
    return bind(tilted, LM, reward=reward, beta=beta)


def number(texts):  # of a lattice so fine that means have few ties
    return [sum((i + 1) ** 0.5 * (ord(c) - 96) ** 0.7 for i, c in enumerate(text.split())) for text in texts]


STATISTICS = {"number": number}


def repeated(draws, seen, fit=lambda part: part):
    """p-values of R repetitions: N observed texts and S draws each, all of them new."""
    value = evaluate(draws, STATISTICS)["number"]
    observed = evaluate(seen, STATISTICS)["number"].flatten()
    found = []
    for i in range(R):
        rows = slice(i * S, (i + 1) * S)
        part = pareto_smooth(fit(draws.map(lambda v, rows=rows: v[:, rows])))
        own = observed[i * N : (i + 1) * N]
        made = against("number", value[:, rows], own, part, shares(part), 400, i)
        found.append((made.p_value, made.p_value_pit))
    return torch.tensor(found, dtype=torch.float64).T


def rate(p):
    return (p.unsqueeze(-1) < LEVELS).double().mean(0)


def error():
    return (LEVELS * (1 - LEVELS) / R).sqrt()


@pytest.fixture(scope="module")
def seen():
    torch.manual_seed(1)
    return rejection(target(), None, [""], num_samples=R * N)


@pytest.mark.parametrize("sampler", [rejection, importance])
def test_p_values_are_uniform(sampler, seen, monkeypatch):
    draws = sampler(target(), None, [""], num_samples=R * S)
    of_mean, of_pit = repeated(draws, seen)
    assert bool(((rate(of_mean) - LEVELS).abs() < 3 * error()).all()), rate(of_mean)
    assert bool((rate(of_pit) < LEVELS + 3 * error()).all()) and float(rate(of_pit)[2]) > 0.2, rate(of_pit)
    known = predictive.expectation
    sure = lambda made, value: replace(known(made, value), se=torch.zeros(1))  # noqa: E731
    monkeypatch.setattr(predictive, "expectation", sure)
    assert float((rate(repeated(draws, seen)[0]) - LEVELS - 3 * error())[0]) > 0, "the draws' own error left out"


def test_p_values_are_small_where_the_law_is_another(seen):
    weighted = importance(target(), None, [""], num_samples=R * S)
    of_mean, of_pit = repeated(weighted, seen, fit=lambda part: replace(part, kind="exact"))  # weights left out
    assert float(rate(of_mean)[0]) > 0.15 and float(rate(of_pit)[0]) > 0.08
    texts = seen.text()[0][:400]
    (good,) = predictive_check(weighted.map(lambda v: v[:, :4000]), texts, STATISTICS)
    (bad,) = predictive_check(weighted.map(lambda v: v[:, :4000]), texts, STATISTICS, prior=True)
    assert good.p_value > 1e-3 > bad.p_value and good.p_value_pit > 1e-3 > bad.p_value_pit
    assert "p = " in str(bad) and good.ess < bad.ess == pytest.approx(4000)
    prior = importance(target(), None, [""], num_samples=400)
    (fine,) = predictive_check(weighted, prior.text()[0], STATISTICS, prior=True)
    assert fine.p_value > 1e-3 and fine.p_value_pit > 1e-3


@pytest.mark.parametrize("sampler", [rejection, importance, mcmc])
def test_the_law_is_the_posteriors(sampler):
    many = {"num_samples": 500, "num_chains": 8} if sampler is mcmc else {"num_samples": 4000}
    draws = sampler(target(), None, [""], **many)
    truth = enumerate_posterior(target(), None, [""])
    x, p = truth.latents["x"][:, 0], truth.log_posterior.detach().exp()[:, 0]
    values = torch.tensor(number(LM.vocabulary.decode(x)), dtype=torch.float64)
    observed = x[p.argsort(descending=True)[:5]]
    (made,) = predictive_check(draws, observed, STATISTICS)
    assert 0 < made.se < 0.3 and abs(made.mean - float(p @ values)) < 4 * made.se
    y = torch.tensor(number(LM.vocabulary.decode(observed)), dtype=torch.float64)
    close = 1e-9
    pit = torch.stack([p @ (values < v - close).double() + p @ ((values - v).abs() <= close).double() / 2 for v in y])
    assert float((made.pit - pit).abs().max()) < 4 * (0.25 / made.ess) ** 0.5
    assert torch.allclose(made.observed, y) and made.observed_mean == pytest.approx(float(y.mean()))


def test_tails_by_hand():
    draws = rejection(target(), None, [""], num_samples=4)
    value = torch.tensor([1.0, 2.0, 2.0, 5.0], dtype=torch.float64).reshape(1, 4, 1)
    y = torch.tensor([2.0, 0.0, 5.0], dtype=torch.float64)
    made = against("n", value, y, draws, shares(draws), 100, 0)
    assert made.pit.tolist() == pytest.approx([0.5, 0.0, 0.875]) and made.tails.tolist() == pytest.approx([1, 0, 0.25])
    same = against("n", torch.ones(1, 4, 1).double(), torch.ones(3).double(), draws, shares(draws), 100, 0)
    assert same.p_value == 1 and same.se == 0 and same.tails.tolist() == [1, 1, 1]
    other = against("n", torch.ones(1, 4, 1).double(), torch.full((3,), 2.0).double(), draws, shares(draws), 999, 0)
    assert other.p_value == pytest.approx(1e-3)


def test_kolmogorovs_law():
    """5% and 1% points of Stephens' form, and uniform numbers."""
    root = 100**0.5 + 0.12 + 0.11 / 100**0.5
    grid = (torch.arange(1, 101, dtype=torch.float64) - 0.5) / 100
    for point, level in ((1.358, 0.05), (1.628, 0.01)):
        moved = (grid + point / root - 0.005).clamp_max(1.0)
        assert uniform(moved, 100.0) == pytest.approx(level, rel=0.02)
    u = torch.rand(2000, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    small = sum(uniform(row, 30.0) < 0.05 for row in u) / 2000
    assert abs(small - 0.05) < 3 * (0.05 * 0.95 / 2000) ** 0.5 and uniform(grid, 100.0) == 1


def test_impossible_draws_count_nothing():
    some = bind(constrained, LM, constraint=lambda completions, **_: ["a" in text for text in completions])
    draws = importance(some, None, [""], num_samples=500)
    has = {"has": lambda texts: [float("a" in text) for text in texts]}
    (made,) = predictive_check(draws, ["b", "a b"], has)
    assert made.mean == pytest.approx(1) and made.se < 1e-12 and made.tails.tolist() == pytest.approx([0, 1])
    never = bind(constrained, LM, constraint=lambda completions, **_: [False] * len(completions))
    with pytest.raises(NoSupportError):
        predictive_check(importance(never, None, [""], num_samples=50), ["a"], has)


def test_bad_input():
    draws = rejection(target(), None, ["", ""], num_samples=20)
    one = draws.of_prompt(0)
    with pytest.raises(ValueError, match="of_prompt"):
        predictive_check(draws, ["a"], STATISTICS)
    for observed in ([], "a b"):
        with pytest.raises(ValueError, match="at least one text"):
            predictive_check(one, observed, STATISTICS)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            predictive_check(one, ["a"], {"s": lambda texts, wrong=wrong: [wrong] * len(texts)})
    with pytest.raises(ValueError, match="shape"):
        predictive_check(one, ["a"], {"s": lambda texts: [1.0]})
    with pytest.raises(ValueError, match="prior=True"):
        predictive_check(one, ["a"], STATISTICS, prior=True)
    with pytest.raises(ValueError, match="those that are"):
        predictive_check(one, ["a"], STATISTICS, name="y")
    with pytest.raises(ValueError, match="resamples"):
        predictive_check(one, ["a"], STATISTICS, resamples=0)
    with pytest.raises(ValueError, match="one draw"):
        predictive_check(one.map(lambda v: v[:, :1]), ["a"], STATISTICS)
    weighted = importance(target(), None, [""], num_samples=20)
    with pytest.raises(ValueError, match="weight is NaN"):
        predictive_check(replace(weighted, log_guide=weighted.log_guide * float("nan")), ["a"], STATISTICS)
