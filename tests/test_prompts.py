"""`Prompts`: what may be asked of a language model, and what happens to everything else."""

import random
from itertools import islice

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset

from ppl_lm.lm.prompts import Prompts, batches

TEXTS = ["the soup was good", "", "a dog", "she said", "bread"]


@pytest.fixture(scope="module")
def lm():
    return tiny.language_model("llama")


@pytest.fixture
def prompts(lm) -> Prompts:
    return lm.prompts({"prompt": TEXTS, "score": [0.0, 1.0, 2.0, 3.0, 4.0]})


def rows_of(prompts: Prompts) -> list[list[int]]:
    """Ids of each prompt without padding, flat."""
    ids, lengths = prompts.ids.reshape(-1, prompts.ids.shape[-1]), prompts.lengths.reshape(-1)
    return [row[len(row) - n :].tolist() for row, n in zip(ids, lengths.tolist(), strict=True)]


def consistent(prompts: Prompts, lm) -> bool:
    """Ids, texts and columns still belong together, and the mask covers exactly the tokens."""
    return (
        rows_of(prompts) == [lm.vocabulary.encode(text) for text in prompts.texts]
        and prompts.columns["score"] == [float(TEXTS.index(text)) for text in prompts.texts]
        and prompts.mask.sum(-1).equal(prompts.lengths)
    )


# ----- what they are made from -----


def test_strings_are_left_padded(lm):
    made = lm.prompts(TEXTS)
    assert rows_of(made) == [lm.vocabulary.encode(text) for text in TEXTS] and made.texts == TEXTS
    assert made.mask[:, -1].all() and made.mask.sum(-1).equal(made.lengths) and len(made) == 5
    assert bool((made.ids[~made.mask] == lm.vocabulary.pad_id).all())
    assert rows_of(lm.prompts("a dog")) == [lm.vocabulary.encode("a dog")]  # one string is one prompt
    assert rows_of(lm.prompts(text for text in TEXTS)) == rows_of(made)
    assert lm.prompts(made).ids.equal(made.ids)


def test_a_prompt_whose_tokens_look_like_padding_is_no_padding(lm):
    """Catches masks made by comparing ids with pad."""
    pad = lm.vocabulary.pad_id
    made = Prompts.from_ids([[pad, 7], [7], [pad, pad]], lm.vocabulary)
    assert made.mask.tolist() == [[True, True], [False, True], [True, True]]
    x = lm(["a"] * 3).sample()
    assert len(lm(made).log_prob(x[:1].expand(3, -1)).unique()) == 3


@pytest.mark.parametrize("kind", ["dict", "dataset", "pandas"])
def test_tables_keep_their_columns_for_the_reward(lm, kind):
    table = {"prompt": TEXTS, "score": [0.0, 1.0, 2.0, 3.0, 4.0]}
    if kind == "dataset":
        table = Dataset.from_dict(table)
    if kind == "pandas":
        table = pytest.importorskip("pandas").DataFrame(table)
    made = lm.prompts(table)
    assert consistent(made, lm) and made.texts == TEXTS and list(made.columns) == ["score"]


def test_chats_alone_and_in_a_dataset():
    lm = tiny.language_model("llama")
    chats = [[{"role": "user", "content": c}] for c in ("the soup", "a <s> b")]
    with pytest.raises(ValueError, match="no chat template"):
        lm.prompts(chats)
    lm.vocabulary.tokenizer.chat_template = tiny.CHAT
    made = lm.prompts(chats)
    assert made.texts == chats and rows_of(made) == [lm.vocabulary.encode_chat(c) for c in chats]
    assert rows_of(lm.prompts(Dataset.from_dict({"prompt": chats}))) == rows_of(made)
    assert lm(made).sample().shape == (2, 8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "prompts=None; give a list of strings"),
        (3, "prompts=3; give a list of strings"),
        (["a", 3], "prompt 1 is 3; give a string or a list of chat messages"),
        ([None], "prompt 0 is None"),
        ([[]], r"prompt 0 is \[\]"),
        ([{"role": "user", "content": "a"}], "prompt 0 is {'role'"),  # one chat, not in a list
        ([b"soup"], "prompt 0 is b'soup'"),
        ({"text": ["a"]}, r"needs the column 'prompt'; it has \['text'\]"),
        ({"prompt": "soup"}, "column 'prompt' is 'soup'; give a list"),  # not four prompts of a letter
        ({"prompt": ["a", "b"], "score": "xy"}, "column 'score' is 'xy'"),
        ({"prompt": ["a", "b"], "score": [1]}, "column 'score' has 1 rows, the column 'prompt' has 2"),
    ],
)
def test_what_is_no_prompt_is_refused(lm, bad, message):
    with pytest.raises(ValueError, match=message):
        lm(bad)


def test_ids_are_checked(lm):
    for bad in ([300], [-1], [7, 10**6]):
        with pytest.raises(ValueError, match=r"prompt 1 has token ids .*; the language model has 0..299"):
            Prompts.from_ids([[1], bad], lm.vocabulary)
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        Prompts.from_ids([[1], []], lm.vocabulary)


def test_no_prompts_at_all(lm):
    for empty in ([], {"prompt": []}, Dataset.from_dict({"prompt": []})):
        made = lm.prompts(empty)
        assert made.batch_shape == (0,) and len(made) == 0 and made.texts == []
        assert made.take(torch.tensor([], dtype=torch.int64)).batch_shape == (0,)


# ----- parts of them -----


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (slice(1, 4, 2), [1, 3]),
        (slice(0, 0), []),
        (torch.tensor([3, 3, 0]), [3, 3, 0]),
        ([4, 1], [4, 1]),
        (2, [2]),
        (-1, [4]),
        (torch.tensor(2), [2]),
        (torch.tensor([True, False, True, False, False]), [0, 2]),
    ],
)
def test_parts_keep_ids_texts_and_columns_together(lm, prompts, index, expected):
    part = prompts[index]
    assert part.texts == [TEXTS[i] for i in expected] and part.batch_shape == (len(expected),)
    assert consistent(part, lm)


def test_taking_cuts_surplus_padding(lm, prompts):
    part = prompts.take(torch.tensor([4, 1, 1]))
    assert part.ids.shape == (3, max(len(lm.vocabulary.encode(TEXTS[i])) for i in (4, 1))) and consistent(part, lm)
    assert [p.texts for p in prompts] == [[text] for text in TEXTS]


def test_two_dimensional_prompts(lm, prompts):
    grid = prompts[:4].reshape(torch.Size((2, 2)))
    assert grid.batch_shape == (2, 2) and grid.mask.shape == grid.ids.shape and consistent(grid, lm)
    assert grid.flatten().batch_shape == (4,) and grid[1].batch_shape == (1, 2) and grid[1].texts == TEXTS[2:4]
    assert grid.take(torch.tensor([3, 0])).texts == [TEXTS[3], TEXTS[0]]


def test_moving_devices(prompts, device):
    moved = prompts.to(device)
    assert moved.ids.device.type == moved.lengths.device.type == moved.mask.device.type == device.type
    assert moved[torch.tensor([1, 0])].texts == [TEXTS[1], TEXTS[0]] and moved.texts == prompts.texts


# ----- appending -----


def test_appending_continues_the_tokens_without_their_end(lm, prompts):
    """A second text prompted by a first: token for token, never through text."""
    end, pad = lm.vocabulary.end_ids[0], lm.vocabulary.pad_id
    x = torch.tensor([[9, 10, 11], [9, end, pad], [end, pad, pad], [200, 201, 202], [9, 9, end]])
    with pytest.warns(UserWarning, match="suffix ' so</s>' spells the control token '</s>'"):
        longer = prompts.append(x, suffix=" so</s>")
    tail = lm.vocabulary.plain(" so</s>")
    assert end not in tail
    cut = [[9, 10, 11], [9], [], [200, 201, 202], [9, 9]]
    expected = [lm.vocabulary.encode(text) + ids + tail for text, ids in zip(TEXTS, cut, strict=True)]
    assert rows_of(longer) == expected and longer.columns == prompts.columns
    assert longer.texts == [t + c + " so</s>" for t, c in zip(TEXTS, lm.vocabulary.decode(x), strict=True)]
    assert lm.prompts([]).append(x[:0]).batch_shape == (0,)


def test_appending_particles_gives_each_its_own_prompt(lm, prompts):
    x = lm(prompts).sample((3,))  # (K, B, T)
    longer = prompts.append(x)
    assert longer.batch_shape == (3, 5) and longer.columns["score"] == prompts.columns["score"] * 3
    ends = set(lm.vocabulary.end_ids)
    flat = [[i for i in ids if i not in ends] for ids in lm.vocabulary.completion_ids(x.reshape(15, -1))]
    assert rows_of(longer) == [head + c for head, c in zip(rows_of(prompts) * 3, flat, strict=True)]
    second = lm(longer)
    assert second.sample().shape == (3, 5, 8)
    alone = second.slice(torch.tensor([7]))
    y = second.sample()
    torch.testing.assert_close(alone.log_prob(y[1, 2][None])[0], second.log_prob(y)[1, 2], atol=1e-4, rtol=0)


# ----- batches -----


def test_each_prompt_once_an_epoch_and_no_global_random_numbers(prompts):
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    drawn = [text for batch in islice(batches(prompts, 2, seed=1), 10) for text in batch.texts]  # 4 epochs of 5
    assert all(sorted(drawn[n : n + 5]) == sorted(TEXTS) for n in range(0, 20, 5))
    assert len({tuple(drawn[n : n + 5]) for n in range(0, 20, 5)}) > 1  # shuffled anew
    assert drawn == [text for batch in islice(batches(prompts, 2, seed=1), 10) for text in batch.texts]
    assert drawn != [text for batch in islice(batches(prompts, 2, seed=2), 10) for text in batch.texts]
    assert random.getstate() == before[0] and str(np.random.get_state()) == before[1]
    assert torch.get_rng_state().equal(before[2])


@pytest.mark.parametrize("size", [0, -1, 6])
def test_batch_sizes_are_checked(prompts, size):
    with pytest.raises(ValueError, match=f"batch_size={size}; give 1 to 5, the number of prompts"):
        next(batches(prompts, size))
