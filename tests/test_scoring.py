"""The fast way to score agrees with the plain one on every architecture, and is left where a check shows that it does not."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from test_networks import build

from ppl_lm.lm import meter
from ppl_lm.lm.decoding.decoder import sample
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.scoring import teacher_forcing as scoring
from ppl_lm.lm.scoring.gradient_checkpointing import recomputing
from ppl_lm.lm.scoring.shortcuts import plain_head
from ppl_lm.lm.table import table_lm

PROMPTS = ["the soup was good and the bread", "a dog", "she said that"]
SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.25, "eos_token_id": 2,
    "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def networks(kind):
    if kind in tiny.KINDS:
        return tiny.network(kind)
    extra = {"Gemma2": {"final_logit_softcapping": 5.0}, "Cohere": {"logit_scale": 0.25}}.get(kind, {})
    return build(kind, **SMALL, **extra)


KINDS = [*tiny.KINDS, "Qwen3", "Gemma2", "Cohere"]
LINEAR = {*tiny.KINDS, "Qwen3"}  # heads whose answers are the logits as they are


def problem(kind, dtype):
    """A network, prompts of three lengths, and five drawn completions of each, the prompts' order mixed."""
    lm = LanguageModel(networks(kind).to(dtype), tiny.bpe(), 7, end_ids=range(2, 50))
    rows = torch.arange(3).repeat(5)
    prompts = lm.prompts(PROMPTS)
    x = lm(prompts).sample((5,)).reshape(15, 7)
    assert len(set(lm.vocabulary.lengths(x).tolist())) > 1
    return lm, prompts, rows, x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "atol", "rtol"), [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-4, 1e-4)])
def test_the_fast_way_agrees_with_the_plain_one(kind, dtype, atol, rtol):
    if kind == "Gemma2" and dtype == torch.float64:
        pytest.skip("transformers' own answers beside padding are NaN there")
    lm, prompts, rows, x = problem(kind, dtype)
    assert lm.shortcuts.prompts
    assert (plain_head(lm) is not None) == (kind in LINEAR)
    if dtype == torch.float64 and kind != "gpt2":
        rtol = 1e-6  # transformers' other norms are single precision whatever they are given
    lm.model.requires_grad_(True)
    alive, weights = lm.vocabulary.alive(x), list(lm.model.parameters())
    coming = torch.randn(x.shape, dtype=dtype)
    own = prompts.take(rows)
    raw = lm.next_token_logits(own, x).log_softmax(-1)
    raw = raw.gather(-1, x[:, : raw.shape[1], None]).squeeze(-1).masked_fill(~alive[:, : raw.shape[1]], 0.0)
    plain = torch.nn.functional.pad(raw, (0, x.shape[-1] - raw.shape[1]))
    right = torch.autograd.grad((plain * coming).sum(), weights)
    for shared in (True, False):
        found = scoring.score(lm, prompts, x, rows, shared=shared)[..., 0]
        torch.testing.assert_close(found, plain, rtol=0, atol=atol)
        slopes = torch.autograd.grad((found * coming).sum(), weights)
        for slope, own_slope in zip(slopes, right, strict=True):
            assert float((slope - own_slope).norm()) <= rtol * float(own_slope.norm()) + 1e-12
    ends = scoring.score(lm, prompts, x, rows, ends=True)[..., 1]
    torch.testing.assert_close(ends, lm.score_with_ends(own, x)[1], rtol=0, atol=atol)


def test_a_prompt_is_paid_for_once_whatever_its_texts_are_given_as():
    """Twelve texts of a prompt of P tokens: P + 12 (T - 1), by particles, by repeated prompts, with gradients and without."""
    lm = LanguageModel(tiny.network("llama"), tiny.bpe(), 5)
    text = PROMPTS[0]
    count = len(lm.prompts([text]).unpadded()[0])
    x = torch.full((12, 1, 5), 7)
    for law, value in ((lm([text]), x), (lm([text] * 12), x[:, 0])):
        for trainable in (False, True):
            lm.model.requires_grad_(trainable)
            law.token_log_probs(value)  # finds out what it needs to
            with meter.measure() as cost:
                law.token_log_probs(value)
            assert cost.lm_tokens == count + 12 * 4
    short = lm(["a"])
    with meter.measure() as cost:
        short.token_log_probs(x[:2])
    assert cost.lm_tokens == 2 * (len(short.prompts.unpadded()[0]) + 4)  # it would save too little


def test_networks_whose_cache_loses_gradients_are_scored_the_plain_way(monkeypatch):
    """Values alone would agree; the gradient that flows through the prompt would be missing."""
    lm, prompts, rows, x = problem("llama", torch.float32)
    fresh = lm.new_cache

    def cut():
        cache = fresh()
        update = cache.update
        cache.update = lambda keys, values, *rest, **more: update(keys.detach(), values.detach(), *rest, **more)
        return cache

    monkeypatch.setattr(lm, "new_cache", cut)
    lm.model.requires_grad_(True)
    weights = list(lm.model.parameters())
    plain = torch.autograd.grad(scoring.score(lm, prompts, x, rows, shared=False).sum(), weights)
    monkeypatch.setattr(scoring, "WORTH", 10**6)
    found = torch.autograd.grad(lm.score(prompts, x, rows).sum(), weights)
    assert lm.shortcuts.gradients[1] is False
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_networks_whose_cached_pass_is_another_law_are_scored_the_plain_way(monkeypatch):
    lm = LanguageModel(tiny.network("llama"), tiny.bpe(), 7)
    forward = type(lm.model).forward

    def forgetful(self, *args, **kwargs):
        """Forgets its prompt where several tokens follow it at once, as if any pass of several began a text."""
        past = kwargs.get("past_key_values")
        if kwargs["input_ids"].shape[1] > 1 and past is not None and past.get_seq_length():
            kwargs = kwargs | {"attention_mask": None, "past_key_values": lm.new_cache()}
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(lm.model), "forward", forgetful)
    law = lm(PROMPTS)
    x = law.sample((6,))
    assert lm.shortcuts.prompts is False
    drawn = law.sampled_log_probs(x)
    assert drawn is not None
    torch.testing.assert_close(law.token_log_probs(x), drawn, rtol=0, atol=1e-5)


def test_micro_batches_keep_texts_of_one_prompt_together_and_long_ones_first():
    lm = LanguageModel(tiny.network("llama"), tiny.bpe(), 7)
    law = lm(PROMPTS).expand([6, 3])
    x = law.sample()
    order = law.together(x)
    rows, lengths = order % 3, lm.vocabulary.lengths(x.reshape(18, 7))[order]
    assert sorted(order.tolist()) == list(range(18)) and rows.tolist() == sorted(rows.tolist())
    assert all(lengths[rows == b].tolist() == sorted(lengths[rows == b].tolist(), reverse=True) for b in range(3))


def test_a_head_that_is_replaced_is_found_again():
    lm = LanguageModel(tiny.network("gpt2"), tiny.bpe(), 4)
    first = plain_head(lm)
    lm.model.lm_head = torch.nn.Linear(32, 300)
    assert plain_head(lm) is lm.model.lm_head is not first
    lm.model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 300), torch.nn.Tanh())
    assert plain_head(lm) is None
    assert plain_head(table_lm(3, 2)) is None


def drawn_as_scored(lm, texts=12):
    """The largest difference, in nats, between a token's log-probability as it was drawn and as it is scored."""
    law = lm(PROMPTS)
    x = law.sample((texts,))
    drawn = law.sampled_log_probs(x)
    assert drawn is not None
    return float((law.token_log_probs(x) - drawn).detach().abs().max())


def later_hook(lm):
    lm.model.lm_head.register_forward_hook(lambda module, given, answer: answer / 2)


def later_scale(lm):
    lm.model.logit_scale = 0.25


def later_forward(lm):
    forward = lm.model.forward

    def halved(**given):
        answer = forward(**given)
        answer.logits = answer.logits / 2
        return answer

    lm.model.forward = halved


def later_cap(lm):
    lm.model.config.final_logit_softcapping = 1.0


@pytest.mark.parametrize(
    ("kind", "change"),
    [("llama", later_hook), ("llama", later_forward), ("Cohere", later_scale), ("Gemma2", later_cap)],
)
def test_what_follows_the_head_may_change_after_it_was_looked_at(kind, change):
    """What was remembered of the network would score texts that nobody draws any more, by half a nat a token."""
    extra = {"Gemma2": {"final_logit_softcapping": None}, "Cohere": {"logit_scale": 1.0}}.get(kind, {})
    net = build(kind, **SMALL, **extra) if extra else tiny.network(kind)
    lm = LanguageModel(net, tiny.bpe(), 7, end_ids=range(2, 50))
    assert drawn_as_scored(lm) < 1e-4 and plain_head(lm) is not None
    change(lm)
    assert drawn_as_scored(lm) < 1e-4
    assert plain_head(lm) is None


def test_a_head_of_zeros_proves_nothing():
    net = build("Gemma2", **SMALL, final_logit_softcapping=3.0, tie_word_embeddings=False)
    with torch.no_grad():
        net.lm_head.weight.zero_()
    lm = LanguageModel(net, tiny.bpe(), 7, end_ids=range(2, 50)).copy()
    assert drawn_as_scored(lm) < 1e-4
    with torch.no_grad():
        lm.model.lm_head.weight.normal_()
    assert drawn_as_scored(lm) < 1e-4


def test_a_forward_of_ones_own_is_not_looked_into():
    """It may do anything after its head, here to one token alone, or trip over an answer that was cut short."""
    base = type(tiny.network("llama"))

    class Rare(base):
        def forward(self, input_ids=None, past_key_values=None, **given):
            answer = super().forward(input_ids=input_ids, past_key_values=past_key_values, **given)
            answer.logits = answer.logits.clone()
            answer.logits[..., 123] += 3.0
            return answer

    class Viewed(base):
        def forward(self, input_ids=None, past_key_values=None, logits_to_keep=0, **given):
            answer = super().forward(input_ids=input_ids, past_key_values=past_key_values, **given)
            answer.logits = answer.logits.view(*input_ids.shape, -1)
            return answer

    for kind in (Rare, Viewed):
        net = tiny.network("llama")
        net.__class__ = kind
        assert drawn_as_scored(LanguageModel(net, tiny.bpe(), 7, end_ids=range(2, 50))) < 1e-4


def test_a_pass_that_fails_is_left_and_no_reason_to_refuse(monkeypatch):
    """A network that can be continued by one token at a time alone."""
    base = type(tiny.network("llama"))

    class OneByOne(base):
        def forward(self, input_ids=None, past_key_values=None, **given):
            if past_key_values is not None and past_key_values.get_seq_length() and input_ids.shape[1] > 1:
                raise NotImplementedError("one token at a time")
            return super().forward(input_ids=input_ids, past_key_values=past_key_values, **given)

    net = tiny.network("llama")
    net.__class__ = OneByOne
    lm = LanguageModel(net, tiny.bpe(), 7, end_ids=range(2, 50))
    assert drawn_as_scored(lm) < 1e-4 and lm.shortcuts.prompts is False


def test_networks_that_are_compiled_in_place_are_scored():
    lm, same = (LanguageModel(tiny.network("llama"), tiny.bpe(), 7, end_ids=range(2, 50)) for _ in range(2))
    lm.model.compile(backend="eager", dynamic=True)
    x = same(PROMPTS).sample((4,))
    torch.testing.assert_close(lm(PROMPTS).log_prob(x), same(PROMPTS).log_prob(x), rtol=0, atol=1e-4)


def test_gradients_are_looked_at_again_when_others_are_trained():
    lm, prompts, rows, x = problem("llama", torch.float32)
    assert lm.shortcuts.gradients is None
    lm.model.lm_head.requires_grad_(True)
    lm.score(prompts, x, rows)
    before = lm.shortcuts.gradients
    lm.model.requires_grad_(True)
    lm.score(prompts, x, rows)
    assert lm.shortcuts.gradients[0] != before[0]


def test_texts_of_one_token_share_their_prompt_with_a_gradient_too():
    lm = LanguageModel(tiny.network("llama"), tiny.bpe(), 1)
    lm.model.requires_grad_(True)
    law = lm([PROMPTS[0]])
    x = torch.full((12, 1, 1), 7)
    law.log_prob(x)
    with meter.measure() as cost:
        law.log_prob(x)
    assert cost.lm_tokens == len(law.prompts.unpadded()[0])


@pytest.mark.parametrize("free", ["adapter", "all"])
def test_second_derivatives_and_torch_func_are_those_of_the_plain_way(free):
    """With a frozen head its slope would be taken for a constant, silently."""
    prior = LanguageModel(
        tiny.network("gpt2", attn_implementation="eager").double(), tiny.bpe(), 4, end_ids=range(2, 50)
    )
    lm = prior.adapted(rank=2) if free == "adapter" else prior.copy()
    law, weights = lm(PROMPTS), {n: w for n, w in lm.model.named_parameters() if w.requires_grad}
    x, found = law.sample((3,)), []
    few = [w for n, w in weights.items() if "lora_B" in n or n.endswith("ln_f.weight")]
    head = plain_head(lm)
    assert head is not None
    for is_plain in (True, False):
        lm.shortcuts.head = head, is_plain
        first = torch.autograd.grad(law.log_prob(x).sum(), few, create_graph=True)
        second = torch.autograd.grad(sum(slope.pow(2).sum() for slope in first), few)

        def total(values):
            return torch.func.functional_call(
                _Summed(lm.model, law, x), {f"model.{n}": w for n, w in values.items()}, ()
            )

        by_func = torch.func.grad(total)({n: w.detach() for n, w in weights.items()})
        found.append([*first, *second, *by_func.values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


class _Summed(torch.nn.Module):
    def __init__(self, model, law, x):
        super().__init__()
        self.model, self.law, self.x = model, law, x

    def forward(self):
        return self.law.log_prob(self.x).sum()


@pytest.mark.parametrize("change", [later_scale, later_hook])
@pytest.mark.parametrize("after", [2, 8, 9])
def test_what_changes_while_texts_are_drawn_is_seen_and_they_are_drawn_again(monkeypatch, change, after):
    """With the same uniforms: they are those of the network as it is in the end."""
    lm = LanguageModel(networks("Cohere" if change is later_scale else "llama"), tiny.bpe(), 20, end_ids=[4])
    if change is later_scale:
        lm.model.logit_scale = 1.0
    prompts, rows = lm.prompts(PROMPTS), torch.arange(3).repeat(4)
    u, steps, right = torch.rand(12, 20, dtype=torch.float64), [], LanguageModel.logits_next
    assert plain_head(lm) is not None

    def changing(self, **given):
        steps.append(len(given["ids"]))
        if len(steps) == after:
            change(lm)
        return right(self, **given)

    monkeypatch.setattr(LanguageModel, "logits_next", changing)
    found = sample(lm, prompts, rows, u)
    assert plain_head(lm) is None
    monkeypatch.undo()
    if change is later_hook:  # which is seen at once: the texts go on, and what was drawn so far stays
        before = LanguageModel(networks("llama"), tiny.bpe(), 20, end_ids=[4])
        assert torch.equal(found[0][:, : after - 1], sample(before, prompts, rows, u)[0][:, : after - 1])
        assert not torch.equal(found[0], sample(before, prompts, rows, u)[0])
    else:
        torch.testing.assert_close(found, sample(lm, prompts, rows, u))
        assert len(steps) > 20


def test_a_network_that_was_changed_between_two_checks_passes_the_second(monkeypatch):
    lm = LanguageModel(networks("Cohere"), tiny.bpe(), 7, end_ids=[4])
    lm.model.logit_scale = 1.0
    lm.self_check()
    assert plain_head(lm) is not None
    lm.model.logit_scale = 0.25
    lm.self_check()
    assert plain_head(lm) is None


class Held:
    """Bytes that autograd keeps at a time, the most so far: inside the block."""

    def __init__(self):
        self.now = self.most = 0

    def __enter__(self):
        def pack(tensor):
            return Kept(self, tensor)

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *given):
        self.hooks.__exit__(*given)


class Kept:
    def __init__(self, held, tensor):
        self.held, self.tensor = held, tensor
        held.now += tensor.nbytes
        held.most = max(held.most, held.now)

    def __del__(self):
        self.held.now -= self.tensor.nbytes


LONG = 512
LENGTHY = {"gpt2": {"n_positions": 640}, "llama": {"max_position_embeddings": 640}}


@pytest.mark.parametrize("kind", LENGTHY)
@pytest.mark.parametrize(("dtype", "atol", "rtol"), [(torch.float64, 1e-9, 1e-6), (torch.float32, 1e-4, 1e-3)])
def test_texts_of_512_tokens_are_drawn_scored_and_taken_in_parts_alike(kind, dtype, atol, rtol):
    """And what autograd keeps at a time is that of a micro-batch, whatever their number."""
    prior = LanguageModel(tiny.network(kind, **LENGTHY[kind]).to(dtype), tiny.bpe(), LONG, end_ids=[2])
    guide = prior.copy()
    prompts = prior.prompts(PROMPTS[:1])
    law = guide(prompts)
    with torch.no_grad():
        x = law.sample((8,))
    assert int(prior.vocabulary.lengths(x).max()) == LONG
    drawn = law.sampled_log_probs(x)
    flat, rows = x[:, 0], torch.zeros(8, dtype=torch.int64)
    plain = scoring.score(prior, prompts.take(rows), flat)[..., 0]
    fast = scoring.score(prior, prompts, flat, rows, shared=True)[..., 0]
    assert drawn is not None
    torch.testing.assert_close(drawn[:, 0], plain.double(), rtol=0, atol=atol)
    torch.testing.assert_close(fast, plain, rtol=0, atol=atol)
    weights = [weight for weight in guide.parameters() if weight.requires_grad]
    right = torch.autograd.grad(scoring.score(guide, prompts.take(rows), flat).sum(), weights)
    most = {}
    for size in (2, 3, 8):
        slopes = [torch.zeros_like(weight) for weight in weights]
        with Held() as held:
            for part in torch.arange(8).split(size):
                surrogate = law.expand((8, 1)).slice(part).token_log_probs(flat[part]).sum()
                for slope, more in zip(slopes, torch.autograd.grad(surrogate, weights), strict=True):
                    slope += more
                del surrogate
        most[size] = held.most
        for a, b in zip(slopes, right, strict=True):
            assert float((a - b).norm()) <= rtol * float(b.norm()) + 1e-12
    assert most[2] < most[3] < most[8] and most[2] < 0.4 * most[8], "that of two texts, not of eight"


def too_long(monkeypatch, is_so):
    monkeypatch.setattr(LanguageModel, "is_too_long", lambda *_: is_so)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_does_not_fit_is_scored_layer_by_layer(monkeypatch, kind):
    """The same numbers and gradients, of which autograd keeps far less; also with an adapter, whose base is frozen."""
    lm = LanguageModel(networks(kind), tiny.bpe(), 40, end_ids=[4])
    prompts = lm.prompts(PROMPTS[:1])
    with torch.no_grad():
        x = lm(prompts).sample((3,))[:, 0]
    rows = torch.zeros(3, dtype=torch.int64)
    for guide in (lm.copy(), lm.adapted(rank=2)):
        weights = [weight for weight in guide.parameters() if weight.requires_grad]
        found = []
        for is_so in (False, True):
            too_long(monkeypatch, is_so)
            with Held() as held:
                said = guide.score(prompts, x, rows)
                kept = held.now
                found.append((said, torch.autograd.grad((said * torch.linspace(1, 2, 40)).sum(), weights), kept))
        assert guide.shortcuts.layers[1] and not any(module.training for module in guide.model.modules())
        (plain, slopes, kept), (again, others, kept_then) = found
        torch.testing.assert_close(again, plain, rtol=0, atol=1e-5)
        assert kept_then < 0.5 * kept
        for a, b in zip(others, slopes, strict=True):
            assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-6


@pytest.mark.parametrize("kind", ["gpt2", "OPT"])
def test_nothing_is_dropped_where_a_guide_that_is_being_trained_is_scored_layer_by_layer(monkeypatch, kind):
    """Whatever a layer itself goes by, as OPT's does; and the backward pass may come twice, when `train()` is on again."""
    shape = {**SMALL, "dropout": 0.5}
    network = (
        build("OPT", **shape, word_embed_proj_dim=32, ffn_dim=48) if kind == "OPT" else tiny.network(kind, dropout=0.5)
    )
    guide = LanguageModel(network, tiny.bpe(), 7).copy().train()
    prompts = guide.prompts(PROMPTS[:1])
    with torch.no_grad():
        x = guide(prompts).sample((2,))[:, 0]
    rows = torch.zeros(2, dtype=torch.int64)
    weights, slopes = [weight for weight in guide.parameters() if weight.requires_grad], []
    for is_so in (False, True):
        too_long(monkeypatch, is_so)
        said = guide.score(prompts, x, rows).sum()
        slopes += [torch.autograd.grad(said, weights, retain_graph=True) for _ in range(2)]
    assert guide.shortcuts.layers[1] and guide.model.training
    for one, *others in zip(*slopes, strict=True):
        for other in others:
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_threads_that_score_layer_by_layer_and_draw_do_not_disturb_each_other(monkeypatch, kind):
    """Of a guide in train mode, with dropout: what is drawn has the log q that it is scored with, gradients are the same."""
    network = tiny.network(kind, dropout=0.5) if kind == "gpt2" else tiny.network(kind)
    guide = LanguageModel(network, tiny.bpe(), 7).copy().train()
    prompts, rows = guide.prompts(PROMPTS[:1]), torch.zeros(2, dtype=torch.int64)
    guide.self_check()
    before = [(module.training, set(vars(module))) for module in guide.model.modules()]
    weights = [weight for weight in guide.parameters() if weight.requires_grad]
    with torch.no_grad():
        x = guide(prompts).sample((2,))[:, 0]
    too_long(monkeypatch, True)
    assert scoring.may_recompute(guide)

    def slope():
        return torch.autograd.grad(guide.score(prompts, x, rows).sum(), weights)[0]

    def draw():
        law = guide(prompts)
        with torch.no_grad():
            drawn = law.sample((3,))
        return drawn, law.sampled_log_probs(drawn)

    right = slope()
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(call) for _ in range(20) for call in (slope, draw)]
        for found in (one.result() for one in asked):
            if isinstance(found, torch.Tensor):
                torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-5)
            else:
                with torch.no_grad():
                    torch.testing.assert_close(guide(prompts).token_log_probs(found[0]), found[1], rtol=0, atol=1e-4)
    assert [(module.training, set(vars(module))) for module in guide.model.modules()] == before


def test_layers_are_left_as_they_were():
    guide = LanguageModel(tiny.network("gpt2"), tiny.bpe(), 7)
    before = [set(vars(module)) for module in guide.model.modules()]
    with pytest.raises(RuntimeError, match="planted"), recomputing(guide.model):
        raise RuntimeError("planted")
    assert [set(vars(module)) for module in guide.model.modules()] == before


def test_a_layer_that_changes_what_it_is_given_is_not_found_again(monkeypatch):
    guide = LanguageModel(tiny.network("llama"), tiny.bpe(), 7).copy()
    layer = guide.model.model.layers[1]
    right = type(layer).forward

    class Changing(type(layer)):
        def forward(self, hidden_states, *given, **named):
            hidden_states.data.mul_(1.5)
            return right(self, hidden_states, *given, **named)

    layer.__class__ = Changing
    assert not scoring.may_recompute(guide)


def test_nothing_is_found_again_where_nothing_is_trained(monkeypatch):
    lm = LanguageModel(tiny.network("llama"), tiny.bpe(), 7)
    prompts = lm.prompts(PROMPTS[:1])
    x, rows = lm(prompts).sample((6,))[:, 0], torch.zeros(6, dtype=torch.int64)
    lm.self_check()
    too_long(monkeypatch, True)
    with meter.measure() as cost:
        lm.score(prompts, x, rows)
    with torch.no_grad(), meter.measure() as plain:
        lm.score(prompts, x, rows)
    assert cost.lm_tokens == plain.lm_tokens


def test_what_has_no_layers_of_transformers_is_scored_as_ever():
    assert not scoring.may_recompute(table_lm(4, 4))


def test_what_does_not_fit_goes_by_the_machines_memory():
    lm = LanguageModel(tiny.network("gpt2"), tiny.bpe(), 7)
    assert not lm.is_too_long(20, 7)
    assert lm.is_too_long(20, 10**9)
