"""`LanguageModel` and `Decoder` on tiny random GPT-2, Llama, Qwen2 and sliding-window Mistral networks."""

import copy

import pytest
import tiny
import torch
from transformers import GenerationConfig

from ppl_lm.lm.decoding.decoder import Decoder, invert, sample
from ppl_lm.lm.dropout import evaluating
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.table import table_like, table_lm

TEXTS = ["the soup was good", "", "a dog"]  # of mixed lengths: left-padded together
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@pytest.fixture(params=tiny.KINDS)
def kind(request) -> str:
    return request.param


def full_log_probs(lm: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Next-token log-probabilities after a text alone: no padding, no cache, no help from the package."""
    with torch.no_grad():
        return lm.model.eval()(torch.tensor([ids], device=lm.device)).logits[0, -1].log_softmax(-1)


# ----- sampled = scored -----


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_drawn_is_scored_alone_together_and_step_by_step(kind, dtype, device):
    """Catches a wrong cache, mask, position or shift in any architecture."""
    lm = tiny.language_model(kind).to(device, dtype)
    d = lm(TEXTS)
    x = d.sample((4,))
    drawn = d.sampled_log_probs(x)
    torch.testing.assert_close(drawn, d.token_log_probs(x), atol=TOLERANCE[dtype], rtol=0)
    for b, text in enumerate(TEXTS):
        alone = lm([text]).token_log_probs(x[:, b : b + 1])
        torch.testing.assert_close(drawn[:, b : b + 1], alone, atol=TOLERANCE[dtype], rtol=0)
    prompt, row = lm.vocabulary.encode(TEXTS[0]), lm.vocabulary.completion_ids(x[:1, 0])[0]
    for t, token in enumerate(row):
        reference = full_log_probs(lm, prompt + row[:t])[token].double()
        torch.testing.assert_close(drawn[0, 0, t], reference, atol=TOLERANCE[dtype], rtol=0)


def test_every_step_of_the_cache_equals_a_pass_without_it(kind):
    """The whole next-token law, for each row of a left-padded batch; also for prompts of batch shape (K, B)."""
    lm = tiny.language_model(kind).double()
    prompts = lm.prompts(TEXTS)
    nested = prompts.reshape(torch.Size((3, 1)))
    texts = [lm.vocabulary.encode(text) for text in TEXTS]
    decoder, same = Decoder(lm, prompts), Decoder(lm, nested)
    for step in range(7):
        expected = torch.stack([full_log_probs(lm, ids) for ids in texts])
        torch.testing.assert_close(decoder.log_probs(), expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(same.log_probs(), expected, atol=1e-10, rtol=0)
        tokens = torch.tensor([7 + step, 290 - step, 50])
        for ids, token in zip(texts, tokens.tolist(), strict=True):
            ids.append(token)
        decoder.advance(tokens)
        same.advance(tokens)


def test_reordered_rows_carry_their_own_past(kind):
    """Catches a cache, mask or position that stays behind when rows are copied, swapped or dropped (SMC's ancestors)."""
    lm = tiny.language_model(kind).double()
    texts = [lm.vocabulary.encode(text) for text in TEXTS]
    decoder = Decoder(lm, lm.prompts(TEXTS))
    generator = torch.Generator().manual_seed(0)
    for ancestors in ([2, 0, 0, 1, 2], [4, 4, 1], [0, 2, 1, 1, 0, 2], [5], [0, 0, 0]):
        decoder.reorder(torch.tensor(ancestors))
        texts = [list(texts[a]) for a in ancestors]
        tokens = torch.randint(5, 300, (len(texts),), generator=generator)
        for ids, token in zip(texts, tokens.tolist(), strict=True):
            ids.append(token)
        decoder.advance(tokens)
        expected = torch.stack([full_log_probs(lm, ids) for ids in texts])
        torch.testing.assert_close(decoder.log_probs(), expected, atol=1e-5, rtol=0)


def test_without_position_ids_left_padding_would_show(monkeypatch):
    """The mutant of the tests above: GPT-2's absolute positions, left to themselves, count the padding."""
    lm = tiny.language_model("gpt2")
    right = lm(TEXTS).token_log_probs(x := lm(TEXTS).sample())
    forward = lm.model.forward
    monkeypatch.setattr(lm.model, "forward", lambda position_ids=None, **inputs: forward(**inputs))
    assert (lm(TEXTS).token_log_probs(x) - right).abs().max() > 1e-2


def test_what_a_neighbour_says_has_no_influence_at_all(kind, device):
    """Exactly none, in the same batch shape; and at most 1e-5 from the size of the batch itself."""
    lm = tiny.language_model(kind).to(device)
    x = lm(["the soup"] * 8).sample()
    ids = lm.vocabulary.encode("the soup")
    eight, other = (lm(Prompts.from_ids([ids] + [[token] * 9] * 7, lm.vocabulary)) for token in (8, 9))
    first = eight.log_prob(x)[0]
    assert other.log_prob(torch.cat([x[:1], x[1:].flip(0)]))[0] == first
    assert abs(lm(["the soup"]).log_prob(x[:1])[0] - first) <= 1e-5 * x.shape[-1]
    assert (lm(["the soup"]).token_log_probs(x[:1])[0] - eight.token_log_probs(x)[0]).abs().max() <= 1e-5


def test_prompts_padded_more_draw_and_score_the_same(kind):
    lm = tiny.language_model(kind).double()
    short, long = lm.prompts(["a dog"]), lm.prompts(["a dog", "the soup was good and the bread was warm"])
    u = torch.rand(1, 8, dtype=torch.float64)
    x, log_q = sample(lm, short, torch.tensor([0]), u)
    both, log_q_both = sample(lm, long, torch.tensor([0, 1]), torch.cat([u, u]))
    assert both[0].equal(x[0])
    torch.testing.assert_close(log_q_both[0], log_q[0], atol=1e-10, rtol=0)


def test_dropping_finished_rows_changes_no_draw(kind):
    """Against a loop that keeps every row to the end and writes with plain ifs."""
    lm = tiny.language_model(kind, max_new_tokens=12).double()
    lm = LanguageModel(lm.model, lm.vocabulary.tokenizer, 12, end_ids=range(100, 220))  # ends often
    prompts = lm.prompts(TEXTS)
    rows = torch.arange(3).repeat(10)
    u = torch.rand(30, 12, dtype=torch.float64)
    decoder = Decoder(lm, prompts.take(rows))
    x = torch.full((30, 12), lm.vocabulary.pad_id)
    ended = [False] * 30
    for t in range(12):
        tokens = invert(decoder.log_probs(), u[:, t])
        for i, token in enumerate(tokens.tolist()):
            if not ended[i]:
                x[i, t] = token
                ended[i] = token in lm.vocabulary.end_ids
        decoder.advance(tokens)
    lengths = lm.vocabulary.lengths(x)
    assert len(lengths.unique()) > 3  # they end at different steps, or this tests nothing
    drawn, log_q = sample(lm, prompts, rows, u)
    assert drawn.equal(x)
    torch.testing.assert_close(log_q, lm.score(prompts.take(rows), x), atol=1e-10, rtol=0)


def test_the_size_of_a_pass_changes_nothing(kind, monkeypatch):
    lm = tiny.language_model(kind).double()
    torch.manual_seed(1)
    x = lm(TEXTS).sample((5,))
    log_p = lm(TEXTS).log_prob(x)
    for size in (1, 4):
        monkeypatch.setattr(LanguageModel, "rows_per_pass", lambda self, *a, size=size, **k: size)
        torch.manual_seed(1)
        assert lm(TEXTS).sample((5,)).equal(x)
        torch.testing.assert_close(lm(TEXTS).log_prob(x), log_p, atol=1e-10, rtol=0)


def test_a_prompt_is_forwarded_once_for_all_its_particles():
    from ppl_lm.lm import meter

    lm = tiny.language_model("llama", max_new_tokens=1)
    with meter.measure() as cost:
        lm(["the soup was good"]).sample((50,))
    assert cost.lm_tokens == len(lm.vocabulary.encode("the soup was good"))


def test_inversion_is_exact_at_the_edges():
    """Never a token of probability zero: not at u = 0, not at the last u below 1, not in float16."""
    log_probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).log()
    edges = torch.tensor([0.0, 0.25 - 1e-6, 0.25 + 1e-6, 1 - 2**-53], dtype=torch.float64)
    assert invert(log_probs.expand(4, -1), edges).tolist() == [1, 1, 3, 3]
    assert invert(log_probs.half(), torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [3]
    for bad in (torch.full((1, 5), torch.nan), torch.full((1, 5), -torch.inf)):
        with pytest.raises(ValueError, match="logits hold NaN"):
            invert(bad, edges[:1])


# ----- the state of the model -----


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_dropout_is_off_for_drawing_and_scoring(kind):
    """Catches a ratio that is not 1 at step 0 because q was drawn or scored in train mode."""
    lm = tiny.language_model(kind, dropout=0.5).copy()
    torch.manual_seed(2)
    x = lm(TEXTS).sample()
    log_p = lm(TEXTS).log_prob(x)
    lm.train()
    lm.model.get_input_embeddings().eval()  # a mixed state is restored as it was
    modes = [m.training for m in lm.modules()]
    torch.manual_seed(2)
    assert lm(TEXTS).sample().equal(x)
    assert lm(TEXTS).log_prob(x).equal(log_p)
    assert [m.training for m in lm.modules()] == modes and any(modes) and not all(modes)


def test_the_mode_is_restored_when_a_pass_fails(monkeypatch):
    lm = tiny.language_model("gpt2", dropout=0.5)
    x = lm(TEXTS).sample()
    lm.train()

    def fails(**inputs):
        assert not lm.model.training
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lm.model, "forward", fails)
    for door in (lm(TEXTS).sample, lambda: lm(TEXTS).log_prob(x)):
        with pytest.raises(RuntimeError, match="out of memory"):
            door()
        assert all(m.training for m in lm.modules())
    with evaluating(lm.model):
        assert not lm.model.training


def test_generation_config_shapes_nothing():
    """top_k, top_p, temperature, min_length: the draws are those of the plain law, to the last bit."""
    lm = tiny.language_model("llama")
    torch.manual_seed(3)
    x = lm(TEXTS).sample((50,))
    lm.model.generation_config = GenerationConfig(
        temperature=0.1, top_k=2, top_p=0.5, min_length=8, repetition_penalty=2.0, do_sample=True, eos_token_id=2
    )
    twin = LanguageModel(lm.model, lm.vocabulary.tokenizer, 8)
    torch.manual_seed(3)
    assert twin(TEXTS).sample((50,)).equal(x)


def test_draws_reach_beyond_the_top_fifty():
    """Catches `generate()`'s hidden top_k=50: ranks of first tokens against the exact mass beyond the fiftieth."""
    lm = tiny.language_model("gpt2", max_new_tokens=1, initializer_range=0.05)
    d = lm(["the soup"])
    law = d.log_prob(torch.arange(300)[:, None, None])[:, 0].exp()
    beyond = law.sort(descending=True).indices[50:]
    mass = float(law[beyond].sum())
    found = float(torch.isin(d.sample((5000,))[:, 0, 0], beyond).double().mean())
    assert abs(found - mass) < 5 * (mass * (1 - mass) / 5000) ** 0.5 and mass > 0.3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_float32_or_wider(dtype):
    """Catches a softmax in half precision (a tail error of 0.1 nats) and float64 that is cut."""
    lm = tiny.language_model("llama").to(dtype)
    ids = torch.tensor([[1, 7, 9]])
    logits, _ = lm.logits(ids=ids, mask=None, positions=torch.arange(3)[None], keep=2)
    assert logits.dtype == torch.promote_types(dtype, torch.float32) and logits.shape == (1, 2, 300)
    d = lm(TEXTS)
    x = d.sample()
    assert d.log_prob(x).dtype == torch.float64
    law = lm.logits_next(ids=ids, mask=None, positions=torch.arange(3)[None], cache=None)[0].log_softmax(-1)
    assert abs(float(law.double().exp().sum()) - 1) < 1e-5


def test_born_frozen_and_copies_are_trainable_and_independent():
    network = tiny.network("llama", tie_word_embeddings=True)
    lm = LanguageModel(network.train(), tiny.bpe(), 8)
    assert not any(p.requires_grad for p in lm.parameters()) and not lm.model.training
    twin = lm.copy()
    assert all(p.requires_grad for p in twin.parameters()) and twin.vocabulary is lm.vocabulary
    assert not {p.data_ptr() for p in lm.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert len(list(twin.parameters())) == len(list(lm.parameters()))  # tied weights stay tied
    before = copy.deepcopy(lm.state_dict())
    x = lm(TEXTS).sample()
    torch.testing.assert_close(twin(TEXTS).log_prob(x), lm(TEXTS).log_prob(x), atol=0, rtol=0)
    (-twin(TEXTS).log_prob(x).sum()).backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert all(before[name].equal(value) for name, value in lm.state_dict().items())
    assert (twin(TEXTS).log_prob(x) - lm(TEXTS).log_prob(x)).abs().max() > 1e-3
    assert not lm(TEXTS).log_prob(x).requires_grad


def test_copies_keep_overridden_end_tokens():
    lm = LanguageModel(tiny.network("llama"), tiny.bpe(), 8, end_ids=[7, 9])
    assert lm.copy().vocabulary.end_ids == lm.vocabulary.end_ids == (7, 9)
    assert table_like(table_lm(4, 3)).vocabulary.end_ids == (3,)


def test_scoring_leaves_the_global_random_states_alone():
    import random

    import numpy as np

    lm = tiny.language_model("gpt2", dropout=0.1)
    x = lm(TEXTS).sample()
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    lm(TEXTS).log_prob(x)
    lm.self_check()
    lm.copy()
    table_lm(4, 3, concentration=1.0)
    assert random.getstate() == before[0] and str(np.random.get_state()) == before[1]
    assert torch.get_rng_state().equal(before[2])


# ----- end tokens -----


def test_end_tokens_are_those_of_configuration_generation_and_tokenizer():
    """Catches one end token honoured of many: a chat model's turn end lives in generation_config alone."""
    network = tiny.network("llama", eos_token_id=[5, 6])
    network.generation_config.eos_token_id = [4, 5]
    lm = LanguageModel(network, tiny.bpe(), 8)
    assert lm.vocabulary.end_ids == (2, 4, 5, 6)
    assert LanguageModel(network, tiny.bpe(), 8, end_ids=[9]).vocabulary.end_ids == (9,)
    assert LanguageModel(tiny.network("gpt2"), tiny.bpe(eos_token="<s>"), 8).vocabulary.end_ids == (1, 2)


def test_each_end_token_stops_and_is_scored():
    lm = LanguageModel(tiny.network("llama"), tiny.bpe(), 20, end_ids=range(100, 200))
    d = lm([""])
    x = d.sample((200,))[:, 0]
    lengths = lm.vocabulary.lengths(x)
    ends = x[torch.arange(200), lengths - 1]
    assert len(ends[lengths < 20].unique()) > 5 and bool(((ends >= 100) & (ends < 200))[lengths < 20].all())
    row = int((lengths < 20).nonzero()[0, 0])
    n = int(lengths[row])
    context = [lm.vocabulary.bos_id, *x[row, : n - 1].tolist()]
    expected = full_log_probs(lm, context)[ends[row]].double()
    torch.testing.assert_close(d.token_log_probs(x[row : row + 1])[0, n - 1], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("names", "pad", "bos", "ends"),
    [
        ({"pad_token": "</s>"}, 2, 1, (2,)),  # pad = end
        ({"pad_token": None}, 0, 1, (2,)),  # from the configuration
        ({"eos_token": "<s>", "pad_token": "<s>"}, 1, 1, (1,)),  # all three in one
    ],
)
def test_pad_begin_and_end_may_be_one_token(names, pad, bos, ends):
    network = tiny.network("llama", eos_token_id=list(ends))
    lm = LanguageModel(network, tiny.bpe(**names), 8)
    v = lm.vocabulary
    assert (v.pad_id, v.bos_id, v.end_ids) == (pad, bos, ends)
    d = lm(TEXTS)
    x = d.sample((40,))
    torch.testing.assert_close(d.sampled_log_probs(x), d.token_log_probs(x), atol=1e-4, rtol=0)
    ended = x.new_full((1, 1, 8), v.pad_id)
    ended[..., 0] = ends[0]
    expected = torch.stack([full_log_probs(lm, v.encode(text))[ends[0]] for text in TEXTS])
    torch.testing.assert_close(
        d.log_prob(ended)[0], expected.double(), atol=1e-4, rtol=0
    )  # the end counts, pads do not


def test_a_begin_token_outside_the_vocabulary_is_none():
    network = tiny.network("gpt2", bos_token_id=50256)
    assert LanguageModel(network, tiny.bpe(bos_token=None), 8).vocabulary.bos_id is None


def test_no_end_token_is_an_error_that_says_what_to_pass():
    network = tiny.network("llama", eos_token_id=None)
    network.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"names one; pass end_ids=\[...\]"):
        LanguageModel(network, tiny.bpe(eos_token=None), 8)
    assert LanguageModel(network, tiny.bpe(eos_token=None), 8, end_ids=[3]).vocabulary.end_ids == (3,)
    with pytest.raises(ValueError, match="end_ids=.*do not fit a vocabulary of 300"):
        LanguageModel(network, tiny.bpe(), 8, end_ids=[300])
    with pytest.raises(ValueError, match="no end token"):
        LanguageModel(network, tiny.bpe(), 8, end_ids=[])


@pytest.mark.parametrize("bad", [0, -1, 2.0, "8", None, True])
def test_max_new_tokens_must_be_a_positive_whole_number(bad, unchecked):
    with pytest.raises(ValueError, match=f"max_new_tokens={bad!r}; give a whole number of tokens, at least 1"):
        LanguageModel(tiny.network("llama"), tiny.bpe(), bad)


def test_a_context_overflow_is_refused_when_the_distribution_is_made():
    lm = tiny.language_model("llama", max_new_tokens=60)
    assert lm(["", ""]).event_shape == (60,)
    with pytest.raises(ValueError, match="need .* positions; this model has 64: shorten the prompt or lower"):
        lm(["", "the soup was good"])


def test_passes_fit_a_memory_budget(kind):
    """Rows of one pass get fewer with text, vocabulary and gradient, and are never none."""
    lm = tiny.language_model(kind)
    assert lm.rows_per_pass(8, 8) > lm.rows_per_pass(8, 64) > lm.rows_per_pass(800, 64) >= 1
    assert lm.rows_per_pass(8, 8) > lm.rows_per_pass(8, 8, gradient=True) > 100
    assert lm.rows_per_pass(10**9, 1) == 1
    assert all((n := lm.rows_per_pass(8, steps)) & (n - 1) == 0 for steps in (3, 8, 50)), "a power of two"
    assert lm.width == 64
