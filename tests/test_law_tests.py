"""Tests of whether texts have a law, held against enumeration.

| what | property | tolerance |
|---|---|---|
| `two_sample` | P(p ≤ α) ≤ α over all samples of 3 and 3 texts and all divisions | exact |
| MMD² | its mean over all samples is the squared distance of the two laws' embeddings | 1e-12 |
| the kernel | positive definite on all texts, so that different laws differ | smallest eigenvalue > 0.05 |
| `next_token_calibration` | E[log q_t + H_t] = 0 at every token, E[(Σ)²] = E[Σ Var_t], quantiles uniform | 1e-10 |
| both | size 0.05, power against a dropped mode and a temperature 0.8 | binomial, 1 in 1,000 |

Mutants that are rejected: p-values that do not count ties; a kernel without equal texts; Markov chains taken for draws;
quantiles without their uniform part, scores without the entropy, variances that are second moments.
"""

import itertools
import math
import sys

import numpy as np
import oracle
import pytest
import scipy.stats
import torch

from ppl_lm.criticism.law_tests.token_quantiles import _tokens, next_token_calibration
from ppl_lm.criticism.law_tests.two_sample_tests import SAME, mmd2, string_kernel, two_sample
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.markov_chains import mcmc
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.lm.laws.temperature import tempered
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted

V, T, END = 4, 3, 3
QUANTILES = sys.modules["ppl_lm.criticism.law_tests.token_quantiles"]
LM = table_lm(V, T, max_prompt=2, concentration=1.0, seed=1)
ROWS = oracle.outcomes(V, T, END)
X = oracle.as_tensor(ROWS, T, END)


def letters(completions, **_):
    return [0.5 * min(2, text.count("a")) for text in completions]


letters.r_max = 1.0
MODEL = bind(tilted, LM, reward=letters, beta=0.5)


def halves():
    """All divisions of six texts into three and three."""
    return np.array(list(itertools.combinations(range(6), 3)))


@pytest.mark.parametrize("law", [(0.5, 0.3, 0.2), (0.9, 0.1, 0.0), (1 / 3, 1 / 3, 1 / 3)])
def test_the_p_value_is_valid(law):
    """Over all samples of three and three texts of one law: P(p ≤ α) ≤ α at every α."""
    texts, chances = [("a",), ("a", "b"), ("c", "b")], []
    for sample in itertools.product(range(3), repeat=6):
        kernel = string_kernel([texts[i] for i in sample])
        found = mmd2(kernel, halves())
        p = float((found >= found[0] - 1e-12).mean())
        strict = float((1 + (found[1:] > found[0] + 1e-12).sum()) / len(found))
        chances.append((math.prod(law[i] for i in sample), p, strict))
    mass = sum(chance for chance, _, _ in chances)
    assert mass == pytest.approx(1.0)
    for alpha in (0.05, 0.1, 0.2, 0.3, 0.5):
        assert sum(chance for chance, p, _ in chances if p <= alpha + 1e-12) <= alpha + 1e-12
    if law[0] == 0.9:  # mutant: ties do not count
        assert sum(chance for chance, _, strict in chances if strict <= 0.1) > 0.3


def test_mmd_is_unbiased():
    texts, p, q = [("a",), ("a", "b"), ("c", "b")], (0.5, 0.3, 0.2), (0.1, 0.3, 0.6)
    mean = 0.0
    for sample in itertools.product(range(3), repeat=5):  # two of the first law, three of the second
        chance = math.prod((p if i < 2 else q)[v] for i, v in enumerate(sample))
        mean += chance * float(mmd2(string_kernel([texts[i] for i in sample]), np.array([[0, 1]]))[0])
    difference = np.array(p) - np.array(q)
    assert mean == pytest.approx(float(difference @ string_kernel(texts) @ difference), abs=1e-12)


def test_different_laws_differ_in_the_kernel():
    """All texts of up to three letters: without equal texts the n-grams have fewer dimensions than there are texts."""
    texts = [row for n in range(5) for row in itertools.product("ab", repeat=n)]
    kernel = string_kernel(texts)
    assert float(np.linalg.eigvalsh(kernel).min()) > 0.05
    assert np.linalg.matrix_rank(kernel - SAME * np.eye(len(texts)), tol=1e-9) < len(texts)


def binomial(count: int, runs: int, p: float) -> bool:
    """Whether a share is what a right method passes 999 times in 1,000."""
    return scipy.stats.binomtest(count, runs, p).pvalue > 1e-3


def test_size_and_power():
    """300 tests of 60 draws each: size 0.05. 500 draws see a dropped mode every time."""
    exact = rejection(MODEL, None, [""] * 300, num_samples=60)
    again = rejection(MODEL, None, [""] * 300, num_samples=60)
    found = two_sample(again, exact, num_permutations=99)
    assert scipy.stats.binomtest(int((found.p_value <= 0.05).sum()), 300, 0.05).pvalue > 1e-3
    assert found.num_draws == (60, 60)
    dropped = bind(tilted, LM, reward=_without_c, beta=0.5)
    lost = rejection(dropped, None, [""] * 30, num_samples=500)
    whole = rejection(MODEL, None, [""] * 30, num_samples=500)
    assert int((two_sample(lost, whole, num_permutations=199).p_value <= 0.05).sum()) >= 27


def _without_c(completions, **_):
    return [r if "c" not in text else -20.0 for r, text in zip(letters(completions), completions, strict=True)]


_without_c.r_max = 1.0


def test_draws_that_depend_on_each_other_are_refused():
    exact = rejection(MODEL, None, [""], num_samples=8)
    chains = mcmc(MODEL, None, [""], num_samples=4, warmup=4, num_chains=2)
    runs = smc(MODEL, None, [""], num_samples=4)
    for wrong in (chains, runs, runs.under(bind(finetuned, LM))):
        with pytest.raises(ValueError, match="depend on each other"):
            two_sample(wrong, exact)
        with pytest.raises(ValueError, match="depend on each other"):
            next_token_calibration(bind(finetuned, LM), wrong)
    with pytest.raises(ValueError, match="2 and 1 prompts"):
        two_sample(rejection(MODEL, None, ["", "a"], num_samples=3), exact)
    with pytest.raises(ValueError, match="at least 2"):
        two_sample(exact.map(lambda v: v[:, :1]), exact)
    with pytest.raises(ValueError, match="'y'"):
        two_sample(exact, exact, name="y")


def test_the_same_prompts_give_the_same_answer():
    exact, other = (rejection(MODEL, None, ["", "a"], num_samples=40) for _ in range(2))
    one, two = two_sample(other, exact), two_sample(other, exact)
    assert torch.equal(one.p_value, two.p_value) and one.p_value.shape == (2,)
    assert "p = " in str(one) and one.blind_below == pytest.approx(2 * 0.45**2 / 40)


def test_padding_is_no_text():
    """Laws that write only the empty text, in tensors of different lengths, are equal."""
    sides = []
    for steps in (2, 5):
        lm = table_lm(V, steps, max_prompt=2).copy()
        with torch.no_grad():
            lm.model.table[:, END] = 50.0
        model = bind(tilted, lm.requires_grad_(False), reward=letters, beta=1.0)
        sides.append(importance(model, None, [""], num_samples=20))
    assert float(two_sample(*sides, num_permutations=99).p_value) == 1.0


# Token by token


def test_scores_are_a_martingale():
    law = LM([""])
    log_q = oracle.log_probs(LM.model.table.detach(), tuple(LM.vocabulary.encode("")), ROWS)
    first = torch.zeros(T, dtype=torch.float64)
    second = spread = torch.zeros((), dtype=torch.float64)
    for x, weight in zip(X, log_q.exp(), strict=True):
        score, variance, below, mass = _tokens(law, x.unsqueeze(0), torch.zeros(1, dtype=torch.int64))
        first[: len(score)] += weight * score
        second = second + weight * score.sum() ** 2
        spread = spread + weight * variance.sum()
        assert bool((below >= -1e-12).all() and (below + mass <= 1 + 1e-12).all())
    torch.testing.assert_close(first, torch.zeros_like(first), atol=1e-6, rtol=0)
    torch.testing.assert_close(second, spread, atol=1e-6, rtol=0)


def test_calibration_has_its_size():
    """200 runs of 40 texts: z is a standard normal, and the uniform test has size 0.05."""
    guide = bind(finetuned, LM)
    found = [next_token_calibration(guide, importance(MODEL, guide, [""], num_samples=40), seed=s) for s in range(200)]
    assert binomial(sum(f.p_value <= 0.05 for f in found), 200, 0.05)
    assert binomial(sum(f.uniform_p_value <= 0.05 for f in found), 200, 0.05)
    assert scipy.stats.kstest([f.z for f in found], "norm").pvalue > 1e-3


@pytest.mark.parametrize("mutant", ["no V", "no entropy", "second moments"])
def test_wrong_calibrations_are_rejected(mutant, monkeypatch):
    """Quantiles without their uniform part; scores that are not centred; a variance that is a second moment."""
    right = QUANTILES._tokens

    def wrong(law, x, rows):
        score, variance, below, mass = right(law, x, rows)
        if mutant == "no V":
            return score, variance, below, 0 * mass
        if mutant == "no entropy":
            return mass.log(), variance, below, mass
        return score, variance + (mass.log() - score).square(), below, mass

    monkeypatch.setattr(QUANTILES, "_tokens", wrong)
    guide = bind(finetuned, LM)
    found = [next_token_calibration(guide, importance(MODEL, guide, [""], num_samples=40), seed=s) for s in range(200)]
    sound = binomial(sum(f.p_value <= 0.05 for f in found), 200, 0.05)
    sound = sound and binomial(sum(f.uniform_p_value <= 0.05 for f in found), 200, 0.05)
    assert not (sound and scipy.stats.kstest([f.z for f in found], "norm").pvalue > 1e-3)


def test_a_temperature_is_seen():
    """Texts drawn at temperature 0.8, said to be the model's own."""
    guide = bind(finetuned, LM)
    colder = importance(MODEL, bind(finetuned, tempered(LM, 0.8)), ["", "a"], num_samples=500)
    found = next_token_calibration(guide, colder)
    assert found.z > 4 and found.p_value < 1e-4
    assert "z = +" in str(found)
