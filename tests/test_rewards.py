"""Rewards: shapes and pairing, every kind of bad answer, time-outs, global state, and the ready reward functions."""

import asyncio
import random
import threading
import traceback
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ppl_lm.likelihood import rewards
from ppl_lm.likelihood.reward import Reward, RewardError, RewardTimeout
from ppl_lm.lm import meter
from ppl_lm.lm.prompts import Prompts
from ppl_lm.run.programs import resolve_reward

END = 9  # ids 0..8 are the letters a..i


class FakePrompts(Prompts):
    """What `Reward` needs of `Prompts`, with letters as tokens."""

    def __init__(self, texts: list[Any], shape: tuple[int, ...], columns: dict[str, list[Any]] | None = None):
        for name, value in {"texts": texts, "columns": columns or {}, "shape": torch.Size(shape), "ids": None}.items():
            object.__setattr__(self, name, value)  # ids: read for the names of the sites that they came from alone

    @property
    def batch_shape(self) -> torch.Size:
        return self.shape

    def completion_ids(self, x: Tensor) -> list[list[int]]:
        return [row[: row.index(END) + 1] if END in row else row for row in x.tolist()]

    def decode(self, x: Tensor) -> list[str]:
        return ["".join("abcdefghi"[i] for i in row if i != END) for row in self.completion_ids(x.flatten(0, -2))]


def prompts_ab() -> FakePrompts:
    return FakePrompts(["p0", "p1"], (2,), {"answer": ["a", "b"]})


def ids(*texts: str) -> Tensor:
    width = max(len(t) for t in texts) + 1
    return torch.tensor([["abcdefghi".index(c) for c in t] + [END] * (width - len(t)) for t in texts])


def returning(value: Any) -> Reward:
    def scorer(completions):
        return value

    return Reward(scorer)


# Shapes and pairing


def test_a_reward_in_trl_signature_is_paired_with_its_prompt_and_columns():
    seen = []

    def trl_reward(prompts, completions, completion_ids=None, **columns):
        seen.extend(zip(prompts, completions, completion_ids, columns["answer"], strict=True))
        return [float(answer in text) for text, answer in zip(completions, columns["answer"], strict=True)]

    x = torch.stack([ids("ab", "cd"), ids("ac", "bd"), ids("bb", "aa")])  # (K=3, B=2, T=3)
    result = Reward(trl_reward)(prompts_ab(), x)
    assert result.dtype == torch.float64 and not result.requires_grad
    assert result.tolist() == [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    assert seen == [
        ("p0", "ab", [0, 1, END], "a"),
        ("p1", "cd", [2, 3, END], "b"),
        ("p0", "ac", [0, 2, END], "a"),
        ("p1", "bd", [1, 3, END], "b"),
        ("p0", "bb", [1, 1, END], "a"),
        ("p1", "aa", [0, 0, END], "b"),
    ]


@pytest.mark.parametrize("leading", [(2,), (3, 2), (4, 1), (5, 3, 1), (5, 1, 2), (1,), ()])
def test_leading_dimensions_broadcast_against_the_prompts(leading):
    """(4, 1) is what Pyro's enumeration makes: every value once, for all the prompts."""

    def code(prompts, completion_ids):
        return [100.0 * int(p[1]) + row[0] for p, row in zip(prompts, completion_ids, strict=True)]

    x = torch.arange(torch.Size(leading).numel()).reshape(leading).remainder(END).unsqueeze(-1)  # (*leading, T=1)
    expected = x[..., 0] + torch.tensor([0.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(Reward(code)(prompts_ab(), x), expected, rtol=0, atol=0)


def test_prompts_of_shape_k_by_b_keep_row_major_order():
    prompts = FakePrompts([f"{k}{b}" for k in range(3) for b in range(2)], (3, 2))
    reward = Reward(lambda prompts: [float(p) for p in prompts])
    expected = torch.tensor([[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]], dtype=torch.float64)
    for leading in [(3, 2), (2,), (1, 1), (3, 1)]:
        assert reward(prompts, torch.zeros(*leading, 4, dtype=torch.int64)).equal(expected)
    four = reward(prompts, torch.zeros(4, 1, 1, 4, dtype=torch.int64))
    assert four.equal(expected.expand(4, 3, 2))


def test_chat_prompts_get_chat_completions():
    prompts = FakePrompts([[{"role": "user", "content": "hi"}]], (1,))

    def check(prompts, completions):
        assert prompts == [[{"role": "user", "content": "hi"}]] * 2
        assert completions == [[{"role": "assistant", "content": t}] for t in ("ab", "c")]
        return [1, 2]

    assert Reward(check)(prompts, ids("ab", "c").unsqueeze(1)).tolist() == [[1.0], [2.0]]


def test_only_the_arguments_that_a_function_names_are_forwarded():
    assert Reward(lambda completions: [1, 2])(prompts_ab(), ids("a", "b")).tolist() == [1.0, 2.0]
    assert Reward(lambda *, answer: [ord(a) for a in answer])(prompts_ab(), ids("a", "b")).tolist() == [97.0, 98.0]

    def all_of_them(**inputs):
        assert set(inputs) == {"prompts", "completions", "completion_ids", "answer"}
        return [0, 0]

    Reward(all_of_them)(prompts_ab(), ids("a", "b"))


@pytest.mark.parametrize("function", [lambda completions, solution: [], lambda p, c: [], lambda prompts, /: []])
def test_a_signature_that_cannot_be_served_is_refused_with_what_there_is(function):
    with pytest.raises(RewardError, match="signature .* missing a required .* completion_ids and the columns"):
        Reward(function)(prompts_ab(), ids("a", "b"))


def test_prompts_and_draws_of_a_language_model_arrive_as_text():
    """`FakePrompts` above is true to the real thing."""
    from ppl_lm.lm.table import table_lm

    lm = table_lm(4, 3, max_prompt=2)  # letters a, b, c; the end token is 3
    prompts = lm.prompts({"prompt": ["a", "b"], "answer": ["b", "c"]})
    x = torch.tensor([[[1, 0, 3], [3, 3, 3]], [[0, 2, 2], [2, 3, 3]]])  # (K=2, B=2, T=3)
    seen = []

    def count(prompts, completions, completion_ids, answer):
        seen.extend(zip(prompts, answer, map(len, completion_ids), strict=True))
        return [float(text.count(a)) for text, a in zip(completions, answer, strict=True)]

    assert Reward(count)(prompts, x).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert seen == [("a", "b", 3), ("b", "c", 1), ("a", "b", 3), ("b", "c", 2)]


def test_no_completions_no_call():
    reward = Reward(lambda completions: pytest.fail("called"))
    assert reward(FakePrompts([], (0,)), torch.zeros(0, 3, dtype=torch.int64)).shape == (0,)


def test_completions_that_do_not_broadcast_or_are_no_ids_are_refused(unchecked):
    with pytest.raises(RewardError, match=r"shape \(3, 2\).*batch shape \(2,\)"):
        returning([0.0])(prompts_ab(), torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(RewardError, match="needs token ids .* got torch.float32"):
        returning([0.0])(prompts_ab(), torch.zeros(2, 2))


def test_calls_are_counted_by_completion():
    with meter.measure() as cost:
        returning([0.0] * 6)(prompts_ab(), torch.zeros(3, 2, 4, dtype=torch.int64))
    assert cost.reward_calls == 6


# The wrapper itself


def test_other_arguments_pass_straight_through():
    reward = Reward(lambda prompts, completions: (prompts, completions))
    assert reward(["p"], ["c"]) == (["p"], ["c"])
    assert reward(prompts=["p"], completions=["c"]) == (["p"], ["c"])


def test_wrapping_twice_keeps_the_function_and_its_settings():
    inner = Reward(rewards.length, r_max=5, timeout=3)
    outer = Reward(inner)
    assert (outer.function, outer.name, outer.r_max, outer.timeout) == (rewards.length, "length", 5.0, 3)
    assert Reward(inner, r_max=6).r_max == 6.0


def test_r_max_comes_from_the_function_or_the_argument():
    assert Reward(rewards.vader).r_max == 1.0
    assert Reward(rewards.vader, r_max=2).r_max == 2.0
    assert Reward(rewards.length).r_max is None


@pytest.mark.parametrize("settings", [{"r_max": nan}, {"r_max": inf}, {"timeout": 0}, {"timeout": nan}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        Reward(rewards.length, **settings)


def test_what_cannot_be_called_is_refused(unchecked):
    with pytest.raises(TypeError, match="a reward is a function .* got 'vader'"):
        Reward("vader")  # type: ignore[arg-type]


# Answers that are refused, and those that are not


@pytest.mark.parametrize("bad", [nan, None, inf, "0.5", 1j, [0.5], torch.tensor([0.5]), torch.tensor(nan), np.inf])
def test_a_bad_reward_is_an_error_that_shows_the_text(bad):
    with pytest.raises(RewardError, match=r"'scorer' returned .* for completion 1 of 2, 'cd'; it needs a real number"):
        returning([0.5, bad])(prompts_ab(), ids("ab", "cd"))


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_bad_numbers_in_arrays_are_errors_too(make):
    for bad in (nan, inf, 1j):
        with pytest.raises(RewardError, match="for completion 0 of 2, 'ab'"):
            returning(make([bad, 0.5]))(prompts_ab(), ids("ab", "cd"))


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("make", [list, torch.tensor, np.array])
def test_a_wrong_length_is_never_broadcast(n, make):
    with pytest.raises(RewardError, match=rf"'scorer' returned .* of shape \({n},\); it needs shape \(2,\).*'ab'"):
        returning(make([1.0] * n))(prompts_ab(), ids("ab", "cd"))


@pytest.mark.parametrize("shaped", [torch.zeros(2, 1), np.zeros((1, 2)), torch.tensor(0.5), np.array(0.5)])
def test_a_wrong_shape_is_refused(shaped):
    with pytest.raises(RewardError, match=r"it needs shape \(2,\)"):
        returning(shaped)(prompts_ab(), ids("ab", "cd"))


@pytest.mark.parametrize("value", ["ab", {0: 1.0, 1: 2.0}, {1.0, 2.0}, None, 0.5, np.float64(0.5), 1j])
def test_what_is_no_list_of_numbers_is_refused(value):
    with pytest.raises(RewardError, match="of type .*; it needs a list of 2 numbers"):
        returning(value)(prompts_ab(), ids("ab", "cd"))


@pytest.mark.parametrize(
    "good",
    [
        [True, False],
        (1, 0),
        [np.float16(1), np.bool_(False)],
        [torch.tensor(1.0, requires_grad=True), torch.tensor(0)],
        np.array([1, 0], dtype=np.int8),
        torch.tensor([1.0, 0.0], dtype=torch.float16),
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([True, False]),
    ],
)
def test_every_kind_of_real_number_is_promoted_and_detached(good, device):
    good = good.to(device) if isinstance(good, Tensor) else good
    result = returning(good)(prompts_ab(), ids("ab", "cd").to(device))
    assert result.dtype == torch.float64 and result.device.type == device.type and not result.requires_grad
    assert result.tolist() == [1.0, 0.0]


def test_minus_infinity_is_a_hard_constraint():
    assert returning([-inf, 0.5])(prompts_ab(), ids("ab", "cd")).tolist() == [-inf, 0.5]


def test_a_reward_above_its_declared_bound_is_refused():
    with pytest.raises(RewardError, match=r"returned 1.5 for completion 1 of 2, 'cd'; .* declared r_max=1"):
        Reward(lambda completions: [1.0, 1.5], r_max=1)(prompts_ab(), ids("ab", "cd"))
    rounded = torch.tensor([0.1, 0.0])  # float32's 0.1 is above 0.1
    assert Reward(lambda completions: rounded, r_max=0.1)(prompts_ab(), ids("a", "b")).tolist() == [0.1, 0.0]


def test_an_exception_is_chained_with_the_reward_and_the_texts():
    def broken(completions):
        raise KeyError("lexicon")

    with pytest.raises(RewardError, match="'broken' raised KeyError: 'lexicon'; .*'p0'.*'ab'") as caught:
        Reward(broken)(prompts_ab(), ids("ab", "cd"))
    assert isinstance(caught.value.__cause__, KeyError)
    assert "broken" in [frame.name for frame in traceback.extract_tb(caught.value.__cause__.__traceback__)]


def test_an_interrupt_is_no_reward_error():
    def interrupted(completions):
        raise KeyboardInterrupt

    for timeout in (None, 60):
        with pytest.raises(KeyboardInterrupt):
            Reward(interrupted, timeout=timeout)(prompts_ab(), ids("ab", "cd"))


def test_long_texts_are_shortened_in_messages():
    with pytest.raises(RewardError) as caught:
        returning([nan])(FakePrompts(["p"], (1,)), torch.zeros(1, 5000, dtype=torch.int64))
    assert len(str(caught.value)) < 300


# Async and time-outs


async def slow_sum(completion_ids, **columns):
    scores = await asyncio.gather(*(asyncio.sleep(0, sum(row)) for row in completion_ids))
    return [float(s) for s in scores]


@pytest.mark.parametrize("timeout", [None, 60])
def test_async_rewards_work_inside_and_outside_a_running_loop(timeout):
    reward = Reward(slow_sum, timeout=timeout)

    async def notebook_cell():
        return reward(prompts_ab(), ids("bb", "dd"))

    for result in (reward(prompts_ab(), ids("bb", "dd")), asyncio.run(notebook_cell())):
        assert result.tolist() == [2.0 + END, 6.0 + END]


def test_an_exception_in_an_async_reward_is_chained():
    async def broken(**inputs):
        raise OSError("no route")

    for timeout in (None, 60):
        with pytest.raises(RewardError, match="'broken' raised OSError: no route") as caught:
            Reward(broken, timeout=timeout)(prompts_ab(), ids("ab", "cd"))
        assert isinstance(caught.value.__cause__, OSError)


def test_a_reward_that_hangs_is_a_timeout_not_a_zero():
    release = threading.Event()

    def hanging(completions):
        release.wait(60)
        return [0.0, 0.0]

    with pytest.raises(RewardTimeout, match="'hanging' did not answer within 0.05 seconds; .*'p0'.*'ab'"):
        Reward(hanging, timeout=0.05)(prompts_ab(), ids("ab", "cd"))
    release.set()


def test_an_async_reward_that_hangs_is_a_timeout_and_is_cancelled():
    cancelled = threading.Event()

    async def hanging(completions):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(RewardTimeout):
        Reward(hanging, timeout=0.05)(prompts_ab(), ids("ab", "cd"))
    assert cancelled.wait(30)


def test_a_timeout_error_of_the_function_is_its_own():
    def upstream(completions):
        raise TimeoutError("gateway")

    with pytest.raises(RewardError, match="raised TimeoutError: gateway") as caught:
        Reward(upstream, timeout=60)(prompts_ab(), ids("ab", "cd"))
    assert not isinstance(caught.value, RewardTimeout)


# Global state and inputs


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("timeout", [None, 60])
def test_the_global_random_states_are_left_alone(fails, timeout):
    def noisy(completions):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        assert not fails
        return [random.random(), np.random.rand() + torch.rand(()).item()]

    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    try:
        Reward(noisy, timeout=timeout)(prompts_ab(), ids("ab", "cd"))
    except RewardError:
        assert fails
    assert states() == before


def test_a_reward_that_mutates_its_inputs_changes_nothing():
    chats = [[{"role": "user", "content": f"q{i}"}] for i in range(2)]
    prompts = FakePrompts(chats, (2,), {"tags": [["x"], ["y"]]})
    x = torch.stack([ids("ab", "cd"), ids("ef", "gh")])

    def vandal(prompts, completions, completion_ids, tags):
        assert [p[0]["content"] for p in prompts] == ["q0", "q1", "q0", "q1"] and tags == [["x"], ["y"]] * 2
        for i in range(len(prompts)):  # the particles of one prompt share nothing either
            prompts[i][0]["content"] += "!"
            completions[i][0]["content"] += "!"
            completion_ids[i].clear()
            tags[i].append("!")
            assert prompts[i][0]["content"].count("!") == tags[i].count("!") == 1
        return [0.0] * 4

    before = x.clone()
    for _ in range(2):
        Reward(vandal)(prompts, x)
    assert prompts.texts == [[{"role": "user", "content": f"q{i}"}] for i in range(2)]
    assert prompts.columns == {"tags": [["x"], ["y"]]} and x.equal(before)


# The ready rewards


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_vader_reads_plain_and_chat_completions():
    good, bad, neutral = rewards.vader(completions=["I love this wonderful soup!", "I hate it.", "A table."], x=1)
    assert 0.8 < good <= 1 and -1 <= bad < -0.4 and neutral == 0
    assert rewards.vader(completions=[chat("I love this wonderful soup!")]) == [good]


def test_length_counts_the_end_token():
    assert Reward(rewards.length)(prompts_ab(), ids("ab", "cdef")).tolist() == [3.0, 5.0]


def test_contains_finds_whole_words_in_any_case():
    reward = rewards.contains("C++")
    assert reward(completions=["c++ is", "C+++", "in C++.", chat("C++"), ""]) == [1, 1, 1, 1, 0]
    reward = rewards.contains("soup")
    assert reward(completions=["Soup!", "soups", "a_soup", "The soup was", "SOUP"]) == [1, 0, 0, 1, 1]
    assert Reward(reward).r_max == 1.0 and Reward(reward).name == "contains:soup"
    with pytest.raises(ValueError, match="the word is ' '"):
        rewards.contains(" ")


# Names


def test_names_of_ready_rewards():
    assert resolve_reward("vader") is rewards.vader and resolve_reward("length") is rewards.length
    assert resolve_reward("contains:soup")(completions=["soup"]) == [1.0]


def test_a_reward_of_the_users_own_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\ntorch.manual_seed(0)\n\ndef constant(completions):\n    return [2.0] * len(completions)\n"
    )
    state = torch.get_rng_state()
    assert resolve_reward(f"{path}:constant")(completions=["a", "b"]) == [2.0, 2.0]
    assert torch.get_rng_state().equal(state)
    with pytest.raises(ValueError, match="has no function 'other'"):
        resolve_reward(f"{path}:other")
    with pytest.raises(ValueError, match="has no function 'torch.nn'"):
        resolve_reward(f"{path}:torch.nn")
    path.write_text("1 / 0")
    with pytest.raises(ValueError, match="raised ZeroDivisionError"):
        resolve_reward(f"{path}:constant")


@pytest.mark.parametrize(
    "name", ["", "vadar", "vader:", "hf:", "contains", "contains:", "contains: ", "text", "my_file"]
)
def test_an_unknown_name_lists_what_there_is(name):
    with pytest.raises(
        ValueError, match=r"vader, length, contains:WORD, hf:FOLDER\[:LABEL\] or path/to/file.py:function"
    ):
        resolve_reward(name)


def test_a_file_that_is_missing_is_named():
    with pytest.raises(ValueError, match="there is no file .nowhere.py"):
        resolve_reward("nowhere.py:f")
