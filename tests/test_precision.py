"""Half precision: what is trained is float32, the noise is measured, and a gradient that points elsewhere is refused."""

import json

import pyro
import pytest
import tiny
import torch
from typer.testing import CliRunner

import ppl_lm
from ppl_lm.cli.app import app
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.lm.checking import precision
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.models import tilted

PROMPTS = ["the soup was good", "a dog"]
HAS_A = ppl_lm.Reward(lambda completions, **_: [float("a" in text) for text in completions], r_max=1.0)


def half(kind="llama", dtype=torch.bfloat16, steps=8):
    return LanguageModel(tiny.network(kind).to(dtype), tiny.bpe(), steps, end_ids=range(2, 20))


def log_ratios(lm, other, texts=40):
    """log lm - log other of texts drawn from `lm`: as they were drawn, and as they are scored."""
    law = lm(PROMPTS)
    x = law.sample((texts,))
    with torch.no_grad():
        return law.sampled_log_probs(x).sum(-1) - other(PROMPTS).log_prob(x)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_trained_is_float32_and_begins_as_the_prior(kind, dtype):
    prior = half(kind, dtype)
    lm = prior.copy()
    assert {w.dtype for w in lm.parameters()} == {torch.float32} and lm.compute_dtype is dtype
    assert {w.dtype for w in prior.parameters()} == {dtype} and prior.compute_dtype is None
    prior.self_check()
    lm.self_check()
    bound = 8 * 8**0.5 * max(prior.noise, lm.noise)
    assert float(log_ratios(lm, prior).abs().max()) < bound
    assert lm.noise > 1e-5, "16-bit weights and 16-bit products of float32 ones are rounded in other places"
    assert lm.copy().compute_dtype is dtype and lm.copy().noise == lm.noise


def test_small_steps_are_taken():
    """Of half-precision weights a step of 1e-5 would change hardly one: it is smaller than their spacing."""
    prior = half()
    mutant = LanguageModel(tiny.network("llama").bfloat16(), tiny.bpe(), 8, end_ids=range(2, 20))
    mutant.model.requires_grad_(True)
    moved = []
    for lm in (prior.copy(), mutant):
        before = [w.detach().clone() for w in lm.parameters()]
        optimiser = torch.optim.Adam(lm.parameters(), lr=1e-5)
        lm(PROMPTS).log_prob(lm(PROMPTS).sample()).sum().backward()
        optimiser.step()
        pairs = list(zip(before, lm.parameters(), strict=True))
        moved.append(sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a in before))
    assert moved[0] > 0.5 > 0.1 > moved[1]


def test_the_self_check_measures_what_rounding_does_to_a_log_ratio():
    exact = LanguageModel(tiny.network("llama"), tiny.bpe(), 8, end_ids=range(2, 20))
    exact.self_check()
    assert exact.noise < 1e-5
    lm = half()
    lm.self_check()
    found = float(log_ratios(lm, lm, 400).square().mean().sqrt())
    lengths = lm.vocabulary.lengths(lm(PROMPTS).sample((400,)).reshape(-1, 8)).double().mean()
    if found < 1e-5:  # a processor with instructions for it rounds every row alike, whatever stands beside it
        assert lm.noise < 1e-5
    else:
        assert lm.noise > 1e-3
        assert 0.05 < found / (lm.noise * float(lengths) ** 0.5) < 2.5  # few tokens, beside padding: rather too large


def test_gradients_are_nearly_those_in_float32_and_others_are_refused():
    lm = half().copy()
    assert precision.gradient_cosine(lm) > 0.99
    precision.require_true_gradient(lm)
    for weight in lm.parameters():
        weight.register_hook(torch.randn_like)  # a backward pass that rounding has made of noise
    assert abs(precision.gradient_cosine(lm)) < 0.5
    target = bind(tilted, half(), reward=HAS_A, beta=0.3)
    with pytest.raises(ValueError, match="cosine"):
        ppl_lm.fit(target, bind(finetuned, lm), PROMPTS, max_steps=1, seed=0)


def test_a_fit_in_half_precision_is_kept_as_it_is(tmp_path):
    prior = half()
    target, guide = bind(tilted, prior, reward=HAS_A, beta=0.3), bind(finetuned, prior.copy())
    fitted = ppl_lm.fit(target, guide, PROMPTS, ppl_lm.SequenceELBO(num_particles=8), max_steps=2, seed=0)
    assert fitted.steps == 2
    guide.lm.save_pretrained(tmp_path / "guide")
    again = LanguageModel.from_pretrained(tmp_path / "guide")
    assert again.compute_dtype is torch.bfloat16 and {w.dtype for w in again.parameters()} == {torch.float32}
    x = again(PROMPTS).sample((4,))
    for one, other in zip(again.parameters(), guide.lm.parameters(), strict=True):
        assert torch.equal(one, other)
    difference = (again(PROMPTS).log_prob(x) - guide.lm(PROMPTS).log_prob(x)).detach().abs().max()
    assert float(difference) < 8 * 8**0.5 * guide.lm.noise
    pyro.clear_param_store()


def test_the_command_takes_a_dtype_and_says_what_it_does(tmp_path):
    run = tmp_path / "run"
    arguments = [
        "fit",
        "tilted",
        "--max-new-tokens",
        "6",
        "--max-steps",
        "1",
        "--particles",
        "4",
        "--num-samples",
        "100",
    ]
    result = CliRunner().invoke(app, [*arguments, "--dtype", "bfloat16", "--output-dir", str(run)])
    assert result.exit_code == 0, result.output
    assert "half precision moves the log-ratio" in " ".join(result.output.split())
    assert json.loads((run / "config.json").read_text())["settings"]["dtype"] == "bfloat16"
    bad = CliRunner().invoke(app, [*arguments, "--dtype", "int8", "--output-dir", str(tmp_path / "other")])
    assert bad.exit_code == 2 and "float32, bfloat16" in bad.output and not (tmp_path / "other").exists()
