"""Recorded steps, without a GPU: kernels are noted down as a CUDA graph notes them, and run again on the same memory.

| what | how it is shown | tolerance |
|---|---|---|
| draws, log q, SMC's weights | by the same uniforms, recorded and not; rows leave, are copied, outgrow their room | 1e-10 |
| a recording that is no longer right | a place, a mask, an input that stay as they were are caught by `_same_steps` | - |
| who is recorded | only where asked for; not: hooks, modules of others, windows, tables, short texts | - |
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import ppl_lm
from ppl_lm.infer.binding import bind
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.lm import meter
from ppl_lm.lm.decoding import recorded_steps
from ppl_lm.lm.decoding.decoder import Decoder, sample
from ppl_lm.lm.decoding.recorded_steps import RecordedSteps, may_record
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.models import tilted
from tests import tiny

PLAIN = ["gpt2", "llama", "qwen2"]
READS = torch.ops.aten._local_scalar_dense.default
TEXTS = ["the soup", "she said that", "a"]


class Noting(TorchDispatchMode):
    """What a CUDA graph does: notes kernels down with the memory that they read and write, which must not be looked at."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.kernels.append((func, args, kwargs or {}, out))
        return out


def noted(step):
    """In the place of `recorded_steps.record`."""
    step()
    with Noting() as graph:
        answer = step()

    def replay():
        for func, args, kwargs, out in graph.kernels:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return answer

    return replay


@pytest.fixture
def graphs(monkeypatch):
    """A device that has graphs; the list of how many rows each recording was of."""
    made = []

    def record(step):
        made.append(len(step.__self__.ids))
        return noted(step)

    monkeypatch.setattr(recorded_steps, "has_graphs", lambda device: True)
    monkeypatch.setattr(recorded_steps, "record", record)
    return made


def lm_of(kind: str, tokens: int = 20, **given) -> LanguageModel:
    ends = range(2, 300, 9)  # so that texts end
    if kind == "qwen2":
        given = {"max_window_layers": 999, **given}  # a number of layers that is taken for a length
    return LanguageModel(tiny.network(kind, **given).double(), tiny.bpe(), tokens, end_ids=ends)


@pytest.mark.parametrize("kind", PLAIN)
def test_draws_are_the_same(kind, graphs, monkeypatch):
    """Of prompts of different lengths, whose copies end one by one, are dropped and leave half of the rows."""
    lm = lm_of(kind)
    assert may_record(lm, Decoder(lm, lm.prompts(TEXTS)).cache, 5) and graphs
    rows, u = torch.arange(3).repeat(8), torch.rand(24, 20, dtype=torch.float64)
    u[::2] = u[::2].clamp_max(0.3)
    graphs.clear()
    with meter.measure() as cost:
        x, log_q = sample(lm, lm.prompts(TEXTS), rows, u)
    assert len(graphs) > 1 and graphs == sorted(graphs, reverse=True), (
        "nothing was recorded, or not again with fewer rows"
    )
    monkeypatch.setattr(recorded_steps, "has_graphs", lambda device: False)
    with meter.measure() as plain:
        expected, log_p = sample(lm, lm.prompts(TEXTS), rows, u)
    assert torch.equal(x, expected) and cost.lm_tokens == plain.lm_tokens
    torch.testing.assert_close(log_q, log_p, atol=1e-10, rtol=0)
    assert len(set(lm.vocabulary.lengths(x).tolist())) > 3


@pytest.mark.parametrize("settings", [SMCSettings(threshold=2.0), SMCSettings(expand=3)], ids=["smc", "expand"])
def test_smc_is_the_same(settings, graphs, monkeypatch):
    """Rows go to their ancestors, become fewer and more."""
    lm = lm_of("llama")
    model = bind(tilted, lm, reward=lambda completions, **_: [float(len(set(t))) for t in completions], beta=1.0)
    found = []
    for has in (True, False):
        monkeypatch.setattr(recorded_steps, "has_graphs", lambda device, has=has: has)
        torch.manual_seed(3)
        found.append(ppl_lm.smc(model, bind(ppl_lm.guides.prior, lm), TEXTS, num_samples=6, settings=settings))
    assert graphs
    torch.testing.assert_close(found[0].latents, found[1].latents)
    torch.testing.assert_close(found[0].log_weight, found[1].log_weight, atol=1e-10, rtol=0)


def test_texts_may_outgrow_their_room(graphs):
    """A decoder goes on for as long as it is asked to; another prompt is as if it stood alone."""
    lm = lm_of("llama", 16)
    decoder, alone = Decoder(lm, lm.prompts(TEXTS)), lm.prompts(TEXTS)
    steps = alone.ids.shape[-1] + 30
    tokens = torch.arange(3 * 30).reshape(30, 3) % 290 + 5
    for t in range(30):
        decoder.advance(tokens[t])
    assert isinstance(decoder.cache, RecordedSteps) and decoder.cache.room >= steps and len(graphs) >= 2
    plain = Decoder(lm, alone)
    plain.cache = None
    ids, mask = torch.cat([alone.ids, tokens.T], 1), torch.cat([alone.mask, alone.mask.new_ones(3, 30)], 1)
    at = (mask.long().cumsum(-1) - 1).clamp_min(0)
    expected = lm.logits(ids=ids, mask=mask, positions=at)[0][:, -1].log_softmax(-1)
    torch.testing.assert_close(decoder.log_probs(), expected, atol=1e-10, rtol=0)


def test_half_precision_is_recorded(graphs, monkeypatch):
    """Weights that autocast converts are converted at every step: what was kept from before is gone by then."""
    lm = tiny.language_model("llama", 20)
    twin = LanguageModel(tiny.network("llama").bfloat16(), tiny.bpe(), 20).copy()
    assert twin.compute_dtype == torch.bfloat16 and lm.compute_dtype is None
    rows, u = torch.arange(3).repeat(2), torch.rand(6, 20, dtype=torch.float64)
    x, log_q = sample(twin, twin.prompts(TEXTS), rows, u)
    assert graphs and twin.shortcuts.steps
    with torch.no_grad():
        again = twin.score(twin.prompts(TEXTS), x, rows)
    assert float((again.double() - log_q).abs().max()) < 0.5


class Counting(torch.nn.Linear):
    """What is not the same at every step, in Python alone."""

    calls = 0

    def forward(self, given):
        self.calls += 1
        return super().forward(given) * (1 + 0.01 * self.calls)


def test_who_is_not_recorded(graphs, monkeypatch):
    lm = lm_of("llama")
    cache = Decoder(lm, lm.prompts(TEXTS)).cache
    assert may_record(lm, cache, 5)
    handle = lm.model.model.layers[0].register_forward_hook(lambda *_: None)
    assert not may_record(lm, cache, 5)
    handle.remove()
    assert may_record(lm, cache, 5)
    window = lm_of("mistral")
    assert not may_record(window, Decoder(window, window.prompts(TEXTS)).cache, 5)
    short = lm_of("llama", 8)
    assert not may_record(short, Decoder(short, short.prompts(TEXTS)).cache, 5)
    monkeypatch.setattr(recorded_steps, "WORTH", 2)
    table = tiny.table(4, 3, 3)
    assert not may_record(table, Decoder(table, table.prompts(["a"])).cache, 5)
    assert may_record(lm.adapted(rank=2), cache, 5)
    lm.boundaries = {40: "window"}
    assert not may_record(lm, cache, 15) and may_record(lm, cache, 5)
    monkeypatch.undo()
    assert not may_record(lm_of("llama"), cache, 5)
    own = lm_of("llama")
    own.model.model.layers[0].mlp.gate_proj.__class__ = Counting
    assert not may_record(own, cache, 5)


@pytest.mark.parametrize("fault", ["place", "mask", "ids", "positions", "python", "read", "rows", "nan"])
def test_a_recording_that_is_wrong_is_not_taken(fault, graphs, monkeypatch):
    lm = lm_of("llama")
    cache = Decoder(lm, lm.prompts(TEXTS)).cache
    right = RecordedSteps._make_inputs

    class Stale(torch.Tensor):
        """Memory that is not written any more."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func in (torch.Tensor.__setitem__, torch.Tensor.fill_):
                return None
            return func(
                *tree_map(lambda v: v.as_subclass(torch.Tensor) if isinstance(v, cls) else v, args), **(kwargs or {})
            )

    def stale(self):
        right(self)
        if fault in ("mask", "ids", "positions", "place"):
            kept = getattr(self, fault).as_subclass(Stale)
            if fault == "mask":
                kept = (self.mask * 0).as_subclass(Stale)
            setattr(self, fault, kept)

    if fault == "python":
        lm.model.model.layers[0].mlp.gate_proj.__class__ = Counting
        monkeypatch.setattr(recorded_steps, "_is_known", lambda model: True)
    elif fault == "read":
        lm.model.model.layers[0].register_forward_hook(lambda module, given, out: out if out.sum() > -1e9 else None)
        monkeypatch.setattr(recorded_steps, "_is_known", lambda model: True)
    elif fault == "nan":
        monkeypatch.setattr(recorded_steps, "record", lambda step: lambda: step() * torch.nan)
    elif fault == "rows":
        monkeypatch.setattr(RecordedSteps, "batch_select_indices", lambda self, indices: None)
    else:
        monkeypatch.setattr(RecordedSteps, "_make_inputs", stale)
    assert not may_record(lm, cache, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", PLAIN)
def test_graphs_of_a_gpu(kind, monkeypatch):
    monkeypatch.setattr(recorded_steps, "ENABLED", True)
    lm = LanguageModel(tiny.network(kind).double().cuda(), tiny.bpe(), 20)
    rows, u = torch.arange(3, device="cuda").repeat(8), torch.rand(24, 20, dtype=torch.float64, device="cuda")
    x, log_q = sample(lm, lm.prompts(TEXTS), rows, u)
    assert lm.shortcuts.steps
    lm.shortcuts.steps = False
    expected, log_p = sample(lm, lm.prompts(TEXTS), rows, u)
    assert torch.equal(x, expected)
    torch.testing.assert_close(log_q, log_p, atol=1e-10, rtol=0)
