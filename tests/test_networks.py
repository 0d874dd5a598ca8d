"""Which networks are taken: what is no causal language model is refused in one sentence, and so is a law that depends on
its neighbours, on the length of the pass, or on weights that are not the network's own."""

import copy
import json
from types import MethodType, SimpleNamespace

import pytest
import tiny
import torch
import transformers as hf

from ppl_lm.lm import meter
from ppl_lm.lm.checking.lengths import boundaries, context_length
from ppl_lm.lm.decoding.decoder import Decoder
from ppl_lm.lm.language_model import LanguageModel

SMALL = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "initializer_range": 0.3, "eos_token_id": 2}
ATTENTION = {**SMALL, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
HYBRID = {**ATTENTION, "num_hidden_layers": 2, "max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 4.0, 8.0, 16.0],
    "factor": 4.0,
    "rope_theta": 10000.0,
}
SHORT, LONG = (
    "a dog",
    "the soup was good and the bread was warm and she said that it was fine and a dog ran over the hill",
)


def build(kind: str, head: str = "ForCausalLM", **config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(hf, kind + head)(getattr(hf, kind + "Config")(**config)).eval()


RECENT = int(hf.__version__.partition(".")[0]) >= 5  # transformers


def stretched(original: int = 16, **kwargs):
    rope = kwargs.pop("rope_parameters", {**LONGROPE, "original_max_position_embeddings": original})
    named = (
        {"rope_parameters": rope} if RECENT else {"rope_scaling": rope, "original_max_position_embeddings": original}
    )
    return build("Llama", **{**HYBRID, "max_position_embeddings": 128, **named, **kwargs})


def of(model, max_new_tokens: int = 6) -> LanguageModel:
    return LanguageModel(model, tiny.bpe(), max_new_tokens)


@torch.no_grad()
def worst_against_each_prefix_alone(lm: LanguageModel, prompts: list[str]) -> float:
    """The largest difference of a drawn or a scored token from the plain network, without padding and cache, in nats."""
    d = lm(prompts)
    x = d.sample((2,))
    assert lm.vocabulary.lengths(x).max() > 3
    drawn, scored, alive = d.sampled_log_probs(x), d.token_log_probs(x), lm.vocabulary.alive(x)
    worst = 0.0
    for k, b, t in alive.nonzero().tolist():
        prefix = [*d.prompts.unpadded()[b], *x[k, b, :t].tolist()]
        right = lm.model(input_ids=torch.tensor([prefix])).logits[0, -1].double().log_softmax(-1)[x[k, b, t]]
        worst = max(worst, *(abs(float(right - found[k, b, t])) for found in (drawn, scored)))
    return worst


OLD_NAME = pytest.mark.filterwarnings(
    "ignore:.past_key_values. is deprecated"
)  # which a wrapper of any inputs is given

# ----- copies -----


def compiled(model):
    model.forward = torch.compile(model.forward, backend="eager")


def wrapped(model):
    inner = model.forward
    model.forward = lambda **inputs: inner(**inputs)


def wrapped_in_one_layer(model):
    layer = model.model.layers[0].mlp
    inner = layer.forward
    layer.forward = lambda x: inner(x)


def hooked(model):
    weight = model.model.norm.weight
    model.model.norm.register_forward_hook(lambda module, given, out: out * weight)


def aliased(model):
    """The very memory of the original's weight, under another tensor."""
    weight = model.model.norm.weight.detach()
    model.model.norm.register_forward_hook(lambda module, given, out: out * weight)


@OLD_NAME
@pytest.mark.parametrize("change", [compiled, wrapped, wrapped_in_one_layer, hooked, aliased])
def test_what_would_go_on_with_the_originals_weights_is_not_copied(change):
    model = tiny.network("llama")
    change(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be copied: .* still reads the original's weights"):
        of(model).copy()


@OLD_NAME
def test_a_network_that_reads_none_of_its_weights_is_not_copied():
    model, elsewhere = tiny.network("llama"), tiny.network("llama", seed=1)
    model.forward = lambda **inputs: elsewhere(**inputs)
    with pytest.raises(ValueError, match="reads none of its own weights"):
        of(model).copy()


class Around(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, **inputs):
        return self.inner(**inputs)


def bound(model):
    model.forward = MethodType(type(model).forward, model)
    return model


@OLD_NAME
@pytest.mark.parametrize("change", [Around, bound], ids=["a module around it", "a method of its own"])
def test_what_follows_its_copy_is_copied(change):
    lm = of(change(tiny.network("llama")))
    twin = lm.copy()
    x = lm([SHORT]).sample((3,))
    torch.testing.assert_close(twin([SHORT]).log_prob(x), lm([SHORT]).log_prob(x), atol=0, rtol=0)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert (twin([SHORT]).log_prob(x) - lm([SHORT]).log_prob(x)).abs().max() > 1


# ----- the vocabulary is the logits' size -----


@pytest.mark.parametrize("said", [280, 320])
def test_logits_of_another_number_than_the_configuration_says_are_refused(said):
    model = tiny.network("llama")
    model.config.vocab_size = said
    for use in (lambda lm: lm.self_check(), lambda lm: lm([""]), lambda lm: lm.copy()):
        with pytest.raises(ValueError, match=f"LlamaForCausalLM answers 300 logits, .* says vocab_size={said}"):
            use(of(model))


# ----- lengths at which the law may change -----


def test_within_the_boundary_a_stretched_rotary_embedding_is_right():
    lm = of(stretched())
    assert lm.self_check() < 1e-4
    assert worst_against_each_prefix_alone(lm, [SHORT, "the soup was"]) < 1e-4


@pytest.mark.parametrize("prompts", [[LONG, SHORT], ["the soup was good and the"]], ids=["in company", "alone"])
def test_a_law_that_changes_where_texts_cross_is_refused(prompts):
    lm = of(stretched(), 12)
    lengths = lm.prompts(prompts).lengths
    assert lengths.min() < 16 < lengths.max() + 12
    for _ in range(2):  # the second time from memory
        with pytest.raises(ValueError, match=r"LlamaForCausalLM changes its law at 16 tokens \((rope_\w+.)?original_"):
            lm(prompts)
    with pytest.raises(ValueError, match="keep prompt and max_new_tokens within 16"):
        lm.self_check(prompts)


def test_a_short_prompt_beside_a_long_one_is_refused_also_for_one_token():
    lm = of(stretched(), 1)
    assert lm([SHORT]) and lm([LONG])
    with pytest.raises(
        ValueError, match=r"changes its law at 16 tokens .* scored in one pass [\d.e-]+, alone against beside other"
    ):
        lm([SHORT, LONG])


def test_prompts_that_are_all_beyond_the_boundary_have_one_law():
    lm = of(stretched(8))
    prompts = [LONG, LONG + " " + SHORT]
    assert lm.prompts(prompts).lengths.min() > 8
    assert worst_against_each_prefix_alone(lm, prompts) < 1e-4


SOUND = {
    "sliding window": lambda: build("Mistral", **{**HYBRID, "sliding_window": 8}),
    "windows in some layers": lambda: build(
        "GptOss",
        **{**HYBRID, "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        layer_types=["sliding_attention", "full_attention"],
    ),
    "yarn": lambda: stretched(
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 16,
        }
    ),
    "local layers": lambda: build(
        "GPTNeo",
        **{k: v for k, v in SMALL.items() if k != "num_hidden_layers"},
        num_layers=2,
        num_heads=2,
        window_size=8,
        attention_types=[[["global", "local"], 1]],
    ),
    "short convolutions": lambda: build("Lfm2", **HYBRID, layer_types=["conv", "full_attention"]),
    "state space and attention in one layer": lambda: build(
        "FalconH1",
        **{**HYBRID, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8},
        mamba_n_groups=1,
        mamba_chunk_size=8,
    ),
}


HYBRIDS = ("short convolutions", "state space and attention in one layer")  # Transformers 4 has other caches for them
needs_recent = pytest.mark.skipif(not RECENT, reason="hybrid networks need transformers 5")


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_recent if name in HYBRIDS else ()) for name in SOUND])
def test_sound_networks_are_taken_across_their_boundaries(name):
    """Against the plain network on each prefix alone; rows are copied as they are drawn, states of recurrences too."""
    model = SOUND[name]()
    lm = of(model)
    assert worst_against_each_prefix_alone(lm, [SHORT, "the soup was good and the bread"]) < 1e-4


@needs_recent
def test_rows_of_a_hybrid_network_carry_their_whole_past():
    """The ancestors of SMC: as many rows as before, so a state that stays behind gives no error, only another law."""
    lm = of(SOUND["state space and attention in one layer"]().double())
    texts = [lm.vocabulary.encode(text) for text in (SHORT, "the soup was", "she")]
    decoder = Decoder(lm, lm.prompts([SHORT, "the soup was", "she"]))
    for ancestors in ([2, 2, 1], [1, 0, 2, 0], [3, 3]):
        decoder.reorder(torch.tensor(ancestors))
        texts = [[*texts[a], 40 + i] for i, a in enumerate(ancestors)]
        decoder.advance(torch.tensor([text[-1] for text in texts]))
        with torch.no_grad():
            right = [lm.model(input_ids=torch.tensor([text])).logits[0, -1].log_softmax(-1) for text in texts]
        torch.testing.assert_close(decoder.log_probs(), torch.stack(right), atol=1e-5, rtol=0)


def test_a_boundary_is_checked_once_and_not_counted(monkeypatch):
    passes = []
    plain = LanguageModel.logits
    monkeypatch.setattr(LanguageModel, "logits", lambda self, **given: passes.append(1) or plain(self, **given))
    lm = of(build("Mistral", **{**HYBRID, "sliding_window": 8}))
    with meter.measure() as cost:
        lm([SHORT])
    assert cost.lm_tokens == 0 and passes
    passes.clear()
    lm([SHORT])
    lm.copy()([SHORT])
    assert len(passes) == 1 + 3  # of the copy: one token, and what its head answers


def test_boundaries_are_found_under_any_name_and_place():
    config = SimpleNamespace(
        rope_scaling={"full": {"type": "su", "original_max_position_embeddings": 40}},
        layers=[SimpleNamespace(attention_chunk_size=30), SimpleNamespace(window=[5, 20])],
        use_sliding_window=True,
        hidden_size=64,
    )
    assert list(boundaries(config)) == [5, 20, 30, 40]


@pytest.mark.parametrize("name", ["max_seq_len", "n_ctx", "seq_length", "max_sequence_length", "n_positions"])
def test_the_context_length_is_found_under_its_names(name):
    assert context_length(SimpleNamespace(**{name: 24})) == 24
    assert context_length(SimpleNamespace(**{name: -1})) is None


def test_a_text_that_does_not_fit_is_refused_in_one_sentence():
    mpt = build("Mpt", vocab_size=300, d_model=16, n_layers=1, n_heads=2, max_seq_len=24, eos_token_id=2)
    with pytest.raises(ValueError, match="and max_new_tokens=40 need .* positions; this model has 24"):
        of(mpt, 40)([SHORT])
    assert of(mpt, 20)([""]).event_shape == (20,)


# ----- what is no causal language model -----

# Transformers 4 writes is_decoder=False into every configuration, so that only the check tells.
NO_CAUSAL = (
    "is no causal .* is_decoder=False" if RECENT else "is sampled from one distribution and scored under another"
)
BERT = {**SMALL, "intermediate_size": 16, "num_attention_heads": 2}
UNSUITABLE = {
    "encoder": (lambda: build("Bert", "LMHeadModel", **BERT), f"BertLMHeadModel {NO_CAUSAL}"),
    "masked": (lambda: build("Bert", "ForMaskedLM", **BERT), "BertForMaskedLM takes no `past_key_values`"),
    "another encoder": (lambda: build("Roberta", **BERT), f"RobertaForCausalLM {NO_CAUSAL}"),
    "permutations": (
        lambda: build("XLNet", "LMHeadModel", vocab_size=300, d_model=16, n_layer=1, n_head=2, d_inner=16),
        r"XLNetLMHeadModel takes no `past_key_values` \(it keeps mems\)",
    ),
    "encoder-decoder": (
        lambda: build(
            "T5", "ForConditionalGeneration", vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
        ),
        "T5ForConditionalGeneration is an encoder-decoder",
    ),
    "recurrent": (
        lambda: build("Mamba", **SMALL, state_size=4),
        # since transformers 5.24 its state is a `cache`; the check finds that it does not go on as it is scored
        r"MambaForCausalLM (takes .* \(it keeps cache_params\)|is sampled from one distribution and scored under another)",
    ),
    "another recurrent": (
        lambda: build("Rwkv", **{**SMALL, "num_hidden_layers": 2}, attention_hidden_size=16, context_length=64),
        r"RwkvForCausalLM takes no .* \(it keeps state\)",
    ),
}


@pytest.mark.parametrize("name", UNSUITABLE)
def test_what_is_no_causal_language_model_is_refused_wherever_it_enters(name, tmp_path):
    make, message = UNSUITABLE[name]
    model = make()
    with pytest.raises(ValueError, match=message):
        of(model)([SHORT])
    model.save_pretrained(tmp_path)
    tiny.bpe().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"BertLMHeadModel {NO_CAUSAL}" if name == "masked" else message):
        LanguageModel.from_pretrained(tmp_path, 4)


def test_what_a_forward_pass_raises_is_told_with_its_cause(monkeypatch):
    lm = of(tiny.network("llama"))

    def broken(**inputs):
        raise RuntimeError("a tensor of size 25 does not fit")

    monkeypatch.setattr(lm.model, "forward", broken)
    with pytest.raises(
        ValueError, match="LlamaForCausalLM fails in a forward pass: RuntimeError: a tensor of size"
    ) as c:
        lm.self_check()
    assert isinstance(c.value.__cause__, RuntimeError)


def test_the_base_of_an_adapter_is_named_where_it_cannot_be_loaded(tmp_path):
    tiny.bpe().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    with pytest.raises(ValueError, match="the base of the adapter in '.*': lm='someone/base' could not be loaded"):
        LanguageModel.from_pretrained(tmp_path, 4)
    (tmp_path / "config.json").write_text("{}")  # some trainers save that of the base beside it
    with pytest.raises(ValueError, match="the base of the adapter in '.*': lm='someone/base' could not be loaded"):
        LanguageModel.from_pretrained(tmp_path, 4)


# ----- a module of one's own, as the docstring asks -----


class Attentive(torch.nn.Module):
    """One layer of attention over the cache, in forty lines, with no more inputs than the contract names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token, self.place = torch.nn.Embedding(300, 8), torch.nn.Embedding(32, 8)
        self.qkv, self.head = torch.nn.Linear(8, 24), torch.nn.Linear(8, 300)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None):
        x = self.token(input_ids) + self.place(position_ids)  # (N, L, 8)
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))  # (N, 1, L, 8)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, 0)
        seen = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]).bool()
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None, :].bool()
        seen = seen | torch.eye(k.shape[2])[k.shape[2] - q.shape[2] :].bool()  # padding looks at itself
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        logits = 3 * self.head(x + attended.squeeze(1))
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)


class Running(torch.nn.Module):
    """A recurrence with a cache of its own: h_t = tanh(W h_t-1 + e(x_t))."""

    class State:
        def __init__(self, rows_stay: bool):
            self.h, self.rows_stay = None, rows_stay

        def batch_select_indices(self, rows):
            if not (self.rows_stay and len(rows) == len(self.h)):
                self.h = self.h[rows]

    def __init__(self, rows_stay=False, **config):
        super().__init__()
        self.config, self.rows_stay = SimpleNamespace(vocab_size=300, eos_token_id=2, **config), rows_stay
        self.token, self.turn = torch.nn.Embedding(300, 8), torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 300)

    def new_cache(self):
        return self.State(self.rows_stay)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False):
        state = past_key_values or self.new_cache()
        h = input_ids.new_zeros(len(input_ids), 8).float() if state.h is None else state.h
        real, out = torch.ones_like(input_ids) if attention_mask is None else attention_mask, []
        for token, keep in zip(input_ids.unbind(1), real[:, -input_ids.shape[1] :].unbind(1), strict=True):
            h = torch.where(keep.bool()[:, None], (self.turn(h) + self.token(token)).tanh(), h)
            out.append(h)
        window = getattr(self.config, "memory_window", None)
        if window is not None and int(position_ids.max()) >= window:  # a pass that reaches beyond it is another law
            out = [h / 2 for h in out]
        state.h = h
        return SimpleNamespace(logits=4 * self.head(torch.stack(out, 1)), past_key_values=state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Attentive(SimpleNamespace(vocab_size=300, eos_token_id=2, n_ctx=32)),
        lambda: Attentive(hf.PretrainedConfig(vocab_size=300, eos_token_id=2, num_hidden_layers=1)),
        Running,
    ],
    ids=["plain configuration", "transformers configuration", "a cache of its own"],
)
def test_a_module_as_the_docstring_asks_is_taken(make):
    torch.manual_seed(0)
    lm = of(make())
    assert lm.self_check() < 1e-4
    d = lm([SHORT, LONG[:30]])
    x = d.sample((5,))
    torch.testing.assert_close(d.sampled_log_probs(x), d.token_log_probs(x), atol=1e-4, rtol=0)
    torch.testing.assert_close(lm([SHORT]).log_prob(x[:, :1]), d.log_prob(x)[:, :1], atol=1e-4, rtol=0)
    twin = lm.copy()
    twin([SHORT]).log_prob(x[:, :1]).sum().backward()
    assert twin.model.head.weight.grad is not None and lm.model.head.weight.grad is None


def test_states_that_stay_behind_when_rows_move_are_found():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="Running is sampled from one distribution and scored under another"):
        of(Running(rows_stay=True)).self_check()


def test_a_boundary_of_an_unknown_kind_is_crossed_as_well():
    torch.manual_seed(0)
    lm = of(Running(memory_window=10))
    lm.self_check()
    assert lm([""])
    assert lm.prompts(["the soup was good"]).lengths.tolist() == [7]
    with pytest.raises(
        ValueError, match=r"Running changes its law at 10 tokens \(memory_window in its configuration\)"
    ):
        lm(["the soup was good"])


class Bare(torch.nn.Module):
    def __init__(self, answer, config=None):
        super().__init__()
        self.config, self.answer = config or SimpleNamespace(vocab_size=300, eos_token_id=2), answer
        self.register_buffer("anchor", torch.zeros(1))  # says on which device it is

    def forward(self, input_ids, past_key_values=None):
        return self.answer(torch.zeros(*input_ids.shape, 300))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bare(lambda logits: logits), "Bare answers with Tensor, which has no `logits`"),
        (
            lambda: Bare(lambda logits: SimpleNamespace(logits=logits)),
            "asked for `past_key_values`, it answered without",
        ),
        (lambda: Bare(copy.copy, SimpleNamespace(eos_token_id=2)), "Bare has no config.vocab_size"),
    ],
)
def test_what_a_module_lacks_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        of(make()).self_check()
