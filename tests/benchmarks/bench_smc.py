"""Where SMC spends its time: how much of it in the forward passes of its networks. Run on purpose: `make bench`."""

import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import transformers

import ppl_lm
from ppl_lm.infer.samplers import next_tokens as grow
from ppl_lm.likelihood.reward import Reward
from ppl_lm.lm import meter
from ppl_lm.lm.decoding.decoder import Decoder
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.models import tilted

PARTICLES, TOKENS, REPEATS = 256, 48, 7
OF = {  # what is timed, innermost calls only
    "forward passes": (LanguageModel, "logits_next"),
    "the reward": (Reward, "__call__"),
    "copies of the cache": (Decoder, "reorder"),
    "drawing tokens": (grow, "choose"),
}


def shares(run: Callable[[], object], monkeypatch) -> dict[str, float]:
    """Median seconds of a run, and the median share of each part."""
    spent: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        for part, (where, name) in OF.items():
            patch.setattr(where, name, timed(getattr(where, name), part, spent))
        rows = []
        for _ in range(REPEATS + 1):
            spent.clear()
            began = time.perf_counter()
            run()
            total = time.perf_counter() - began
            rows.append({"seconds": total} | {part: spent[part] / total for part in OF})
    return {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}  # the first warms up


def timed(function: Callable, part: str, spent: Counter) -> Callable:
    def wrapped(*args, **kwargs):
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[part] += time.perf_counter() - began

    return wrapped


def short(prompts, x, n):
    """A twist that costs nothing: shorter texts are better, so that populations are resampled."""
    return -0.1 * n.double()


@pytest.mark.parametrize("threads", [1, 2])
def test_where_the_time_goes(threads, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        prior = ppl_lm.LanguageModel.from_pretrained(max_new_tokens=TOKENS)
        target = ppl_lm.bind(tilted, prior, reward=ppl_lm.rewards.vader, beta=0.2)
        length = ppl_lm.bind(tilted, prior, reward=ppl_lm.rewards.length, beta=10.0)
        prefix = ppl_lm.twists.tempered(ppl_lm.twists.prefix_likelihood(target), TOKENS)

        def grown(model, twist=None):
            ppl_lm.smc(model, None, [""], num_samples=PARTICLES, settings=ppl_lm.SMCSettings(twist=twist))

        made = {
            "no reward until the end": lambda: grown(length),
            "a cheap twist": lambda: grown(length, short),
            "a network": lambda: grown(length, twist),
            "VADER of every prefix": lambda: grown(target, prefix),
        }
        twist = ppl_lm.twists.twist_like(prior)
        print(f"\nSMC, {PARTICLES} particles × {TOKENS} tokens, {threads} threads, {platform.machine()}, "
              f"torch {torch.__version__}, transformers {transformers.__version__}; medians of {REPEATS}")  # fmt: skip
        found = {name: shares(run, monkeypatch) for name, run in made.items()}
        for name, row in found.items():
            with meter.measure() as cost:
                made[name]()
            parts = ", ".join(f"{part} {row[part]:.0%}" for part in OF)
            print(f"  {name:24} {row['seconds']:.2f} s, {cost.lm_tokens} tokens: {parts}")
    finally:
        torch.set_num_threads(before)
