"""An adapted language model begins as the prior, shares its weights, and trains the adapter alone; it is saved as PEFT does."""

import copy
import json
import shutil
import warnings

import pyro
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ppl_lm.cli.app import app
from ppl_lm.guides import lora
from ppl_lm.infer.binding import bind
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.objectives.baselines import leave_one_out
from ppl_lm.lm.checking.folders import fingerprint
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.trainable_weights import adapter_weights
from ppl_lm.models import tilted

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated"
)  # PEFT's own wrapper asks for it
PROMPTS = ["the soup was", "a"]


def length(completions):
    return [float(len(text)) for text in completions]


@torch.no_grad()
def scores(lm, x):
    return lm(PROMPTS).log_prob(x)


@torch.no_grad()
def fitted(prior, steps=3, **kwargs):
    """An adapter that has left its beginning."""
    q = prior.adapted(**kwargs)
    with torch.enable_grad():
        guide = bind(lora, q)
        svi = pyro.infer.SVI(
            bind(tilted, prior, reward=length, beta=5.0), guide, pyro.optim.Adam({"lr": 0.05}), SequenceELBO(8)
        )
        for _ in range(steps):
            svi.step(PROMPTS)
    return q


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_it_begins_as_the_prior_and_leaves_it_as_it_is(kind):
    """To the last bit. A copy that is merged and unmerged would differ by rounding, one of its own weights in memory."""
    prior = tiny.language_model(kind)
    before, x = fingerprint(prior), prior(PROMPTS).sample((6,))
    whole = {id(w): w.clone() for w in prior.parameters()}
    start = prior.adapted(rank=2)
    assert torch.equal(scores(start, x), scores(prior, x))
    shared = {w.data_ptr() for w in prior.parameters()}
    own = [w for w in start.parameters() if w.data_ptr() not in shared]
    assert {id(w) for w in own} == {id(w) for w in start.parameters() if w.requires_grad}
    assert {id(w) for w in own} == {id(w) for w in adapter_weights(start.model)}
    assert sum(w.numel() for w in own) < 0.2 * sum(w.numel() for w in prior.parameters())
    before_score = scores(prior, x)
    q = fitted(prior, rank=2)
    assert float((scores(q, x) - before_score).abs().max()) > 0.1
    assert torch.equal(scores(prior, x), before_score)
    assert torch.equal(scores(start, x), before_score)  # adapters do not know of each other
    assert fingerprint(prior) == before
    assert all(torch.equal(whole[id(w)], w) for w in prior.parameters())
    assert not any(w.requires_grad for w in prior.parameters())


def test_expected_gradients_are_those_of_the_enumerated_bound():
    """Of the adapter's weights; the estimator's errors are its own standard errors."""
    prior = LanguageModel(tiny.network("llama", vocab_size=5, seed=1), tiny.bpe(), 2, end_ids=[2])
    prior.vocabulary.size = 5
    q = prior.adapted(rank=2)
    with torch.no_grad():
        for weight in adapter_weights(q.model):
            weight.add_(0.1 * torch.randn_like(weight))

    def reward(completion_ids):
        return [1.0 * ids.count(3) - 0.5 * ids.count(1) for ids in completion_ids]

    target, guide = (
        bind(tilted, prior, reward=lambda completion_ids, **_: reward(completion_ids), beta=0.7),
        bind(lora, q),
    )
    ids = prior.prompts({"prompt": [""]})
    support = q(ids).enumerate_support()
    log_q, log_p = q(ids).log_prob(support), prior(ids).log_prob(support).detach()
    potential = torch.tensor(reward([[i for i in row if i != 0] for row in support[:, 0].tolist()])) / 0.7
    exact = (log_q.exp() * (log_q.detach() - log_p - potential[:, None])).sum()
    weights = adapter_weights(q.model)
    right = torch.cat([g.flatten() for g in torch.autograd.grad(exact, weights)])
    loss, grads = SequenceELBO(16, baseline=leave_one_out), []
    for _ in range(200):
        for weight in weights:
            weight.grad = None
        loss.loss_and_grads(target, guide, ids)
        grads.append(torch.cat([weight.grad.flatten() for weight in weights]))
    found = torch.stack(grads).double()
    z = (found.mean(0) - right) / (found.std(0) / len(found) ** 0.5).clamp_min(1e-12)
    assert float(right.abs().max()) > 0.01
    assert float(z.abs().max()) < 5.5  # of some 1,500 numbers


def test_a_fitted_adapter_is_read_back_by_everyone(tmp_path):
    prior = on_disk(tmp_path / "base")
    q = fitted(prior, rank=2)
    x = prior(PROMPTS).sample((6,))
    q.save_pretrained(tmp_path / "q")
    names = {path.name for path in (tmp_path / "q").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "model.safetensors" not in names and "config.json" not in names
    again = prior.adapted(tmp_path / "q")
    assert torch.equal(scores(again, x), scores(q, x))
    assert {w.data_ptr() for w in prior.parameters()} < {w.data_ptr() for w in again.parameters()}
    assert [w.requires_grad for w in again.parameters()] == [w.requires_grad for w in q.parameters()]
    alone = LanguageModel.from_pretrained(tmp_path / "q", device="cpu")
    assert torch.equal(scores(alone, x), scores(q, x))
    assert alone.max_new_tokens == 6 and not any(w.requires_grad for w in alone.parameters())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = LanguageModel(peft.PeftModel.from_pretrained(plain, tmp_path / "q"), prior.vocabulary.tokenizer, 6)
    torch.testing.assert_close(scores(theirs, x), scores(q, x), rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(scores(prior.adapted(tmp_path / "theirs"), x), scores(q, x), rtol=0, atol=1e-5)
    alone.save_pretrained(tmp_path / "again")  # what was read knows its base still
    assert torch.equal(scores(prior.adapted(tmp_path / "again"), x), scores(q, x))
    with pytest.raises(ValueError, match="fitted to another base"):
        LanguageModel(tiny.network("llama", seed=5), tiny.bpe(), 6).adapted(tmp_path / "again")


def test_a_base_that_was_trained_beside_its_adapter_is_not_lost_in_silence(tmp_path):
    q = tiny.language_model("llama").adapted(rank=2).copy().requires_grad_(True)
    q.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        for weight in q.parameters():
            weight.add_(0.01)
    with pytest.raises(ValueError, match="weights of the base were trained beside the adapter"):
        q.save_pretrained(tmp_path / "after")


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])),
        ("llama", peft.LoraConfig(r=2, target_modules=["q_proj"], use_rslora=True)),
        ("llama", peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)),
        ("qwen2", peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["norm"])),
        ("llama", peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])),
    ],
    ids=["embedding", "rslora", "dora", "modules_to_save", "ia3"],
)
def test_other_adapters_of_peft_are_saved_whole(tmp_path, kind, config):
    prior = tiny.language_model(kind)
    before, q = fingerprint(prior), prior.adapted(config)
    x = prior(PROMPTS).sample((6,))
    torch.testing.assert_close(scores(q, x), scores(prior, x), rtol=0, atol=1e-4)
    with torch.no_grad():
        for weight in adapter_weights(q.model):
            weight.add_(0.05 * torch.randn_like(weight))
    assert float((scores(q, x) - scores(prior, x)).abs().max()) > 0.01
    q.save_pretrained(tmp_path / "q")
    assert torch.equal(scores(prior.adapted(tmp_path / "q"), x), scores(q, x))
    assert fingerprint(prior) == before


def test_copies_keep_frozen_what_was_frozen():
    """What PEFT made trainable, what a user froze, and nothing else: a copy of a prior that was frozen whole is free."""
    prior = tiny.language_model("gpt2")
    q = prior.adapted(rank=2)
    wrapped = LanguageModel(
        peft.get_peft_model(
            copy.deepcopy(prior.model),
            peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
        ),
        tiny.bpe(),
        8,
    )
    again = LanguageModel(wrapped.model, tiny.bpe(), 4)  # frozen whole by now
    for lm in (q, wrapped, again, q.copy(), q.requires_grad_(False)):
        free = {name for name, w in lm.copy().named_parameters() if w.requires_grad}
        assert free and all("lora_" in name for name in free)
    model = tiny.network("gpt2")
    model.transformer.wte.requires_grad_(False)
    half = LanguageModel(model, tiny.bpe(), 8)
    frozen = [name for name, w in half.copy().copy().named_parameters() if not w.requires_grad]
    assert frozen == ["model.transformer.wte.weight"]
    assert all(w.requires_grad for w in tiny.language_model("gpt2").copy().copy().parameters())
    assert not any(w.requires_grad for w in half.parameters())


def test_weights_in_half_precision_are_trained_in_single_precision():
    prior = LanguageModel(tiny.network("llama").bfloat16(), tiny.bpe(), 8)
    q = prior.adapted(rank=2)
    x = prior(PROMPTS).sample((6,))
    assert torch.equal(scores(q, x), scores(prior, x))
    assert {w.dtype for w in adapter_weights(q.model)} == {torch.float32}
    assert {w.dtype for w in prior.parameters()} == {torch.bfloat16}
    dora = LanguageModel(prior.model, tiny.bpe(), 8).adapted(peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    saved = prior.adapted(peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    with warnings.catch_warnings():  # some versions of PEFT do, of a norm that is no torch.nn.LayerNorm
        warnings.simplefilter("ignore")
        norms = prior.adapted(peft.LNTuningConfig(target_modules=["norm"]))
    for other in (dora, saved, norms):
        assert float((scores(other, x) - scores(prior, x)).abs().max()) < 1.0  # rounding, at most


LORA = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"init_lora_weights": False}, "begins .* from the prior"),
        ({"bias": "all"}, "would train .* of the base itself"),
        ({"target_modules": ["nothing"]}, "does not fit GPT2LMHeadModel: Target modules"),
    ],
)
def test_adapters_that_would_change_the_prior_are_refused(change, message):
    prior = tiny.language_model("gpt2")
    before = fingerprint(prior)
    with pytest.raises(ValueError, match=message):
        prior.adapted(peft.LoraConfig(**(LORA | change)))
    assert fingerprint(prior) == before and not any(w.requires_grad for w in prior.parameters())


def test_networks_that_cannot_be_shared_are_refused(unchecked):
    prior = tiny.language_model("gpt2")
    with pytest.raises(ValueError, match="has an adapter of its own; merge it"):
        prior.adapted(rank=2).adapted(rank=2)
    with pytest.raises(ValueError, match="is being trained"):
        prior.copy().adapted()
    with pytest.raises(ValueError, match="rank=0; give a whole number"):
        prior.adapted(rank=0)
    with pytest.raises(ValueError, match="described by a peft.PeftConfig or a folder; got 3"):
        prior.adapted(3)
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="does not fit GPT2LMHeadModel"):
        prior.adapted(prompt)
    soft = peft.get_peft_model(
        tiny.network("llama"), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match="soft prompts are given anew at every step"):
        LanguageModel(soft, tiny.bpe(), 4)
    with pytest.warns(UserWarning, match="lora_dropout=0.1 is off"):
        prior.adapted(peft.LoraConfig(**LORA, lora_dropout=0.1))
    inner = prior.model.transformer.h[0]
    inner.forward = inner.forward
    with pytest.raises(ValueError, match="'transformer.h.0' has a forward that was put on it"):
        prior.adapted(rank=2)


def test_folders_that_are_not_adapters_of_this_base_are_refused(tmp_path):
    prior = on_disk(tmp_path / "base")
    fitted(prior, rank=2).save_pretrained(tmp_path / "q")
    other = LanguageModel(tiny.network("llama", seed=5), tiny.bpe(), 6)
    with pytest.raises(ValueError, match="fitted to another base than this one"):
        other.adapted(tmp_path / "q")
    (tmp_path / "q" / "language_model.json").unlink()  # as PEFT itself writes one: no hash to be held against
    assert other.adapted(tmp_path / "q").frozen
    shorter = LanguageModel(tiny.network("llama", num_hidden_layers=1), tiny.bpe(), 6)
    with pytest.raises(ValueError, match="is not one of this LlamaForCausalLM: .*layers.1.* is in the folder alone"):
        shorter.adapted(tmp_path / "q")
    weights = load_file(tmp_path / "q" / "adapter_model.safetensors")
    shutil.copytree(tmp_path / "q", tmp_path / "part")
    save_file(dict(list(weights.items())[1:]), tmp_path / "part" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is in the network alone"):
        other.adapted(tmp_path / "part")
    wider = LanguageModel(tiny.network("llama", intermediate_size=64), tiny.bpe(), 6)
    with pytest.raises(ValueError, match=r"has the shape \(2, 48\) and not|has the shape \(48, 2\) and not"):
        wider.adapted(tmp_path / "q")
    with pytest.raises(ValueError, match="it has no adapter_config.json"):
        prior.adapted(tmp_path)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match="was in '.*base', which is gone; load it"):
        LanguageModel.from_pretrained(tmp_path / "q")
    named = json.loads((tmp_path / "q" / "adapter_config.json").read_text())
    (tmp_path / "q" / "adapter_config.json").write_text(json.dumps(named | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base; load that, and give lm.adapted"):
        LanguageModel.from_pretrained(tmp_path / "q")
    (tmp_path / "q" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="it has no adapter_model.safetensors"):
        prior.adapted(tmp_path / "q")


def test_the_command_fits_saves_and_goes_on_with_an_adapter(tmp_path):
    on_disk(tmp_path / "base")
    run, more = tmp_path / "run", tmp_path / "more"
    quick = ["--particles", "8", "--num-samples", "128", "--max-steps", "2"]
    fit = ["fit", "tilted", "--guide", "lora", "--rank", "2", "--reward", "length", "--beta", "5"]
    call(
        *fit, "--lm", tmp_path / "base", "--max-new-tokens", "6", *quick, "--learning-rate", "0.05", "--output-dir", run
    )
    config = json.loads((run / "guide" / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["base_model_name_or_path"] == str(tmp_path / "base")
    assert not (run / "guide" / "config.json").exists()
    for command in (["sample", run], ["diagnose", run, "--num-samples", "128"], ["report", run]):
        call(*command)
    call("fit", "tilted", "--init-from", run, *quick, "--output-dir", more)
    assert json.loads((more / "config.json").read_text())["settings"]["rank"] == 2
    again = ["fit", "tilted", "--init-from", run, "--rank", "4", *quick, "--output-dir", tmp_path / "none"]
    refused = CliRunner().invoke(app, [str(word) for word in again])
    assert refused.exit_code == 2 and "goes on with the adapter as it is" in " ".join(refused.output.split())
    assert not (tmp_path / "none").exists()
    prior = LanguageModel.from_pretrained(tmp_path / "base", 6, device="cpu")
    first, second = (prior.adapted(folder / "guide") for folder in (run, more))
    assert all(w.shape[0] == 2 or w.shape[1] == 2 for w in adapter_weights(second.model))
    x = prior(PROMPTS).sample((6,))
    assert float((scores(first, x) - scores(prior, x)).abs().max()) > 1e-3
    assert float((scores(second, x) - scores(first, x)).abs().max()) > 0
    same = tmp_path / "same"
    call(
        *fit,
        "--lm",
        tmp_path / "base",
        "--max-new-tokens",
        "6",
        *quick,
        "--learning-rate",
        "0.05",
        "--output-dir",
        same,
    )
    repeated = prior.adapted(same / "guide")
    assert torch.equal(scores(repeated, x), scores(first, x))  # the seed decides the adapter's beginning too
    said = call(
        "sample", "tilted", "--lm", run / "guide", "--output-dir", tmp_path / "as_prior"
    )  # as a prior of its own
    assert "is tilted once more" in " ".join(said.output.split())
    call("report", tmp_path / "as_prior")
    further = ["fit", "tilted", "--lm", run / "guide", "--reward", "length", "--beta", "5", *quick]
    call(
        *further, "--learning-rate", "0.05", "--output-dir", tmp_path / "further"
    )  # a copy of a prior that has an adapter
    call("diagnose", tmp_path / "further", "--num-samples", "128")
    third = prior.adapted(tmp_path / "further" / "guide")
    assert float((scores(third, x) - scores(first, x)).abs().max()) > 0


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (["--guide", "finetuned", "--rank", "4"], "has no adapter"),
        (["--guide", "lora", "--rank", "4096"], "is 128 wide"),
    ],
)
def test_a_rank_that_would_have_no_effect_is_refused(tmp_path, how, why):
    said = CliRunner().invoke(app, ["fit", "tilted", *how, "--max-steps", "1", "--output-dir", str(tmp_path / "run")])
    assert said.exit_code == 2 and why in " ".join(said.output.split())
    assert not (tmp_path / "run").exists()


def call(*args):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result


def on_disk(folder) -> LanguageModel:
    tiny.network("llama").save_pretrained(folder)
    tiny.bpe().save_pretrained(folder)
    return LanguageModel.from_pretrained(folder, 6, device="cpu")
