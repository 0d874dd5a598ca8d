"""A language model saved is the one read back: by `from_pretrained`, by transformers, as the guide that a fit begins with."""

import json
import re

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ppl_lm.cli.app import app
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.lm.experts import product
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.table import table_lm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_guides_language_model_is_read_back_as_it_was(tmp_path, dtype):
    """Its end tokens too, where they are not those that the model's files name; its length; its chat template."""
    tiny.network("llama").save_pretrained(tmp_path / "base")
    tiny.bpe().save_pretrained(tmp_path / "base")
    lm = LanguageModel.from_pretrained(tmp_path / "base", 7, end_ids=[4], dtype=dtype, device="cpu")
    lm.vocabulary.tokenizer.chat_template = tiny.CHAT
    guide = bind(finetuned, lm.copy())
    with torch.no_grad():
        for weight in guide.parameters():
            weight.add_(0.01)
    guide.lm.save_pretrained(tmp_path / "a" / "guide")
    again = LanguageModel.from_pretrained(tmp_path / "a" / "guide", device="cpu")
    chats = [[{"role": "user", "content": "the soup"}], [{"role": "user", "content": "a dog"}]]
    for prompts in (["the soup was", "a"], chats):
        with torch.no_grad():
            x = guide.lm(prompts).sample((4,))
            scores = [m(prompts).log_prob(x) for m in (again, guide.lm, lm)]
        torch.testing.assert_close(
            scores[0], scores[1], rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5
        )  # rounding
        assert float((scores[0] - scores[2]).abs().max()) > 0.01
    assert all(map(torch.equal, again.parameters(), guide.parameters()))
    again.vocabulary.require_same(lm.vocabulary, "both")
    assert (again.max_new_tokens, again.vocabulary.end_ids) == (7, (4,))
    assert LanguageModel.from_pretrained(tmp_path / "a" / "guide", 3, end_ids=[2, 4]).vocabulary.end_ids == (2, 4)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "guide", dtype=dtype)
    assert all(map(torch.equal, theirs.state_dict().values(), guide.lm.model.state_dict().values()))


def test_tables_are_saved_and_products_and_files_refused(tmp_path):
    lm = table_lm(3, 2, concentration=1.0)
    lm.save_pretrained(tmp_path / "table")
    x = lm([""]).sample((4,))
    assert torch.equal(
        LanguageModel.from_pretrained(tmp_path / "table", device="cpu")([""]).log_prob(x), lm([""]).log_prob(x)
    )
    with pytest.raises(ValueError, match="no model of transformers'.*save the networks that it is made of"):
        product([lm, lm]).save_pretrained(tmp_path / "product")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give the name of a folder"):
        lm.save_pretrained(tmp_path / "file")
    (tmp_path / "table" / "language_model.json").write_text("{}")
    with pytest.raises(ValueError, match="language_model.json' is damaged"):
        LanguageModel.from_pretrained(tmp_path / "table")


def fit(*args):
    quick = ["--particles", "8", "--num-samples", "100", "--max-new-tokens", "4", "--max-steps", "2"]
    result = CliRunner().invoke(app, ["fit", "tilted", *quick, *map(str, args)])
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def test_a_fit_begins_with_an_earlier_runs_guide(tmp_path):
    tiny.language_model("llama", max_new_tokens=4).save_pretrained(tmp_path / "lm")
    first, second = tmp_path / "first", tmp_path / "second"
    rate = ("--lm", tmp_path / "lm", "--learning-rate")
    assert fit(*rate, 0.05, "--output-dir", first)[0] in (0, 1)
    status, text = fit(*rate, 1e-12, "--init-from", first, "--output-dir", second)
    assert status in (0, 1) and json.loads((second / "config.json").read_text())["settings"]["init_from"] == str(first)
    prior, begun, ended = (
        LanguageModel.from_pretrained(path, device="cpu").model.state_dict()["model.embed_tokens.weight"]
        for path in (tmp_path / "lm", first / "guide", second / "guide")
    )
    torch.testing.assert_close(ended, begun, atol=1e-9, rtol=0)  # steps of 1e-12 from there
    if json.loads((first / "fit.json").read_text())["kept"] != "start":
        assert not torch.allclose(begun, prior, atol=1e-4, rtol=0)

    (tmp_path / "mine.py").write_text(
        "def mine(completions, k):\n    return [float(n) for n in k]\n\n\nmine.r_max = 2.0\n"
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "k": 1}\n{"prompt": "the", "k": 2}\n')
    mine = ("--reward", f"{tmp_path / 'mine.py'}:mine", "--beta", 0.7, "--prompts", tmp_path / "p.jsonl")
    status, text = fit(*rate, 0.05, *mine, "--output-dir", tmp_path / "mine")
    assert status in (0, 1), text
    assert fit("--beta", 0.4, "--init-from", tmp_path / "mine", "--output-dir", tmp_path / "goes_on")[0] in (0, 1)
    before, after = (json.loads((tmp_path / n / "config.json").read_text())["settings"] for n in ("mine", "goes_on"))
    assert after["beta"] == 0.4 and before["beta"] == 0.7 and after["prompts"] == ["a", "the"]
    assert all(
        after[name] == before[name] for name in ("guide", "lm", "reward", "prompts", "columns", "max_new_tokens")
    )

    for args, message in (
        ((*rate, 0.05, "--init-from", tmp_path / "nowhere"), "is not a run folder"),
        (
            (*rate, 0.05, "--init-from", first, "--guide", "twisted"),
            "fitted the guide 'finetuned'; give --guide finetuned",
        ),
        ((*rate, 0.05, "--init-from", first, "--output-dir", first, "--overwrite"), "which would be emptied"),
    ):
        status, text = fit(*args, *(() if "--output-dir" in args else ("--output-dir", tmp_path / "third")))
        assert status == 2 and message in text and (first / "guide").is_dir()
