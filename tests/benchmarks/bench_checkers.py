"""A constraint that one text in a thousand keeps: tokens, questions to its checker and seconds of each way to draw, and
genlm-control's AWRS on the same network, constraint and number of texts. Run on purpose: `make bench`.

    python tests/benchmarks/bench_checkers.py [--repeats N]

stories260K in `PPL_LM_TEST_DATA`; `pip install genlm-control` for its column."""

import argparse
import asyncio
import contextlib
import json
import math
import os
import platform
import statistics
import time
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs" / "bench"
DATA = Path(os.environ.get("PPL_LM_TEST_DATA", ROOT.parent / "shared" / "data"))
PROMPT, TOKENS, TEXTS = "Once upon a time, there was a little girl named Lily.", 48, 64
BANNED = "t"  # no text may have this letter


def keeps(text, whole):
    return BANNED not in text.lower()


def ways(folder):
    """What draws, by name: each gives how many independent texts its draws are worth, tokens forwarded and questions asked."""
    import ppl_lm
    from ppl_lm.infer.samplers import adaptive_rejection
    from ppl_lm.likelihood import Checker
    from ppl_lm.models import constrained

    prior = ppl_lm.LanguageModel.from_pretrained(folder, max_new_tokens=TOKENS)
    checker = Checker(keeps, cut_off=True)
    model = ppl_lm.bind(constrained, prior, constraint=checker)

    def told(draws, worth):
        return worth, draws.cost.lm_tokens, draws.cost.checker_calls

    def grown():
        runs = ppl_lm.smc(model, None, [PROMPT], num_samples=TEXTS, settings=ppl_lm.SMCSettings(checker=checker))
        w = runs.log_weight.flatten().softmax(0)
        return told(runs, float(1 / w.square().sum()))

    def by_rejection(sampler, *guide, number=TEXTS):
        return lambda: told(sampler(model, *guide, [PROMPT], num_samples=number), number)

    made = {
        "smc with a checker": grown,
        "adaptive rejection": by_rejection(adaptive_rejection),
        "rejection": by_rejection(ppl_lm.rejection, None, number=TEXTS // 16),
    }
    with contextlib.suppress(ImportError):
        made["genlm-control AWRS"] = genlm(folder)
    return made


def genlm(folder):
    from genlm.control import AWRS, Potential, PromptedLLM

    llm = PromptedLLM.from_name(str(folder), backend="hf", batch_size=TEXTS)
    llm.set_prompt_from_str(PROMPT)
    asked = [0]

    class Keeps(Potential):
        async def prefix(self, context):
            asked[0] += 1
            text = b"".join(bytes(token) for token in context).decode(errors="ignore")
            return 0.0 if keeps(text, False) else -math.inf

        async def complete(self, context):
            return await self.prefix(context)

    sampler = AWRS(llm, Keeps(llm.vocab))
    loop = asyncio.new_event_loop()

    def run():
        asked[0] = 0
        made = loop.run_until_complete(sampler.smc(n_particles=TEXTS, ess_threshold=0.5, max_tokens=TOKENS))
        return made.ess, None, asked[0]

    return run


def run(repeats):
    folder = DATA / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"needs the language model in {folder} (PPL_LM_TEST_DATA)")
    torch.manual_seed(0)
    timed = ways(folder)
    found = {name: [] for name in timed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(repeats):
            for name, call in timed.items():
                began = time.perf_counter()
                worth, tokens, asked = call()
                seconds = time.perf_counter() - began
                found[name].append((seconds / worth, math.nan if tokens is None else tokens / worth, asked / worth))
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    a_text = {name: dict(zip(("seconds", "tokens", "questions"), row, strict=True)) for name, row in medians.items()}
    machine = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return {"machine": machine, "torch": torch.__version__, "threads": threads, "texts": TEXTS, "a text": a_text}


def test_checkers():
    made = run(3)
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / "checkers.json").write_text(json.dumps(made, indent=1) + "\n")
    show(made)


def show(made):
    print(f"\n{made['machine']}, {made['threads']} threads, torch {made['torch']}: no {BANNED!r} in {TOKENS} tokens")
    for name, row in made["a text"].items():
        print(
            f"  {name:20} {row['seconds']:9.3f} s {row['tokens']:12,.0f} tokens {row['questions']:10,.1f} questions a text"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    show(run(parser.parse_args().repeats))
