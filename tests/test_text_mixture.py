"""Mixtures of whole texts: the law, its gradient and its bound, against enumeration.

| what | property | mutant |
|---|---|---|
| law | Σ w_k p_k of whole texts, prompts left out | the same weights at every token |
| gradient | each component's responsibility times its own | none: the gradient of log q_k alone |
| weights | at most 1/ε times the largest likelihood, where those of the guide alone have no bound | |
"""

import math

import oracle
import pyro
import pytest
import tiny
import torch
from test_automata import each_a_before_b

import ppl_lm
from ppl_lm.guides import finetuned
from ppl_lm.guides import mixture as mixture_guide
from ppl_lm.guides import prior as prior_guide
from ppl_lm.infer.binding import bind
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.laws.support import truncated
from ppl_lm.lm.table import table_like, table_lm
from ppl_lm.lm.text_mixture import mixture
from ppl_lm.models import tilted

V, T, END = 3, 3, 2
ROWS = oracle.outcomes(V, T, END)
X = oracle.as_tensor(ROWS, T, END)
WEIGHTS = [0.7, 0.3]
PROMPTS = ["", "a"]
HAS_B = ppl_lm.Reward(lambda completions, **_: [float("b" in text) for text in completions], r_max=1.0)


def components(concentration=1.0):
    return [table_lm(V, T, max_prompt=2, concentration=concentration, seed=seed) for seed in (1, 2)]


def whole(lms, weights, prompts, x):
    """log Σ_k w_k p_k(x), by hand."""
    each = [
        torch.tensor(w, dtype=torch.float64).log() + lm(prompts).log_prob(x) for lm, w in zip(lms, weights, strict=True)
    ]
    return torch.stack(each).logsumexp(0)


def test_it_is_the_mixture_of_whole_texts_whatever_the_prompt():
    lms = components()
    q, x = mixture(lms, WEIGHTS), X[:, None].expand(-1, 2, -1)
    log_q = q(PROMPTS).log_prob(x)
    for b, prompt in enumerate(PROMPTS):
        context = tuple(lms[0].vocabulary.encode(prompt))
        each = [oracle.log_probs(lm.model.table, context, ROWS) for lm in lms]
        right = sum(w * log_p.exp() for w, log_p in zip(WEIGHTS, each, strict=True)).log()
        torch.testing.assert_close(log_q[:, b], right, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_q.exp().sum(0), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
    tokens = torch.stack([lm(PROMPTS).token_log_probs(x) for lm in lms])  # the mutant: each token from either
    log_w = torch.tensor(WEIGHTS, dtype=torch.float64).log()[:, None, None, None]
    assert float(((tokens + log_w).logsumexp(0).sum(-1) - log_q).abs().max()) > 0.05
    law = q(PROMPTS)
    x = law.sample((200,))
    torch.testing.assert_close(law.sampled_log_probs(x), law.token_log_probs(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_it_is_sampled_as_it_is_scored(kind):
    """Step by step with rows moved and dropped, in one pass, after a prompt that is passed once, alone: the self-check."""
    lms = [
        LanguageModel(tiny.network(kind, seed=seed).double(), tiny.bpe(), 6, end_ids=range(2, 40)) for seed in (0, 1)
    ]
    q = mixture(lms, WEIGHTS)
    assert q.self_check(["the soup was", "a"]) < 1e-7
    assert q.shortcuts.prompts
    law = q(["the soup was good", "a"])
    x = law.sample((8,))
    torch.testing.assert_close(law.log_prob(x), whole(lms, WEIGHTS, law.prompts, x), rtol=0, atol=1e-6)


def test_gradients_are_the_components_by_their_responsibilities():
    prior, guide = components()
    free = table_like(guide, max_prompt=2)
    with torch.no_grad():
        free.model.table.copy_(guide.model.table)
    q, x = mixture([free, prior], [0.9, 0.1]), X[:, None]
    coming = torch.randn(len(X), 1, dtype=torch.float64)
    log_q = q([""]).log_prob(x)
    (found,) = torch.autograd.grad((coming * log_q).sum(), free.model.table)
    responsibility = (torch.log(torch.tensor(0.9)) + free([""]).log_prob(x) - log_q).exp().detach()
    (right,) = torch.autograd.grad((coming * responsibility * free([""]).log_prob(x)).sum(), free.model.table)
    (mutant,) = torch.autograd.grad((coming * free([""]).log_prob(x)).sum(), free.model.table)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-7)
    assert float((found - mutant).abs().max()) > 0.01


def test_weights_are_bounded_where_those_of_the_guide_are_not():
    prior = components()[0]
    narrow = table_like(prior, max_prompt=2)
    with torch.no_grad():
        narrow.model.table[:, 0] = 12.0  # all but one text are forgotten
    beta, epsilon = 0.5, 0.2
    target = bind(tilted, prior, reward=HAS_B, beta=beta)
    q = bind(mixture_guide, narrow, prior, epsilon=epsilon)
    draws = importance(target, q, [""], num_samples=2000)
    exact = ppl_lm.enumerate_posterior(target, q, [""])
    assert float(draws.log_weight.max()) <= 1 / beta - math.log(epsilon) + 1e-9
    alone, before = (
        float(ppl_lm.enumerate_posterior(target, guide, [""]).kl_p_q.detach())
        for guide in (bind(finetuned, narrow), bind(prior_guide, prior))
    )
    assert float(exact.kl_p_q.detach()) <= min(alone - math.log(1 - epsilon), before - math.log(epsilon)) + 1e-9
    assert alone > before - math.log(epsilon) + 1  # of the guide alone that does not hold
    found = float(draws.log_weight.logsumexp((0, 1)) - math.log(2000))
    assert found == pytest.approx(float(exact.log_z), abs=0.1)


def test_svi_fits_the_guide_beside_the_prior():
    prior = components()[0]
    free = table_like(prior, max_prompt=2)
    target, q = bind(tilted, prior, reward=HAS_B, beta=0.3), bind(mixture_guide, free, prior, epsilon=0.05)
    before = float(ppl_lm.enumerate_posterior(target, q, [""]).kl_q_p.detach())
    svi = pyro.infer.SVI(target, q, pyro.optim.Adam({"lr": 0.1}), loss=SequenceELBO(num_particles=32))
    for _ in range(60):
        svi.step([""])
    after = float(ppl_lm.enumerate_posterior(target, q, [""]).kl_q_p.detach())
    assert after < 0.1 * before
    assert not any(w.requires_grad for w in prior.parameters())


def test_bad_weights_are_refused():
    lms = components()
    for weights in ([0.5, 0.6], [1.0, 0.0], [1.0], [1.5, -0.5]):
        with pytest.raises(ValueError, match="weight"):
            mixture(lms, weights)


def test_what_all_components_forbid_is_impossible_and_moves_nothing():
    """The sum of no probability at all has no logarithm to go back through: NaN in every weight, without care."""
    lms = [table_lm(4, T, max_prompt=2, concentration=1.0, seed=seed) for seed in (1, 2)]
    mask = each_a_before_b(lms[0]).mask(lms[0])
    free = lms[0].copy()
    allowed = mixture([ppl_lm.lm.product([free, mask]), ppl_lm.lm.product([lms[1], mask])], WEIGHTS)
    law = allowed([""])
    x = law.enumerate_support()
    log_q = law.log_prob(x)
    right = whole([ppl_lm.lm.product([lm, mask]) for lm in (free, lms[1])], WEIGHTS, [""], x)
    torch.testing.assert_close(log_q, right, rtol=0, atol=1e-12)
    possible = log_q.isfinite()
    assert possible.any() and not possible.all()
    (found,) = torch.autograd.grad(log_q[possible].sum(), free.model.table, retain_graph=True)
    alone = whole([ppl_lm.lm.product([lm, mask]) for lm in (free, lms[1])], WEIGHTS, [""], x[possible[:, 0]])
    (wanted,) = torch.autograd.grad(alone.sum(), free.model.table)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    (whatever,) = torch.autograd.grad(
        log_q.masked_fill(~possible, 0.0).sum() + log_q[~possible].sum(), free.model.table
    )
    assert bool(whatever.isfinite().all())


def test_weights_of_single_precision_are_weights():
    lms = components()
    given = torch.tensor([0.7, 0.2, 0.1]).tolist()
    three = [*lms, table_lm(V, T, max_prompt=2, seed=3)]
    law = mixture(three, given)([""])
    torch.testing.assert_close(law.log_prob(X[:, None]).exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_a_guide_that_is_a_mixture_is_not_looked_into_at_every_step():
    """Each call makes a language model anew; what is known of its components is known of it."""
    prior = LanguageModel(tiny.network("llama"), tiny.bpe(), 6, end_ids=range(2, 40))
    prior.self_check()
    free, passes = prior.copy(), []
    free.model.register_forward_pre_hook(lambda *_: passes.append(1))
    prompts = prior.prompts(["the soup was good"] * 4)
    counts = []
    for _ in range(3):
        passes.clear()
        law = mixture([free, prior], WEIGHTS)(prompts)
        law.log_prob(torch.full((3, 4, 6), 60)).sum().backward()
        counts.append(len(passes))
    assert counts[1] == counts[2] == 2


def test_copies_keep_what_is_known_of_all_components():
    short = LanguageModel(tiny.network("llama", max_position_embeddings=16), tiny.bpe(), 6, end_ids=range(2, 40))
    long = LanguageModel(tiny.network("gpt2"), tiny.bpe(), 6, end_ids=range(2, 40))
    for whole_of in (ppl_lm.lm.product, lambda lms: mixture(lms, WEIGHTS)):
        q = whole_of([long, short])
        twin = q.copy()
        assert (
            (twin.max_positions, twin.networks, twin.width)
            == (16, 2, q.width)
            == (q.max_positions, q.networks, q.width)
        )
        x = q(["a dog"]).sample((5,))
        torch.testing.assert_close(twin(["a dog"]).log_prob(x), q(["a dog"]).log_prob(x), rtol=0, atol=1e-4)


def test_what_no_component_can_draw_is_impossible_and_has_a_gradient():
    """After such a token, and at those that none of them keeps: -inf, and no NaN in the gradient of the others."""
    lms = [truncated(lm.copy(), top_k=k) for lm, k in zip(components(), (1, 2), strict=True)]
    q, x = mixture(lms, WEIGHTS), X[:, None]
    log_q = q([""]).log_prob(x)
    torch.testing.assert_close(log_q, whole(lms, WEIGHTS, [""], x), rtol=0, atol=1e-12)
    assert bool((log_q == -torch.inf).any())
    coming = torch.randn(len(X), 1, dtype=torch.float64)
    table = lms[1].model.model.table
    (found,) = torch.autograd.grad((coming * log_q).sum(), table, retain_graph=True)
    assert bool(found.isfinite().all())
    possible = log_q > -torch.inf
    (found,) = torch.autograd.grad((coming * log_q)[possible].sum(), table)
    log_p = lms[1]([""]).log_prob(x)
    responsibility = (math.log(WEIGHTS[1]) + log_p - log_q).exp().detach()
    own = log_p > -torch.inf
    right = (coming[own] * responsibility[own] * log_p[own]).sum()
    torch.testing.assert_close(found, torch.autograd.grad(right, table)[0], rtol=0, atol=1e-10)
