"""Best-of-n as a posterior: its law against an enumeration of n draws, and its distance from the prior."""

import itertools
import math

import oracle
import pytest
import torch

from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.likelihood.best_of import BestOfN, log_ratio
from ppl_lm.likelihood.reward import Reward
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted
from ppl_lm.run.fitting.loop import fit


def letters(completions, **_):
    """With ties: many texts hold as many."""
    return [text.count("a") - 0.5 * text.count("b") for text in completions]


def by_enumeration(prior, reward, n):
    """The law of the best of n texts, ties broken at random, by walking all n-tuples."""
    law = torch.zeros(len(prior), dtype=torch.float64)
    for draw in itertools.product(range(len(prior)), repeat=n):
        top = max(float(reward[i]) for i in draw)
        best = [i for i in draw if float(reward[i]) == top]
        chance = math.prod(float(prior[i]) for i in draw)
        for i in best:
            law[i] += chance / len(best)
    return law


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_law_is_that_of_the_best_of_n_draws(n):
    """π_n = π0 (F^n - F_^n)/(F - F_) for every text, to 1e-12; KL(π_n ‖ π0) ≤ log n - (n - 1)/n."""
    lm, rows = table_lm(3, 2, concentration=1.0, seed=2), oracle.outcomes(3, 2, 2)
    prior = oracle.log_probs(lm.model.table, (2,), rows).detach().exp()
    reward = torch.tensor(letters(lm.vocabulary.decode(oracle.as_tensor(rows, 2, 2))), dtype=torch.float64)
    below = torch.stack([prior[reward < r].sum() for r in reward])
    upto = torch.stack([prior[reward <= r].sum() for r in reward])
    law, made = by_enumeration(prior, reward, n), prior * log_ratio(below, upto, n).exp()
    torch.testing.assert_close(made, law, atol=1e-12, rtol=0)
    distance = float((law * (law / prior).log()).sum())
    assert 0 < distance <= math.log(n) - (n - 1) / n
    for mutant in (log_ratio(below, upto, n - 1), log_ratio(upto, upto, n), (n - 1) * upto.log()):
        assert float((prior * mutant.exp() - law).abs().max()) > 1e-3


def test_the_bound_on_the_distance_is_reached_without_ties_only():
    """Atoms leave slack: for texts all different and all alike probable KL tends to log n - (n - 1)/n, for two to log 2."""
    for atoms, n in [(2, 8), (1000, 8)]:
        upto = torch.arange(1, atoms + 1, dtype=torch.float64) / atoms
        log_r = log_ratio(upto - 1 / atoms, upto, n)
        distance, bound = float((log_r.exp() * log_r).mean()), math.log(n) - (n - 1) / n
        assert distance <= bound and (bound - distance < 0.01) == (atoms == 1000)


@pytest.mark.parametrize("texts", [[""], ["", "a"]])
def test_the_posterior_ranks_among_the_references(texts):
    """`tilted` at β = 1 with this reward, enumerated, against ranks counted one text at a time."""
    lm, rows, n = table_lm(3, 2, max_prompt=2, concentration=1.0, seed=2), oracle.outcomes(3, 2, 2), 4
    torch.manual_seed(0)
    reward = BestOfN(letters, lm, n, num_references=50)
    truth = enumerate_posterior(bind(tilted, lm, reward=reward, beta=1.0), None, texts)
    x = oracle.as_tensor(rows, 2, 2)
    own = letters(lm.vocabulary.decode(x))
    for b, text in enumerate(texts):
        context = tuple(lm.vocabulary.encode(text))
        (known,) = [v for key, v in reward.references.items() if key[0] == context]
        assert len(known) == 50
        for row, r, log_prior in zip(x, own, oracle.log_probs(lm.model.table, context, rows), strict=True):
            below, upto = (sum(v < r for v in known.tolist()) / 51, (sum(v <= r for v in known.tolist()) + 1) / 51)
            want = float(log_prior) + math.log((upto**n - below**n) / (upto - below))
            here = (truth.latents["x"][:, b] == row).all(-1)
            assert float(truth.log_joint[here, b]) == pytest.approx(want, abs=1e-10)


def test_what_is_drawn_is_as_good_as_the_best_of_n():
    """Rejection from this posterior, and plain best-of-n, have the same mean reward; references stay the same."""
    lm, n = table_lm(4, 3, concentration=1.0, seed=1), 4
    torch.manual_seed(0)
    reward = BestOfN(letters, lm, n, num_references=4000)
    target = bind(tilted, lm, reward=reward, beta=1.0)
    assert target.arguments["reward"] is reward and reward.r_max == math.log(n)
    kept = rejection(target, None, [""], num_samples=4000)
    drawn = torch.tensor(letters(kept.text()[0]), dtype=torch.float64)
    plain = importance(bind(tilted, lm, reward=letters), None, [""], num_samples=16000)["reward"].view(-1, n)
    best = plain.max(1).values
    gap, se = (
        float(drawn.mean() - best.mean()),
        math.hypot(float(drawn.std()) / 4000**0.5, float(best.std()) / 4000**0.5),
    )
    assert abs(gap) < 4 * math.hypot(se, float(plain.std()) / 4000**0.5), "the last: of 4000 references"
    assert float(plain.mean()) < float(best.mean()) - 20 * se, "the prior's mean would have been found out"
    assert len(reward.references) == 1


def test_it_is_distilled_by_a_fit():
    lm = table_lm(4, 3, concentration=1.0, seed=1)
    torch.manual_seed(0)
    target, guide = bind(tilted, lm, reward=BestOfN(letters, lm, 4), beta=1.0), bind(finetuned, lm.copy())
    before = float(enumerate_posterior(target, guide, [""]).kl_q_p.detach())
    fit(target, guide, [""], SequenceELBO(64), max_steps=300, learning_rate=0.02, seed=0)
    assert float(enumerate_posterior(target, guide, [""]).kl_q_p.detach()) < 0.1 * before


def test_columns_and_signatures_are_a_rewards():
    """Prompts with different columns have references of their own."""
    lm = table_lm(3, 2, concentration=1.0)

    def wanted(completions, letter):
        return [float(w in c) for c, w in zip(completions, letter, strict=True)]

    reward = BestOfN(wanted, lm, 2, num_references=20)
    prompts = lm.prompts({"prompt": ["", "", ""], "letter": ["a", "b", "a"]})
    made = reward(prompts, lm(prompts).sample(torch.Size((5,))))
    assert made.shape == (5, 3) and len(reward.references) == 2 and float(made.max()) <= math.log(2)
    assert isinstance(reward, Reward) and reward.name == "best_of_2(wanted)"


@pytest.mark.parametrize(("change", "message"), [({"n": 1}, "n=1"), ({"num_references": 1}, "num_references=1")])
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        BestOfN(letters, table_lm(3, 2), **{"n": 2, **change})
