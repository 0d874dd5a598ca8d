"""`tempered` and `truncated`: the laws of whole texts that temperature, top-p, min-p and top-k make, by enumeration.

| what | property |
|---|---|
| law | p^(1/τ), or p on the kept tokens, each token with its own normaliser, by hand; sums to 1; draws agree with it |
| kept tokens | by hand, also of equal ones; transformers' own warpers, one after the other |
| gradient | finite differences, of the wrapped weights and of the temperature; finite where a text is impossible |
| networks | sampled = scored on other kinds; prompts of several lengths; what stands after an end |

Mutants: one normaliser for the whole text; the cut before the temperature; the crossing token left out; of equal tokens the
higher ids; top-p of the whole law after top-k; the gradient without the normaliser of what is kept.
"""

import math

import oracle
import pyro
import pytest
import tiny
import torch
from scipy import stats
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import ppl_lm
from ppl_lm.guides import tempered as tempered_guide
from ppl_lm.infer.binding import bind
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.lm.experts import product
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.laws.support import kept_tokens, truncated
from ppl_lm.lm.laws.temperature import tempered
from ppl_lm.lm.network import DivergedError
from ppl_lm.lm.table import table_like, table_lm
from ppl_lm.models import tilted

V, T, END = 4, 3, 3
ROWS = oracle.outcomes(V, T, END)
X = oracle.as_tensor(ROWS, T, END)
PROMPTS = ["", "a"]
CUTS = [{"top_p": 0.5}, {"top_p": 0.7}, {"top_p": 0.85}, {"min_p": 0.4}, {"top_k": 1}, {"top_k": 3}]
CUTS += [{"top_p": 0.8, "top_k": 3}, {"top_p": 0.9, "min_p": 0.3, "top_k": 3}]
LENGTH = ppl_lm.Reward(lambda completions, **_: [len(text) / 4 for text in completions], r_max=3.0)


def random_lm(seed=1, concentration=1.0):
    return table_lm(V, T, max_prompt=2, concentration=concentration, seed=seed)


def kept_by_hand(p, top_p=None, min_p=None, top_k=None, crossing=True, higher=False):
    """Ids, from a list of probabilities, one after the other."""
    order = sorted(range(len(p)), key=lambda i: (-p[i], -i if higher else i))[: top_k or len(p)]
    if top_p is not None:
        mass, kept, goal = 0.0, [], top_p * sum(p[i] for i in order)
        for i in order:
            if mass >= goal - 1e-6 or (not crossing and kept and mass + p[i] >= goal):
                break
            kept.append(i)
            mass += p[i]
        order = kept
    return {i for i in order if min_p is None or p[i] >= min_p * max(p) * (1 - 1e-6)}


def cut_table(table, **how):
    rows = [kept_by_hand(row.softmax(-1).tolist(), **how) for row in table]
    kept = torch.tensor([[i in row for i in range(table.shape[1])] for row in rows])
    return table.masked_fill(~kept, -torch.inf)


def law_of(table, prompt, lm):
    return oracle.log_probs(table, tuple(lm.vocabulary.encode(prompt)), ROWS)


def distance(a, b):
    return 0.5 * float((a.exp() - b.exp()).abs().sum())


def agrees(q, table, lm):
    log_q = q(PROMPTS).log_prob(X[:, None].expand(-1, 2, -1))
    torch.testing.assert_close(log_q.exp().sum(0), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-10)
    for b, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(log_q[:, b], law_of(table, prompt, lm), rtol=0, atol=1e-10)
    return log_q


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.5])
def test_a_temperature_is_that_of_each_token(tau):
    lm = random_lm()
    log_q = agrees(tempered(lm, tau), lm.model.table / tau, lm)
    whole = (lm([""]).log_prob(X[:, None])[:, 0] / tau).log_softmax(0)  # the mutant: one normaliser for the whole text
    assert distance(whole, log_q[:, 0]) > 0.01 or tau == 1
    if tau == 1:
        assert torch.equal(log_q, lm(PROMPTS).log_prob(X[:, None].expand(-1, 2, -1)))


@pytest.mark.parametrize("how", CUTS, ids=str)
def test_a_cut_keeps_what_it_should_and_each_token_has_its_own_normaliser(how):
    lm = random_lm(concentration=4.0)
    log_q = agrees(truncated(lm, **how), cut_table(lm.model.table, **how), lm)
    whole = lm([""]).log_prob(X[:, None])[:, 0].masked_fill(log_q[:, 0] == -torch.inf, -torch.inf).log_softmax(0)
    assert distance(whole, log_q[:, 0]) > 0.01 or how == {"top_k": 1}
    assert how.get("top_k") != 1 or int((log_q[:, 0] == 0).sum()) == 1


def test_the_mutants_are_other_laws():
    lm = random_lm()
    table, how = lm.model.table, {"top_p": 0.7}
    right = law_of(cut_table(table / 2, **how), "", lm)
    torch.testing.assert_close(
        truncated(tempered(lm, 2.0), **how)([""]).log_prob(X[:, None])[:, 0], right, rtol=0, atol=1e-10
    )
    assert distance(right, law_of(cut_table(table, **how) / 2, "", lm)) > 0.05  # the cut before the temperature
    alone = law_of(cut_table(table, **how), "", lm)
    assert distance(alone, law_of(cut_table(table, **how, crossing=False), "", lm)) > 0.05


@pytest.mark.parametrize("how", [{"top_p": 0.5}, {"top_k": 2}, {"top_p": 0.7, "top_k": 3}, {"min_p": 0.6}], ids=str)
def test_of_equal_tokens_the_lower_ids_are_kept(how):
    lm = random_lm()
    with torch.no_grad():
        lm.model.table.copy_(lm.model.table.clamp(-8, -1).round())  # many are equal
        lm.model.table[::2] = 0.0
    log_q = agrees(truncated(lm, **how), cut_table(lm.model.table, **how), lm)
    other = law_of(cut_table(lm.model.table, **how, higher=True), "", lm)
    assert "min_p" in how or distance(other, log_q[:, 0]) > 0.05


@pytest.mark.parametrize(
    ("p", "how", "kept"),
    [
        ([0.2] * 5, {"top_p": 0.6}, [1, 1, 1, 0, 0]),  # 0.2 + 0.2 + 0.2 is 0.6, whatever it is in binary
        ([0.04] * 25, {"top_p": 0.28}, [1] * 7 + [0] * 18),  # 0.28 · 25 is above 7
        ([0.2] * 5, {"top_p": 0.61}, [1, 1, 1, 1, 0]),
        ([0.2] * 5, {"top_p": 1e-9}, [1, 0, 0, 0, 0]),
        ([0.5, 0.1, 0.4], {"min_p": 0.8}, [1, 0, 1]),
        ([0.5, 0.1, 0.4], {"min_p": 0.81}, [1, 0, 0]),
        ([0.5, 0.1, 0.4], {"min_p": 1.0}, [1, 0, 0]),
        ([0.6, 0.3, 0.1], {"top_k": 2, "top_p": 0.65}, [1, 0, 0]),  # 0.6 of 0.9
        ([0.6, 0.4, 0.0], {"top_k": 3}, [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_kept_at_the_border(p, how, kept, dtype):
    assert kept_tokens(torch.tensor(p, dtype=dtype).log(), **how).tolist() == [bool(i) for i in kept]


@pytest.mark.parametrize("size", [40, 3000])
def test_it_keeps_what_transformers_keeps(size):
    """At a width at which only a part is sorted at first, too; flat laws and peaked ones."""
    logits = torch.randn(24, size, dtype=torch.float64) * torch.linspace(0.1, 6, 24, dtype=torch.float64)[:, None]
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    for how in (
        {"top_p": 0.9},
        {"top_p": 0.2},
        {"min_p": 0.1},
        {"top_k": 30},
        {"top_k": 30, "top_p": 0.8, "min_p": 0.05},
    ):
        for tau in (0.7, 1.0):
            chain = [TemperatureLogitsWarper(tau)] + [warpers[name](how[name]) for name in warpers if name in how]
            theirs = LogitsProcessorList(chain)(torch.zeros(24, 1), logits) > -torch.inf
            assert torch.equal(kept_tokens(logits / tau, **how), theirs)
    both = kept_tokens(logits, top_k=30) & kept_tokens(logits, top_p=0.8)  # the mutant: top-p of the whole law
    assert not torch.equal(both, kept_tokens(logits, top_k=30, top_p=0.8))


def test_draws_have_the_law_that_is_scored():
    lm, tau, how = random_lm(3, concentration=2.0), 0.7, {"top_p": 0.5}
    with torch.no_grad():
        lm.model.table[::2, 1:3] = lm.model.table[::2].amax(-1, keepdim=True)  # equal ones among them
    q = truncated(tempered(lm, tau), **how)
    law = q([""])
    x = law.sample((4000,))
    torch.testing.assert_close(law.sampled_log_probs(x), law.token_log_probs(x), rtol=0, atol=1e-12)
    seen = (x[:, 0, None] == X).all(-1).sum(0).double()

    def pvalue(log_p):
        due = 4000 * log_p.exp()
        if bool((seen[due == 0] > 0).any()):
            return 0.0
        return stats.chisquare(seen[due > 0], due[due > 0] * 4000 / due.sum()).pvalue

    table = lm.model.table / tau
    right = law_of(cut_table(table, **how), "", lm)
    assert pvalue(right) > 1e-5
    mutants = {
        "ties": law_of(cut_table(table, **how, higher=True), "", lm),
        "crossing": law_of(cut_table(table, **how, crossing=False), "", lm),
        "order": law_of(cut_table(lm.model.table, **how) / tau, "", lm),
        "whole": law_of(table, "", lm).masked_fill(right == -torch.inf, -torch.inf).log_softmax(0),
        "not normalised": law_of(table, "", lm),
    }
    assert all(pvalue(mutant) < 1e-9 for mutant in mutants.values()), {k: pvalue(v) for k, v in mutants.items()}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_networks_are_sampled_as_they_are_scored(kind):
    """Step by step with rows moved and dropped, in one pass, after a prompt that is passed once, alone: the self-check; and by
    transformers' warpers on the network's own logits."""
    lm = LanguageModel(tiny.network(kind).double(), tiny.bpe(), 6, end_ids=range(2, 40))
    q = truncated(tempered(lm, 0.8), top_p=0.9, min_p=0.01)
    assert q.self_check(["the soup was", "a"]) < 1e-7 and q.shortcuts.prompts
    law = q(["the soup was good", "a", ""])
    x = law.sample((8,))
    torch.testing.assert_close(law.sampled_log_probs(x), law.token_log_probs(x), rtol=0, atol=1e-7)
    flat, prompts = x.flatten(0, 1), law.prompts.take(torch.arange(3).repeat(8))
    logits = lm.next_token_logits(prompts, flat)
    chain = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9), MinPLogitsWarper(0.01)])
    theirs = (
        chain(torch.zeros(len(logits.flatten(0, 1)), 1), logits.flatten(0, 1)).log_softmax(-1).reshape(logits.shape)
    )
    alive = lm.vocabulary.alive(flat)[:, : logits.shape[1]]
    torch.testing.assert_close(q.next_token_log_probs(prompts, flat)[alive], theirs[alive], rtol=0, atol=1e-7)
    assert not bool(alive.all())  # some have ended: what stands after is 0


def test_gradients_are_those_of_the_law_and_finite_where_a_text_is_impossible():
    frozen = random_lm()
    lm = table_like(frozen, max_prompt=2)
    with torch.no_grad():
        lm.model.table.copy_(frozen.model.table)
    q = truncated(tempered(lm, 1.3, trainable=True), top_p=0.8)
    temperature = q.model.model.log_temperature
    assert {id(w) for w in q.parameters() if w.requires_grad} == {id(lm.model.table), id(temperature)}
    x, coming = X[:, None].expand(-1, 2, -1), torch.randn(len(X), 2, dtype=torch.float64)

    def value():
        log_q = q(PROMPTS).log_prob(x)
        return (coming * log_q.where(log_q > -torch.inf, 0.0)).sum()

    found = torch.autograd.grad(value(), [lm.model.table, temperature])
    for weight, grad in zip((lm.model.table, temperature), found, strict=True):
        assert bool(grad.isfinite().all())
        flat = weight.data.view(-1)
        for i in range(0, len(flat), max(1, len(flat) // 40)):
            with torch.no_grad():
                flat[i] += 1e-6
                above = value()
                flat[i] -= 2e-6
                below = value()
                flat[i] += 1e-6
            assert float((above - below) / 2e-6) == pytest.approx(float(grad.view(-1)[i]), abs=1e-6)
    log_p = lm(PROMPTS).log_prob(x).where(q(PROMPTS).log_prob(x) > -torch.inf, 0.0)
    (mutant,) = torch.autograd.grad(
        (coming * log_p).sum() / 1.3, lm.model.table
    )  # without the normaliser of what is kept
    assert float((mutant - found[0]).abs().max()) > 0.05
    every = torch.autograd.grad(
        q(PROMPTS).log_prob(x).sum(), [lm.model.table, temperature]
    )  # -inf, impossible ones too
    assert all(bool(grad.isfinite().all()) for grad in every)


def test_a_trainable_temperature_of_a_law_that_has_zeros():
    masked = truncated(random_lm(), top_k=2)
    q = tempered(masked, 1.0, trainable=True)
    log_q = q([""]).log_prob(X[:, None])
    (grad,) = torch.autograd.grad(log_q[log_q > -torch.inf].sum(), q.model.log_temperature)
    values = []
    for tau in (math.exp(1e-5), math.exp(-1e-5)):
        other = tempered(masked, tau)([""]).log_prob(X[:, None])
        values.append(float(other[other > -torch.inf].sum()))
    assert float(grad) == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-6)


def test_the_guide_begins_as_the_prior_and_its_temperature_alone_is_trained():
    """The ELBO's gradient is that of the enumerated KL; after some steps it is near the best temperature of a grid."""
    prior = random_lm(concentration=3.0)
    target, q = bind(tilted, prior, reward=LENGTH, beta=0.4), tempered(prior, trainable=True)
    guide, log_temperature = bind(tempered_guide, q), q.model.log_temperature
    x = X[:, None].expand(-1, 2, -1)
    assert q.model.temperature == 1 and torch.equal(q(PROMPTS).log_prob(x), prior(PROMPTS).log_prob(x))

    def kl(lm):
        return ppl_lm.enumerate_posterior(target, bind(tempered_guide, lm), PROMPTS).kl_q_p.sum()

    (exactly,) = torch.autograd.grad(kl(q), log_temperature)
    elbo, found = SequenceELBO(num_particles=200), []
    for _ in range(16):
        log_temperature.grad = None
        elbo.loss_and_grads(target, guide, PROMPTS)
        found.append(float(log_temperature.grad))
    error = stats.sem(found)
    assert abs(sum(found) / 16 - float(exactly)) < 5 * error and error < 0.2 * float(exactly)
    best = min(float(kl(tempered(prior, math.exp(-0.05 * i))).detach()) for i in range(20))
    before = float(kl(q).detach())
    svi = pyro.infer.SVI(target, guide, pyro.optim.Adam({"lr": 0.04}), loss=SequenceELBO(num_particles=200))
    for _ in range(25):
        svi.step(PROMPTS)
    assert float(kl(q).detach()) - best < 0.2 * (before - best)
    assert [w for w in q.parameters() if w.requires_grad] == [log_temperature]
    assert not any(w.requires_grad for w in prior.parameters())
    assert [name for name, w in q.copy().named_parameters() if w.requires_grad] == ["model.log_temperature"]


def test_what_stands_after_an_end_counts_nothing_and_ends_are_tokens_like_others():
    lm = tiny.table(4, 3, ends=[2, 3], pad=0, bos=1)
    q = truncated(lm, top_p=0.75)
    law = q([""])
    x = law.enumerate_support(expand=False)
    log_q = law.log_prob(x)
    assert float(log_q.exp().sum()) == pytest.approx(1, abs=1e-10)
    assert bool((log_q == -torch.inf).any())
    ended = x.clone()
    ended[0, 0, -1] = 1  # not canonical
    assert float(law.log_prob(ended)[0]) == -torch.inf and not bool(law.token_log_probs(ended).isnan().any())
    never = table_lm(V, T, max_prompt=2)
    with torch.no_grad():
        never.model.table[:, END] = -20.0
    assert bool(
        (truncated(never, top_p=0.9)([""]).sample((50,)) != END).all()
    )  # its end is cut: every text is truncated


def test_weights_that_diverged_are_told():
    lm = random_lm()
    with torch.no_grad():
        lm.model.table[:, 0] = math.nan
    for how in CUTS:
        with pytest.raises(DivergedError):
            truncated(lm, **how)([""]).sample((5,))


def test_refusals(unchecked):
    lm = random_lm()
    for tau in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature="):
            tempered(lm, tau)
    with pytest.raises(ValueError, match="give top_p="):
        truncated(lm)
    for how in (
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_k": True},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(how))}="):
            truncated(lm, **how)
    q = truncated(product([lm, lm]), top_p=1.0, min_p=0.0, top_k=10**6)  # nothing is cut
    assert not q.model.cuts
    torch.testing.assert_close(q([""]).log_prob(X[:, None]), product([lm, lm])([""]).log_prob(X[:, None]))
