"""A real pretrained language model (260,000 parameters); skips where its folder is missing."""

import pytest
import torch

from ppl_lm.likelihood import rewards
from ppl_lm.lm.decoding.decoder import Decoder
from ppl_lm.lm.language_model import LanguageModel

OPENING = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)


@pytest.fixture(scope="module")
def lm(stories) -> LanguageModel:
    return LanguageModel.from_pretrained(stories, 60, device="cpu")


def test_the_story_begins_as_documented_byte_for_byte(stories, device):
    """Catches a wrong first position, mask or cache: any of them changes the greedy text."""
    lm = LanguageModel.from_pretrained(stories, 60, device=device)
    decoder, ids = Decoder(lm, lm.prompts([""])), []
    for _ in range(80):
        token = decoder.log_probs().argmax(-1)
        ids.append(int(token))
        decoder.advance(token)
    assert lm.vocabulary.tokenizer.decode(ids).strip().encode().startswith(OPENING.encode())


def test_one_token_begins_and_ends_a_story(lm):
    v = lm.vocabulary
    assert (v.bos_id, v.end_ids, v.pad_id) == (1, (1,), 0)
    assert v.encode("") == [1] and v.encode("Once")[0] == 1
    injected = v.encode("a<s> b</s><unk>")
    assert injected[0] == 1 and not {0, 1, 2} & set(injected[1:])
    assert v.tokenizer.decode(injected[1:]) == "a<s> b</s><unk>"


def test_drawn_is_scored_on_mixed_prompts(lm):
    d = lm(["", "Once upon a time", "Tom and Sue went to the big park to play. They"])
    x = d.sample((20,))
    drawn = d.sampled_log_probs(x)
    torch.testing.assert_close(drawn, d.token_log_probs(x), atol=1e-4, rtol=0)
    assert lm.self_check(d.prompts) < 1e-4


def test_token_ids_are_the_value_where_text_does_not_survive(lm):
    """About 1 text in 32 is encoded otherwise than it was drawn (none of 256: 3e-4); its score is that of its ids."""
    d = lm([""])
    x = d.sample((256,))
    drawn = d.sampled_log_probs(x).sum(-1)[:, 0]
    rows = lm.vocabulary.completion_ids(x[:, 0])
    lost = [i for i, row in enumerate(rows) if lm.vocabulary.plain(lm.vocabulary.tokenizer.decode(row)) != row]
    assert 1 <= len(lost) <= 64
    torch.testing.assert_close(d.log_prob(x[lost])[:, 0], drawn[lost], atol=1e-3, rtol=0)


def test_the_priors_sentiment_is_the_documented_one(stories):
    """E[VADER] = 0.512 ± 0.002 at 48 tokens, found with independent code: five standard errors."""
    lm = LanguageModel.from_pretrained(stories, 48, device="cpu")
    x = lm([""]).sample((512,))[:, 0]
    score = torch.tensor(rewards.vader(completions=lm.vocabulary.decode(x)), dtype=torch.float64)
    error = (float(score.std()) ** 2 / 512 + 0.002**2) ** 0.5
    assert abs(float(score.mean()) - 0.512) < 5 * error and error < 0.03
