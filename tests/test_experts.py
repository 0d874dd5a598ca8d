"""Products of language models token by token, and the networks that twists are.

| what | property | tolerance |
|---|---|---|
| `product` | its law against one made from tables by hand, for a left-padded batch | 1e-10 |
| `product` | sampled = scored, cached = uncached, on networks of other kinds | 1e-10, float64 |
| `twist_like` | ψ = 1 at first: the twisted guide is the prior; gradients reach the twist alone | 1e-10 |
"""

import oracle
import pyro
import pytest
import tiny
import torch

from ppl_lm.guides import twisted
from ppl_lm.infer.binding import bind
from ppl_lm.infer.twists.networks import twist_like
from ppl_lm.lm.decoding.decoder import Decoder
from ppl_lm.lm.experts import product
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.meter import measure
from ppl_lm.lm.table import table_lm

V, T, END = 3, 3, 2
ROWS = oracle.outcomes(V, T, END)
X = oracle.as_tensor(ROWS, T, END)
TEXTS = ["the soup", "she said that it was", ""]


@pytest.mark.parametrize("powers", [(1.0, 1.0), (0.5, -0.3), (2.0, 0.0)])
def test_each_token_is_normalised_by_itself(powers):
    lms = [table_lm(V, T, max_prompt=2, concentration=1.0, seed=seed) for seed in (1, 2)]
    tables = [lm.model.table for lm in lms]
    made = product(lms, powers)
    logits = sum(p * t.log_softmax(-1) for p, t in zip(powers, tables, strict=True))
    for text in ("", "a"):
        context = tuple(lms[0].vocabulary.encode(text))
        expected = oracle.log_probs(logits, context, ROWS)
        torch.testing.assert_close(made([text]).log_prob(X[:, None])[:, 0], expected, atol=1e-10, rtol=0)
    batch = made(["", "a"])
    x = batch.sample((50,))
    torch.testing.assert_close(batch.sampled_log_probs(x), batch.token_log_probs(x), atol=1e-10, rtol=0)


def test_it_is_not_the_product_of_whole_texts():
    lm = table_lm(V, T, max_prompt=2, concentration=1.0, seed=1)
    whole = 2 * lm([""]).log_prob(X[:, None])[:, 0]
    assert (product([lm], [2.0])([""]).log_prob(X[:, None])[:, 0] - whole.log_softmax(0)).abs().max() > 0.1


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_caches_move_together(kind):
    lms = [tiny.language_model(kind, seed=seed).double() for seed in (0, 1)]
    made = product(lms, (1.0, 0.5))
    assert made.self_check() < 1e-10
    decoder = Decoder.of(made, made.prompts(TEXTS), torch.tensor([2, 0, 0, 1]))
    singles = [Decoder.of(lm, lm.prompts(TEXTS), torch.tensor([2, 0, 0, 1])) for lm in lms]
    for rows in ([3, 3, 0, 1], [1, 0], [1, 1, 0]):
        tokens = torch.arange(len(decoder.logits())) + 7
        for one in (decoder, *singles):
            one.advance(tokens)
            one.reorder(torch.tensor(rows))
        expected = (singles[0].log_probs() + 0.5 * singles[1].log_probs()).log_softmax(-1)
        torch.testing.assert_close(decoder.log_probs(), expected, atol=1e-10, rtol=0)


def test_every_expert_is_counted():
    lms = [tiny.language_model("llama", seed=seed) for seed in (0, 1)]
    with measure() as alone:
        Decoder(lms[0], lms[0].prompts(TEXTS))
    with measure() as both:
        Decoder(product(lms), lms[0].prompts(TEXTS))
    assert both.lm_tokens == 2 * alone.lm_tokens


@pytest.mark.parametrize("head_only", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_twist_begins_as_none_and_alone_is_trained(kind, head_only):
    prior = tiny.language_model(kind).double()
    twist = twist_like(prior, head_only)
    guide = bind(twisted, prior, twist)
    x = prior(TEXTS).sample((4,))
    log_q = product([prior, twist])(TEXTS).log_prob(x)
    torch.testing.assert_close(log_q, prior(TEXTS).log_prob(x), atol=1e-10, rtol=0)
    with pyro.poutine.trace(param_only=True) as trace:
        guide(TEXTS)
    names = [name for name in trace.trace.nodes if "$$$" in name]
    assert names and all("twist" in name for name in names)
    assert not head_only or len(names) == 1
    log_q.sum().backward()
    moved = [p for p in twist.parameters() if p.grad is not None and bool((p.grad != 0).any())]
    assert moved and all(p.grad is None for p in prior.parameters())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_twist_of_a_head_alone_lies_around_the_priors_own_body(kind):
    """Also where the head's weights are the embeddings' too; of a prior that is being trained it is a copy."""
    prior = tiny.language_model(kind)
    before = prior(TEXTS).log_prob(x := prior(TEXTS).sample((2,)))
    twist = twist_like(prior, head_only=True)
    theirs = {id(weight) for weight in prior.parameters()}
    own = [weight for weight in twist.parameters() if id(weight) not in theirs]
    assert len(own) == 1 and own[0].requires_grad
    with torch.no_grad():
        own[0].normal_()
    torch.testing.assert_close(prior(TEXTS).log_prob(x), before, rtol=0, atol=0)
    trained = twist_like(prior.copy(), head_only=True)
    assert not {id(weight) for weight in trained.parameters()} & theirs
    with pytest.raises(ValueError, match="is being trained"):
        prior.copy().around_same_weights()
    half = twist_like(LanguageModel(tiny.network(kind).bfloat16(), tiny.bpe(), 7), head_only=True)
    (head,) = (weight for weight in half.parameters() if weight.requires_grad)
    assert head.dtype == torch.float32 and half.compute_dtype == torch.bfloat16
    assert bool(half(TEXTS).log_prob(half(TEXTS).sample()).isfinite().all())
    prior.model.forward = prior.model.forward
    with pytest.raises(ValueError, match="has a forward that was put on it"):
        twist_like(prior, head_only=True)


def test_refusals():
    one, other = table_lm(3, 2), table_lm(4, 2)
    with pytest.raises(ValueError, match="language models that are put together"):
        product([one, other])
    with pytest.raises(ValueError, match="max_new_tokens are 2 and 3"):
        product([one, table_lm(3, 3)])
    with pytest.raises(ValueError, match="1 language models and 2 powers"):
        product([one], [1.0, 2.0])
    with pytest.raises(ValueError, match="no output embeddings"):
        twist_like(one)
    assert isinstance(product([one]), LanguageModel)
