"""Means of weights and weighted means, held against formulas written out and against their own spread over many repetitions.

| what | property | tolerance |
|---|---|---|
| `weighted_mean` of equal weights | mean and s/√n of a plain one | 1e-12 |
| `weighted_mean`, `log_mean` | the standard error is the spread of the estimate over 4,000 repetitions | 5 of its errors |
| `kong_ess` | (Σw)²/Σw², n of equal weights, 1 of one weight alone | 1e-12 |

Mutants that are rejected: an error without n/(n - 1) at 4 draws; an error without weights; the mean of log weights taken
for the log of their mean.
"""

import math

import pytest
import torch

from ppl_lm.infer.log_weights import kong_ess, log_mean, mean, weighted_mean


def test_equal_weights_weigh_nothing():
    values = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, se = weighted_mean(torch.full_like(values, -700.0), values)
    expected, plain_se = mean(values)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(se, plain_se, atol=1e-12, rtol=0)
    torch.testing.assert_close(se, values.std(0) / 2, atol=1e-12, rtol=0)
    without = se * math.sqrt(3 / 4)  # the mutant: Σ influence² alone
    assert bool(((without - plain_se).abs() > 1e-3 * plain_se).all())


@pytest.fixture(scope="module")
def repetitions():
    """4,000 times 200 draws: values, log weights that go with them, and what the means are."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(200, 4000, dtype=torch.float64, generator=generator)
    noise = torch.randn(200, 4000, dtype=torch.float64, generator=generator)
    return values, 0.5 * values + 0.3 * noise  # log weights: E[w] = exp((0.25 + 0.09) / 2), E[w v] / E[w] = 0.5


def is_spread(estimates, errors):
    """Whether the stated errors are, on average, the standard deviation of the estimates, within five of its own errors."""
    spread, stated = float(estimates.std()), float(errors.square().mean().sqrt())
    return (
        abs(stated - spread) < 5 * spread / math.sqrt(2 * len(estimates)) + 0.02 * spread
    )  # 2%: the delta method at 200 draws


def test_errors_of_weighted_means_are_their_spread(repetitions):
    values, log_w = repetitions
    found, se = weighted_mean(log_w, values)
    assert float(found.mean()) == pytest.approx(0.5, abs=0.01) and is_spread(found, se)
    assert not is_spread(found, mean(values)[1]), "the error of the unweighted mean passes for that of the weighted"


def test_errors_of_the_mean_weight_are_its_spread(repetitions):
    _, log_w = repetitions
    found, se = log_mean(log_w)
    assert float(found.mean()) == pytest.approx(0.17, abs=0.01) and is_spread(found, se)
    assert float(log_w.mean()) < 0.1, "the mean of the log weights would have been found out"


def test_what_weights_are_worth():
    w = torch.tensor([[0.5, 1.0], [0.25, 0.0], [0.25, 0.0]], dtype=torch.float64)
    worth = kong_ess(w.log() + 800.0)
    torch.testing.assert_close(worth, torch.tensor([1 / (0.25 + 2 / 16), 1.0], dtype=torch.float64), atol=1e-12, rtol=0)
    assert float(kong_ess(torch.full((7,), -3.0, dtype=torch.float64))) == pytest.approx(7.0, abs=1e-12)
    assert float(kong_ess(torch.full((7,), -math.inf, dtype=torch.float64))) == 0.0


def test_one_draw_has_no_error_and_impossible_ones_do_not_count():
    value, se = weighted_mean(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert float(value) == 1.0 and float(se) == math.inf
    log_w, values = torch.tensor([0.0, 0.0, -math.inf]).double(), torch.tensor([1.0, 3.0, math.nan]).double()
    assert float(weighted_mean(log_w, values)[0]) == 2.0
    for log_w in (torch.tensor([0.0, -180.0, -180.0]), torch.tensor([0.0, -0.1])):  # worth fewer than two
        assert float(weighted_mean(log_w.double(), torch.arange(float(len(log_w))).double())[1]) == math.inf
    assert float(weighted_mean(torch.zeros(2).double(), torch.tensor([1.0, 3.0]).double())[1]) == 1.0
    with pytest.raises(ValueError, match="at least 2"):
        mean(torch.ones(1, dtype=torch.float64))
