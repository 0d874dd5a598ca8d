"""The command: what it writes, what it refuses, and how it ends."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import arviz as az
import pytest
from tiny import language_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ppl_lm.cli.app import app
from ppl_lm.criticism.diagnoses.draws_verdicts import CODES_OF_DRAWS
from ppl_lm.criticism.diagnoses.verdicts import CODES, Verdict
from ppl_lm.run.config import FORMAT
from ppl_lm.run.fitting.loop import Fit
from ppl_lm.run.names import from_file
from ppl_lm.run.outcome import in_words, verdict_after
from ppl_lm.run.prompts_file import read_prompts
from ppl_lm.run.run_folder import claim, read_config

pytestmark = pytest.mark.xdist_group("cli")  # many read one run
runner = CliRunner()
QUICK = ["--max-steps", "3", "--particles", "8", "--num-samples", "128", "--max-new-tokens", "8"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """What is written by default lands under runs/ of an empty folder."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


def call(*args):
    return runner.invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    result = call("fit", "tilted", *QUICK, "--output-dir", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_fit_writes_a_whole_run_folder(run):
    folder, output = run
    made = {p.name for p in folder.iterdir() if "_" not in p.name}  # other tests sample from this run
    assert made == {
        "config.json", "metrics.jsonl", "fit.json", "guide", "draws.nc", "diagnosis.json", "samples.json",
    }  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"elbo", "elbo_se", "gain", "reward", "kl_prior", "seconds", "lm_tokens", "grad_norm"} <= rows[0].keys()
    AutoModelForCausalLM.from_pretrained(folder / "guide")
    assert "reward" in az.from_netcdf(str(folder / "draws.nc")).posterior
    for word in ("prior", "guide", "ELBO", "log Z", "EUBO", "ESS", "k-hat", "KL(guide ‖ prior)"):
        assert word in output


def test_diagnosis_has_the_promised_keys(run):
    folder, _ = run
    made = json.loads((folder / "diagnosis.json").read_text())
    for record in (made, *made["prompts"]):
        for key in ("elbo", "iwae", "upper", "log_z", "kl_q_p", "kl_p_q", "kl_prior_p", "reward"):
            assert isinstance(record[key], float) and isinstance(record[f"{key}_se"], float)
        for key in ("iwae_upper_exact", "ess", "khat", "lm_tokens", "reward_calls", "verdict"):
            assert key in record
    assert made["reward_calls"] == 2 * made["num_samples"]  # once for the guide's draws, once for the prior's


def test_diagnose_prints_json_alone(run):
    folder, _ = run
    result = call("diagnose", folder, "--json", "--num-samples", 200)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["num_samples"] == 200


def test_sample_prints_texts(run):
    folder, _ = run
    result = call("sample", folder, "--num-samples", 3, "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 3 and all({"prompt", "completion", "reward", "log_weight"} <= row.keys() for row in rows)
    assert call("sample", folder, "--num-samples", 2).exit_code == 0


def test_exact_draws_without_a_fit(run):
    """`rejection` draws from a posterior that no fit can reach, and from a run's; every text satisfies the constraint."""
    result = call("sample", "constrained", "--reward", "contains:the", "--sampler", "rejection", "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 0 and len(rows) == 10, result.output
    assert all(row["holds"] == 1 and "the" in row["completion"].lower() and "log_weight" not in row for row in rows)
    plain = call("sample", run[0], "--sampler", "rejection", "--num-samples", 3)
    assert plain.exit_code == 0 and "exact posterior draws, from" in plain.output
    weighted = call("sample", "tilted", "--num-samples", 3)
    assert weighted.exit_code == 0 and "log weight" in weighted.output
    impossible = call("sample", "constrained", "--reward", "contains:zebra", "--json")
    assert impossible.exit_code == 2 and not impossible.stdout and "possible" in impossible.stderr
    assert call("sample", "tilted", "--guide", "finetuned", "--sampler", "rejection").exit_code == 2
    assert call("sample", run[0], "--beta", 1).exit_code == 2
    assert call("sample", run[0], "--sampler", "nope").exit_code == 2
    assert call("sample", "tilted", "--reward", "length", "--sampler", "rejection").exit_code == 2  # no bound


@pytest.mark.parametrize(
    ("sampler", "told", "weighted"),
    [
        ("quasi_rejection", "proposals accepted", True),
        ("best_of_n", "not the posterior", True),
        *(
            pytest.param(chains, "largest R-hat", False, marks=pytest.mark.slow)
            for chains in ("independence_mh", "suffix_mh", "particle_gibbs")
        ),
        ("smc", "texts that grew together", True),
    ],
)
def test_every_sampler_says_what_its_draws_are(sampler, told, weighted):
    short = ("--sampler", sampler, "--max-new-tokens", 4, "--num-samples", 5)
    plain = call("sample", "tilted", *short)
    assert plain.exit_code == 0 and told in " ".join(plain.output.split()), plain.output
    rows = [json.loads(line) for line in call("sample", "tilted", *short, "--json").stdout.splitlines()]
    assert len(rows) == 5 and all(("log_weight" in row) == weighted for row in rows)
    chains = call("sample", "constrained", "--reward", "contains:zebra", *short)
    assert chains.exit_code == 2 and "NaN" not in chains.output and not chains.stdout


def test_sample_writes_what_its_draws_are_worth(tmp_path):
    """In a folder of their own, which is replaced only where that is asked for."""
    args = ("sample", "tilted", "--sampler", "suffix_mh", "--max-new-tokens", 4, "--num-samples", 5, "--json")
    result = call(*args)
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 5, result.output
    (out,) = Path("runs").iterdir()
    assert out.name.startswith("tilted-suffix_mh-")
    assert {p.name for p in out.iterdir()} == {"config.json", "diagnosis.json", "draws.nc"}
    made = json.loads((out / "diagnosis.json").read_text())
    assert made["sampler"] == "suffix_mh" and made["kind"] == "chains" and made["verdict"] in CODES_OF_DRAWS
    assert (made["r_hat"] < 1.05) == (made["verdict"] in ("good", "unreliable"))
    data = az.from_netcdf(str(out / "draws.nc"))
    assert data.posterior["reward"].shape == (32, 100, 1) and made["num_samples"] == 3200
    assert float(az.rhat(data.posterior["reward"].values[..., 0])) <= made["r_hat"] + 1e-6
    again = call(*args, "--output-dir", out)
    assert again.exit_code == 2 and "--overwrite it" in re.sub(r"\s+", " ", again.output) and not again.stdout
    weighted = ("sample", "tilted", "--num-samples", 200, "--max-new-tokens", 4, "--output-dir", out, "--overwrite")
    result = call(*weighted)
    assert result.exit_code == 0, result.output
    told, made = re.sub(r"\s+", " ", result.output), json.loads((out / "diagnosis.json").read_text())
    assert made["kind"] == "weighted" and made["num_samples"] == 200 and f"{made['verdict']}: " in told
    assert "posterior E(reward)" in told and "log Z" in told and "ESS" in told and "effective draw" in told
    assert call("sample", out).exit_code == 2 and "holds no fitted guide" in re.sub(
        r"\s+", " ", call("sample", out).output
    )
    never = call("sample", "constrained", "--reward", "contains:zebra", "--output-dir", tmp_path / "never")
    assert never.exit_code == 2 and "None of 10 draws is possible" in re.sub(r"\s+", " ", never.output)
    assert not (tmp_path / "never").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert call(*args, "--output-dir", tmp_path / "mine", "--overwrite").exit_code == 2
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_draws_of_a_run_leave_its_fit_alone(run, tmp_path):
    folder, _ = run
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "_" not in p.name}
    prompts = tmp_path / "held_out.txt"
    prompts.write_text("The soup was\n")
    for args, suffix in (((), "importance"), (("--prompts", prompts), "importance_held_out")):
        result = call("sample", folder, "--num-samples", 120, *args)
        assert result.exit_code == 0, result.output
        assert json.loads((folder / f"diagnosis_{suffix}.json").read_text())["num_samples"] == 120
        assert "reward" in az.from_netcdf(str(folder / f"draws_{suffix}.nc")).posterior
    for way in ((), ("--overwrite",)):
        assert call("sample", folder, "--output-dir", folder, *way).exit_code == 2
    assert {p: p.read_bytes() for p in before} == before
    result = call("sample", folder, "--output-dir", tmp_path / "out")
    assert result.exit_code == 0 and (tmp_path / "out" / "draws.nc").is_file(), result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["settings"]["guide"] == "finetuned"


def test_a_runs_guide_proposes_for_another_posterior(run, tmp_path):
    """Its LM, prompts and lengths are taken over, and what does not fit is refused."""
    folder, _ = run
    result = call(
        "sample", "tilted", "--beta", 0.4, "--guide", folder, "--num-samples", 200, "--output-dir", tmp_path / "a"
    )
    assert result.exit_code == 0, result.output
    settings = read_config(tmp_path / "a").settings
    assert (settings.guide, settings.max_new_tokens, settings.beta) == ("finetuned", 8, 0.4)
    plain = call(
        "sample", "tilted", "--beta", 0.4, "--max-new-tokens", 8, "--num-samples", 200, "--output-dir", tmp_path / "b"
    )
    assert plain.exit_code == 0, plain.output
    fitted, untouched = (json.loads((tmp_path / name / "diagnosis.json").read_text()) for name in "ab")
    assert fitted["kl_q_p"] != untouched["kl_q_p"], "the fitted guide did not propose"
    draws = az.from_netcdf(str(tmp_path / "a" / "draws.nc")).guide
    assert float(abs(draws["log_prior"] - draws["log_guide"]).max()) > 1e-3
    other = language_model("llama")
    other.model.save_pretrained(tmp_path / "other")
    other.vocabulary.tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    for args, message in (
        (("--guide", folder, "--max-new-tokens", 9), "was fitted to 8"),
        (("--guide", folder, "--lm", tmp_path / "other"), "use different tokenizers"),
        (("--guide", tmp_path / "empty"), "is not a run folder"),
        (("--guide", tmp_path / "b"), "holds no fitted guide"),
        (("--guide", folder, "--sampler", "rejection"), "rejection proposes from the prior"),
    ):
        result = call("sample", "tilted", *args)
        text = re.sub(r"\s+", " ", result.output)
        assert result.exit_code == 2 and message in text and "Traceback" not in text, text
    assert not Path("runs").exists(), "something was left"


def test_a_program_imports_its_neighbour_and_errors_name_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "neighbour_of_mine.py").write_text("WEIGHT = 1.0\n")
    (tmp_path / "mine.py").write_text(
        "import pyro, torch\n"
        "from neighbour_of_mine import WEIGHT\n"
        "from ppl_lm.likelihood import Optimality\n"
        "def model(prompts, prior, reward, beta):\n"
        "    with pyro.plate('prompts', len(prompts)):\n"
        "        x = pyro.sample('x', prior(prompts))\n"
        "        pyro.sample('o', Optimality(WEIGHT * reward(prompts, x) / beta), obs=torch.ones(1))\n"
        "def broken(prompts, prior, reward, beta):\n"
        "    with pyro.plate('prompts', len(prompts)):\n"
        "        x = pyro.sample('x', prior(prompts))\n"
        "        pyro.sample('o', Optimality(reward(prompts, x) + torch.zeros(7, 3)), obs=torch.ones(1))\n"
    )
    assert call("sample", f"{tmp_path}/mine.py:model", "--num-samples", 2).exit_code == 0
    result = call("sample", f"{tmp_path}/mine.py:broken", "--num-samples", 2)
    text = re.sub(r"\s+", " ", result.output)
    assert result.exit_code == 2 and "mine.py, line 11, in broken)" in text and "Trace Shapes" not in text, text
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "neighbour_of_mine.py").write_text("def fail():\n    return {}['no such key']\n")
    (tmp_path / "judge" / "mine.py").write_text(
        "from neighbour_of_mine import fail\ndef reward(completions, **_):\n    return fail()\n"
    )
    result = call("sample", f"{tmp_path}/mine.py:model", "--reward", f"{tmp_path}/judge/mine.py:reward")
    text = re.sub(r"\s+", " ", result.output)
    assert result.exit_code == 2 and "judge/mine.py, line 3, in reward)" in text, text
    broken = tmp_path / "judge" / "broken.py"
    broken.write_text("def reward(completions, **_):\n    raise TypeError('tired')\n")
    text = call("sample", "tilted", "--reward", f"{broken}:reward").output
    assert text.count("TypeError") == 1 and "line 2, in reward" in text, text
    result = call("fit", f"{tmp_path}/mine.py", "--output-dir", tmp_path / "out")
    assert result.exit_code == 2 and "with one of broken, model" in re.sub(r"\s+", " ", result.output)


def test_files_with_neighbours_of_the_same_name(tmp_path):
    """Modules and packages of one folder are never those of another; a file that exits is an error like any other."""
    for name in ("one", "two"):
        (tmp_path / name / "util").mkdir(parents=True)
        (tmp_path / name / "util" / "__init__.py").write_text("from util.words import WORD\n")
        (tmp_path / name / "util" / "words.py").write_text(f"WORD = {name!r}\n")
        (tmp_path / name / "r.py").write_text("from util import WORD\ndef word():\n    return WORD\n")
    found = [from_file(f"{tmp_path}/{name}/r.py:word", "reward")() for name in ("one", "two")]
    assert found == ["one", "two"]
    assert "util" not in sys.modules and not any(str(tmp_path) in path for path in sys.path)
    (tmp_path / "quits.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(ValueError, match="quits.py raised SystemExit: 3"):
        from_file(f"{tmp_path}/quits.py:word", "reward")


def test_prompts_are_the_lines_that_an_editor_shows(tmp_path):
    """A byte-order mark is no part of the first prompt; U+2028 and form feeds end no line."""
    (tmp_path / "p.txt").write_bytes("One\u2028two\x0cthree\r\nfour\n".encode("utf-8-sig"))
    assert read_prompts(tmp_path / "p.txt") == (["One\u2028two\x0cthree", "four"], {})
    (tmp_path / "p.jsonl").write_bytes('{"prompt": "a\u2028b"}\n'.encode("utf-8-sig"))
    assert read_prompts(tmp_path / "p.jsonl") == (["a\u2028b"], {})


def test_a_run_is_read_on_another_machine_and_never_emptied_by_accident(run, tmp_path):
    folder, _ = run
    made = json.loads((folder / "config.json").read_text())
    made["settings"]["device"] = "teapot"
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.json").write_text(json.dumps(made))
    assert read_config(tmp_path / "copy").settings.device is None
    with pytest.raises(ValueError, match="holds an earlier run"):
        claim(tmp_path / "copy", overwrite=False)  # which another process made after this one looked
    inside = ("fit", "tilted", *QUICK, "--lm", folder / "guide", "--output-dir", folder, "--overwrite")
    result = call(*inside)
    assert result.exit_code == 2 and "would be emptied" in re.sub(r"\s+", " ", result.output)
    assert (folder / "guide").is_dir()


@pytest.mark.parametrize(
    ("number", "which"), [(None, "an earlier version"), (1, "an earlier"), (99, "a later version")]
)
@pytest.mark.parametrize("command", ["report", "diagnose", "sample", "compare"])
def test_a_run_of_another_format_is_refused_by_name(run, tmp_path, command, number, which):
    """Its files may mean something else: reading them as if they did not is worse than fitting once more."""
    other = shutil.copytree(run[0], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    assert config.pop("format") == FORMAT
    (other / "config.json").write_text(json.dumps(config if number is None else config | {"format": number}))
    before = sorted(p.name for p in other.iterdir())
    result = call(command, other)
    message = re.sub(r"\s+", " ", result.stderr)
    assert result.exit_code == 2 and "Traceback" not in message
    assert f"{str(other)!r} was written by {which}" in message and "fit it again" in message
    assert sorted(p.name for p in other.iterdir()) == before, "something was written into it"


def test_a_text_site_may_have_any_name(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import pyro\n"
        "def model(prompts, prior):\n"
        "    with pyro.plate('prompts', len(prompts)):\n"
        "        pyro.sample('story', prior(prompts))\n"
    )
    result = call("sample", f"{tmp_path}/mine.py:model", "--num-samples", 2, "--json")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 2, result.output


def test_a_reader_that_stops_is_no_error(run):
    command = (
        f"{sys.executable} -m ppl_lm sample {run[0]} --num-samples 1000 --json | head -1"  # more than a pipe holds
    )
    ran = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert ran.stdout.startswith("{") and not {"Traceback", "BrokenPipe"} & {*ran.stderr.replace("Error", " ").split()}


def test_a_second_fit_must_say_overwrite_and_the_same_seed_repeats_it(run, tmp_path):
    folder, _ = run
    first = (folder / "metrics.jsonl").read_text().splitlines()
    assert call("fit", "tilted", *QUICK, "--output-dir", tmp_path / "b").exit_code == 0
    refused = call("fit", "tilted", *QUICK, "--output-dir", tmp_path / "b")
    assert refused.exit_code == 2 and "--overwrite" in refused.output
    assert (tmp_path / "b" / "diagnosis.json").is_file()
    assert call("fit", "tilted", *QUICK, "--output-dir", tmp_path / "b", "--overwrite").exit_code == 0
    again = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(r)["elbo"] for r in again] == [json.loads(r)["elbo"] for r in first]


def test_programs_and_rewards_from_files(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import pyro, torch\n"
        "from ppl_lm.likelihood import Optimality\n"
        "def short(completion_ids, **_): return [-float(len(ids)) for ids in completion_ids]\n"
        "short.r_max = 0.0\n"
        "def model(prompts, prior, reward, beta, weight=0.5):\n"
        "    with pyro.plate('prompts', len(prompts)):\n"
        "        x = pyro.sample('x', prior(prompts))\n"
        "        pyro.sample('short', Optimality(weight * reward(prompts, x) / beta), obs=torch.ones(1))\n"
        "def guide(prompts, lm):\n"
        "    with pyro.plate('prompts', len(prompts)):\n"
        "        pyro.sample('x', lm(prompts))\n"
    )
    file, out = tmp_path / "mine.py", tmp_path / "run"
    args = ("fit", f"{file}:model", "--guide", f"{file}:guide", "--reward", f"{file}:short", "--beta", 5, *QUICK)
    result = call(*args, "--output-dir", out)
    assert result.exit_code == 0, result.output
    made = json.loads((out / "diagnosis.json").read_text())
    assert made["verdict"] in CODES
    assert made["iwae_upper_exact"] is False  # this model declares no bound, so no exact draws


def test_a_run_is_read_from_anywhere(tmp_path, monkeypatch):
    """What was given by a relative path is found again from another folder; runs get a folder each by default."""
    (tmp_path / "mine.py").write_text("def short(completions, **_): return [-0.1 * len(c) for c in completions]\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert call("fit", "tilted", "--reward", "mine.py:short", *QUICK).exit_code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("tilted-")
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = call("sample", run, "--num-samples", 2)
    assert result.exit_code == 0, result.output


def test_prompts_from_files(tmp_path):
    (tmp_path / "p.txt").write_text("The soup was\n\nMy new phone\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "The soup was", "word": "good"}\n{"prompt": "I", "word": "bad"}\n')
    (tmp_path / "r.py").write_text(
        "def has(completions, word): return [float(w in c) for c, w in zip(completions, word)]\n"
    )
    for name, reward in (("p.txt", "vader"), ("p.jsonl", f"{tmp_path}/r.py:has")):
        out = tmp_path / name.replace(".", "-")
        result = call("fit", "tilted", *QUICK, "--prompts", tmp_path / name, "--reward", reward, "--output-dir", out)
        assert result.exit_code == 0, result.output
        assert len(json.loads((out / "diagnosis.json").read_text())["prompts"]) == 2


BAD = {
    "unknown model": (["fit", "tilterd"], "model 'tilterd' is unknown; give at_least, constrained, power, tilted"),
    "unknown guide": (
        ["fit", "tilted", "--guide", "x"],
        "guide 'x' is unknown; give finetuned, lora, mixture, prior, tabular",
    ),
    "unknown reward": (["fit", "tilted", "--reward", "nice"], "nice"),
    "missing file": (["fit", "no/such.py:model"], "there is no file 'no/such.py'"),
    "missing lm": (["fit", "tilted", "--lm", "/"], "has no config.json"),
    "beta": (["fit", "tilted", "--beta", "0"], "beta=0.0"),
    "learning rate": (["fit", "tilted", "--learning-rate", "-1"], "learning_rate=-1.0"),
    "particles": (["fit", "tilted", "--particles", "1"], "particles=1; give at least 2"),
    "max steps": (["fit", "tilted", "--max-steps", "0"], "max_steps=0"),
    "time limit": (["fit", "tilted", "--time-limit", "0"], "time_limit=0.0"),
    "batch size": (["fit", "tilted", "--batch-size", "0"], "batch_size=0"),
    "num samples": (["fit", "tilted", "--num-samples", "5"], "num_samples=5"),
    "too long": (["fit", "tilted", "--max-new-tokens", "100000"], "max_new_tokens=100000"),
    "no tokens": (["fit", "tilted", "--max-new-tokens", "0"], "max_new_tokens=0"),
    "nothing to train": (["fit", "tilted", "--guide", "prior"], "nothing to train"),
    "table too big": (["fit", "tilted", "--guide", "tabular"], "tiny vocabularies"),
    "hard constraint": (["fit", "constrained", "--reward", "contains:the"], "reverse_kl cannot fit a hard constraint"),
    "device": (["fit", "tilted", "--device", "teapot"], "teapot"),
    "prompts": (["fit", "tilted", "--prompts", "nowhere.txt"], "nowhere.txt"),
    "not a run": (["sample", "/"], "is not a run folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message_and_status_2(name, tmp_path):
    args, message = BAD[name]
    out = tmp_path / "out"
    result = call(*args, *(["--output-dir", out] if args[0] == "fit" else []))
    text = re.sub(r"\s+", " ", result.output)
    assert result.exit_code == 2, result.output
    assert message in text and "Traceback" not in text
    assert not out.exists(), "something half-written was left"


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = call("fit", "tilted", *QUICK, "--output-dir", tmp_path)
    assert result.exit_code == 2 and "is not a run of ppl-lm" in re.sub(r"\s+", " ", result.output)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [float('nan')] * len(completions)", "nan"),
        ("return None", "None"),
        ("return [1.0]", "shape"),
        ("raise KeyError('boom')", "boom"),
    ],
)
def test_bad_rewards_show_the_text_and_leave_nothing(tmp_path, body, message):
    (tmp_path / "r.py").write_text(f"def r(completions, **_):\n    {body}\n")
    out = tmp_path / "out"
    result = call("fit", "tilted", *QUICK, "--reward", f"{tmp_path}/r.py:r", "--output-dir", out)
    assert result.exit_code == 2 and message in result.output and not out.exists()
    assert "first completion" in result.output or "completion 0" in result.output


def test_a_reward_that_fails_later_leaves_the_best_guide(tmp_path):
    (tmp_path / "r.py").write_text(
        "calls = []\n"
        "def r(completions, **_):\n"
        "    calls.append(1)\n"
        "    return [float('nan') if len(calls) > 4 else 0.5] * len(completions)\n"
    )
    out = tmp_path / "out"
    result = call("fit", "tilted", *QUICK[2:], "--max-steps", 9, "--reward", f"{tmp_path}/r.py:r", "--output-dir", out)
    assert result.exit_code == 2 and "nan" in result.output
    assert (out / "guide" / "config.json").is_file() and not (out / "diagnosis.json").exists()
    assert json.loads((out / "fit.json").read_text()) == {"outcome": "failed", "kept": "start"}


def test_worse_than_prior_is_said_and_fails(tmp_path):
    """A learning rate that raises the reward and ruins the guide: the kept guide is not the last one."""
    out = tmp_path / "out"
    args = ("fit", "tilted", "--max-steps", 30, "--particles", 16, "--num-samples", 512, "--learning-rate", "5e-2")
    result = call(*args, "--max-new-tokens", 12, "--output-dir", out)
    assert result.exit_code == 1, result.output
    made = json.loads((out / "diagnosis.json").read_text())
    assert made["verdict"] == made["outcome"] == "worse_than_prior" and made["kept"] in ("best", "start")
    assert "worse_than_prior" in result.output and "further from the posterior" in re.sub(r"\s+", " ", result.output)
    assert made["elbo_gain"] > -3 * made["elbo_gain_se"], "the guide that was kept is worse than the prior"
    again = call("diagnose", out, "--num-samples", 256, "--json")
    assert json.loads(again.stdout)["verdict"] == "worse_than_prior"


def test_the_outcome_in_words():
    """A diverged fit may have come close before: it is not called worse than the prior."""
    fitted = Fit("diverged", "best", 30, 44, 9.0, 1.25, 0.05, -4.0, 0.1)
    assert "a gradient was not finite" in in_words(fitted) and "that of step 30, ELBO +1.25" in in_words(fitted)
    assert "further from the posterior" not in in_words(fitted)
    assert "further from the posterior" in in_words(replace(fitted, outcome="worse_than_prior"))
    assert in_words(replace(fitted, outcome="finished")).startswith("fitted after 44 steps")
    covering = replace(fitted, outcome="finished", covers=True)
    assert "KL(posterior ‖ guide) -1.25 ± 0.05" in in_words(covering), "a KL falls where an ELBO rises"


def test_the_verdict_after_a_fit_that_went_wrong():
    """It is the fit's, with the kept guide's beside it, and of other fits the guide's as it was."""
    judged = Verdict("poor", "It is 0.30 nats away.", "Fit longer.")
    fitted = Fit("worse_than_prior", "best", 30, 44, 9.0, 1.25, 0.05, -4.0, 0.1)
    verdict = verdict_after(fitted, judged)
    assert verdict.code == "worse_than_prior" and verdict.sentence.startswith("After 44 steps in 9 s the last guide is")
    assert "ELBO -4.00 nats" in verdict.sentence and "Of the guide that was kept: poor. It is 0.30" in verdict.sentence
    assert verdict.remedy.startswith("Lower --learning-rate") and verdict.remedy not in verdict.sentence
    for outcome in ("finished", "diverged", "interrupted"):
        assert verdict_after(replace(fitted, outcome=outcome), judged) is judged


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_writes_the_best_guide(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ppl_lm", "fit", "tilted", "--time-limit", "300", *QUICK[2:]]
    process = subprocess.Popen(
        [*command, "--output-dir", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and not (out / "metrics.jsonl").exists():
            time.sleep(0.2)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=120)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "interrupted" in output and "Traceback" not in output
    assert json.loads((out / "fit.json").read_text())["outcome"] == "interrupted"
    AutoModelForCausalLM.from_pretrained(out / "guide")


def test_help_comes_at_once():
    """Without torch: a second more at every `ppl-lm --help`, and at every word that was mistyped."""
    code = "import sys, ppl_lm.cli.app; print(*sorted({'torch', 'arviz', 'transformers', 'pyro'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def test_version_and_help():
    assert re.match(r"\d+\.\d+", call("--version").output)
    assert "fit" in call("--help").output
    assert subprocess.run([sys.executable, "-m", "ppl_lm", "--version"], capture_output=True).returncode == 0
