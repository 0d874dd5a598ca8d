"""Ranks of exact draws among exact draws are uniform; among others they are not."""

import pytest
import torch

from ppl_lm.criticism.calibration import REPEATS, sbc
from ppl_lm.infer.binding import bind
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted

LM = table_lm(5, 4, concentration=1.0, seed=3)
R, L = 200, 19


def reward(completions, **_):
    return [min(1.0, 0.4 * text.count("a") + 0.1 * text.count("b")) for text in completions]


def target(beta=0.5, lm=LM):
    model = bind(tilted, lm, reward=reward, beta=beta)
    model.arguments["reward"].r_max = 1.0
    return model


def draws(model, count):
    return rejection(model, None, [""], num_samples=count)


@pytest.mark.slow
def test_false_alarms_are_as_rare_as_they_should_be():
    """Of 200 repetitions on exact draws 5% are called not calibrated, within 3 standard errors; the bound is Bonferroni's, so
    they may be fewer."""
    pool, exact = draws(target(), 200 * R * 5), draws(target(), 200 * R)
    alarms = []
    for i in range(200):
        some = exact.map(lambda v, i=i: v[:, i * R : (i + 1) * R])
        other = pool.map(lambda v, i=i: v[:, i * R * 5 : (i + 1) * R * 5])
        alarms.append(sbc(some, other, num_draws=5, seed=i).p_value < 0.05)
    assert sum(alarms) / 200 < 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


def test_exact_draws_pass_and_others_do_not():
    exact = draws(target(), R)
    found = sbc(exact, draws(target(), R * L), L)
    assert found.p_value > 0.01 and 0.1 < found.detectable < 0.5 and "calibrated as far" in str(found)
    assert found.ranks["reward"].shape == (R,) and int(found.ranks["reward"].max()) <= L
    from_prior = importance(target(), None, [""], num_samples=R * L)
    assert sbc(exact, from_prior, L).p_value < 0.01 and "not calibrated" in str(sbc(exact, from_prior, L))
    much = rejection(target(0.25), None, [""], num_samples=R * L)
    assert sbc(exact, much, L).p_value < 0.05, "the likelihood squared"


def test_a_mode_that_the_numbers_do_not_see_is_seen_by_log_q():
    """Texts that begin with a, a third of the mass, left out and the others' reward made the same: only log q tells."""
    model = target()
    model.arguments["reward"] = lambda prompts, x: torch.zeros(x.shape[:-1])
    model.arguments["reward"].r_max = 0.0
    exact, pool = draws(model, R), draws(model, 4 * R * L)
    first = lambda d: d["x"][..., 0]  # noqa: E731
    missed = first(pool).flatten().mode().values
    kept = pool.map(lambda v: v[:, (first(pool) != missed)[0, :, 0]]).map(lambda v: v[:, : R * L])
    log_q = lambda d: {"log_q": d.log_prior.masked_fill(first(d) == missed, -torch.inf)}  # noqa: E731
    assert sbc(exact, kept, L, statistics=log_q).p_values["log_q"] < 0.001
    assert sbc(exact, pool, L, statistics=lambda d: {"log_q": d.log_prior}).p_value > 0.01
    with pytest.raises(ValueError, match="NaN"):
        sbc(exact, pool, L, statistics=lambda d: {"r": d.log_prior * torch.nan})
    with pytest.raises(ValueError, match="shape"):
        sbc(exact, pool, L, statistics=lambda d: {"r": d.log_prior[0]})


def test_the_band_holds_as_often_as_it_says():
    exact = draws(target(), R)
    band = sbc(exact, draws(target(), R * L), L).band
    generator = torch.Generator().manual_seed(5)
    ranks = torch.randint(L + 1, (REPEATS, R), generator=generator)
    ecdf = (ranks.unsqueeze(-1) <= torch.arange(L + 1)).double().mean(1)
    outside = ((ecdf < band[0] - 1e-12) | (ecdf > band[1] + 1e-12)).any(-1).double().mean()
    assert abs(float(outside) - 0.05) < 0.025
    assert bool((band[0] <= band[1]).all()) and band.shape == (2, L + 1)


def test_bad_input():
    exact = draws(target(), 30)
    with pytest.raises(ValueError, match="at least 570"):
        sbc(exact, draws(target(), 100), L)
    with pytest.raises(ValueError, match="exact posterior draws"):
        sbc(importance(target(), None, [""], num_samples=30), exact, 1)
    with pytest.raises(ValueError, match="at least 20"):
        sbc(draws(target(), 5), exact, L)
