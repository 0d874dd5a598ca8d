"""Rare events: how many nominal 95% intervals hold where the truth is known, and what P(r ≥ c) costs on a pretrained LM beside
draws of the prior. Run on purpose: `make bench`.

    python tests/benchmarks/bench_rare_events.py holds [--power 3] [--repeats 200] [--runs 32] [--texts 64] [--moves 8]
    python tests/benchmarks/bench_rare_events.py costs [--repeats 10] [--runs 8] [--texts 128] [--moves 2]

stories260K in `PPL_LM_TEST_DATA`, for the costs."""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("PPL_LM_TEST_DATA", ROOT.parent / "shared" / "data"))
sys.path.insert(0, str(ROOT / "tests"))
STEPS, TOKENS, TOGETHER = 28, 48, 640  # tokens of the bigram's texts, of the stories; runs in one call


def letters(letter, sign=1.0):
    def reward(completions, **_):
        return [sign * text.lower().count(letter) for text in completions]

    return reward


def estimates(model, repeats, runs, **how):
    """log P and its error by each of so many repeats of so many runs; the runs' estimates; tokens of a run."""
    import ppl_lm
    from ppl_lm.infer.samplers import splitting

    made, each, tokens, done = [], [], 0, 0
    while done < repeats:
        now = min(repeats - done, max(1, TOGETHER // runs))
        draws = splitting(model, [""], num_runs=now * runs, **how)
        each.append(draws.log_weight.logsumexp(1)[:, 0] - math.log(how["num_samples"]))
        tokens += draws.cost.lm_tokens
        for r in range(now):
            one = ppl_lm.criticism.log_evidence(draws.map(lambda v, r=r: v[r * runs : (r + 1) * runs]))
            made.append((float(one.log_z), float(one.log_z_se)))
        done += now
    return torch.tensor(made), torch.cat(each), tokens / (repeats * runs)


def holds(power, repeats, runs, **how):
    """Intervals on a bigram of texts too many to count, whose tails are known by dynamic programming."""
    from bigram import bigram

    import ppl_lm
    from ppl_lm.models import at_least

    lm, tail = bigram(STEPS)
    level = min(range(len(tail)), key=lambda c: abs(tail[c] / math.log(10) + power))
    model = ppl_lm.bind(at_least, lm, reward=letters("a"), level=float(level))
    began = time.perf_counter()
    made, each, tokens = estimates(model, repeats, runs, **how)
    z = (made[:, 0] - tail[level]) / made[:, 1]
    share, found = each.exp().mean().log() - tail[level], each[each > -math.inf]
    rows = {
        "intervals that hold": f"{int((z.abs() <= 1.96).sum())} of {repeats} (z {z.mean():.2f}, sd {z.std():.2f})",
        "error of log P": f"{made[:, 1].mean():.2f}",
        "all runs together, log of their mean less log P": f"{share:.3f}",
        "log of one run's, sd": f"{found.std():.2f}, {len(each) - len(found)} of {len(each)} lost",
        "tokens of an interval": f"{tokens * runs:.0f}",
        "seconds": f"{time.perf_counter() - began:.0f}",
    }
    how = f"{runs} runs of {how['num_samples']} texts, {how['moves']} moves"
    print(
        f"P = 10^{tail[level] / math.log(10):.2f}, {how}: " + "; ".join(f"{k} {v}" for k, v in rows.items()), flush=True
    )


def costs(repeats, runs, **how):
    """Events of stories260K: tokens for the same relative error, by draws of the prior, by splitting, and by SMC whose twist is
    a tempered reward."""
    import ppl_lm
    from ppl_lm.infer.samplers import splitting
    from ppl_lm.models import at_least, tilted

    folder = DATA / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"needs stories260K in {folder} (PPL_LM_TEST_DATA)")
    prior = ppl_lm.LanguageModel.from_pretrained(folder, max_new_tokens=TOKENS)
    events = {  # reward, level, and the β of the twist
        "at least 6 letters k": (letters("k"), 6.0, 0.7),
        "at least 9 letters w": (letters("w"), 9.0, 0.9),
        "VADER of at least 0.97": (ppl_lm.rewards.vader, 0.97, 0.08),
    }
    for name, (reward, level, beta) in events.items():
        model = ppl_lm.bind(at_least, prior, reward=reward, level=level)
        soft = ppl_lm.bind(tilted, prior, reward=reward, beta=beta)
        settings = ppl_lm.SMCSettings(twist=ppl_lm.twists.tempered(ppl_lm.twists.prefix_likelihood(soft), TOKENS))
        count = repeats * runs
        ways = {
            f"splitting, {how['moves']} moves": lambda: splitting(model, [""], num_runs=count, **how),  # noqa: B023
            "smc": lambda: ppl_lm.smc(model, None, [""], num_samples=256, num_runs=2 * count, settings=settings),  # noqa: B023
        }
        for way, draw in ways.items():
            began = time.perf_counter()
            draws = draw()
            each = draws.log_weight.exp().mean(1)[:, 0]
            p, tokens = float(each.mean()), draws.cost.lm_tokens / len(each)
            variance = float(each.var()) / p**2  # of one run's estimate, relative
            direct = TOKENS * (1 - p) / p  # tokens for a relative variance of 1
            print(
                f"{name}, {way}: P = {p:.2e}, relative error {math.sqrt(variance / len(each)):.2f}, the largest of {len(each)} "
                f"runs is {float(each.max() / each.sum()):.0%} of it; of a run {tokens:.0f} tokens and relative variance "
                f"{variance:.2f}: draws of the prior take {direct / (tokens * variance):.1f} times as many tokens; "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )


def main(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["holds", "costs"])
    for name, value in {"power": 3, "repeats": 200, "runs": 32, "texts": 64, "moves": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args(words)
    torch.manual_seed(0)
    how = {"num_samples": given.texts, "moves": given.moves}
    if given.what == "holds":
        holds(given.power, given.repeats, given.runs, **how)
    else:
        costs(given.repeats, given.runs, **how)


@pytest.mark.parametrize("power", [3, 6, 10])
def test_holds(power):
    main(["holds", "--power", str(power), "--repeats", "200"])


def test_costs():
    main(["costs", "--repeats", "10", "--runs", "8", "--texts", "128", "--moves", "2"])


if __name__ == "__main__":
    main(sys.argv[1:])
