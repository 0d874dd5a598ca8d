"""Networks around one body: one pass answers for all heads.

| what | how it is shown | tolerance |
|---|---|---|
| product, its gradient, its steps | against the networks passed one by one | 1e-10 |
| SMC, `fit_twist`, Bellman residuals | against the same head on its own body, same random numbers; half the tokens | 1e-10 |
| who shares | not: full twists, trained bodies, hooks, other precisions, tables, modules that do something else | - |
"""

import copy
import sys
import threading

import pytest
import torch

import ppl_lm
from ppl_lm.infer.binding import bind
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.twists.bellman import bellman_residuals
from ppl_lm.infer.twists.fitting import fit_twist
from ppl_lm.infer.twists.networks import twist_like
from ppl_lm.lm import meter
from ppl_lm.lm.decoding.decoder import Decoder
from ppl_lm.lm.experts import product
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.scoring.shared_body import head_on
from ppl_lm.models import tilted
from tests import tiny

TEXTS = ["the soup", "she said that", "a"]


def pair(kind: str = "llama", **given) -> tuple[LanguageModel, LanguageModel, LanguageModel]:
    """A prior, a twist around its body with a random head, and the same twist with a body of its own."""
    prior = LanguageModel(tiny.network(kind, **given).double(), tiny.bpe(), 7, end_ids=range(2, 300, 20))
    twist = twist_like(prior, head_only=True)
    with torch.no_grad():
        torch.nn.init.normal_(twist.model.get_output_embeddings().weight, std=0.3)
    apart = twist._around(copy.deepcopy(twist.model))
    for own, weight in zip(apart.parameters(), twist.parameters(), strict=True):
        own.requires_grad_(weight.requires_grad)
    return prior, twist, apart


def rewarded(prior: LanguageModel):
    return bind(tilted, prior, reward=lambda completions, **_: [float(len(set(t))) for t in completions], beta=2.0)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_product_passes_a_body_once(kind):
    prior, twist, apart = pair(kind)
    assert head_on(prior, twist) is twist.model.get_output_embeddings() and head_on(prior, apart) is None
    x = prior(TEXTS).sample((4,))
    found = []
    for other in (twist, apart):
        with meter.measure() as cost:
            q = product([prior, other, prior], [1.0, 0.7, 0.5])
            log_q = q(TEXTS).log_prob(x)
        other.zero_grad()
        log_q.sum().backward()
        decoder = Decoder(q, q.prompts(TEXTS))
        decoder.advance(torch.tensor([5, 6, 7]))
        decoder.reorder(torch.tensor([2, 2, 0, 1]))
        decoder.advance(torch.tensor([8, 9, 10, 11]))
        found.append((log_q, other.model.get_output_embeddings().weight.grad, decoder.log_probs(), cost.lm_tokens))
    for one, plain in zip(found[0][:3], found[1][:3], strict=True):
        torch.testing.assert_close(one, plain, atol=1e-10, rtol=0)
    assert float(found[0][1].abs().max()) > 0 and found[1][3] == 2 * found[0][3]


@pytest.mark.parametrize(
    "how", [{"threshold": 0.9}, {"at": (3,), "moves": 1}, {"candidates": 4}, {"expand": 2}], ids=str
)
def test_smc_passes_the_body_once(how):
    prior, twist, apart = pair()
    model, found = rewarded(prior), []
    for other in (twist, apart):
        torch.manual_seed(5)
        settings = SMCSettings(twist=other, **how)
        found.append(ppl_lm.smc(model, None, TEXTS, num_samples=6, num_runs=2, settings=settings))
    one, plain = found
    torch.testing.assert_close(one.latents, plain.latents)
    torch.testing.assert_close(one.log_weight, plain.log_weight, atol=1e-10, rtol=0)
    assert plain.cost.lm_tokens == 2 * one.cost.lm_tokens


def test_a_twist_is_fitted_on_the_priors_pass():
    prior, twist, apart = pair()
    model, found = rewarded(prior), []
    draws = ppl_lm.importance(model, None, TEXTS, num_samples=5)
    for other in (twist, apart):
        with meter.measure() as cost:
            residuals = bellman_residuals(model, other, draws)
        torch.manual_seed(6)
        losses = fit_twist(model, other, TEXTS, steps=3, num_samples=8)
        found.append((residuals, torch.tensor(losses), other.model.get_output_embeddings().weight, cost.lm_tokens))
    for one, plain in zip(found[0][:3], found[1][:3], strict=True):
        torch.testing.assert_close(one, plain, atol=1e-9, rtol=0)
    assert found[1][3] == 2 * found[0][3]


def test_who_does_not_share():
    prior, twist, _ = pair()
    assert head_on(prior, twist_like(prior)) is None
    hook = twist.model.model.layers[1].register_forward_hook(lambda *_: None)
    assert head_on(prior, twist) is None
    hook.remove()
    assert head_on(prior, twist) is not None
    norm = twist.model.model.norm
    twist.model.model.norm = torch.nn.Identity()
    assert head_on(prior, twist) is None
    twist.model.model.norm = norm
    half = LanguageModel(tiny.network("llama").bfloat16(), tiny.bpe(), 7)
    assert head_on(half, twist_like(half, head_only=True)) is None, "its head is float32, and its products are not"
    prior.model.model.layers[0].requires_grad_(True)
    assert head_on(prior, twist) is None
    prior.requires_grad_(False)
    table = tiny.table(4, 3, 3)
    assert head_on(table, table) is None


def test_the_same_weights_in_modules_that_do_something_else():
    """What identity cannot tell, the hidden states of a few tokens do."""
    prior, twist, _ = pair()
    for layer in twist.model.model.layers:
        layer.self_attn.scaling *= 2
    assert head_on(prior, twist) is None


def test_a_product_whose_bodies_part():
    """Then each has its own pass; a copy, which is trained, as well."""
    prior, twist, apart = pair()
    q = product([prior, twist])
    before = q(TEXTS).log_prob(x := prior(TEXTS).sample())
    twist.requires_grad_(False)
    copied = product([prior, twist]).copy()
    torch.testing.assert_close(copied(TEXTS).log_prob(x), before, atol=1e-10, rtol=0)
    assert sum(weight.requires_grad for weight in copied.parameters()) > 2
    with torch.no_grad():
        for one in (twist, apart):
            one.model.get_output_embeddings().weight.mul_(2.0)  # as a step of training
            one.model.model.norm.weight = torch.nn.Parameter(one.model.model.norm.weight * 2, requires_grad=False)
    plain = product([prior, apart])(TEXTS).log_prob(x)
    assert float((plain - before).detach().abs().max()) > 0.1
    with meter.measure() as cost:
        torch.testing.assert_close(q(TEXTS).log_prob(x), plain, atol=1e-10, rtol=0)
    with meter.measure() as own:
        prior(TEXTS).log_prob(x)
    assert cost.lm_tokens == 2 * own.lm_tokens
    decoder = Decoder(q, q.prompts(TEXTS))
    decoder.advance(torch.tensor([5, 6, 7]))
    right = Decoder(product([prior, apart]), q.prompts(TEXTS))
    right.advance(torch.tensor([5, 6, 7]))
    torch.testing.assert_close(decoder.log_probs(), right.log_probs(), atol=1e-10, rtol=0)


def test_a_new_twist_shares_from_the_start():
    """Its head answers zeros, of which none looks like the logits of a head more than of anything else."""
    prior, _, _ = pair()
    twist = twist_like(prior, head_only=True)
    assert head_on(prior, twist) is twist.model.get_output_embeddings()
    with meter.measure() as cost:
        fit_twist(rewarded(prior), twist, TEXTS, steps=2, num_samples=4)
    with meter.measure() as both:
        fit_twist(rewarded(prior), twist_like(prior), TEXTS, steps=2, num_samples=4)
    assert cost.lm_tokens < 0.75 * both.lm_tokens


def test_settings_that_change_later_are_seen():
    prior, twist, _ = pair()
    assert head_on(prior, twist) is not None
    twist.model.model.layers[0].self_attn.scaling *= 2
    assert head_on(prior, twist) is None
    adapted = prior.adapted(rank=2).requires_grad_(False)
    around = twist_like(adapted, head_only=True)
    assert head_on(adapted, around) is not None
    adapted.model.disable_adapters()
    assert head_on(adapted, around) is None


def test_threads_do_not_disturb_each_other():
    """Another thread's look at the prior's head is none of this one's."""
    prior, twist, _ = pair()
    model, texts = rewarded(prior), prior(TEXTS).sample((8,)).flatten(0, 1)
    rows, stop, failed = torch.arange(3).repeat(8), threading.Event(), []
    before = sys.getswitchinterval()

    def scoring():
        while not stop.is_set():
            with torch.no_grad():
                prior.score(prior.prompts(TEXTS), texts, rows)

    thread = threading.Thread(target=scoring)
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        for _ in range(15):
            ppl_lm.smc(model, None, TEXTS, num_samples=4, settings=SMCSettings(twist=twist))
            Decoder(prior, prior.prompts(TEXTS)).advance(torch.tensor([5, 6, 7]))
    except RuntimeError as error:
        failed.append(error)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)
    assert not failed
