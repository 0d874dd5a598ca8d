"""Loading, and the self-check that refuses what would be sampled from one law and scored under another."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from ppl_lm.lm.language_model import LanguageModel

WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    tiny.network("llama").save_pretrained(folder)
    tiny.bpe().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "lm"))


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def states():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


@pytest.mark.parametrize("as_path", [str, Path])
def test_a_folder_loads_frozen_checked_and_without_touching_random_states(folder, as_path, device, capfd):
    before = states()
    lm = LanguageModel.from_pretrained(as_path(folder), 8, device=device)
    assert states() == before
    assert not any(p.requires_grad for p in lm.parameters()) and lm.device.type == device.type
    assert lm.max_new_tokens == 8 and lm.max_positions == 64
    same = tiny.language_model("llama").to(device)
    x = same(["a dog"]).sample()
    torch.testing.assert_close(lm(["a dog"]).log_prob(x), same(["a dog"]).log_prob(x))
    assert capfd.readouterr() == ("", "")  # no bars, no reports


def test_end_ids_and_dtype_can_be_given(folder):
    lm = LanguageModel.from_pretrained(folder, 8, end_ids=[7, 9], dtype=torch.float64)
    assert lm.vocabulary.end_ids == (7, 9) and next(lm.parameters()).dtype == torch.float64
    assert lm.self_check() < 1e-10


@pytest.mark.parametrize("max_new_tokens", [1, 62, 63, 200])
def test_any_length_loads_and_only_what_does_not_fit_is_refused_later(folder, max_new_tokens):
    """Catches a self-check that needs more room than the user's own prompts."""
    lm = LanguageModel.from_pretrained(folder, max_new_tokens)
    if max_new_tokens < 64:
        assert lm([""]).event_shape == (max_new_tokens,)
    else:
        with pytest.raises(ValueError, match="max_new_tokens=200 need 201 positions"):
            lm([""])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(WEIGHT), f"missing_keys: .*{WEIGHT}"),
        (lambda w: w.update(extra=torch.zeros(2)), "unexpected_keys: .*extra"),
        (lambda w: w.update({WEIGHT: w[WEIGHT][:-1].clone()}), f"mismatched_keys: .*{WEIGHT}"),
        (lambda w: w[WEIGHT][3, 3].fill_(torch.nan), f"weight '{WEIGHT}' holds NaN or infinite values"),
        (lambda w: w[WEIGHT][3, 3].fill_(torch.inf), f"weight '{WEIGHT}' holds NaN or infinite values"),
    ],
    ids=["missing", "unexpected", "misshapen", "NaN", "infinite"],
)
def test_faulty_weights_are_refused_by_name(folder, change, message):
    """transformers initialises them at random, with a report; NaN makes greedy decoding return token 0."""
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        LanguageModel.from_pretrained(folder, 8)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("size", [4, 100, -1])
def test_a_cut_off_file_is_refused(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="could not be loaded: .*header"):
        LanguageModel.from_pretrained(folder, 8)


def test_pickled_weights_are_not_opened(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="could not be loaded: .*safetensors"):
        LanguageModel.from_pretrained(folder, 8)


def test_what_is_no_model_folder_is_named_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: pytest.fail("asked the hub"))
    for name in (tmp_path, str(tmp_path), tmp_path / "nope", str(tmp_path / "nope"), "./nope", "../nope", "a/b/c"):
        with pytest.raises(ValueError, match="is not a Hugging Face folder: it has no config.json"):
            LanguageModel.from_pretrained(name, 8)


def test_a_hub_name_that_cannot_be_reached_is_one_clear_error(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    level = transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    with pytest.raises(ValueError, match="lm='someone/model' could not be loaded: We couldn't connect") as caught:
        LanguageModel.from_pretrained("someone/model", 8)
    assert isinstance(caught.value.__cause__, OSError)
    assert transformers.utils.logging.get_verbosity() == level
    assert transformers.utils.logging.is_progress_bar_enabled() == bars


# ----- the self-check -----


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_sound_models_pass(kind, device):
    before = states()
    lm = tiny.language_model(kind, max_new_tokens=8).to(device)
    assert lm.self_check() < 1e-4
    assert lm.self_check(["the soup", "", "a dog ran over"]) < 1e-4
    assert lm.double().self_check() < 1e-10
    assert states() == before


def ignores(name):
    def broken(forward, inputs):
        return forward(**{**inputs, name: None})

    return broken


def noisy(forward, inputs):
    out = forward(**inputs)
    generator = torch.Generator().manual_seed(out.logits.shape[1] + len(out.logits))
    out.logits = out.logits + 0.1 * torch.randn(out.logits.shape, generator=generator)
    return out


def forgets_the_cache(forward, inputs):
    name = "past_key_values" if "past_key_values" in inputs else "cache"  # the latter since transformers 5.24
    if inputs[name] is not None and inputs[name].get_seq_length():
        forward(**inputs)
        return forward(**{**inputs, name: None, "attention_mask": None})
    return forward(**inputs)


def cools_single_steps(forward, inputs):
    """As an engine that applies the model's temperature when it generates, and not when it scores."""
    out = forward(**inputs)
    if inputs["use_cache"]:
        out.logits = out.logits / 0.9
    return out


def answers_nan(forward, inputs):
    out = forward(**inputs)
    out.logits = out.logits * torch.nan
    return out


BROKEN = [ignores("attention_mask"), ignores("position_ids"), noisy, forgets_the_cache, cools_single_steps]


@pytest.mark.parametrize("broken", BROKEN, ids=["mask", "positions", "noise", "cache", "temperature"])
def test_models_that_are_scored_otherwise_than_drawn_are_refused(monkeypatch, broken):
    lm = tiny.language_model("gpt2")
    forward = lm.model.forward
    monkeypatch.setattr(lm.model, "forward", lambda **inputs: broken(forward, inputs))
    with pytest.raises(ValueError, match="sampled from one distribution and scored under another: .* differs by"):
        lm.self_check()


def test_nan_logits_are_refused(monkeypatch):
    lm = tiny.language_model("gpt2")
    forward = lm.model.forward
    monkeypatch.setattr(lm.model, "forward", lambda **inputs: answers_nan(forward, inputs))
    with pytest.raises(ValueError, match="logits hold NaN"):
        lm.self_check()


def test_the_check_refuses_what_it_cannot_check():
    lm = tiny.language_model("gpt2")
    with pytest.raises(ValueError, match="the self-check got no prompts"):
        lm.self_check([])
    with pytest.raises(ValueError, match="positions; this model has 64"):
        lm.self_check(["the soup was good " * 20])
