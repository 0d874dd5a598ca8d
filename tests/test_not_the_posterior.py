"""Samplers that say how far from the posterior they are: their laws by enumeration, and what they report of them.

| sampler | what is proved | tolerance |
|---|---|---|
| `quasi_rejection` | law min(P, b q) / Z_b, its acceptance rate, total variation and bound, KL(p ‖ p_b) | 1e-10 |
| `best_of_n` | law F^n - F_^n with ties, over all n-tuples; KL to the prior at most log n - (n - 1)/n | 1e-10 |
| the same, soft | law q n E[w / (w + Σ w_j)] over all n-tuples; KL(p ‖ law) at most log(1 + CV²/n) | 1e-10 |
| all | `log_guide` is their law: KL to the posterior as they report it against the exact one; weights correct it | 4 SE |
"""

import itertools
import math
import sys

import oracle
import pytest
import torch

from ppl_lm.criticism.diagnoses.draws_diagnosis import diagnose_draws
from ppl_lm.criticism.evidence import log_evidence
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import NoSupportError
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.best_of_n_sampling import best_of_n
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.quasi_rejection_sampling import quality, quasi_rejection
from ppl_lm.lm.table import table_lm
from ppl_lm.lm.token_sequence import TokenSequence
from ppl_lm.models import constrained, tilted

V, T, END, BETA = 3, 2, 2, 0.7
ROWS = oracle.outcomes(V, T, END)
X = oracle.as_tensor(ROWS, T, END)
INDEX = {tuple(x): i for i, x in enumerate(X.tolist())}
BOUNDS = [-2.0, -0.5, 0.0, 0.3, 1.0, 2.5, 9.0]


def letters(completions, **_):
    """Ties: `ab`, `ba` and the empty text have the same reward."""
    return [float(text.count("a")) for text in completions]


class Problem:
    """Target and guide with what is known of them by enumeration, (N, B)."""

    def __init__(self, texts, concentration=2.0):
        lm = table_lm(V, T, max_prompt=2, concentration=1.0, seed=1)
        other = table_lm(V, T, max_prompt=2, concentration=concentration, seed=2).copy()
        contexts = [tuple(lm.vocabulary.encode(text)) for text in texts]
        log_prior, self.log_q = (
            torch.stack([oracle.log_probs(table.detach(), c, ROWS) for c in contexts], 1)
            for table in (lm.model.table, other.model.table)
        )
        self.texts, self.lm = list(texts), lm
        self.reward = torch.tensor(letters(lm.vocabulary.decode(X)), dtype=torch.float64)
        self.log_joint = log_prior + self.reward[:, None] / BETA
        self.target, self.guide = bind(tilted, lm, reward=letters, beta=BETA), bind(finetuned, other)
        self.log_z = self.log_joint.logsumexp(0)
        self.log_p, self.log_w = self.log_joint - self.log_z, self.log_joint - self.log_q

    def force(self, patch, values):
        """Draws of the guide as given, (S, T): of all prompts alike."""
        each = values.unsqueeze(1).expand(-1, len(self.texts), T)
        patch.setattr(TokenSequence, "sample", lambda self, _=torch.Size(): each)
        patch.setattr(
            sys.modules["ppl_lm.infer.samplers.importance_sampling"], "texts_a_piece", lambda *_: 10**7
        )  # one call


@pytest.fixture(params=[("",), ("", "a")], ids=["one prompt", "left-padded batch"])
def problem(request):
    return Problem(request.param)


def within(found, truth, draws_se, factor=4.0):
    assert abs(float(found) - float(truth)) < factor * float(draws_se), (float(found), float(truth), float(draws_se))


# quasi-rejection


def test_quasi_rejection_keeps_each_outcome_as_often_as_its_law_says(problem, monkeypatch):
    """Its one choice is a uniform: over a grid of 1000 of it. The mutant, rejection's clamp, has another law."""
    from ppl_lm.infer.samplers.quasi_rejection_sampling import accept

    problem.force(monkeypatch, X)
    draws = importance(problem.target, problem.guide, problem.texts, num_samples=len(X))
    for b in (0.0, 1.0):
        bound = torch.tensor(b, dtype=torch.float64)
        cells, kept = 1000, torch.zeros(len(X), len(problem.texts), dtype=torch.float64)
        for i in range(cells):
            monkeypatch.setattr(torch, "rand_like", lambda v, u=(i + 0.5) / cells: torch.full_like(v, u))
            kept += accept(draws, bound)
        probability = (problem.log_w - b).clamp_max(0.0).exp()
        assert float((kept / cells - probability).abs().max()) <= 0.5 / cells + 1e-9


@pytest.mark.parametrize("b", BOUNDS)
def test_quality_is_exact(problem, monkeypatch, b):
    """Over draws that are the guide's law itself: each outcome once, weighted by q through a guide that is uniform."""
    problem.force(monkeypatch, X)
    draws = importance(problem.target, problem.guide, problem.texts, num_samples=len(X))
    uniform = torch.full_like(draws.log_guide, -math.log(len(X)))  # P/q of a uniform guide: sums over outcomes
    log_w = draws.log_prior + draws.log_likelihood - uniform
    made = quality(type(draws)(**{**vars(draws), "log_guide": uniform}), b)
    z = log_w[0].exp().mean(0)
    torch.testing.assert_close(z, problem.log_z.exp(), atol=1e-10, rtol=0)
    q = torch.full_like(problem.log_p, 1 / len(X))
    capped = torch.minimum(problem.log_joint.exp(), math.exp(b) * q)
    z_b, p = capped.sum(0), problem.log_p.exp()
    p_b = capped / z_b
    torch.testing.assert_close(made.log_z_b, z_b.log(), atol=1e-10, rtol=0)
    torch.testing.assert_close(made.acceptance_rate, z_b / math.exp(b), atol=1e-10, rtol=0)
    torch.testing.assert_close(made.total_variation, 0.5 * (p - p_b).abs().sum(0), atol=1e-10, rtol=0)
    torch.testing.assert_close(made.kl, (p * (problem.log_p - p_b.log())).sum(0), atol=1e-10, rtol=0)
    over = (p * (problem.log_joint.exp() > math.exp(b) * q)).sum(0)
    torch.testing.assert_close(made.total_variation_bound, over, atol=1e-10, rtol=0)
    assert bool((made.total_variation <= made.total_variation_bound + 1e-12).all())
    further = quality(type(draws)(**{**vars(draws), "log_guide": uniform}), b + 0.5)
    assert bool((further.kl <= made.kl + 1e-12).all()) and bool((further.acceptance_rate <= made.acceptance_rate).all())


def test_quasi_rejection_reports_its_own_distance(problem):
    torch.manual_seed(0)
    bound = torch.tensor([0.3, 1.0], dtype=torch.float64)[: len(problem.texts)]  # one for each prompt
    draws = quasi_rejection(problem.target, problem.guide, problem.texts, num_samples=20_000, log_bound=bound)
    capped = torch.minimum(problem.log_joint, bound + problem.log_q)
    law = capped.log_softmax(0)
    assert draws.kind == "weighted" and draws.log_weight.shape == (1, 20_000, len(problem.texts))
    check_distance(problem, draws, law)
    assert draws.cost.reward_calls == draws.proposals.num_samples * len(problem.texts)


def test_a_bound_that_no_weight_exceeds_is_rejection(problem):
    torch.manual_seed(0)
    draws = quasi_rejection(problem.target, problem.guide, problem.texts, num_samples=5000)  # the pilot meets all seven
    spread = draws.log_weight.std(1)
    assert float(spread.max()) < 1e-8
    counts = torch.stack([(draws["x"][0] == x).all(-1).double().mean(0) for x in X])
    p = problem.log_p.exp()
    assert bool(((counts - p).abs() < 4.5 * (p * (1 - p) / 5000).sqrt()).all())


# best of n


def tuples(n):
    cells = list(itertools.product(range(len(X)), repeat=n))
    return torch.tensor(cells)


def bon_law(problem, n):
    """q / (mass of its ties) · (F^n - F_^n), by the definition."""
    q, r = problem.log_q.exp(), problem.reward
    upto = torch.stack([(q * (r <= r[i])[:, None]).sum(0) for i in range(len(X))])
    below = torch.stack([(q * (r < r[i])[:, None]).sum(0) for i in range(len(X))])
    return q / (upto - below) * (upto**n - below**n)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_law_of_the_best_of_n(problem, monkeypatch, n):
    cells = tuples(n)
    problem.force(monkeypatch, X[cells].flatten(0, 1))
    made = best_of_n(problem.target, problem.guide, problem.texts, num_samples=len(cells), n=n)
    weight = problem.log_q[cells].sum(1).exp()  # of each tuple, (S, B)
    law = torch.zeros(len(X), len(problem.texts), dtype=torch.float64)
    for b in range(len(problem.texts)):
        picked = torch.tensor([INDEX[tuple(x)] for x in made["x"][0, :, b].tolist()])
        law[:, b] = torch.zeros(len(X), dtype=torch.float64).index_add(0, picked, weight[:, b])
    truth = bon_law(problem, n)
    by_reward = torch.stack([((problem.reward == r)[:, None] * (law - truth)).sum(0) for r in problem.reward.unique()])
    assert float(by_reward.abs().max()) < 1e-10  # among equals the order of a tuple decides, which is the same law:
    torch.testing.assert_close(law, truth, atol=1e-10, rtol=0)
    kl = (truth * (truth.log() - problem.log_q)).sum(0)
    assert bool((kl <= math.log(n) - (n - 1) / n + 1e-12).all())
    mutant = problem.log_q.exp()  # the first of n
    assert n == 1 or float((law - mutant).abs().max()) > 0.05


@pytest.mark.parametrize("n", [1, 2, 3])
def test_law_of_the_soft_best_of_n(problem, monkeypatch, n):
    """Every tuple with every pick forced, weighted by the probability that the production code gives the pick."""
    cells = tuples(n).repeat_interleave(n, 0)
    forced = torch.arange(n).repeat(len(cells) // n)
    batch, seen = len(problem.texts), []

    def pick(log_probs, u):
        seen.append(log_probs)
        return forced.repeat_interleave(batch)

    problem.force(monkeypatch, X[cells].flatten(0, 1))
    monkeypatch.setattr(sys.modules["ppl_lm.infer.samplers.best_of_n_sampling"], "invert", pick)
    made = best_of_n(problem.target, problem.guide, problem.texts, num_samples=len(cells), n=n, soft=True)
    (log_probs,) = seen
    chance = log_probs.gather(-1, forced.repeat_interleave(batch)[:, None]).reshape(-1, batch).exp()
    weight = problem.log_q[cells].sum(1).exp() * chance
    picked = cells.gather(1, forced[:, None]).squeeze(1)
    assert torch.equal(made["x"][0, :, 0], X[picked])
    law = torch.zeros(len(X), batch, dtype=torch.float64).index_add(0, picked, weight)
    truth = soft_law(problem, n)
    torch.testing.assert_close(law, truth, atol=1e-10, rtol=0)
    p = problem.log_p.exp()
    kl, cv2 = (
        (p * (problem.log_p - truth.log())).sum(0),
        (problem.log_q.exp() * (problem.log_w - problem.log_z).exp() ** 2),
    )
    assert bool((kl <= torch.log1p((cv2.sum(0) - 1) / n) + 1e-12).all())


def soft_law(problem, n):
    q, w = problem.log_q.exp(), problem.log_w.exp()
    others = list(itertools.product(range(len(X)), repeat=n - 1))
    law = torch.zeros_like(q)
    for rest in others:
        chance = torch.stack([q[i] for i in rest]).prod(0) if rest else torch.ones_like(q[0])
        law += n * q * chance * w / (w + sum((w[i] for i in rest), torch.zeros_like(w[0])))
    return law


@pytest.mark.parametrize("soft", [False, True])
def test_best_of_n_reports_its_own_distance(problem, soft):
    torch.manual_seed(0)
    draws = best_of_n(problem.target, problem.guide, problem.texts, num_samples=4000, n=3, soft=soft)
    law = (soft_law(problem, 3) if soft else bon_law(problem, 3)).log()
    assert draws.kind == "weighted" and draws.cost.reward_calls == 12_000 * len(problem.texts)
    check_distance(problem, draws, law)


def check_distance(problem, draws, law):
    """E[log w] is log Z - KL(law ‖ posterior), and the weights make of the draws the posterior's share of its best text."""
    n = draws.num_samples
    index = torch.tensor([[INDEX[tuple(x)] for x in row] for row in draws["x"][0].tolist()])  # (S, B)
    for b in range(len(problem.texts)):
        counts = torch.bincount(index[:, b], minlength=len(X)).double() / n
        p = law[:, b].exp()
        assert bool(((counts - p).abs() < 4.5 * (p * (1 - p) / n).sqrt()).all())
        error = draws.log_guide[0, :, b] - law[index[:, b], b]
        assert float(error.abs().max()) < 0.1 and float(error.mean().abs()) < 0.02
        log_w = draws.log_weight[0, :, b]
        elbo = problem.log_z[b] - oracle.kl(law[:, b], problem.log_p[:, b])
        within(log_w.mean(), elbo, log_w.std() / n**0.5 + 0.01)
        truth, best = problem.log_p[:, b].exp().max(0)
        is_best, share = (index[:, b] == best).double(), log_w.softmax(0)
        mean = share @ is_best
        se = (share**2 @ (is_best - mean) ** 2).sqrt()
        within(mean, truth, se + 0.002)
        assert abs(float(is_best.mean() - truth)) > 8 * float(se + 0.002)  # the mutant: the draws as the posterior's


def test_impossible_evidence_is_named():
    lm = table_lm(3, 2, concentration=1.0)
    never = bind(constrained, lm, constraint=lambda completions, **_: [False] * len(completions))
    with pytest.raises(NoSupportError, match="all weights of the guide's draws are zero"):
        quasi_rejection(never, None, [""], num_samples=5)
    with pytest.raises(NoSupportError, match="0 of 100 proposals"):
        quasi_rejection(never, None, [""], num_samples=5, log_bound=0.0, max_proposals=100)
    with pytest.raises(NoSupportError, match="raise n"):
        best_of_n(never, None, [""], num_samples=5, soft=True)
    draws = best_of_n(never, None, [""], num_samples=5)  # the best of the impossible, and known to be
    assert bool((draws.log_weight == -torch.inf).all()) and not bool(draws.log_guide.isnan().any())


@pytest.mark.parametrize(
    ("wrong", "least"), [({"num_samples": 0}, 1), ({"n": 0}, 1), ({"num_samples": 1, "soft": True}, 2)]
)
def test_bad_numbers_are_refused(wrong, least):
    lm = table_lm(3, 2)
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name}={value}; give at least {least}"):
        best_of_n(bind(tilted, lm, reward=letters), None, [""], **wrong)


def test_the_evidence_of_quasi_rejection_has_its_proposals_error():
    """Where no weight exceeds the bound all of its weights are equal: the error of log Z is the proposals', not 0."""
    lm = table_lm(5, 4, concentration=1.0, seed=3)
    target = bind(tilted, lm, reward=lambda completions, **_: [0.5 * text.count("a") for text in completions], beta=0.5)
    truth = float(enumerate_posterior(target, None, [""]).log_z[0])
    off = []
    for seed in range(60):
        torch.manual_seed(seed)
        draws = quasi_rejection(target, None, [""], num_samples=100, log_bound=4.0)  # of aaaa
        made, found = diagnose_draws(draws), log_evidence(draws)
        assert made["log_z"] == pytest.approx(float(found.log_z)) and made["log_z_se"] > 0.005
        assert float(found.elbo_se) > 0.005 and float(found.upper_se) > 0.005
        off.append((made["log_z"] - truth) / made["log_z_se"])
    assert 0.6 < float(torch.tensor(off).std()) < 1.4 and abs(sum(off)) / 60**0.5 < 3.5
