"""Counts below the least that makes sense are refused by name: none is taken for the default."""

import pytest

import ppl_lm
from ppl_lm.guides import finetuned
from ppl_lm.infer.counts import require_count
from ppl_lm.lm.table import table_like, table_lm
from ppl_lm.models import tilted


def letters(completions):
    return [float(text.count("a")) for text in completions]


letters.r_max = 3.0


@pytest.fixture(scope="module")
def given():
    lm = table_lm(3, 2, concentration=1.0)
    target = ppl_lm.bind(tilted, lm, reward=letters, beta=1.0)
    draws = ppl_lm.importance(target, None, [""], num_samples=20)
    return lm, target, draws, ppl_lm.rejection(target, None, [""], num_samples=4)


CALLS = {
    "to_arviz": ("num_samples", lambda lm, t, d, e, n: ppl_lm.to_arviz(d, num_samples=n)),
    "reweighted": ("num_samples", lambda lm, t, d, e, n: d.reweighted(n)),
    "reweighted, exact draws": ("num_samples", lambda lm, t, d, e, n: e.reweighted(n)),
    "importance": ("num_samples", lambda lm, t, d, e, n: ppl_lm.importance(t, None, [""], num_samples=n)),
    "rejection": ("max_proposals", lambda lm, t, d, e, n: ppl_lm.rejection(t, None, [""], max_proposals=n)),
    "quasi_rejection": ("max_proposals", lambda lm, t, d, e, n: ppl_lm.quasi_rejection(t, None, [""], max_proposals=n)),
    "best_of_n": ("n", lambda lm, t, d, e, n: ppl_lm.best_of_n(t, None, [""], n=n)),
    "mcmc": ("num_samples", lambda lm, t, d, e, n: ppl_lm.mcmc(t, None, [""], num_samples=n)),
    "smc": ("num_runs", lambda lm, t, d, e, n: ppl_lm.smc(t, None, [""], num_runs=n)),
    "log_evidence": ("iwae_particles", lambda lm, t, d, e, n: ppl_lm.log_evidence(d, iwae_particles=n)),
    "table_like": ("max_prompt", lambda lm, t, d, e, n: table_like(lm, max_prompt=n)),
    "fit": (
        "warmup",
        lambda lm, t, d, e, n: ppl_lm.fit(t, ppl_lm.bind(finetuned, lm.copy()), [""], max_steps=1, warmup=n),
    ),
    "batch": (
        "batch_size",
        lambda lm, t, d, e, n: ppl_lm.fit(t, ppl_lm.bind(finetuned, lm.copy()), [""], max_steps=1, batch_size=n),
    ),
    "plates": ("max_plate_nesting", lambda lm, t, d, e, n: ppl_lm.importance(t, None, [""], max_plate_nesting=n)),
    "resampling": ("count", lambda lm, t, d, e, n: ppl_lm.resampling.systematic(d.log_weight[0], n)),
}


@pytest.mark.parametrize("n", [0, -3, 2.5, "3", True])
@pytest.mark.parametrize("call", CALLS)
def test_every_count_is_checked(given, call, n, unchecked):
    name, run = CALLS[call]
    with pytest.raises(ValueError, match=rf"{name}={n!r}; give (a whole number.*)?at least \d"):
        run(*given, n)


def test_prompts_are_counted_from_0_and_colours_have_a_scale(given):
    *_, draws, exact = given
    for b in (1, -1):
        with pytest.raises(ValueError, match=rf"of_prompt\({b}\), but the draws are of 1 prompts"):
            draws.of_prompt(b)
    for scale in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"scale={scale}; give a number of nats above 0"):
            ppl_lm.plot.heat(["a"], [1.0], scale=scale)
    require_count("n", 1)
    assert len(exact.reweighted(1)) == 1
