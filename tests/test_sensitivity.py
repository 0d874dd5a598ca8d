"""Power-scaling against enumeration.

| what | property | tolerance |
|---|---|---|
| means at power alpha, of draws of every kind | enumeration at β/alpha, or of the prior's power | 4 standard errors |
| | standard errors: 40 repetitions, of chains 30 | spread of each z-score 1 ± 0.5 |
| sensitivity | enumeration, mean of 30 runs of 2,000 draws | 4 standard errors + 1% |
| cumulative Jensen-Shannon distance | ArviZ's `psens`, where it has one | 1e-6 |

Mutants that are rejected: alpha - 1 with the wrong sign; prior and likelihood exchanged; chains' draws taken for independent.
"""

import math
from dataclasses import replace

import arviz as az
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppl_lm.criticism import sensitivity
from ppl_lm.criticism.sensitivity import DELTA, Sensitivity, cjs, power_scale
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import NoSupportError
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.kernels import suffix
from ppl_lm.infer.samplers.markov_chains import mcmc
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.lm.table import table_lm
from ppl_lm.models import constrained, tilted

LM = table_lm(4, 4, concentration=1.0, seed=3)
BETA = 0.4


def reward(completions, **_):
    return [min(1.0, 0.3 * text.count("a") + 0.1 * text.count("b")) for text in completions]


reward.r_max = 1.0
STATISTICS = {"c": lambda texts: [float(text.count("c")) for text in texts]}


def target(beta=BETA):
    return bind(tilted, LM, reward=reward, beta=beta)


def enumerated(component="likelihood", alpha=1.0):
    """The scaled posterior over all texts, (N,), and the numbers of each."""
    truth = enumerate_posterior(target(), None, [""])
    reward = truth.records["reward"][:, 0].double()
    log_prior = truth.log_joint.detach()[:, 0] - reward / BETA
    powers = (alpha if component == c else 1.0 for c in ("prior", "likelihood"))
    p = sum(power * term for power, term in zip(powers, (log_prior, reward / BETA), strict=True)).softmax(0)
    x = truth.latents["x"][:, 0]
    length = LM.vocabulary.lengths(x).double()
    c = torch.tensor(STATISTICS["c"](LM.vocabulary.decode(x)), dtype=torch.float64)
    return p, {"reward": reward, "length": length, "log_prior": log_prior, "c": c}


def exact_(count=4000):
    return rejection(target(), None, [""], num_samples=count)


def weighted_(count=4000):
    return importance(target(), bind(finetuned, LM.copy()), [""], num_samples=count)


def markov_(count=500):
    return mcmc(target(), None, [""], num_samples=count, warmup=50, num_chains=8)


def runs_(count=100):
    return smc(target(), None, [""], num_samples=count, num_runs=40)


def off(made, powers=None):
    """The largest distance from enumeration in standard errors, over all numbers and powers."""
    worst = 0.0
    for one in made.scaled:
        p, numbers = enumerated(*(powers(one) if powers else (one.component, one.alpha)))
        for name, value in numbers.items():
            centre, se = one.means[name]
            assert 0 < se < 0.2
            worst = max(worst, abs(centre - float(p @ value)) / se)
    return worst


@pytest.mark.parametrize("draw", [exact_, weighted_, markov_, runs_])
def test_means_are_those_of_the_scaled_posterior(draw):
    draws = draw()
    made = power_scale(draws, statistics=STATISTICS)
    assert [(one.component, one.alpha) for one in made.scaled] == [
        (c, a) for c in ("likelihood", "prior") for a in (0.8, 1.25)
    ]
    assert off(made) < 4
    assert off(made, lambda one: (one.component, 2 - one.alpha)) > 5, "alpha - 1 with the wrong sign"
    assert off(made, lambda one: ("prior" if one.component == "likelihood" else "likelihood", one.alpha)) > 5
    p, numbers = enumerated()
    for name, value in numbers.items():
        centre, se = made.means[name]
        assert abs(centre - float(p @ value)) < 4 * se


def test_the_reward_at_power_alpha_is_at_beta_over_alpha():
    truth = enumerate_posterior(target(BETA / 1.25), None, [""])
    p, numbers = enumerated("likelihood", 1.25)
    assert torch.allclose(p, truth.log_posterior.detach().exp()[:, 0], atol=1e-12)
    made = power_scale(exact_(), alphas=[1.25])
    centre, se = made.scaled[0].means["reward"]
    assert abs(centre - float(p @ truth.records["reward"][:, 0].double())) < 4 * se


def spread(pieces):
    """Of each mean's errors over the pieces, in the standard errors that are given; 1 where these are right."""
    z = []
    for piece in pieces:
        each = []
        for one in power_scale(piece).scaled:
            p, numbers = enumerated(one.component, one.alpha)
            for name in ("reward", "length", "log_prior"):
                centre, se = one.means[name]
                each.append((centre - float(p @ numbers[name])) / se)
        z.append(each)
    return torch.tensor(z).square().mean(0).sqrt()  # (12,), its own error 1 / (2 · pieces) ** 0.5


def test_errors_are_as_large_as_they_say():
    pool = exact_(40 * 1000)
    found = spread(pool.map(lambda v, i=i: v[:, i * 1000 : (i + 1) * 1000]) for i in range(40))
    assert float((found - 1).abs().max()) < 0.5, found


def test_errors_of_chains_take_autocorrelation_into_account():
    pool = mcmc(target(), None, [""], num_samples=200, warmup=30, num_chains=30 * 4, kernel=suffix)
    pieces = [pool.map(lambda v, i=i: v[i * 4 : (i + 1) * 4]) for i in range(30)]
    found, naive = spread(pieces), spread(replace(piece, kind="exact") for piece in pieces)
    assert float((found - 1).abs().max()) < 0.5 and float(naive.max()) > 1.5, (found, naive)


def test_sensitivity_is_the_enumerated_one():
    pool = exact_(30 * 2000)
    found = [
        power_scale(pool.map(lambda v, i=i: v[:, i * 2000 : (i + 1) * 2000]), [], STATISTICS).sensitivity
        for i in range(30)
    ]
    p, numbers = enumerated()
    for component in ("likelihood", "prior"):
        for name, value in numbers.items():
            exactly = 0.0
            for alpha in (1 / (1 + DELTA), 1 + DELTA):
                q, _ = enumerated(component, alpha)
                exactly += max(cjs(value, p, q), cjs(-value, p, q)) / (2 * math.log2(1 + DELTA))
            each = torch.tensor([made[component][name] for made in found])
            se = float(each.std()) / 30**0.5
            assert abs(float(each.mean()) - exactly) < 4 * se + 0.01 * exactly, (
                component,
                name,
                exactly,
                each.mean(),
                se,
            )


def test_words():
    made = Sensitivity({}, [], {"likelihood": {"a": 0.2, "b": 0.01, "c": 0.2, "d": None}, "prior": {}})
    made.sensitivity["prior"] = {"a": 0.2, "b": 0.2, "c": 0.01, "d": None}
    assert [made.word(k) for k in "abcd"] == [
        "β decides it, against the prior",
        "β hardly matters for it: the prior decides",
        "β decides it, the prior hardly matters",
        "it never changes",
    ]


@pytest.mark.skipif(not hasattr(az, "psens"), reason="this ArviZ has no psens")
def test_sensitivity_is_arvizs():
    """On numbers without ties, where both smooth the same weights."""
    draws = exact_(1000)
    generator = torch.Generator().manual_seed(0)
    log_l, value = (torch.randn(1, 1000, 1, dtype=torch.float64, generator=generator) for _ in range(2))
    value = value + log_l
    made = power_scale(replace(draws, log_likelihood=log_l, records={"v": value}))
    given_ = {"posterior": {"v": value[..., 0].numpy()}, "log_likelihood": {"o": log_l.numpy()}}
    found = az.psens(az.from_dict(**given_), component="likelihood")
    assert made.sensitivity["likelihood"]["v"] == pytest.approx(float(found["v"]), abs=1e-6)


@given(st.lists(st.tuples(st.integers(-5, 5), st.floats(0.01, 1), st.floats(0.01, 1)), min_size=1, max_size=8))
def test_the_distance_is_one(rows):
    """Symmetric, from 0 to 1, the same wherever its ties stand, and 0 of a law to itself."""
    x, p, q = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    p, q = p / p.sum(), q / q.sum()
    found = cjs(x, p, q)
    if len(set(x.tolist())) == 1:
        assert found is None
        return
    assert -1e-9 <= found <= 1 + 1e-9 and found == pytest.approx(cjs(x, q, p), abs=1e-6)
    assert found == pytest.approx(cjs(x.flip(0), p.flip(0), q.flip(0)), abs=1e-6)
    assert cjs(x, p, p) == pytest.approx(0, abs=1e-6)
    points = np.unique(x.numpy())
    total = bound = 0.0
    for low, high in zip(points[:-1], points[1:], strict=True):  # between two points both CDFs are flat
        f, g = float(p[x <= low].sum()), float(q[x <= low].sum())
        m = (f + g) / 2
        total += (high - low) * (f * math.log2(f / m) + g * math.log2(g / m))
        bound += (high - low) * (f + g)
    assert found == pytest.approx(math.sqrt(max(0, total) / bound), abs=1e-6)


def test_extreme_powers_are_not_answered():
    draws = exact_(2000)
    heavy = torch.empty(1, 2000, 1, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
    draws = replace(draws, log_likelihood=heavy)  # at power alpha the weights' tail has the shape alpha - 1
    made = power_scale(draws, alphas=(1.1, 2.2))
    near, far = made.scaled[:2]
    assert near.means is not None and near.khat < 0.5
    assert far.means is None and far.khat > 0.9
    few = power_scale(exact_(20), alphas=(1.25,)).scaled[0]
    assert few.means is None and few.ess < 30


def test_impossible_draws_count_nothing():
    some = bind(constrained, LM, constraint=lambda completions, **_: ["a" in text for text in completions])
    made = power_scale(importance(some, None, [""], num_samples=2000))
    for one in made.scaled[:2]:  # a hard constraint has no temperature
        assert one.means["length"][0] == pytest.approx(made.means["length"][0], abs=0.05)
    assert made.sensitivity["likelihood"]["length"] < 1e-6 < made.sensitivity["prior"]["length"]
    assert (
        made.word("length") == "β hardly matters for it: the prior decides" and made.word("holds") == "it never changes"
    )
    never = bind(constrained, LM, constraint=lambda completions, **_: [False] * len(completions))
    with pytest.raises(NoSupportError):
        power_scale(importance(never, None, [""], num_samples=50))


def test_bad_input():
    draws = exact_(50)
    for alpha in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            power_scale(draws, alphas=[alpha])
    with pytest.raises(ValueError, match="of_prompt"):
        power_scale(rejection(target(), None, ["", ""], num_samples=5))
    with pytest.raises(ValueError, match="one draw"):
        power_scale(draws.map(lambda v: v[:, :1]))
    for field in ("log_prior", "log_likelihood", "log_guide"):
        with pytest.raises(ValueError, match="NaN"):
            power_scale(replace(draws, **{field: getattr(draws, field) * math.nan}))
    with pytest.raises(ValueError, match="NaN or infinite"):
        power_scale(replace(draws, records={"reward": draws["reward"] * math.nan}))
    assert sensitivity.COMPONENTS == ("likelihood", "prior")


def test_weights_whose_fit_fails_stay():
    """105 of 2,000 weights are the largest, and tied: ArviZ's smoothed weights are NaN."""
    draws = exact_(2000)
    log_l = torch.zeros(1, 2000, 1, dtype=torch.float64)
    log_l[:, :105] = 1.0
    made = power_scale(replace(draws, log_likelihood=log_l, records={"v": log_l}), alphas=[2.0])
    w = log_l.exp() / log_l.exp().sum()
    if hasattr(az, "psislw"):  # before ArviZ 1
        with np.errstate(invalid="ignore"):
            assert np.isnan(az.psislw(log_l.numpy().ravel())[0]).any()
    assert made.scaled[0].means["v"][0] == pytest.approx(float((w * log_l).sum()))
    assert all(math.isfinite(v) for v in made.sensitivity["likelihood"].values())
