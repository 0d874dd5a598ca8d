"""What an independent posterior draw takes without a fit, on a real language model: of VADER's sentiment at β = 0.1 by
importance, and by SMC whose twist is the sentiment of what is written; of the prior's fourth power by SMC, and by
Metropolis-Hastings that draws ends anew (suffix). Run on purpose: `make bench`.

    python tests/benchmarks/bench_decoding.py [--runs N]

stories260K in `PPL_LM_TEST_DATA`. Draws are worth as many independent ones as would know the less known of E[reward] and
E[log p0] as well, by the standard errors of `diagnose_draws`; |z| is the largest distance from exact draws, in standard errors.
(Lengths are left out: almost no text ends within 48 tokens, so that their variance is not known.)"""

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path

import pytest
import torch

import ppl_lm
from ppl_lm.criticism import diagnose_draws
from ppl_lm.infer.samplers import kernels
from ppl_lm.models import power, tilted

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs" / "bench"
DATA = Path(os.environ.get("PPL_LM_TEST_DATA", ROOT.parent / "shared" / "data"))
TOKENS, BETA, ALPHA = 48, 0.1, 4.0
EXACT, TEXTS = 2000, 32768  # exact draws; texts of importance
POWERS = (16, 48)  # tokens


def timed(call):
    began = time.perf_counter()
    draws = call()
    return draws, diagnose_draws(draws) | {"seconds": time.perf_counter() - began}


def of_sentiment(lm, num_runs):
    prompts = lm.prompts([""])
    target = ppl_lm.bind(tilted, lm, reward=ppl_lm.rewards.vader, beta=BETA)
    exact, reference = timed(lambda: ppl_lm.rejection(target, None, prompts, num_samples=EXACT))
    spread = {"reward": float(exact.records["reward"].var()), "log_prior": float(exact.log_prior.var())}
    twist = ppl_lm.twists.tempered(ppl_lm.twists.prefix_likelihood(target), TOKENS)
    settings = ppl_lm.SMCSettings(twist=twist, threshold=0.25)
    ways = {
        f"importance, {TEXTS:,} texts": lambda: ppl_lm.importance(target, None, prompts, num_samples=TEXTS),
        f"smc, {num_runs} runs of 256": lambda: ppl_lm.smc(
            target, None, prompts, num_samples=256, num_runs=num_runs, settings=settings
        ),
    }
    rows = {}
    for name, call in ways.items():
        draws, found = timed(call)
        worth = min(variance / found[f"{key}_se"] ** 2 for key, variance in spread.items())
        z = max(abs(found[k] - reference[k]) / math.hypot(found[f"{k}_se"], reference[f"{k}_se"]) for k in spread)
        rows[name] = {
            "worth": worth,
            "texts": draws.num_samples / worth,
            "tokens": draws.cost.lm_tokens / worth,
            "seconds": found["seconds"] / worth,
            "z": z,
        }
    return rows


def of_power(folder, tokens):
    lm = ppl_lm.LanguageModel.from_pretrained(folder, max_new_tokens=tokens)
    prompts, model = lm.prompts([""]), ppl_lm.bind(power, lm, alpha=ALPHA)
    settings = ppl_lm.SMCSettings(ppl_lm.twists.prior_power(ALPHA))
    ways = {
        "smc, 40 runs of 256": lambda: ppl_lm.smc(
            model, None, prompts, num_samples=256, num_runs=40, settings=settings
        ),
        "suffix MH, 64 chains of 300": lambda: ppl_lm.mcmc(
            model, None, prompts, num_samples=300, warmup=300, num_chains=64, kernel=kernels.suffix
        ),
    }
    rows = {}
    for name, call in ways.items():
        draws, found = timed(call)
        rows[name] = {key: found[key] for key in ("log_prior", "log_prior_se", "verdict", "seconds")}
        rows[name]["tokens"] = draws.cost.lm_tokens
    return rows


def run(num_runs):
    folder = DATA / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"needs the language model in {folder} (PPL_LM_TEST_DATA)")
    torch.manual_seed(0)
    print(
        f"\n{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    made = {}
    for tokens in POWERS:
        made[f"power {tokens}"] = rows = of_power(folder, tokens)
        print(f"the power {ALPHA:g} of {tokens} tokens")
        for name, row in rows.items():
            print(f"  {name:28} E[log p0] {row['log_prior']:.3f} ± {row['log_prior_se']:.3f} ({row['verdict']}), "
                  f"{row['tokens']:,} tokens, {row['seconds']:.0f} s", flush=True)  # fmt: skip
        smc, chains = (row["log_prior_se"] ** 2 * row["tokens"] for row in rows.values())
        print(f"  tokens for the same error: suffix MH {chains / smc:,.1f} times those of smc", flush=True)
    made["sentiment"] = of_sentiment(ppl_lm.LanguageModel.from_pretrained(folder, max_new_tokens=TOKENS), num_runs)
    print(f"sentiment, β = {BETA:g}, {TOKENS} tokens: of a draw")
    for name, row in made["sentiment"].items():
        print(f"  {name:28} {row['texts']:.2f} texts, {row['tokens']:.0f} tokens, {1000 * row['seconds']:.1f} ms, "
              f"worth {row['worth']:,.0f} draws, |z| {row['z']:.1f}", flush=True)  # fmt: skip
    return made


def test_decoding():
    made = run(320)
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / "decoding.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=320)
    run(parser.parse_args().runs)
