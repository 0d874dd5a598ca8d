"""Several rewards as one: the sum, its bound, and each of them among the draws."""

import math
from math import inf

import pyro
import pytest
import torch
from tiny import table

import ppl_lm
from ppl_lm.guides import finetuned
from ppl_lm.likelihood import Reward, RewardError, WeightedRewards, rewards
from ppl_lm.models import constrained, tilted

LM = table(3, 3, [2])
PROMPTS = ["a", "b"]


def letters(completions):
    return [float(text.count("a")) for text in completions]


letters.r_max = 3.0


def ends(completion_ids):
    return [float(ids[-1] == 2) for ids in completion_ids]


ends.r_max = 1.0


def test_the_sum_is_the_weighted_one_and_each_is_recorded():
    both = WeightedRewards([letters, rewards.length, ends], [1.0, -0.5, 0.0])
    draws = ppl_lm.importance(ppl_lm.bind(tilted, LM, reward=both, beta=0.7), None, PROMPTS, num_samples=50)
    assert [*draws.records] == ["letters", "length", "ends", "reward"]
    by_hand = {f: Reward(f)(draws.prompts, draws["x"]) for f in (letters, rewards.length, ends)}
    for function, values in by_hand.items():
        torch.testing.assert_close(draws[function.__name__], values)
    torch.testing.assert_close(draws["reward"], by_hand[letters] - 0.5 * by_hand[rewards.length])
    torch.testing.assert_close(draws.log_likelihood, draws["reward"] / 0.7)
    assert draws.cost.reward_calls == 3 * 100
    assert both(completions=["aa"], completion_ids=[[0, 0, 2]]) == [2 - 1.5]
    data = ppl_lm.to_arviz(draws)
    assert {"letters", "length", "ends", "reward"} <= {*data.posterior.data_vars}


def test_the_posterior_is_that_of_the_sum():
    """The mutant is the posterior of the first reward alone, which is what a dropped one would leave."""
    guide = ppl_lm.bind(finetuned, LM.copy())
    both = ppl_lm.bind(tilted, LM, reward=WeightedRewards([letters, ends], [1.0, 2.0]), beta=1.0)
    truth = ppl_lm.enumerate_posterior(both, guide, PROMPTS)
    same = ppl_lm.bind(
        tilted, LM, beta=1.0, reward=lambda completions, completion_ids: [
            a + 2 * b for a, b in zip(letters(completions), ends(completion_ids), strict=True)
        ]
    )  # fmt: skip
    torch.testing.assert_close(truth.log_posterior, ppl_lm.enumerate_posterior(same, guide, PROMPTS).log_posterior)
    first = ppl_lm.enumerate_posterior(ppl_lm.bind(tilted, LM, reward=letters, beta=1.0), guide, PROMPTS)
    assert float((first.log_posterior - truth.log_posterior).abs().max()) > 0.1
    exact = ppl_lm.rejection(both, None, PROMPTS, num_samples=40)  # by the bound of the sum, 5
    assert exact.kind == "exact" and torch.allclose(exact["reward"], exact["letters"] + 2 * exact["ends"])


@pytest.mark.parametrize(
    ("functions", "weights", "bound"),
    [
        ([letters, ends], None, 4.0),
        ([letters, ends], [2.0, 0.5], 6.5),
        ([letters, rewards.length], [2.0, 0.0], 6.0),  # what does not count needs no bound
        ([letters, rewards.length], [2.0, 0.1], None),
        ([letters, ends], [1.0, -1.0], None),  # what bounds a reward from below is not known
        ([letters], [0.0], 0.0),
    ],
)
def test_the_bound_of_the_sum(functions, weights, bound):
    assert WeightedRewards(functions, weights).r_max == bound


def test_names_are_told_apart():
    def reward(completions):
        return [0.0] * len(completions)

    def length(completions):  # not the tokens that `length` is among the draws' numbers
        return [float(len(text)) for text in completions]

    both = WeightedRewards([reward, letters, letters, rewards.contains("a/b"), length])
    assert both.names == ["reward (2)", "letters", "letters (2)", "contains:a_b", "length (2)"]
    assert WeightedRewards([rewards.length]).names == ["length"]
    assert both.name == "1 × reward + 1 × letters + 1 × letters + 1 × contains:a/b + 1 × length"

    def twice(prompts, prior, reward):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("x", prior(prompts))
            pyro.factor("rated", reward(prompts, x))
        reward(prompts, x)  # outside the plate, too

    draws = ppl_lm.importance(
        ppl_lm.bind(twice, LM, reward=WeightedRewards([letters, ends])), None, PROMPTS, num_samples=4
    )
    assert [*draws.records] == ["letters", "ends", "letters (2)", "ends (2)"]
    torch.testing.assert_close(draws["letters"], draws["letters (2)"])


def test_files_hold_the_names(tmp_path):
    both = WeightedRewards([rewards.contains("a b/c."), letters], [1.0, 1.0])
    draws = ppl_lm.importance(ppl_lm.bind(tilted, LM, reward=both, beta=1.0), None, PROMPTS, num_samples=8)
    ppl_lm.to_arviz(draws).to_netcdf(str(tmp_path / "draws.nc"))
    import arviz as az

    again = ppl_lm.from_arviz(az.from_netcdf(str(tmp_path / "draws.nc")), draws.prompts)
    torch.testing.assert_close(again["contains:a b_c."], draws["contains:a b_c."])


def test_fit_and_graph():
    both = ppl_lm.bind(tilted, LM, reward=WeightedRewards([letters, ends], [1.0, 0.5]), beta=1.0)
    guide = ppl_lm.bind(finetuned, LM.copy())
    svi = pyro.infer.SVI(both, guide, pyro.optim.Adam({"lr": 1e-3}), loss=ppl_lm.SequenceELBO(num_particles=8))
    assert math.isfinite(svi.step(PROMPTS))
    edges = {*ppl_lm.graphs.model(both, PROMPTS).edges}
    assert {("x", "letters"), ("x", "ends"), ("letters", "reward"), ("ends", "reward"), ("reward", "optimal")} == edges
    diagnosis = ppl_lm.diagnose(both, guide, PROMPTS, num_samples=400)
    means, guides = diagnosis.prompts[0].recorded["letters"], diagnosis.guide
    assert means.guide == pytest.approx(float(guides["letters"][0, :, 0].mean()))
    assert means.prior == pytest.approx(float(diagnosis.prior["letters"][0, :, 0].mean()))
    truth = ppl_lm.enumerate_posterior(both, guide, PROMPTS)
    expected = float((truth.log_posterior.exp() * truth.records["letters"]).sum(0)[0].detach())
    assert abs(means.posterior - expected) < 5 * means.posterior_se < 0.5
    assert abs(means.prior - expected) > 5 * means.prior_se  # which a mean without weights would not pass
    assert diagnosis.average.recorded["ends"].guide == pytest.approx(float(guides["ends"].mean()))
    assert diagnosis.to_dataframe()["letters_guide"].tolist()[0] == pytest.approx(means.guide)


def test_infinite_rewards():
    def never(completions):
        return [-inf if "a" in text else 0.0 for text in completions]

    prompts, x = LM.prompts(["a"]), torch.tensor([[0, 2, 2]])
    assert float(WeightedRewards([letters, never])(prompts, x)) == -inf
    assert float(WeightedRewards([letters, never], [1.0, 0.0])(prompts, x)) == 1.0  # recorded, and does not count
    with pytest.raises(RewardError, match=r"the sum 1 × letters \+ -1 × never is inf: a reward of -inf"):
        WeightedRewards([letters, never], [1.0, -1.0])(prompts, x)


@pytest.mark.parametrize(
    ("given", "weights", "why"),
    [
        ([], None, "rewards=\\[\\]; give a list"),
        ([letters], [1.0, 2.0], "2 weights for 1 rewards"),
        ([letters], [], "0 weights for 1 rewards"),
        ([letters], [inf], "give finite numbers"),
        ([letters], ["one"], "give finite numbers"),
    ],
)
def test_what_is_no_sum_is_refused(given, weights, why, unchecked):
    with pytest.raises(ValueError, match=why):
        WeightedRewards(given, weights)


def test_a_sum_is_no_constraint():
    target = ppl_lm.bind(constrained, LM, constraint=WeightedRewards([letters, ends]))
    with pytest.raises(ValueError, match="the constraint must answer yes or no"):
        ppl_lm.importance(target, None, PROMPTS, num_samples=20)
