"""Objectives against enumeration: every K-tuple of particles is a column of one call, so nothing here is random.

| objective | what is proved | tolerance |
|---|---|---|
| f-divergences | value and expected gradient are those of Σ p f(q/p), for any baseline | 1e-10 |
| forward_kl, Ẑ of the others | expected gradient is Z E[1/Ẑ] ∇KL(p ‖ q), so its direction is exact | 1e-10 |
| f-divergences, Ẑ of the same particles | the expectation is the one defined; its bias falls as 1/K | 1e-10; slope -1 ± 0.1 |
| alpha | its limits are reverse KL, forward KL and χ² | 1e-10 |
| iwae | value and gradient are those of E[log mean w], K = 2, 3; monotone in K | 1e-10 |
| trajectory_balance, vargrad | on-policy the gradient of KL(q ‖ p), whatever log Zθ; 0 at the posterior | 1e-10 |
| subtb | value and gradient are those of the formula, over all pairs of prefixes; 0 at the posterior | 1e-10 |
| expected_reward | the gradient of -E[r/β] | 1e-10 |
| grpo | its parts: neither normalised nor with k3 it is β ∇KL(q ‖ p) (K - 1)/K; each alone is not 0 at the posterior | 1e-10 |
| grpo and ratios, off-policy | E_b of the paper's min(ρ A, clip(ρ) A) - β k3, differentiated as it is written | 1e-10 |
| k1, k2, k3 | means KL, not KL, KL; as losses their gradients are 0, that of KL(q ‖ prior), that of KL(prior ‖ q) | 1e-10 |

Each row but that of Ẑ from the same particles has a mutant that is rejected. What concerns objectives elsewhere:

| file | what is proved | tolerance |
|---|---|---|
| `test_elbo.py` | ELBO = log Z - KL(q ‖ p); its gradient by all pairs, three doors; that of `TraceGraph_ELBO` | 1e-8 |
| `test_evidence.py` | E_q[log Ẑ] ≤ log Z ≤ E_σ[log Ẑ] ≤ log Z + log(1 + CV²/n); the law of a text picked from n | 1e-10 |
| `test_best_of.py` | the law of the best of n, with ties; its distance from the prior | 1e-12 |
| `test_fit_objectives.py` | each objective under stock `SVI`, through `fit` and the command, one prompt and many | exact KLs |
"""

import itertools
import math
from dataclasses import dataclass, replace

import oracle
import pytest
import torch
from pyro import poutine
from torch import Tensor

from ppl_lm.guides import tabular
from ppl_lm.infer.binding import bind
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.objectives.balance import SubTB, TrajectoryBalance, vargrad
from ppl_lm.infer.objectives.baselines import (
    MovingAverage,
    constant,
    known,
    leave_one_out,
    no_baseline,
    of_others,
    of_particles,
)
from ppl_lm.infer.objectives.bounds import iwae
from ppl_lm.infer.objectives.divergences import (
    alpha_divergence,
    chi2,
    forward_kl,
    jensen_shannon,
    reverse_chi2,
    reverse_kl,
    total_variation,
)
from ppl_lm.infer.objectives.rl import GRPO, expected_reward
from ppl_lm.infer.off_policy import Proposal, Replay, Reuse
from ppl_lm.infer.terms import Estimate, Terms
from ppl_lm.lm.table import table_lm
from ppl_lm.lm.token_sequence import TokenSequence
from ppl_lm.models import tilted

V, T, END, BETA = 3, 3, 2, 0.7
TEXTS = ["", "a"]


def letters(completions, **_):
    return [text.count("a") - 0.5 * text.count("b") for text in completions]


@dataclass
class Problem:
    """A target and a tabular guide over 15 outcomes for each of two prompts, with log-probabilities by the oracle."""

    model: object
    guide: object
    table: Tensor
    outcomes: list[tuple[int, ...]]
    rows: Tensor
    log_prior: list[Tensor]
    log_joint: list[Tensor]
    log_q: list[Tensor]

    @property
    def log_p(self):
        return [joint - joint.logsumexp(0) for joint in self.log_joint]

    @property
    def log_z(self):
        return torch.stack([joint.logsumexp(0) for joint in self.log_joint])

    def sum(self, f):
        """Σ over prompts of f(log p, log q), and its gradient."""
        total = sum(f(p, q) for p, q in zip(self.log_p, self.log_q, strict=True))
        return float(total.detach()), torch.autograd.grad(total, self.table, retain_graph=True)[0]


def make(at_posterior=False, seed=2):
    lm = table_lm(V, T, max_prompt=2, concentration=1.0, seed=1)
    target = bind(tilted, lm, reward=letters, beta=BETA)
    table = table_lm(V, T, max_prompt=2, concentration=1.5, seed=seed).copy()
    outcomes = oracle.outcomes(V, T, END)
    rows = oracle.as_tensor(outcomes, T, END)
    reward = torch.tensor(letters(lm.vocabulary.decode(rows)), dtype=torch.float64) / BETA
    contexts = [tuple(lm.vocabulary.encode(text)) for text in TEXTS]
    log_prior = [oracle.log_probs(lm.model.table, c, outcomes).detach() for c in contexts]
    log_joint = [prior + reward for prior in log_prior]
    if at_posterior:
        for c, joint in zip(contexts, log_joint, strict=True):
            oracle.condition(table.model.table, c, outcomes, joint)
    log_q = [oracle.log_probs(table.model.table, c, outcomes) for c in contexts]
    return Problem(target, bind(tabular, table), table.model.table, outcomes, rows, log_prior, log_joint, log_q)


@pytest.fixture(scope="module")
def problem():
    return make()


def expected(problem, objective, count=2, baseline=leave_one_out, log_z="exact", proposal=None, **ratios):
    """Expected loss and gradient of `count` particles, over all tuples of outcomes, drawn by the guide or a proposal."""
    n = len(problem.rows)
    tuples = torch.tensor(list(itertools.product(range(n), repeat=count)))
    values = torch.cat([problem.rows[tuples].transpose(0, 1)] * len(TEXTS), 1)  # (K, columns, T)
    drawn_by = problem.log_q if proposal is None else proposal.log_q
    weights = torch.cat([b.detach()[tuples].sum(-1).exp() for b in drawn_by])
    source = None if proposal is None else Proposal(proposal.guide)
    texts = [text for text in TEXTS for _ in tuples]
    exact_z = known(problem.log_z.repeat_interleave(len(tuples)))
    z = exact_z if log_z == "exact" else log_z
    elbo = SequenceELBO(count, objective=objective, baseline=baseline, log_z=z, source=source, **ratios)
    problem.table.grad = None
    prompts = problem.model.lm.prompts(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenSequence, "sample", lambda self, sample_shape=torch.Size(): values)
        model, guide = (poutine.scale(p, scale=weights) for p in (problem.model, problem.guide))
        loss = elbo.loss_and_grads(model, guide, prompts)
    return loss, problem.table.grad.clone()


def general(kind):
    """A copy under another name, so that reverse KL too takes the path of all others."""
    return replace(kind, name=f"{kind.name}, as the others")


def same(a, b, tolerance=1e-10):
    return abs(a[0] - b[0]) < tolerance and float((a[1] - b[1]).abs().max()) < tolerance


# Textbook forms in t = q/p, as Σ p f(t); the code has them as functions of log t.
FORMULAS = {
    "reverse_kl": lambda p, q: (q.exp() * (q - p)).sum(),
    "forward_kl": lambda p, q: (p.exp() * (p - q)).sum(),
    "jensen_shannon": lambda p, q: (
        0.5 * (p.exp() * (p - ((p.exp() + q.exp()) / 2).log())).sum()
        + 0.5 * (q.exp() * (q - ((p.exp() + q.exp()) / 2).log())).sum()
    ),
    "total_variation": lambda p, q: 0.5 * (p.exp() - q.exp()).abs().sum(),
    "chi2": lambda p, q: ((p.exp() - q.exp()).square() / q.exp()).sum(),
    "reverse_chi2": lambda p, q: ((p.exp() - q.exp()).square() / p.exp()).sum(),
    "alpha": lambda p, q: ((0.5 * p + 0.5 * q).exp().sum() - 1) / (0.5 * (0.5 - 1)),
}
KINDS = [reverse_kl, forward_kl, jensen_shannon, total_variation, chi2, reverse_chi2, alpha_divergence(0.5)]


@pytest.mark.parametrize("baseline", [leave_one_out, no_baseline, constant(-1.0)], ids=["loo", "none", "constant"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_divergences_have_their_value_and_gradient(problem, kind, baseline):
    value, gradient = problem.sum(FORMULAS[kind.name])
    truth = (value if kind.needs_z else value - float(problem.log_z.sum()), gradient)  # reverse KL: -ELBO
    made = expected(problem, general(kind), baseline=baseline)  # a copy: the general path, for reverse KL too
    assert same(made, truth)
    other = make(seed=5)
    assert same(expected(problem, general(kind), baseline=baseline, proposal=other), truth), "off-policy"
    wrong = [
        replace(kind, slope=lambda log_t: 2 * kind.slope(log_t)),
        replace(kind, slope=lambda log_t: kind.slope(-log_t)),
        replace(kind, slope=lambda log_t: kind.slope(log_t) + 0.1 * log_t),
        lambda terms: kind(replace(terms, max_ratio=1.0)),
    ]
    wrong, truncated = wrong[:3], wrong[3]
    assert not same(expected(problem, truncated, baseline=baseline, proposal=other), truth, 1e-4)
    assert not any(same(expected(problem, mutant, baseline=baseline), truth, 1e-4) for mutant in wrong)


def test_own_cost_in_the_baseline_is_rejected(problem):
    def own(cost, ratio):
        return cost.mean(0, keepdim=True).expand_as(cost)

    for kind in KINDS:
        assert not same(expected(problem, general(kind), baseline=own), problem.sum(FORMULAS[kind.name]), 1e-4)


def test_reverse_kl_needs_no_evidence_and_others_do(problem):
    for kind in KINDS:
        off = expected(problem, general(kind), log_z=known(problem.log_z.repeat_interleave(225) + 0.5))
        truth = problem.sum(FORMULAS[kind.name])
        assert same((0.0, off[1]), (0.0, truth[1])) == (not kind.needs_z)


@pytest.mark.parametrize(("alpha", "other"), [(0.0, "reverse_kl"), (1.0, "forward_kl"), (2.0, "chi2")])
def test_limits_of_the_alpha_divergence(problem, alpha, other):
    value, gradient = problem.sum(FORMULAS[other])
    truth = (value / 2, gradient / 2) if other == "chi2" else (value, gradient)
    assert same(expected(problem, alpha_divergence(alpha)), truth)
    assert same(expected(problem, alpha_divergence(alpha + 1e-6)), truth, 1e-3)
    assert not same(expected(problem, alpha_divergence(alpha + 0.1)), truth, 1e-3)


def test_forward_kl_with_the_others_evidence_is_exact_in_direction(problem):
    """E[w_k / Ẑ_-k] = E[w] E[1/Ẑ_-k]: the exact gradient times one positive factor a prompt."""
    found = expected(problem, forward_kl, baseline=constant(-1.0), log_z=of_others)[1]
    truth = torch.zeros_like(found)
    for p, q, joint in zip(problem.log_p, problem.log_q, problem.log_joint, strict=True):
        factor = (q.detach() + joint.logsumexp(0) + q.detach() - joint).exp().sum()  # Z · E[1/w]
        (gradient,) = torch.autograd.grad((p.exp() * (p - q)).sum(), problem.table, retain_graph=True)
        truth += factor * gradient
    assert same((0.0, found / truth.abs().max()), (0.0, truth / truth.abs().max()))
    for mutant in ({"log_z": of_particles, "baseline": constant(-1.0)}, {"log_z": of_others}):
        assert not same((0.0, expected(problem, forward_kl, **mutant)[1]), (0.0, truth), 1e-4)


@pytest.mark.parametrize("kind", [forward_kl, jensen_shannon, chi2], ids=lambda kind: kind.name)
def test_bias_of_the_particles_own_evidence(problem, kind):
    """With Ẑ from the same particles the expectation is what the formula says, not the exact gradient; the bias falls with
    the number of particles."""
    exact_gradient, bias = problem.sum(FORMULAS[kind.name])[1], []
    for count in (2, 3):
        found = expected(problem, general(kind), count, no_baseline, of_particles)[1]
        total = torch.zeros(())
        n = len(problem.rows)
        tuples = torch.tensor(list(itertools.product(range(n), repeat=count)))
        for q, joint in zip(problem.log_q, problem.log_joint, strict=True):
            chance = q.detach()[tuples].sum(-1).exp()
            log_w = (joint - q.detach())[tuples]  # (N, K)
            t = (log_w.logsumexp(1, keepdim=True) - math.log(count) - log_w).exp()
            slope = {
                "forward_kl": -1 / t,
                "jensen_shannon": 0.5 * (2 * t / (1 + t)).log(),
                "chi2": 1 - 1 / t**2,
            }[kind.name]
            total = total + (chance * (slope * q[tuples]).mean(1)).sum()
        (defined,) = torch.autograd.grad(total, problem.table, retain_graph=True)
        assert same((0.0, found), (0.0, defined))
        bias.append(float((found - exact_gradient).norm()))
    assert bias[0] > bias[1] > 1e-4


@pytest.mark.parametrize("kind", [forward_kl, jensen_shannon, chi2], ids=lambda kind: kind.name)
def test_that_bias_falls_as_one_over_the_particles(kind):
    """Three outcomes, all ways in which K particles can fall on them, K to 64. With the others' Ẑ it falls as fast; with a
    Z that is known there is none."""
    p, q = (torch.tensor(law, dtype=torch.float64).log() for law in ([0.5, 0.3, 0.2], [0.25, 0.35, 0.4]))
    prompts = table_lm(V, T).prompts([""])

    def expected_costs(count, log_z):
        falls = torch.tensor([(i, j, count - i - j) for i in range(count + 1) for j in range(count + 1 - i)])
        x = torch.stack([torch.arange(3).repeat_interleave(n) for n in falls], 1)  # (K, columns)
        chance = (math.lgamma(count + 1) - torch.lgamma(falls.double() + 1).sum(1) + (falls * q).sum(1)).exp()
        zero = torch.zeros(x.shape, dtype=torch.float64)
        terms = Terms(prompts, zero, (p + 1.3)[x], q[x], None, log_z, no_baseline)  # log Z = 1.3
        cost = kind(terms).coefficient * chance
        return torch.stack([torch.where(x == i, cost, 0.0).mean(0).sum() for i in range(3)])

    truth = q.exp() * kind.slope(q - p)
    assert float((expected_costs(32, known(torch.tensor(1.3, dtype=torch.float64))) - truth).abs().max()) < 1e-10
    for log_z in (of_particles, of_others):
        bias = [float((expected_costs(n, log_z) - truth).norm()) for n in (32, 64)]
        assert math.log2(bias[1] / bias[0]) == pytest.approx(-1, abs=0.1)


@pytest.mark.parametrize("count", [2, 3])
def test_iwae_is_the_multi_sample_bound(problem, count):
    n = len(problem.rows)
    tuples = torch.tensor(list(itertools.product(range(n), repeat=count)))
    total = torch.zeros(())
    for q, joint in zip(problem.log_q, problem.log_joint, strict=True):
        log_w = (joint - q)[tuples]
        total = total - (q[tuples].sum(-1).exp() * (log_w.logsumexp(1) - math.log(count))).sum()
    truth = float(total.detach()), torch.autograd.grad(total, problem.table, retain_graph=True)[0]
    assert same(expected(problem, iwae, count), truth)

    def without_pathwise(terms):
        made = iwae(terms)
        return replace(made, coefficient=made.coefficient - len(terms.log_weight) * terms.log_weight.softmax(0))

    def own_in_the_baseline(terms):
        made = iwae(terms)
        log_w = terms.log_weight
        return replace(made, coefficient=made.coefficient + 0.5 * (log_w - log_w.mean(0)))

    for mutant in (without_pathwise, own_in_the_baseline):
        assert not same(expected(problem, mutant, count), truth, 1e-4)


def test_iwae_rises_from_the_elbo_to_the_evidence(problem):
    elbo = expected(problem, general(reverse_kl))[0]
    bounds = [elbo, expected(problem, iwae, 2)[0], expected(problem, iwae, 3)[0], -float(problem.log_z.sum())]
    assert bounds == sorted(bounds, reverse=True) and min(a - b for a, b in itertools.pairwise(bounds)) > 1e-3


@pytest.mark.parametrize("log_z", [-3.0, 0.0, 2.0])
def test_trajectory_balance_is_reverse_kl_on_policy(problem, log_z):
    """Whatever log Zθ is, on-policy; the loss itself depends on it."""
    truth = problem.sum(FORMULAS["reverse_kl"])[1]

    def at(value):
        made = TrajectoryBalance()
        made.log_z = dict.fromkeys(problem.model.lm.prompts(TEXTS).identities(), value)
        return made

    assert same((0.0, expected(problem, at(log_z))[1]), (0.0, truth))
    assert same((0.0, expected(problem, TrajectoryBalance())[1]), (0.0, truth)), "the first step, log Zθ unknown"
    doubled = lambda terms: replace(at(log_z)(terms), coefficient=2 * at(log_z)(terms).coefficient)  # noqa: E731
    assert not same((0.0, expected(problem, doubled)[1]), (0.0, truth), 1e-4)


def test_trajectory_balance_learns_the_evidence():
    problem = make(at_posterior=True)
    made, prompts = TrajectoryBalance(rate=0.3), problem.model.lm.prompts(TEXTS)
    elbo = SequenceELBO(4, objective=made)
    loss = [elbo.loss(problem.model, problem.guide, prompts) for _ in range(3)]
    assert torch.tensor(loss).abs().max() < 1e-20
    assert [made.log_z[key] for key in prompts.identities()] == pytest.approx(problem.log_z.tolist(), abs=1e-10)


def test_vargrad_is_reverse_kl_on_policy(problem):
    truth = problem.sum(FORMULAS["reverse_kl"])[1]
    for count in (2, 3):
        assert same((0.0, expected(problem, vargrad, count)[1]), (0.0, truth))
        biased = lambda terms, k=count: replace(vargrad(terms), coefficient=vargrad(terms).coefficient * (k - 1) / k)  # noqa: E731
        assert not same((0.0, expected(problem, biased, count)[1]), (0.0, truth), 1e-4)


@pytest.mark.parametrize("objective", ["trajectory_balance", "vargrad"])
def test_off_policy_balance_is_the_gradient_of_its_own_loss(problem, objective):
    """Whatever drew the texts, no importance ratios: ½ E_b[δ²], or half the variance of log q/P under b."""
    other, total, log_z = make(seed=5), torch.zeros(()), [0.3, -0.4]
    for q, joint, b, z in zip(problem.log_q, problem.log_joint, other.log_q, log_z, strict=True):
        b, gap = b.detach().exp(), q - joint
        centre = -z if objective == "trajectory_balance" else (b * gap).sum()
        total = total + 0.5 * (b * (gap - centre).square()).sum()
    truth = float(total.detach()), torch.autograd.grad(total, problem.table, retain_graph=True)[0]
    balance = TrajectoryBalance()

    def loss(terms):
        balance.log_z = dict(zip(problem.model.lm.prompts(TEXTS).identities(), log_z, strict=True))  # unmoved
        return vargrad(terms) if objective == "vargrad" else balance(terms)

    assert same(expected(problem, loss, proposal=other), truth)
    ratios = lambda terms: replace(loss(terms), coefficient=terms.ratio * loss(terms).coefficient)  # noqa: E731
    assert not same((0.0, expected(problem, ratios, proposal=other)[1]), (0.0, truth[1]), 1e-4)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_subtb_is_its_formula(problem, decay):
    """Walked prefix by prefix: every prefix of a text, ended, is an outcome whose log weight the oracle knows."""
    total = torch.zeros(())
    for q, joint in zip(problem.log_q, problem.log_joint, strict=True):
        weight = dict(zip(problem.outcomes, joint - q, strict=True))
        for text, chance in zip(problem.outcomes, q.detach().exp(), strict=True):
            letters_only = [token for token in text if token != END]
            u = [weight[(*letters_only[:i], END) if i < T else text] for i in range(len(letters_only) + 1)]
            pairs = [(j, i) for j in range(len(u)) for i in range(j)]
            if pairs:
                norm = sum(decay ** (j - i - 1) for j, i in pairs)
                total = total + chance * sum(decay ** (j - i - 1) * (u[i] - u[j]) ** 2 for j, i in pairs) / norm
    truth = float(total.detach()), torch.autograd.grad(total, problem.table, retain_graph=True)[0]
    assert same(expected(problem, SubTB(decay)), truth)

    def ends_forgotten(terms):
        return replace(SubTB(decay)(terms), end_coefficient=None)

    def one_late(terms):
        made = SubTB(decay)(terms)
        return replace(made, coefficient=made.coefficient.roll(1, -1))

    for mutant in (ends_forgotten, one_late, SubTB(1.5 - decay)):
        assert not same((0.0, expected(problem, mutant)[1]), (0.0, truth[1]), 1e-4)


@pytest.mark.parametrize("objective", [SubTB(), SubTB(0.3), vargrad, TrajectoryBalance(), *KINDS[:6]])
def test_nothing_is_left_to_learn_at_the_posterior(objective):
    """Off-policy objectives and divergences: each single draw's loss and gradient vanish there, not only their means."""
    posterior = make(at_posterior=True)
    z = known(posterior.log_z)
    elbo = SequenceELBO(5, objective=general(objective) if objective in KINDS else objective, log_z=z)
    loss = elbo.loss_and_grads(posterior.model, posterior.guide, posterior.model.lm.prompts(TEXTS))
    value = -float(posterior.log_z.sum()) if objective is reverse_kl else 0.0
    assert abs(loss - value) < 1e-10 and float(posterior.table.grad.abs().max()) < 1e-10


def test_objectives_that_need_the_guides_own_draws_say_so(problem):
    prompts = problem.model.lm.prompts(TEXTS)
    with pytest.raises(ValueError, match="cannot use others; off-policy use"):
        elbo = SequenceELBO(3, objective=iwae, source=Proposal(make(seed=5).guide))
        elbo.loss(problem.model, problem.guide, prompts)
    for kind in (forward_kl, reverse_kl, expected_reward, GRPO(BETA)):
        elbo = SequenceELBO(3, objective=kind, source=Replay())
        with pytest.raises(ValueError, match="use trajectory_balance, vargrad or subtb"):
            elbo.loss(problem.model, problem.guide, prompts)


@pytest.mark.parametrize(
    "ratios", [{}, {"max_ratio": 1.3}, {"clip_ratio": 0.2}, {"max_ratio": 1.5, "clip_ratio": 0.4}], ids=str
)
def test_truncated_and_clipped_ratios(problem, ratios):
    """Off-policy: E_b of the surrogate differentiated as it is written, min(ρ A, clip(ρ) A) for a text with A = -cost."""
    other, cap, clip = make(seed=5), ratios.get("max_ratio", 1e9), ratios.get("clip_ratio", math.inf)

    def surrogate(p, q, b):
        ratio = (q - b).exp()
        ratio = torch.where(ratio > cap, cap * (q - q.detach()).exp(), ratio)  # truncated: a weight, not a maximum
        advantage = -(q - p).detach() - 1.0  # against a constant baseline of -1
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        return -(b.exp() * gain).sum()

    total = sum(surrogate(p, q, b.detach()) for p, q, b in zip(problem.log_p, problem.log_q, other.log_q, strict=True))
    (truth,) = torch.autograd.grad(total, problem.table, retain_graph=True)
    kind, at_z = replace(reverse_kl, needs_z=True), "exact"
    made = expected(problem, kind, baseline=constant(-1.0), log_z=at_z, proposal=other, **ratios)[1]
    assert same((0.0, made), (0.0, truth))
    unlike = expected(problem, kind, baseline=constant(-1.0), log_z=at_z, proposal=other, max_ratio=0.9, clip_ratio=0.1)
    assert not same((0.0, unlike[1]), (0.0, truth), 1e-4)


@pytest.mark.parametrize("ratios", [{}, {"clip_ratio": 0.2}], ids=str)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("kl_in_reward", [True, False])
def test_grpo_off_policy_is_its_papers_surrogate(problem, kl_in_reward, normalise, ratios):
    """E_b over all pairs of mean_k Σ_t min(ρ_t A_k, clip(ρ_t) A_k) - β k3_t, by autograd through the tokens."""
    other, count, clip = make(seed=5), 2, ratios.get("clip_ratio", math.inf)
    pairs, total = torch.tensor(list(itertools.product(range(len(problem.rows)), repeat=count))), torch.zeros(())
    for i, text in enumerate(TEXTS):
        context = tuple(problem.model.lm.vocabulary.encode(text))
        q, b, p0 = (oracle.token_log_probs(t, context, problem.outcomes) for t in _tables(problem, other))
        reward = BETA * (problem.log_joint[i] - problem.log_prior[i])
        advantage = reward[pairs] - reward[pairs].mean(1, keepdim=True)
        if normalise:
            advantage = advantage / (reward[pairs].std(1, keepdim=True) + 1e-4)
        k1 = (q - p0).sum(-1).detach()[pairs]
        if kl_in_reward:
            advantage = advantage - BETA * (k1 - k1.mean(1, keepdim=True))
        ratio, a = (q - b.detach()).exp()[pairs], advantage.unsqueeze(-1)  # (N, K, T), (N, K, 1)
        gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a).sum(-1)
        if not kl_in_reward:
            gain = gain - BETA * ((p0 - q).exp() - 1 - (p0 - q)).sum(-1)[pairs]
        total = total - (b.detach().sum(-1)[pairs].sum(1).exp() * gain.mean(1)).sum()
    (truth,) = torch.autograd.grad(total, problem.table, retain_graph=True)
    made = expected(problem, GRPO(BETA, normalise, kl_in_reward), count, proposal=other, **ratios)[1]
    assert same((0.0, made), (0.0, truth))
    mutant = expected(problem, GRPO(BETA, normalise, kl_in_reward), count, proposal=other, clip_ratio=0.4)[1]
    assert not same((0.0, mutant), (0.0, truth), 1e-4)


def _tables(problem, other):
    return problem.table, other.table, problem.model.lm.model.table


@pytest.mark.parametrize("kind", [general(reverse_kl), forward_kl, jensen_shannon], ids=lambda kind: kind.name)
def test_one_particle_has_the_exact_gradient_too(problem, kind):
    truth = problem.sum(FORMULAS[kind.name.split(",")[0]])[1]
    assert same((0.0, expected(problem, kind, 1, no_baseline)[1]), (0.0, truth))


@pytest.mark.parametrize("objective", [TrajectoryBalance(), forward_kl, general(reverse_kl), SubTB()])
def test_one_particle_and_what_was_found_before(objective):
    """With a moving baseline; the moving Z is unknown at the first step, from which forward KL learns nothing then."""
    torch.manual_seed(0)
    problem, losses = make(), []
    elbo = SequenceELBO(1, objective=objective, baseline=MovingAverage())
    for _ in range(3):
        losses.append(elbo.loss_and_grads(problem.model, problem.guide, problem.model.lm.prompts(TEXTS)))
        assert bool(problem.table.grad.isfinite().all())
        assert objective is not forward_kl or len(losses) > 1 or not bool(problem.table.grad.any())
    assert all(math.isfinite(loss) for loss in losses[1:]) and bool(problem.table.grad.any())


def test_one_particle_where_texts_are_compared_is_refused(problem):
    for objective in (iwae, vargrad, GRPO(BETA)):
        elbo = SequenceELBO(1, objective=objective, baseline=no_baseline)
        with pytest.raises(ValueError, match="give num_particles of at least 2"):
            elbo.loss(problem.model, problem.guide, problem.model.lm.prompts(TEXTS))


def test_reuse_draws_once_for_several_updates(problem, monkeypatch):
    drawn, sample = [], TokenSequence.sample

    def count(self, sample_shape=torch.Size()):
        drawn.append(sample(self, sample_shape))
        return drawn[-1]

    monkeypatch.setattr(TokenSequence, "sample", count)
    elbo = SequenceELBO(4, objective=forward_kl, source=Reuse(3))
    for text, total in [("", 1), ("", 1), ("", 1), ("", 2), ("a", 3), ("a", 3)]:
        elbo.loss_and_grads(problem.model, problem.guide, problem.model.lm.prompts([text]))
        assert len(drawn) == total
    problem.table.grad = None


def test_replay_keeps_the_most_probable_texts():
    torch.manual_seed(0)
    problem = make()
    replay, prompts = Replay(capacity=6, share=0.5), problem.model.lm.prompts(TEXTS)
    elbo = SequenceELBO(8, objective=vargrad, source=replay)
    for _ in range(40):
        elbo.loss(problem.model, problem.guide, prompts)
    for key, joint in zip(prompts.identities(), problem.log_joint, strict=True):
        best = {tuple(problem.rows[i].tolist()) for i in joint.topk(6).indices}
        assert set(replay.kept[*key, T]) == best and len(replay.kept) == 2
    assert {tuple(x) for x in replay.x[:4, 0].tolist()} <= set(replay.kept[*prompts.identities()[0], T])


@pytest.mark.parametrize("better", [True, False])
def test_the_proposal_follows_the_guide_only_where_it_is_better(better):
    torch.manual_seed(0)
    near, far = make(at_posterior=True), make(seed=5)
    guide, program = (near.guide, far.guide) if better else (far.guide, near.guide)
    proposal = Proposal(program, every=40)
    elbo = SequenceELBO(16, objective=forward_kl, source=proposal)
    prompts = near.model.lm.prompts(TEXTS)
    for _ in range(40):
        elbo.loss(near.model, guide, prompts)
    assert proposal.taken_over == int(better)
    assert torch.equal(proposal.program.lm.model.table, guide.lm.model.table) == better


def test_expected_reward(problem):
    total = sum(
        -(q.exp() * (j - a)).sum() for q, j, a in zip(problem.log_q, problem.log_joint, problem.log_prior, strict=True)
    )
    truth = float(total.detach()), torch.autograd.grad(total, problem.table, retain_graph=True)[0]
    assert same(expected(problem, expected_reward), truth)
    assert not same(expected(problem, general(reverse_kl)), truth, 1e-4)


def test_grpo_in_parts(problem):
    """Neither normalised nor with k3: KL-regularised RL, scaled by (K - 1)/K since the mean is the group's own."""
    truth = problem.sum(FORMULAS["reverse_kl"])[1]
    for count in (2, 3):
        plain = expected(problem, GRPO(BETA, normalise=False, kl_in_reward=True), count)[1]
        assert same((0.0, plain / (BETA * (count - 1) / count)), (0.0, truth))
        for changed in (GRPO(BETA, normalise=True, kl_in_reward=True), GRPO(BETA, normalise=False)):
            assert not same(
                (0.0, expected(problem, changed, count)[1] / (BETA * (count - 1) / count)), (0.0, truth), 1e-4
            )


def test_estimators_of_the_kl_and_their_gradients_as_losses(problem):
    """k1 = log q/p0, k2 = k1²/2, k3 = p0/q - 1 + k1, x ~ q; as losses they are differentiated for a fixed draw."""

    def as_loss(value, slope):
        def loss(terms):
            k1 = terms.log_guide - terms.log_prior
            return Estimate(value(k1).mean(0), slope(k1))

        return expected(problem, loss)

    def of_prior(f):
        total = sum(f(prior, q) for prior, q in zip(problem.log_prior, problem.log_q, strict=True))
        return float(total.detach()), torch.autograd.grad(total, problem.table, retain_graph=True)[0]

    reverse, forward = (of_prior(FORMULAS[name]) for name in ("reverse_kl", "forward_kl"))
    zero = torch.zeros_like(reverse[1])
    made = {
        "k1": as_loss(lambda k: k, torch.ones_like),
        "k2": as_loss(lambda k: 0.5 * k.square(), lambda k: k),
        "k3": as_loss(lambda k: torch.expm1(-k) + k, lambda k: -torch.expm1(-k)),
    }
    assert same(made["k1"], (reverse[0], zero))
    assert same(made["k3"], (reverse[0], forward[1]))
    assert same((0.0, made["k2"][1]), (0.0, reverse[1])) and abs(made["k2"][0] - reverse[0]) > 1e-3
    assert not same((0.0, made["k3"][1]), (0.0, reverse[1]), 1e-3)


@pytest.mark.parametrize("changed", [{"normalise": True, "kl_in_reward": True}, {"normalise": False}, {}])
def test_grpo_moves_away_from_the_posterior(changed):
    """Its expected gradient there is not 0; without either departure each draw's is, on average."""
    posterior = make(at_posterior=True)
    assert float(expected(posterior, GRPO(BETA, **changed))[1].abs().max()) > 1e-3
    plain = expected(posterior, GRPO(BETA, normalise=False, kl_in_reward=True))[1]
    assert float(plain.abs().max()) < 1e-10
