"""How close a fit comes, on the figures that the README shows. Run on purpose: `make bench` (about fifteen minutes)."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[2]
STORIES = ROOT.parent / "shared" / "data" / "stories260K"
PROMPTS = ROOT / "tests" / "data"


def ppl_lm(*args) -> None:
    subprocess.run([sys.executable, "-m", "ppl_lm", *map(str, args)], check=True)


def told(path: Path) -> dict:
    made = json.loads(path.read_text())
    print(f"\n{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")  # fmt: skip
    for key in ("elbo", "iwae", "log_z", "upper", "kl_q_p", "kl_p_q", "kl_prior_p", "reward_prior", "reward"):
        print(f"  {key:14} {made[key]:.3f} ± {made[key + '_se']:.3f}")
    print(f"  ess {made['ess']:.0f} of {made['num_samples']}, k-hat {made['khat']}, {made['verdict']}")
    return made


def test_demo(tmp_path):
    """At least 80% of the distance between prior and posterior is closed."""
    ppl_lm("fit", "tilted", "--output-dir", tmp_path / "run")
    made = told(tmp_path / "run" / "diagnosis.json")
    assert made["kl_prior_p"] >= 1 and made["iwae_upper_exact"]
    assert made["kl_q_p"] <= 0.2 * made["kl_prior_p"]


def test_real_pretrained_lm(tmp_path):
    """The bracket is at most a third of the prior's, 3.22 nats."""
    if not STORIES.is_dir():
        pytest.skip(f"needs the pretrained LM {STORIES.name}")
    ppl_lm(
        "fit", "tilted", "--lm", STORIES, "--max-new-tokens", 48, "--beta", 0.1, "--time-limit", 175,
        "--output-dir", tmp_path / "run",
    )  # fmt: skip
    made = told(tmp_path / "run" / "diagnosis.json")
    assert made["upper"] - made["elbo"] <= 3.22 / 3


def test_held_out_prompts(tmp_path):
    """64 prompts fitted together; on 16 others at most half of the distance is left."""
    run = tmp_path / "run"
    ppl_lm("fit", "tilted", "--prompts", PROMPTS / "prompts.txt", "--time-limit", 175, "--output-dir", run)
    ppl_lm("diagnose", run, "--prompts", PROMPTS / "held_out.txt", "--num-samples", 2048)
    made = told(run / "diagnosis_held_out.json")
    assert len(made["prompts"]) == 16
    assert made["kl_q_p"] <= 0.5 * made["kl_prior_p"]
