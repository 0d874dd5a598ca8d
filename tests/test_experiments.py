"""Each experiment comes out with a table, claims and a figure; that the claims hold is shown by `make experiments`."""

import itertools
import json
from importlib import import_module

import pytest
import torch
import typer
from typer.testing import CliRunner

import ppl_lm.experiments.__main__ as command
from ppl_lm.experiments import decoding, lab
from ppl_lm.experiments.local_masking import resampled
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.kernels import independence
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc

ENUMERATED = [name for name in command.NAMES if name not in command.REAL]
APP = typer.Typer()
APP.command()(command.main)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "leaderboard" else ()) for name in ENUMERATED]
)
def test_comes_out(name, tmp_path, monkeypatch):
    """With two steps a fit, so the claims need not hold, and the exit status tells whether they do."""
    module = import_module(f"ppl_lm.experiments.{name}")

    def short(*args, **settings):
        return lab.train(*args, **{**settings, "steps": 2, "every": 2, "num_particles": 8})

    if hasattr(module, "train"):
        monkeypatch.setattr(module, "train", short)
    few = {"GRADIENTS": 3, "STEPS": 2, "REPEATS": 2, "BUDGET": 1000, "TARGETS": 2}
    for constant in few.keys() & vars(module).keys():
        monkeypatch.setattr(module, constant, few[constant])
    result = CliRunner().invoke(APP, [name, "--seed", "1", "--output-dir", str(tmp_path)])
    made = json.loads((tmp_path / f"{name}.json").read_text())
    assert result.exit_code == (0 if all(made["claims"].values()) else 1), result.output
    assert made["claims"] and made["rows"] and all(claim[:40] in result.output for claim in made["claims"])
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_decoding_comes_out(tmp_path, monkeypatch):
    """The one on a real language model, with few draws of each sampler."""
    few = decoding.with_settings(rejection, num_samples=20), decoding.with_settings(importance, num_samples=200)
    by_smc, chains = decoding.with_settings(smc, num_samples=8, num_runs=4), decoding.chains(independence, 4, 10)
    soft = dict(zip(decoding.AGREES, [*few, by_smc, few[1], chains], strict=True))
    monkeypatch.setattr(decoding, "SOFT", soft)
    monkeypatch.setattr(
        decoding, "HARD", {"rejection": few[0], "importance, prior": few[1], "importance, guide": few[1]}
    )
    for name, value in {"EXACT": (40, 20), "PILOT": 100, "WORD": "the"}.items():
        monkeypatch.setattr(decoding, name, value)
    result = CliRunner().invoke(APP, ["decoding", "--time-limit", "3", "--output-dir", str(tmp_path)])
    made = json.loads((tmp_path / "decoding.json").read_text())
    assert result.exit_code == (0 if all(made["claims"].values()) else 1), result.output
    assert len(made["rows"]) == 8 and all(row["pays from"] for row in made["rows"] if row["by"].endswith("guide"))
    assert (tmp_path / "decoding.png").stat().st_size > 10_000


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_law_of_a_resampled_text(count):
    """Against every tuple of draws, weights from e^-8 to e^8; also where q has no mass."""
    log_q = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0], dtype=torch.float64).log()
    log_w = torch.tensor([8.0, -8.0, 0.5, 0.0, 1.0], dtype=torch.float64)
    expected = torch.zeros(5, dtype=torch.float64)
    for drawn in itertools.product(range(4), repeat=count):
        index = torch.tensor(drawn)
        expected.index_add_(0, index, log_q[index].sum().exp() * log_w[index].softmax(0))
    torch.testing.assert_close(resampled(log_q, log_w, count).exp(), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["collaps"], "'collaps' is unknown; give one of calibration"),
        (["grpo", "--lm", "x"], "--lm and --time-limit"),
    ],
)
def test_refusals(args, message):
    result = CliRunner().invoke(APP, args)
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())
