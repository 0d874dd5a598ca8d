"""A reward is a reward whatever kind of callable it is; its numbers are numbers whatever kind they are."""

import asyncio
from decimal import Decimal
from fractions import Fraction
from functools import partial
from math import inf

import numpy as np
import pyro
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from ppl_lm.infer.binding import bind
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.likelihood import rewards
from ppl_lm.likelihood.automata import Automaton
from ppl_lm.likelihood.reward import Reward, RewardError
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted


def count(completions, **columns):
    return [float(text.count("a")) for text in completions]


class Plain:
    scale = 1.0

    def __call__(self, completions):
        return count(completions)

    def method(self, prompts, completions, completion_ids=None):
        return count(completions)


class Module(nn.Module):
    def forward(self, prompts, completions):
        return torch.tensor(count(completions))


class Anything(nn.Module):
    def forward(self, **inputs):
        return torch.tensor(count(inputs["completions"]))


class Asynchronous:
    async def __call__(self, completions, **columns):
        await asyncio.sleep(0)
        return count(completions)


def weighted(completions, weight, **columns):
    return [weight * r for r in count(completions)]


KINDS = {
    "function": count,
    "lambda": lambda completions: count(completions),
    "object": Plain(),
    "bound method": Plain().method,
    "partial": partial(weighted, weight=1),
    "module": Module(),
    "module of any keyword": Anything(),
    "asynchronous object": Asynchronous(),
    "Reward": Reward(count),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_callable_is_called_with_texts(kind):
    """As many particles as prompts: what is called with tensors of ids would fit its shape by accident."""
    lm = table_lm(3, 3, concentration=1.0)
    draws = importance(bind(tilted, lm, reward=KINDS[kind], beta=1.0), None, ["", ""], num_samples=2)
    assert draws["reward"][0].T.tolist() == [count(texts) for texts in draws.text()]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "module of any keyword"])
def test_by_its_own_signature_under_any_name_and_in_lists(kind):
    def program(prompts, lm, score, several):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("x", lm(prompts))
            return x, score(prompts, x), several[1](prompts, x)

    lm = table_lm(3, 3, concentration=1.0)
    x, score, second = bind(program, lm, KINDS[kind], [count, KINDS[kind]])(["", ""])
    expected = count(lm.vocabulary.decode(x))
    assert score.tolist() == expected and second.tolist() == expected


def test_networks_tokenizers_and_objects_of_a_program_stay_what_they_are():
    """A module whose forward takes no completions is a network of the program, trained and moved with it; what is wrapped
    keeps what else it can do."""

    def program(prompts, head, tokenizer, automaton):
        return head(torch.ones(1, 2)), tokenizer("a"), automaton.mask(lm)

    lm = table_lm(3, 2, concentration=1.0)
    automaton = Automaton({0: {0: 0}}, 0, [0], lm.vocabulary)
    bound = bind(program, nn.Linear(2, 1), lm.vocabulary.tokenizer, automaton)
    assert len(list(bound.parameters())) == 2 and isinstance(bound.networks["head"], nn.Linear)
    assert bound([""])[0].shape == (1, 1)


CLASSIFIER = LlamaForSequenceClassification(
    LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, num_labels=1
    )
)


@pytest.mark.parametrize(
    ("given", "way"),
    [
        ("vader", "'vader', a name, .* give the function, such as ppl_lm.rewards.vader"),
        ([rewards.vader, rewards.length], r"a list: .*WeightedRewards\(\[first, second\]"),
        ({"a": rewards.vader}, r"a dict: .*WeightedRewards\(\[first, second\]"),
        (CLASSIFIER, r"LlamaForSequenceClassification .*ppl_lm.rewards.classifier\(model, label, tokenizer\)"),
        (Plain, "the class Plain: give an instance"),
        (table_lm(3, 2), "a language model"),
    ],
)
def test_what_is_no_reward_is_refused_with_the_way(given, way, unchecked):
    for make in (lambda: Reward(given), lambda: bind(tilted, table_lm(3, 2), reward=given)):
        with pytest.raises(TypeError, match=way):
            make()


@pytest.mark.parametrize(
    "combined",
    [
        lambda a, b: 0.5 * a,
        lambda a, b: a * 2,
        lambda a, b: a + b,
        lambda a, b: sum([a, b]),
        lambda a, b: -a,
        lambda a, b: a / 2,
    ],
)
def test_arithmetic_with_rewards_shows_the_way(combined):
    with pytest.raises(
        TypeError, match=r"WeightedRewards\(\[first, second\], weights=.*two rewards, each bound by its name"
    ):
        combined(Reward(count), Reward(rewards.length))


def returning(value):
    lm = table_lm(3, 2, concentration=1.0)
    return importance(
        bind(tilted, lm, reward=lambda completions: [value] * len(completions)), None, [""], num_samples=2
    )


@pytest.mark.parametrize(
    "number", [Decimal("0.5"), Fraction(1, 2), np.float16(0.5), np.longdouble(0.5), np.array(0.5), torch.tensor(0.5)]
)
def test_numbers_of_every_kind_are_numbers(number):
    assert set(returning(number)["reward"].flatten().tolist()) == {0.5}


@pytest.mark.parametrize(
    "bad",
    [10**400, -(10**400), 10**5000, Decimal("1e400"), Decimal("-1e400"), Decimal("sNaN"), Fraction(10**400), "0.5", b"1"]
    + [np.longdouble("-1e4000"), np.datetime64("2020"), 1j, torch.zeros((), device="meta")],
    ids=lambda bad: type(bad).__name__,
)  # fmt: skip
def test_what_float64_cannot_hold_names_reward_and_text(bad):
    """-1e400 is no -inf: a text that is bad beyond measure is not one that must not occur."""
    with pytest.raises(
        RewardError, match=r"reward '<lambda>' returned .* for completion 0 of 2, .*; it needs a real number"
    ):
        returning(bad)


def test_an_array_that_cannot_be_read_is_the_rewards_fault():
    sparse = Reward(lambda completions: torch.zeros(len(completions)).to_sparse())
    with pytest.raises(RewardError, match="returned Tensor, whose numbers cannot be read"):
        importance(bind(tilted, table_lm(3, 2), reward=sparse), None, [""], num_samples=2)


@pytest.mark.parametrize("bad", ["1", 10**400, inf, [1.0], Decimal("1e999")])
def test_bounds_that_are_no_numbers_are_refused_in_words(bad, unchecked):
    with pytest.raises(ValueError, match="r_max=.*; give a finite number"):
        Reward(count, r_max=bad)
    if bad != inf:
        with pytest.raises(ValueError, match="timeout=.* seconds; give a number above 0"):
            Reward(count, timeout=bad)


def test_bounds_of_every_kind(unchecked):
    assert Reward(count, r_max=Decimal("1.5")).r_max == 1.5 and Reward(count, r_max=np.float32(2)).r_max == 2.0
