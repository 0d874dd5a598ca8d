"""How varied texts are, by hand and against sacrebleu.

| what | property | tolerance |
|---|---|---|
| distinct-n, unique, truncated | counted by hand, and one by one over random rows | exact |
| self-BLEU | sacrebleu called for each text | 1e-9 |
| truncated, entropy | enumeration | 4 standard errors |
| not_roundtrip | words spelled out by hand | exact |

Mutants that are rejected: pads or end tokens counted as tokens; n-grams across texts.
"""

import random
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppl_lm.criticism.text_diversity import MOST, distinct, diversity, self_bleu, survives
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.markov_chains import mcmc
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.lm.table import table_lm
from ppl_lm.lm.vocabulary import Vocabulary
from ppl_lm.models import tilted
from tests import tiny

LM = table_lm(4, 3, max_prompt=2, concentration=1.0, seed=3)  # a, b, c and the end, 3


def reward(completions, **_):
    return [min(1.0, 0.5 * text.count("a")) for text in completions]


reward.r_max = 1.0


def target(lm=LM):
    return bind(tilted, lm, reward=reward, beta=0.5)


def of_rows(rows, lm=LM):
    """Draws that hold the given token ids."""
    made = importance(target(lm), None, [""], num_samples=len(rows))
    return replace(made, latents={"x": torch.tensor(rows)[None, :, None]})


def test_counted_by_hand():
    made = diversity(of_rows([[0, 0, 1], [0, 1, 3], [0, 1, 3], [3, 3, 3]]))  # aab, ab·, ab·, ·
    assert made["distinct_1"] == 2 / 7 and made["distinct_2"] == 2 / 4 and made["distinct_3"] == 1
    assert made["unique"] == 3 / 4 and made["truncated"] == 1 / 4 and made["num_samples"] == 4
    assert made["truncated_se"] == pytest.approx(0.25) and made["not_roundtrip"] == made["not_roundtrip_se"] == 0
    none = diversity(of_rows([[3, 3, 3]] * 2))
    assert none["distinct_1"] is none["distinct_3"] is None and none["unique"] == 0.5


@given(st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=5), st.integers(1, 3))
def test_distinct_counts_what_lies_within_a_text(rows, n):
    seen, total = [], 0
    for row in rows:
        for i in range(len(row)):
            if i + n <= len(row):
                total += 1
                if row[i : i + n] not in seen:
                    seen.append(row[i : i + n])
    assert distinct(rows, n) == (len(seen) / total if total else None)


def test_self_bleu_is_sacrebleus():
    metric = pytest.importorskip("sacrebleu.metrics.bleu").BLEU(effective_order=True)
    texts = ["the cat sat on the mat", "the cat sat on a mat today", "a dog", "the cat sat on the mat", "one"]
    each = [metric.sentence_score(t, texts[:i] + texts[i + 1 :]).score for i, t in enumerate(texts)]
    assert self_bleu(texts) == pytest.approx(sum(each) / 5, abs=1e-9)
    assert 0 < self_bleu(texts) < 100 and self_bleu(["alone"]) is None
    chosen = random.Random(0)  # few words, so that n-grams occur several times in a text, and in several texts
    several = [" ".join(chosen.choices(["a", "b,", "a.", "c"], k=chosen.randint(1, 12))) for _ in range(40)]
    each = [metric.sentence_score(t, several[:i] + several[i + 1 :]).score for i, t in enumerate(several)]
    assert self_bleu(several) == pytest.approx(sum(each) / 40, abs=1e-9)
    assert self_bleu(["one two"] * 3) == pytest.approx(100) and self_bleu(["", " ", ""]) == 100
    assert self_bleu(["a b c d", "e f g h"]) == 0 and self_bleu(["", "a"]) == 0
    many = [f"w{i} w{i % 7} w{i % 3}" for i in range(MOST + 50)]
    state = torch.random.get_rng_state()
    assert self_bleu(many, seed=1) == self_bleu(many, seed=1) != self_bleu(many, seed=2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_without_sacrebleu_there_is_no_self_bleu(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    made = diversity(of_rows([[0, 0, 1], [0, 1, 3]]))
    assert made["self_bleu"] is None and made["distinct_1"] == 2 / 5


def test_collapse_shows():
    collapsed, varied = (
        diversity(of_rows([[0, 1, 0]] * 50)),
        diversity(importance(target(), None, [""], num_samples=50)),
    )
    assert collapsed["unique"] == 1 / 50 and collapsed["distinct_3"] == 1 / 50
    assert all(collapsed[key] < varied[key] for key in ("unique", "distinct_1", "distinct_2", "distinct_3"))
    if collapsed["self_bleu"] is not None:
        assert collapsed["self_bleu"] == pytest.approx(100) and varied["self_bleu"] < 99


@pytest.mark.parametrize("sampler", [importance, rejection, mcmc])
def test_means_are_those_of_the_draws_law(sampler):
    """Of the guide for `importance`, of the posterior for the others."""
    model, guide = target(), bind(finetuned, LM.copy())
    many = {"num_samples": 300, "num_chains": 8} if sampler is mcmc else {"num_samples": 3000}
    made = diversity(sampler(model, None if sampler is rejection else guide, ["", "a"], **many))
    truth = enumerate_posterior(model, guide, ["", "a"])
    law = (truth.log_q if sampler is importance else truth.log_posterior).detach().exp()
    truncated = (~LM.vocabulary.is_end(truth.latents["x"]).any(-1)).double()  # (N, B)
    for b, figures in enumerate(made["prompts"]):
        exactly = float((law * truncated)[:, b].sum())
        assert 0 < figures["truncated_se"] < 0.05 and abs(figures["truncated"] - exactly) < 4 * figures["truncated_se"]
        assert (figures["entropy"] is None) == (sampler is not importance)
        if figures["entropy"] is not None:
            entropy = -float(torch.special.xlogy(law, law)[:, b].sum())
            assert abs(figures["entropy"] - entropy) < 4 * figures["entropy_se"] < 0.2
        assert figures["not_roundtrip"] == 0
    one, two = made["prompts"]
    assert made["truncated"] == pytest.approx((one["truncated"] + two["truncated"]) / 2)
    assert made["truncated_se"] == pytest.approx((one["truncated_se"] ** 2 + two["truncated_se"] ** 2) ** 0.5 / 2)


def test_the_error_of_runs_is_their_spread():
    made = smc(target(), None, [""], num_samples=20, num_runs=50)
    figures = diversity(made)
    ended = LM.vocabulary.is_end(made["x"][:, :, 0]).any(-1)
    each = 1 - ended.double().mean(1)  # of each run
    assert figures["truncated"] == pytest.approx(float(each.mean()))
    assert figures["truncated_se"] == pytest.approx(float(each.std() / 50**0.5)) and figures["entropy"] is None


def test_a_word_that_is_spelled_out_does_not_survive():
    lm = tiny.language_model(max_new_tokens=6)
    vocabulary = lm.vocabulary
    whole = vocabulary.plain(" soup")
    letters = [i for c in " soup" for i in vocabulary.plain(c)]
    assert vocabulary.tokenizer.decode(whole) == vocabulary.tokenizer.decode(letters) and len(whole) < len(letters) == 5
    prompts = lm(["the"]).prompts if hasattr(lm(["the"]), "prompts") else of_rows([[2] * 6], lm).prompts
    assert survives(whole, prompts) and survives([], prompts) and not survives(letters, prompts)
    rows = [(ids + [2] + [0] * 6)[:6] for ids in (whole, letters, letters, [])]
    made = diversity(of_rows(rows, lm))
    assert made["not_roundtrip"] == 0.5 and made["not_roundtrip_se"] == pytest.approx((1 / 3) ** 0.5 / 2)
    if made["self_bleu"] is not None:  # as text they are the same, as tokens they are not
        assert made["unique"] == 0.75 and made["self_bleu"] == pytest.approx(75)


def test_what_is_not_known_is_none():
    draws = of_rows([[0, 1, 0], [0, 0, 0]])
    v = LM.vocabulary
    bare = replace(draws.prompts, vocabulary=Vocabulary(None, v.size, v.end_ids, v.pad_id, v.bos_id))
    made = diversity(replace(draws, prompts=bare))
    assert made["self_bleu"] is made["not_roundtrip"] is made["not_roundtrip_se"] is None
    assert made["distinct_1"] == 2 / 6 and made["truncated"] == 1
    one = diversity(of_rows([[0, 1, 0]]))
    assert one["unique"] == 1 and one["truncated_se"] is one["self_bleu"] is one["entropy_se"] is None
    with pytest.raises(ValueError, match="text are"):
        diversity(draws, name="y")
    with pytest.raises(ValueError, match="NaN"):
        diversity(replace(draws, log_guide=draws.log_guide * float("nan")))
    never = diversity(replace(draws, log_likelihood=torch.full_like(draws.log_guide, -torch.inf)))
    assert never["unique"] == 1, "weights are not used"
