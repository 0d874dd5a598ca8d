"""Containers of prompts: read once, as what they are, whatever library they are of and whichever door they come in by."""

from collections import deque

import numpy as np
import pandas as pd
import pyarrow as pa
import pyro
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import ppl_lm
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.lm.table import table_like, table_lm
from ppl_lm.models import tilted

TEXTS, SCORES = ["the soup", "", "a dog"], [0.5, 1.5, 2.5]
TABLE = {"prompt": TEXTS, "score": SCORES}
ROWS = [{"prompt": t, "score": s} for t, s in zip(TEXTS, SCORES, strict=True)]


class MapStyle(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


LISTS = {
    "tuple": tuple(TEXTS),
    "deque": deque(TEXTS),
    "numpy": np.array(TEXTS),
    "numpy objects": np.array(TEXTS, dtype=object),
    "series": pd.Series(TEXTS, index=[7, 8, 9]),
    "index": pd.Index(TEXTS),
    "column of a frame": pd.DataFrame(TABLE)["prompt"],
    "array": pa.array(TEXTS),
    "chunked array": pa.chunked_array([TEXTS[:1], TEXTS[1:]]),
    "scalars": list(pa.array(TEXTS)),
    "column": Dataset.from_dict(TABLE)["prompt"],
    "keys": dict.fromkeys(TEXTS).keys(),
    "map-style": MapStyle(TEXTS),
    "generator": (text for text in TEXTS),
    "iterator": iter(TEXTS),
}
TABLES = {
    "frame": pd.DataFrame(TABLE, index=[7, 8, 9]),
    "table": pa.table(TABLE),
    "record batch": pa.RecordBatch.from_pydict(TABLE),
    "dataset": Dataset.from_dict(TABLE),
    "iterable dataset": Dataset.from_dict(TABLE).to_iterable_dataset(),
    "nameless iterable dataset": IterableDataset.from_generator(lambda: iter(ROWS)),
    "rows": ROWS,
    "rows of a generator": (row for row in ROWS),
    "map-style rows": MapStyle(ROWS),
    "columns of every kind": {"prompt": pd.Series(TEXTS), "score": (s for s in SCORES)},
    "columns of arrays": {"prompt": pa.array(TEXTS), "score": np.array(SCORES)},
    "structured array": np.array(list(zip(TEXTS, SCORES, strict=True)), dtype=[("prompt", "O"), ("score", "f8")]),
}


@pytest.fixture(scope="module")
def lm():
    return tiny.language_model("llama")


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_every_kind(lm, kind):
    made = lm.prompts(LISTS[kind])
    assert made.texts == TEXTS and {type(text) for text in made.texts} == {str} and not made.columns


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_every_kind(lm, kind):
    made = lm.prompts(TABLES[kind])
    assert made.texts == TEXTS and made.columns.keys() == {"score"} and list(made.columns["score"]) == SCORES


def test_chats_as_parquet_gives_them(tmp_path):
    lm = tiny.language_model("llama")
    lm.vocabulary.tokenizer.chat_template = tiny.CHAT
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    pd.DataFrame({"prompt": chats}).to_parquet(tmp_path / "chats.parquet")
    read = pd.read_parquet(tmp_path / "chats.parquet")
    for given in (read, read["prompt"], read["prompt"].to_numpy(), pa.table({"prompt": chats}), pa.array(chats)):
        made = lm.prompts(given)
        assert made.texts == chats and made.ids.equal(lm.prompts(chats).ids)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            DatasetDict({"train": Dataset.from_dict(TABLE)}),
            r"it has \['train'\]: give one of these data sets, such as prompts\['",
        ),
        (pd.DataFrame({"text": TEXTS}), r"needs the column 'prompt'; it has \['text'\]"),
        (pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"]), "two columns 'prompt'"),
        (pd.Series(["a", None]), "prompt 1 is (None|nan)"),
        ([{"prompt": "a"}, {"text": "b"}], r"row 1 has \['text'\]; each row needs the key 'prompt'"),
        ([{"prompt": "a"}, {"prompt": "b", "k": 1}], r"row 1 has \['prompt', 'k'\]; .* the keys of the first row"),
        ([{"prompt": "a"}, "b"], "row 1 has 'b'"),
        ([{"role": "user", "content": "a"}], r"one chat: give a list of chats, \[\[...\]\]"),
        (np.array("a"), "give a list of strings"),
        (iter([]), "iterator gives none"),
        (["a", "cut \ud83d off"], r"prompt 1 has half of a surrogate pair, '\\ud83d' at position 4"),
        ([[{"role": "user", "content": "\udc00"}]], "prompt 0 has half of a surrogate pair"),
    ],
)
def test_what_cannot_be_read_is_said(lm, bad, message):
    with pytest.raises(ValueError, match=message):
        lm.prompts(bad)


def letters(completions, **_):
    return [float(text.count("a")) for text in completions]


letters.r_max = 3.0

DOORS = {
    "importance": lambda t, g, p: ppl_lm.importance(t, g, p, num_samples=4),
    "importance of the prior": lambda t, g, p: ppl_lm.importance(t, None, p, num_samples=4),
    "rejection": lambda t, g, p: ppl_lm.rejection(t, None, p, num_samples=4),
    "quasi_rejection": lambda t, g, p: ppl_lm.quasi_rejection(t, g, p, num_samples=4),
    "best_of_n": lambda t, g, p: ppl_lm.best_of_n(t, g, p, num_samples=4, n=2),
    "mcmc": lambda t, g, p: ppl_lm.mcmc(t, g, p, num_samples=2, warmup=1, num_chains=2),
    "smc": lambda t, g, p: ppl_lm.smc(t, g, p, num_samples=4),
    "enumerate_posterior": lambda t, g, p: ppl_lm.enumerate_posterior(t, g, p),
    "fit": lambda t, g, p: ppl_lm.fit(t, g, p, SequenceELBO(4), max_steps=1),
    "svi": lambda t, g, p: SVI(t, g, Adam({"lr": 0.01}), SequenceELBO(4)).step(p),
    "module": lambda t, g, p: SequenceELBO(4)(t, g)(p),
    "likelihood_bound": lambda t, g, p: ppl_lm.likelihood_bound(t, p),
    "diagnose": lambda t, g, p: ppl_lm.diagnose(t, g, p, num_samples=100),
    "Pyro's MCMC": lambda t, g, p: pyro.infer.MCMC(
        ppl_lm.SequenceKernel(t, g), num_samples=2, warmup_steps=1, disable_progbar=True
    ).run(p),
    "fit_twist": lambda t, g, p: ppl_lm.twists.fit_twist(t, table_like(g.lm), p, steps=2, num_samples=4),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_generator_is_read_once_at_every_door(door):
    lm = table_lm(3, 2, concentration=1.0)
    target, guide = bind(tilted, lm, reward=letters, beta=1.0), bind(finetuned, lm.copy())
    asked = []

    def prompts():
        for text in ("", ""):
            asked.append(text)
            yield text

    DOORS[door](target, guide, prompts())
    assert asked == ["", ""]


def test_plain_programs_are_given_a_list():
    """Without a bound language model nobody could tokenise them."""
    lm = table_lm(3, 2, concentration=1.0)
    free, seen = lm.copy(), []

    def guide(prompts):
        seen.append(prompts)
        return finetuned(free.prompts(prompts), free)

    ppl_lm.importance(lambda p: tilted(lm.prompts(p), lm, ppl_lm.Reward(letters)), guide, iter(["", ""]), num_samples=2)
    assert seen == [["", ""]] * 2  # once to count the plates


def test_one_string_is_one_prompt_to_every_count_of_them():
    lm = table_lm(3, 2, max_prompt=3, concentration=1.0)
    target = bind(tilted, lm, reward=letters, beta=1.0)
    assert ppl_lm.enumerate_posterior(target, None, "a b").log_joint.shape[1] == 1
    assert len(ppl_lm.importance(target, None, "a b", num_samples=2).prompts) == 1


def test_pyros_own_elbo_is_told_when_a_generator_is_empty():
    lm = table_lm(3, 2, concentration=1.0)
    svi = SVI(bind(tilted, lm, reward=letters), bind(finetuned, lm.copy()), Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.raises(ValueError, match="was read before, which can be done once; give a list"):
        svi.step(text for text in ["", ""])


@pytest.mark.parametrize("guide_is_bound", [False, True])
def test_a_plain_program_sees_what_was_given_whatever_stands_beside_it(guide_is_bound):
    """Once, the guide's language model turned the plain model's list into `Prompts`: another posterior, without a word."""
    lm, asked = table_lm(3, 2, max_prompt=3, concentration=1.0), []

    def model(prompts):
        own = lm.prompts([f"b {text}" for text in prompts])
        asked.append(own.texts)
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("x", lm(own))

    ppl_lm.importance(model, bind(finetuned, lm.copy()) if guide_is_bound else None, ["a", "b"], num_samples=4)
    assert asked and all(texts == ["b a", "b b"] for texts in asked)


def test_prompts_with_arrays_beside_them_are_told_apart_by_all_that_these_hold():
    lm = table_lm(3, 2, max_prompt=3, concentration=1.0)
    long = torch.zeros(2, 2000)
    long[1, 1000] = 1  # which Python does not write out
    for column in (long, long.numpy(), long.bfloat16(), [long[0], long[1]]):
        first, second = lm.prompts({"prompt": ["a", "a"], "mask": column}).identities()
        assert first != second and hash(first) != hash(second)
    close = torch.tensor([1.00001, 1.00003], dtype=torch.float64)
    first, second = lm.prompts({"prompt": ["a", "a"], "k": close}).identities()
    assert first != second
    again = lm.prompts({"prompt": ["a", "a"], "mask": long.clone()})
    assert again.identities() == lm.prompts({"prompt": ["a", "a"], "mask": long}).identities()
