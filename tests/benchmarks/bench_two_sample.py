"""How often `two_sample` rejects at the level 0.05 on a real language model, with 500 draws a side: texts of one law (its size,
which should be 0.05), of the law at another temperature, and of what the law leaves without the texts that have some word (its
power). Run on purpose: `make bench` (48 repeats).

    python tests/benchmarks/bench_two_sample.py [--repeats N]

stories260K in `PPL_LM_TEST_DATA`. Sets of draws are disjoint; for the size each is compared with the one before and the one
after it, for the power the last of them with sets of the other laws."""

import argparse
import json
import math
import os
import platform
from pathlib import Path

import pytest
import torch

import ppl_lm
from ppl_lm.criticism import two_sample
from ppl_lm.guides import finetuned
from ppl_lm.lm import tempered
from ppl_lm.models import constrained

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs" / "bench"
DATA = Path(os.environ.get("PPL_LM_TEST_DATA", ROOT.parent / "shared" / "data"))
TOKENS, DRAWS, DIVISIONS, LEVEL = 48, 500, 199, 0.05
TOGETHER = 24  # tests at once, as that many equal prompts
OF_SIZE = 20  # tests of the size for each test of the power
TEMPERATURES = (0.8, 1.2, 0.95)
WORDS = (" boy", " big")  # that a quarter of the texts have


def lacks(word):
    return lambda completions: [float(word not in text) for text in completions]


def rejected(one, other, seed):
    p = two_sample(one, other, num_permutations=DIVISIONS, seed=seed).p_value
    return int((p <= LEVEL).sum())


def run(repeats):
    folder = DATA / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"needs the language model in {folder} (PPL_LM_TEST_DATA)")
    torch.manual_seed(0)
    lm = ppl_lm.LanguageModel.from_pretrained(folder, max_new_tokens=TOKENS)
    prompts = lm.prompts([""] * TOGETHER)

    def drawn(law):
        return ppl_lm.importance(ppl_lm.bind(finetuned, law), None, prompts, num_samples=DRAWS)

    print(f"\n{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
          f"two_sample at {LEVEL}, {DRAWS} draws of {TOKENS} tokens a side")  # fmt: skip
    rounds, found = math.ceil(repeats / TOGETHER), {}
    seen, before = 0, drawn(lm)
    for k in range(rounds):
        after = drawn(lm)
        seen += rejected(before, after, k)
        before = after
    show(found, "one law", seen, rounds * TOGETHER)
    others = {f"temperature {t:g}": lambda t=t: drawn(tempered(lm, t)) for t in TEMPERATURES}
    for word in WORDS:
        share = sum(word in text for texts in before.text() for text in texts) / (TOGETHER * DRAWS)
        rest = ppl_lm.bind(constrained, lm, constraint=lacks(word))
        others[f"without{word}, that {share:.0%} have"] = lambda rest=rest: ppl_lm.rejection(
            rest, None, prompts, num_samples=DRAWS
        )
    tests = math.ceil(rounds / OF_SIZE)
    for name, other in others.items():
        seen = sum(rejected(other(), before, k) for k in range(tests))
        show(found, name, seen, tests * TOGETHER)
    return found


def show(found, name, seen, of):
    found[name], share = (seen, of), seen / of
    error = math.sqrt(share * (1 - share) / of)
    print(f"  {name:34} {share:.3f} ± {error:.3f} ({seen} of {of})", flush=True)


def test_two_sample():
    found = run(48)
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / "two_sample.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=480)
    run(parser.parse_args().repeats)
