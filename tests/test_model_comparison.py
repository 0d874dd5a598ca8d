"""Model comparison against enumerated evidence.

| what | property | tolerance |
|---|---|---|
| log Z, differences | enumeration, bounds taken off | 4 standard errors |
| 95% intervals of differences and probabilities | 400 repetitions cover the truth | 95% ± 3 standard errors |

Mutants that are rejected: bounds left out; the best model's error left out of a difference's.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppl_lm.criticism.evidence import log_evidence
from ppl_lm.criticism.model_comparison import compare_models
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import NoSupportError
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.markov_chains import mcmc
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.infer.traces.observations import likelihood_bound
from ppl_lm.lm.table import table_lm
from ppl_lm.models import constrained, tilted

PRIORS = {"one": table_lm(4, 3, max_prompt=2, concentration=1.0, seed=3), "two": table_lm(4, 3, max_prompt=2, seed=4)}
TEXTS = ["", "a"]
R, S = 400, 400


def many_a(completions, **_):
    return [min(1.0, 0.5 * text.count("a")) for text in completions]


def any_b(completions, **_):
    return [1.5 + ("b" in text) for text in completions]  # the constant must not matter


many_a.r_max, any_b.r_max = 1.0, 2.5


def target(prior="one", reward=many_a, beta=0.5):
    return bind(tilted, PRIORS[prior], reward=reward, beta=beta)


def log_z(model, texts=TEXTS):
    return float(enumerate_posterior(model, None, texts).log_z.detach().sum())


def smc_(model, prompts):
    return smc(model, None, prompts, num_samples=100, num_runs=60)


def rejection_(model, prompts):
    return rejection(model, None, prompts, num_samples=1000)


def importance_(model, prompts):
    return importance(model, bind(finetuned, PRIORS["one"].copy()), prompts, num_samples=3000)


def evidence_(model, prompts):
    return log_evidence(importance_(model, prompts))


@pytest.mark.parametrize("sampler", [importance_, evidence_, rejection_, smc_])
def test_evidence_of_two_rewards_is_the_enumerated_one(sampler):
    models = {"a": target(), "b": target(reward=any_b), "hot": target(beta=2.0)}
    bounds = {name: likelihood_bound(model, TEXTS) for name, model in models.items()}
    assert bounds == pytest.approx({"a": 2.0, "b": 5.0, "hot": 0.5})
    rows = compare_models({name: sampler(model, TEXTS) for name, model in models.items()}, bounds)
    truth = {name: log_z(model) - 2 * bounds[name] for name, model in models.items()}
    assert [row.name for row in rows] == sorted(truth, key=truth.__getitem__, reverse=True) and rows[0].name == "hot"
    total = sum(map(math.exp, truth.values()))
    for row in rows:
        assert 0 < row.se < 0.1 and abs(row.log_z - truth[row.name]) < 4 * row.se
        assert row.difference == pytest.approx(row.log_z - rows[0].log_z) and row.difference <= 0
        assert abs(row.difference - truth[row.name] + truth["hot"]) <= 4 * row.difference_se
        assert row.low <= row.probability <= row.high and abs(row.probability - math.exp(truth[row.name]) / total) < 0.1
        assert row.name in str(row)
        assert abs(row.log_z - log_z(models[row.name])) > 4 * row.se, "bounds left out"
    assert sum(row.probability for row in rows) == pytest.approx(1) and rows[0].difference_se == 0


def test_only_runs_are_independent():
    draws = smc_(target(), [""])
    found = log_evidence(draws)  # of as many runs
    for row in compare_models({"a": draws, "b": draws}, same_likelihood=True):
        assert row.log_z == pytest.approx(float(found.log_z)) and row.se == pytest.approx(float(found.log_z_se))


def test_two_priors_and_two_prompts_need_no_bound():
    for models, texts in (
        ({"one": target("one"), "two": target("two")}, (TEXTS, TEXTS)),
        ({"empty": target(), "a": target()}, ([""], ["a"])),
    ):
        made = {name: importance(model, None, t, num_samples=3000) for (name, model), t in zip(models.items(), texts)}  # noqa: B905
        best, other = compare_models(made, same_likelihood=True)
        truth = {name: log_z(model, t) for (name, model), t in zip(models.items(), texts, strict=True)}
        assert abs(other.difference - truth[other.name] + truth[best.name]) < 4 * other.difference_se < 0.5


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say():
    """Of one model against another, whichever is the best."""
    models = {"one": target("one"), "two": target("two")}
    pools = {name: importance(model, None, [""], num_samples=R * S) for name, model in models.items()}
    truth = {name: log_z(model, [""]) for name, model in models.items()}
    gap = truth["one"] - truth["two"]
    covered, in_interval, mutant = [], [], []
    for i in range(R):
        part = {name: pool.map(lambda v, i=i: v[:, i * S : (i + 1) * S]) for name, pool in pools.items()}
        rows = compare_models(part, same_likelihood=True, seed=i)
        by_name = {row.name: row for row in rows}
        found = by_name["one"].log_z - by_name["two"].log_z
        covered.append(abs(found - gap) < 1.96 * rows[1].difference_se)
        mutant.append(abs(found - gap) < 1.96 * rows[1].se)  # without the best model's error
        in_interval.append(by_name["one"].low <= 1 / (1 + math.exp(-gap)) <= by_name["one"].high)
    error = 3 * (0.05 * 0.95 / R) ** 0.5
    assert abs(sum(covered) / R - 0.95) < error and abs(sum(in_interval) / R - 0.95) < error
    assert sum(mutant) / R < 0.95 - error


@given(st.lists(st.floats(-2000, 2000), min_size=2, max_size=6), st.floats(0, 1e3))
def test_probabilities_are_some(values, se):
    """Of any evidence: a law, within its intervals, ordered, and never NaN."""
    one = EVIDENCE
    models = {str(i): _evidence(one, value, se) for i, value in enumerate(values)}
    rows = compare_models(models, same_likelihood=True)
    assert sum(row.probability for row in rows) == pytest.approx(1)
    assert all(0 <= row.low <= row.high <= 1 and row.difference <= 0 for row in rows)
    assert [row.log_z for row in rows] == sorted(values, reverse=True)
    shifted = compare_models(models, {name: 3.0 for name in models})
    assert [row.difference for row in shifted] == pytest.approx([row.difference for row in rows])


def _evidence(one, value, se):
    number = torch.tensor([value], dtype=torch.float64)
    return replace(one, log_z=number, log_z_se=torch.full_like(number, se))


EVIDENCE = log_evidence(importance(target(), None, [""], num_samples=100))


def test_factors_of_different_rewards_are_not_compared():
    made = {"a": importance(target(), None, TEXTS, num_samples=100)}
    made["b"] = importance(target(reward=any_b), None, TEXTS, num_samples=100)
    with pytest.raises(ValueError, match="no probability"):
        compare_models(made)
    with pytest.raises(ValueError, match="r_max"):
        compare_models(made, {"a": 2.0, "b": None})
    with pytest.raises(ValueError, match="reached 5.00"):
        compare_models(made, {"a": 2.0, "b": 2.0})
    with pytest.raises(ValueError, match="one for each"):
        compare_models(made, {"a": 2.0})
    with pytest.raises(ValueError, match="give one"):
        compare_models(made, {"a": 2.0, "b": 5.0}, same_likelihood=True)


def test_impossible_draws():
    """Some lower the evidence; of none but such it is not known."""

    def holding(word):
        return bind(constrained, PRIORS["one"], constraint=lambda completions, **_: [word in t for t in completions])

    models = {word: holding(word) for word in "ab"}
    rows = compare_models(
        {word: importance(model, None, [""], num_samples=2000) for word, model in models.items()}, {"a": 0.0, "b": 0.0}
    )
    for row in rows:
        assert abs(row.log_z - log_z(models[row.name], [""])) < 4 * row.se and row.reliable is None
    never = importance(holding("zzz"), None, [""], num_samples=50)
    with pytest.raises(NoSupportError, match="'n'"):
        compare_models({"n": never, "m": never}, same_likelihood=True)


def test_heavy_weights_are_told():
    draws = importance(target(), None, [""], num_samples=1000)
    x = torch.empty(1, 1000, 1, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
    heavy = replace(draws, log_guide=draws.log_prior + draws.log_likelihood - 1.3 * x)
    rows = {row.name: row for row in compare_models({"fine": draws, "heavy": heavy}, same_likelihood=True)}
    assert rows["heavy"].reliable is False and rows["fine"].reliable is not False and "k-hat" in str(rows["heavy"])


def test_bad_input():
    draws = importance(target(), None, TEXTS, num_samples=50)
    chains = mcmc(target(), None, [""], num_samples=5, warmup=0, num_chains=2)
    bare = replace(rejection(target(), None, [""], num_samples=5), proposals=None)
    for other, match in (
        (chains, "Markov"),
        (bare, "without their proposals"),
        (draws.of_prompt(0), "numbers of prompts"),
        (draws.map(lambda v: v[:, :1]), "one draw"),
        (replace(draws, log_prior=draws.log_prior * math.nan), "NaN"),
        (_evidence(EVIDENCE, math.nan, 1.0), "not known"),
        (_evidence(EVIDENCE, 0.0, math.nan), "not known"),
    ):
        with pytest.raises(ValueError, match=match):
            compare_models({"x": draws, "y": other}, same_likelihood=True)
    with pytest.raises(ValueError, match="at least 2"):
        compare_models({"x": draws}, same_likelihood=True)
