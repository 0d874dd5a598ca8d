"""SMC over text, held against every outcome of its random choices; no seed where that is possible.

| what | property | tolerance |
|---|---|---|
| resampling rules | E[Σ w' 1(n)] = w_n; with a survivor, the law of SMC given it | 1e-10 |
| `smc` | E[weight of each text] = p(x, evidence), so E[Ẑ] = Z: twists, proposals, rules, thresholds, expansion | 1e-10 |
| `conditional_smc` | E[1/Ẑ] = 1/Z, and a particle by weight is the posterior's | 1e-10 |
| exact twist | every weight is Z | variance < 1e-20 |
| `stats` of a run | log Ẑ increments sum to log Ẑ; ESS (Σ w)² / Σ w² of each step's weights | 1e-12; 1e-10 |
| networks | log p0 of the texts from the cache = scored again; tokens forwarded = prompts + open texts | 1e-10; exact |

Mutants that are rejected: weights not reset, weights lost where nothing is resampled, ended texts left out, no division by
`expand`, twist taken for the evidence, a planted text that stays where it was; increments without the evidence, or of the
weights before they are resampled; an ESS of the weights after.
"""

import itertools
import math
import sys
from dataclasses import replace

import oracle
import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
import walk

from ppl_lm.criticism.diagnoses.draws_diagnosis import diagnose_draws
from ppl_lm.criticism.evidence import log_evidence
from ppl_lm.experiments.local_masking import answers
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import NoSupportError, concatenate
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.conditional import conditional_smc
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.kernels import particle_gibbs
from ppl_lm.infer.samplers.markov_chains import mcmc
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.resampling import Resampled, multinomial, stratified, systematic, without_replacement
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.twists.functions import exact_twist, prefix_likelihood, tempered
from ppl_lm.lm import meter
from ppl_lm.lm.table import table_lm
from ppl_lm.models import constrained, tilted

BETA = 0.7
# The package's names of two of these modules are those of their functions.
GROW, POPULATION, SMC, CONDITIONAL = (
    sys.modules[f"ppl_lm.infer.samplers.{name}"] for name in ("next_tokens", "population", "sequential", "conditional")
)
TEXTS = ["", "a"]
RULES = [multinomial, stratified, systematic, without_replacement]


def letters(completions, **_):
    return [text.count("a") - 0.5 * text.count("b") for text in completions]


class World:
    """A posterior over few texts, known by enumeration, with a guide and twists good and bad."""

    def __init__(self, size, steps, gaps=False):
        """:param gaps: whether the prior finds some texts impossible that the guide draws."""
        self.lm = table_lm(size, steps, max_prompt=2, concentration=1.0, seed=1)
        if gaps:
            with torch.no_grad():
                self.lm.model.table[3::2, 1] = -torch.inf
        rows = oracle.outcomes(size, steps, size - 1)
        self.x, self.steps, self.size = oracle.as_tensor(rows, steps, size - 1), steps, size
        self.model = bind(tilted, self.lm, reward=letters, beta=BETA)
        self.guide = bind(finetuned, table_lm(size, steps, max_prompt=2, concentration=2.0, seed=2).copy())
        contexts = [tuple(self.lm.vocabulary.encode(text)) for text in TEXTS]
        self.reward = torch.tensor(letters(self.lm.vocabulary.decode(self.x)), dtype=torch.float64)
        log_prior = torch.stack([oracle.log_probs(self.lm.model.table.detach(), c, rows) for c in contexts], 1)
        self.joint = log_prior + self.reward[:, None] / BETA  # (N, B)
        self.z = self.joint.logsumexp(0).exp()
        self.twists = {
            "none": None,
            "likelihood": prefix_likelihood(self.model),
            "tempered": tempered(prefix_likelihood(self.model), 3),
            "network": table_lm(size, steps, max_prompt=2, concentration=1.0, seed=3),
            "exact": exact_twist(self.model, TEXTS),
            "hopeless": lambda prompts, x, n: torch.where(n == steps, 0.0, 3.0 * (x[:, 0] == 1)),
            "half blind": lambda prompts, x, n: torch.where((n == 1) & (x[:, 0] == 0), -8.0, 0.0),
        }

    def which(self, x):
        """Row of each text in `x`."""
        return (x.unsqueeze(-2) == self.x).all(-1).long().argmax(-1)

    def by_text(self, log_w, x):
        """Mean weight that falls on each text, (C, B, N), of particles along dim 1 of (C, K, B)."""
        hit = torch.nn.functional.one_hot(self.which(x), len(self.x)).double()  # (C, K, B, N)
        return (hit * log_w.exp().unsqueeze(-1)).sum(1) / log_w.shape[1]


SMALL, LONG, TINY, ONE = World(3, 2), World(2, 4), World(2, 2), World(2, 1)
LM, MODEL, GUIDE, JOINT, REWARD, Z, TWISTS, V, T = (
    SMALL.lm, SMALL.model, SMALL.guide, SMALL.joint, SMALL.reward, SMALL.z, SMALL.twists, SMALL.size, SMALL.steps,
)  # fmt: skip


def expected_weights(monkeypatch, world=SMALL, guide=None, resample=systematic, count=2, **settings):
    """E[(1/K) Σ_k w_k 1(x_k = x)] of each text and prompt, (N, B), over all that SMC can choose."""

    def program(w, runs):
        with monkeypatch.context() as patch:
            patch.setattr(GROW, "choose", w.choose)
            patch.setattr(SMC, "texts_a_piece", lambda *_: 10**9)
            patch.setattr(POPULATION, "_needed", w.needed(POPULATION._needed))
            how = SMCSettings(resample=w.rule(resample), **settings)
            made = smc(world.model, guide, TEXTS, num_samples=count, num_runs=runs, settings=how)
        return world.by_text(made.log_weight, made["x"])

    found = walk.explore(program, len(TEXTS))
    return torch.stack([sum(chance * value for chance, value in each) for each in found], 1)


def conditional_expectations(monkeypatch, world=SMALL, guide=None, resample=systematic, count=2, **settings):
    """E[1/Ẑ] and the law of a particle by weight, over all posterior texts to plant and all choices."""
    inverse, law = torch.zeros(len(TEXTS), dtype=torch.float64), torch.zeros_like(world.joint)
    some = importance(world.model, None, TEXTS, num_samples=2)
    for i, x in enumerate(world.x):

        def program(w, runs, x=x):
            flat = torch.zeros(1, runs, len(TEXTS), dtype=torch.float64)
            planted = replace(
                some,
                latents={"x": x.expand(1, runs, len(TEXTS), world.steps)},
                log_prior=flat,
                log_likelihood=flat,
                log_guide=flat,
                kind="exact",
            )
            with monkeypatch.context() as patch:
                patch.setattr(GROW, "choose", w.choose)
                patch.setattr(POPULATION, "_anywhere", w.anywhere)
                patch.setattr(POPULATION, "_needed", w.needed(POPULATION._needed))
                patch.setattr(CONDITIONAL, "ROWS", 10**9)
                how = SMCSettings(resample=w.rule(resample), **settings)
                made = conditional_smc(world.model, guide, planted, num_samples=count, settings=how)
            assert made.kind == "conditional_runs" and bool((made["x"] == x).all(-1).any(1).all())  # it is still there
            torch.testing.assert_close(made.weights * len(made.weights), made.log_weight.softmax(1), atol=1e-12, rtol=0)
            return world.by_text(made.log_weight, made["x"])

        for b, each in enumerate(walk.explore(program, len(TEXTS))):
            posterior = world.joint[i, b].exp() / world.z[b]
            for chance, value in each:
                inverse[b] += posterior * chance / value.sum()
                law[:, b] += posterior * chance * value / value.sum()
    return inverse, law


CASES = [
    dict(twist=twist, threshold=threshold, resample=rule)
    for twist, threshold, rule in [
        ("none", 0.0, systematic),
        *itertools.product(["likelihood", "network", "exact"], [2.0], RULES[:3]),
        *itertools.product(["likelihood", "tempered", "network", "hopeless", "half blind"], [0.0, 0.75], [systematic]),
    ]
] + [
    dict(world=LONG, twist="likelihood", threshold=2.0, resample=systematic),
    dict(world=LONG, twist="likelihood", threshold=0.9, resample=stratified),
    dict(world=LONG, twist="network", threshold=2.0, resample=systematic),
    dict(twist="likelihood", candidates=1, threshold=2.0),
    dict(twist="likelihood", candidates=2, threshold=0.75, resample=multinomial),
    dict(twist="half blind", candidates=1, threshold=2.0),
    dict(twist="network", candidates=2, threshold=2.0, resample=stratified),
    dict(twist="exact", candidates=3, threshold=2.0),
    dict(twist="none", guide=True, threshold=2.0),
    dict(twist="likelihood", guide=True, threshold=2.0, resample=stratified),
    dict(twist="network", guide=True, threshold=0.75),
    dict(world=TINY, twist="likelihood", expand=2, resample=without_replacement),
    dict(world=TINY, twist="network", expand=2, resample=without_replacement),
    dict(world=TINY, twist="likelihood", expand=2, resample=systematic, guide=True),
    dict(world=TINY, twist="likelihood", expand=2, resample=without_replacement, candidates=2),
]  # fmt: skip


def name_of(case):
    parts = [case["twist"], case.get("threshold", 0.5), case.get("resample", systematic).__name__]
    parts += [f"{k}={case[k]}" for k in ("candidates", "expand") if k in case]
    return "-".join(map(str, parts + ["guide"] * ("guide" in case) + ["long"] * (case.get("world") is LONG)))


def settings_of(case):
    world = case.get("world", SMALL)
    return {**case, "twist": world.twists[case["twist"]], "guide": world.guide if "guide" in case else None}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_weight_of_every_text_is_unbiased(case, monkeypatch):
    found = expected_weights(monkeypatch, **settings_of(case))
    torch.testing.assert_close(found, case.get("world", SMALL).joint.exp(), atol=1e-10, rtol=1e-10)


AROUND = [case for case in CASES if "expand" not in case] + [
    dict(world=TINY, twist="network", expand=2, resample=without_replacement),
    *(dict(world=ONE, twist="likelihood", expand=3, resample=rule) for rule in RULES[1:]),
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow if name_of(c).endswith("-long") else ()) for c in AROUND],
    ids=name_of,
)
def test_around_posterior_texts_the_inverse_is_unbiased_and_the_posterior_kept(case, monkeypatch):
    inverse, law = conditional_expectations(monkeypatch, **settings_of(case))
    world = case.get("world", SMALL)
    torch.testing.assert_close(inverse, 1 / world.z, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(law, world.joint.softmax(0), atol=1e-10, rtol=1e-10)


def reset_forgotten(log_w, count, u=None, through=None):
    made = systematic(log_w, count, u, through)
    return Resampled(made.index, log_w.gather(0, made.index), made.slot)


reset_forgotten.__name__ = "systematic"


def weights_lost(log_w, count, u=None, through=None):
    made = systematic(log_w, count, u, through)
    return Resampled(made.index, torch.zeros_like(made.log_w), made.slot)


weights_lost.__name__ = "systematic"


@pytest.mark.parametrize("mutant", [reset_forgotten, weights_lost])
def test_a_rule_that_mistakes_its_weights_is_rejected(mutant, monkeypatch):
    found = expected_weights(monkeypatch, twist=TWISTS["likelihood"], threshold=2.0, resample=mutant)
    assert (found / JOINT.exp() - 1).abs().max() > 0.05


@pytest.mark.parametrize("mutant", ["ended texts are left out", "no division by expand", "twist for the evidence"])
def test_a_wrong_weight_is_rejected(mutant, monkeypatch):
    settings = dict(twist=TINY.twists["network"] if "expand" in mutant else TWISTS["network"], threshold=2.0)
    right = POPULATION._select
    if mutant == "ended texts are left out":

        def select(log_w, open_, *rest):
            return right(log_w.masked_fill(~open_ & open_.any(0), -torch.inf), open_, *rest)

        monkeypatch.setattr(POPULATION, "_select", select)
    if mutant == "no division by expand":
        settings |= dict(world=TINY, expand=2, resample=without_replacement)
        monkeypatch.setattr(POPULATION.math, "log", lambda v: 0.0)
    if mutant == "twist for the evidence":
        finish = SMC.finish

        def wrong(model, prompts, population, *rest):
            return finish(model, prompts, replace(population, log_target=population.token_log_p.sum(-1)), *rest)

        monkeypatch.setattr(SMC, "finish", wrong)
    found = expected_weights(monkeypatch, **settings)
    assert (found / settings.get("world", SMALL).joint.exp() - 1).abs().max() > 0.05


def test_a_planted_text_that_stays_where_it_was_is_rejected(monkeypatch):
    """Stratified resampling puts it where its share of the weights puts it."""

    def stays(log_w, count, u=None, through=None):
        made = stratified(log_w, count, u)
        index = made.index.scatter(0, through.unsqueeze(0), through.unsqueeze(0))
        return Resampled(index, made.log_w, through)

    stays.__name__ = "multinomial"  # all its uniform numbers are looked at
    inverse, law = conditional_expectations(monkeypatch, twist=TWISTS["likelihood"], threshold=2.0, resample=stays)
    far = max(float((inverse * Z - 1).abs().max()), float((law - JOINT.softmax(0)).abs().max()))
    assert far > 1e-3


def test_a_planted_text_that_is_always_its_first_continuation_is_rejected(monkeypatch):
    """Where it stands among them is for chance: a rule may look at their order."""
    right = walk.Walk.anywhere

    def wrong(self, count, columns, device):
        return right(self, count, columns, device) * (0 if count == 3 else 1)

    monkeypatch.setattr(walk.Walk, "anywhere", wrong)
    inverse, law = conditional_expectations(
        monkeypatch, world=ONE, twist=ONE.twists["likelihood"], expand=3, resample=stratified
    )
    assert float((law - ONE.joint.softmax(0)).abs().max()) > 1e-3 or float((inverse * ONE.z - 1).abs().max()) > 1e-3


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("w", [[0.1, 3.0, 0.4], [0.0, 1.0, 2.0], [1.0, 0.0, 0.0], [2.0, 0.5, 0.5, 0.7]])
def test_what_a_rule_does(rule, w, monkeypatch):
    """E[w'] = w, and for each survivor n: P(index, slot | n) w_n = P(index) w'_slot 1(index[slot] = n)."""
    log_w, count = torch.tensor(w, dtype=torch.float64).log(), 2

    def outcomes(through=None):
        def program(walker, runs):
            columns = log_w[:, None].expand(-1, runs).contiguous()
            planted = None if through is None else torch.full((runs,), through)
            made = walker.rule(rule)(columns, count, through=planted)
            slot = [-1] * runs if made.slot is None else made.slot.tolist()
            return [[(tuple(made.index[:, r].tolist()), slot[r], made.log_w[:, r].exp())] for r in range(runs)]

        return walk.explore(program)[0]

    joint, weights = {}, torch.zeros(len(w), dtype=torch.float64)
    for chance, (index, _, made) in outcomes():
        for slot, n in enumerate(index):
            weights[n] += chance * made[slot]
            joint[n, index, slot] = joint.get((n, index, slot), 0.0) + chance * float(made[slot])
    torch.testing.assert_close(weights, log_w.exp(), atol=1e-12, rtol=1e-12)
    for n in range(len(w)):
        if w[n] == 0:
            continue
        given = {}
        for chance, (index, slot, _) in outcomes(n):
            assert index[slot] == n
            given[index, slot] = given.get((index, slot), 0.0) + chance
        expected = {(i, s): v / w[n] for (m, i, s), v in joint.items() if m == n and v > 0}
        for key in given.keys() | expected.keys():
            assert abs(given.get(key, 0.0) - expected.get(key, 0.0)) < 1e-10, key


STEPS = {
    "nothing resampled": dict(threshold=0.0, twist=TWISTS["likelihood"]),
    "always": dict(threshold=2.0, twist=TWISTS["likelihood"], resample=multinomial),
    "half": dict(twist=TWISTS["likelihood"], threshold=0.7),
    "expanded": dict(twist=TWISTS["likelihood"], expand=2, resample=without_replacement),
    "no twist": dict(),
}


def steps_of(draws, name):
    """(C, B, T)"""
    value = draws.stats[name]
    assert value.shape == (len(draws.log_guide), 1, len(draws.prompts), draws["x"].shape[-1])
    return value[:, 0]


@pytest.mark.parametrize("how", STEPS)
def test_the_increments_of_a_run_sum_to_its_log_z(how):
    """Also of runs that grow around a text, and of those that lose all weight on the way or at the end."""
    settings = SMCSettings(**STEPS[how])
    draws = smc(MODEL, None, TEXTS, num_samples=5, num_runs=30, settings=settings)
    planted = rejection(MODEL, None, TEXTS, num_samples=20, log_bound=T / BETA)
    rare = bind(constrained, LM, constraint=lambda completions: [text.split() == ["a", "b"] for text in completions])
    begins_with_a = lambda prompts, x, n: torch.where(x[:, 0] == 0, 0.0, -torch.inf)  # noqa: E731
    for made in (
        draws,
        conditional_smc(MODEL, None, planted, num_samples=5, settings=settings),
        smc(rare, None, TEXTS, num_samples=4, num_runs=60),
        smc(MODEL, None, TEXTS, num_samples=2, num_runs=60, settings=SMCSettings(begins_with_a, threshold=2.0)),
    ):
        log_z = made.log_weight.logsumexp(1) - math.log(made.log_weight.shape[1])  # (C, B)
        torch.testing.assert_close(steps_of(made, "log_z_increment").sum(-1), log_z, atol=1e-12, rtol=0)
    assert bool((log_z == -torch.inf).any()) and bool((log_z > -torch.inf).any())


@pytest.mark.parametrize("how", STEPS)
def test_the_effective_sample_size_is_that_of_the_weights_before_they_are_resampled(how, monkeypatch):
    """(Σ w)² / Σ w² of each step's weights, and where the rule was asked; the last of the draws' own weights."""
    settings, direct, asked = SMCSettings(**STEPS[how]), [], []
    right = POPULATION._select

    def select(log_w, *rest):
        w = log_w.exp()
        direct.append(w.sum(0) ** 2 / w.square().sum(0))
        asked.append(torch.zeros(log_w.shape[1], dtype=torch.bool))
        return right(log_w, *rest)

    needed = POPULATION._needed

    def seen(*args):
        asked[-1] = needed(*args)
        return asked[-1]

    monkeypatch.setattr(POPULATION, "_select", select)
    monkeypatch.setattr(POPULATION, "_needed", seen)
    draws = smc(MODEL, None, TEXTS, num_samples=8, num_runs=50, settings=settings)
    ess, resampled = steps_of(draws, "ess"), steps_of(draws, "resampled")
    for t in range(T):
        assert torch.equal(resampled[..., t].flatten(), asked[t])
        if t < T - 1:
            torch.testing.assert_close(ess[..., t].flatten(), direct[t], atol=1e-10, rtol=0)
    w = draws.log_weight.exp()
    torch.testing.assert_close(ess[..., -1], w.sum(1) ** 2 / w.square().sum(1), atol=1e-10, rtol=0)
    if how in ("always", "expanded"):
        assert bool(resampled[..., 0].all())
    elif how in ("nothing resampled", "no twist"):
        assert not bool(resampled.any())
    else:
        assert 0 < int(resampled.sum()) < resampled.numel()


@pytest.mark.parametrize(
    "mutant", ["evidence left out", "of the weights before they are resampled", "ESS after resampling"]
)
def test_wrong_steps_are_rejected(mutant, monkeypatch, unchecked):
    right, select = SMC._by_token, POPULATION._select
    if mutant == "evidence left out":
        monkeypatch.setattr(SMC, "_by_token", lambda before, after, *rest: right(before, before, *rest))
    if mutant == "of the weights before they are resampled":
        weights = []
        monkeypatch.setattr(
            POPULATION, "_select", lambda log_w, *rest: (weights.append(log_w), select(log_w, *rest))[1]
        )
        increment = POPULATION.log_z_increment
        monkeypatch.setattr(
            POPULATION,
            "log_z_increment",
            lambda before, after: increment(before, weights[-1]) + math.log(len(weights[-1]) / len(before)),
        )
    if mutant == "ESS after resampling":
        monkeypatch.setattr(POPULATION, "kong_ess", lambda log_w: torch.full_like(log_w[0], 5.0))
    with pytest.raises(AssertionError):
        test_the_increments_of_a_run_sum_to_its_log_z("expanded")
        test_the_effective_sample_size_is_that_of_the_weights_before_they_are_resampled("half", monkeypatch)


def test_what_a_run_shares_stays_with_it_through_picks():
    """Draws of one run keep one row of its steps; draws of several runs each their own run's."""
    draws = smc(
        MODEL, None, TEXTS, num_samples=6, num_runs=7, settings=SMCSettings(TWISTS["likelihood"], threshold=2.0)
    )
    some = draws.map(lambda v: v[2:5, 1:4])
    assert some.log_guide.shape == (3, 3, 2) and torch.equal(some.stats["ess"], draws.stats["ess"][2:5])
    assert some.stats["ess"].shape == (3, 1, 2, T) and some.stats["log_weight_before_evidence"].shape == (3, 3, 2)
    assert draws.of_prompt(1).stats["log_z_increment"].shape == (7, 1, 1, T)
    rows = torch.tensor([0, 6, 41])  # of the runs 0, 1 and 6
    mixed = draws.map(lambda v: v.flatten(0, 1)[rows].unsqueeze(0))
    assert torch.equal(mixed.stats["ess"][0], draws.stats["ess"][[0, 1, 6], 0])
    both = concatenate([some, draws.map(lambda v: v[:3])])
    assert both.stats["ess"].shape == (3, 9, 2, T) == (*both.log_guide.shape, T)
    assert concatenate([some, some], dim=0).stats["ess"].shape == (6, 1, 2, T)


def test_the_exact_twist_leaves_nothing_to_chance():
    made = smc(MODEL, None, TEXTS, num_samples=8, num_runs=5, settings=SMCSettings(twist=TWISTS["exact"], candidates=V))
    torch.testing.assert_close(made.log_weight, JOINT.logsumexp(0).expand(5, 8, -1), atol=1e-10, rtol=0)
    assert float(made.log_weight.exp().var()) >= 0 and float(made.by_run().log_weight.exp().var(1).max()) < 1e-20


def test_bounds_meet_around_log_z():
    """E[log Ẑ] ≤ log Z ≤ E[log Ẑ given a planted posterior draw], each within 4 standard errors, and log Z between."""
    settings = dict(num_samples=4, settings=SMCSettings(twist=TWISTS["likelihood"]))
    made = smc(MODEL, None, TEXTS, num_runs=400, **settings)
    planted = rejection(MODEL, None, TEXTS, num_samples=400, log_bound=T / BETA)
    found = log_evidence(made, conditional_smc(MODEL, None, planted, **settings))
    log_z = Z.log()
    assert bool((found.elbo - 4 * found.elbo_se < log_z).all() and (log_z < found.upper + 4 * found.upper_se).all())
    assert bool(((found.log_z - log_z).abs() < 4 * found.log_z_se).all()) and found.upper_exact
    assert bool((found.elbo + 4 * found.elbo_se < found.upper).all())  # and they are not equal: four texts are few
    with pytest.raises(ValueError, match="with no others"):
        log_evidence(made, planted)
    alone = log_evidence(made)
    assert not alone.upper_exact


def test_what_runs_are_worth():
    """Means, log Z and the count of effective draws: against the spread over many repetitions, within 4 errors or 20%."""
    settings = SMCSettings(twist=TWISTS["likelihood"])
    many = [smc(MODEL, None, TEXTS, num_samples=16, num_runs=30, settings=settings) for _ in range(60)]
    found = [diagnose_draws(draws)["prompts"][1] for draws in many]
    assert {f["kind"] for f in found} == {"runs"} and {f["khat"] for f in found} == {None}
    means = torch.tensor([f["reward"] for f in found])
    truth = float((JOINT.softmax(0)[:, 1] * REWARD).sum())
    assert abs(float(means.mean()) - truth) < 4 * float(means.std()) / 60**0.5 + 1e-3  # self-normalised: bias 1/n
    told = float(torch.tensor([f["reward_se"] for f in found]).mean())
    assert abs(told / float(means.std()) - 1) < 0.35  # of 60 repetitions a deviation is known to a tenth
    log_z = torch.tensor([(f["log_z"] - float(Z[1].log())) / f["log_z_se"] for f in found])
    assert abs(float(log_z.std()) - 1) < 0.4
    one = diagnose_draws(smc(MODEL, None, TEXTS, num_samples=200))
    assert one["verdict"] == "unknown" and one["ess"] is None and one["log_z"] is None


def test_particle_gibbs_reaches_the_posterior():
    chains = mcmc(
        MODEL, GUIDE, TEXTS, num_samples=30, warmup=5, num_chains=300,
        kernel=particle_gibbs(3, SMCSettings(twist=TWISTS["likelihood"], resample=stratified)),
    )  # fmt: skip
    means = chains["reward"].mean(1)  # (N, B): independent chains
    truth = (JOINT.softmax(0) * REWARD[:, None]).sum(0)
    assert bool(((means.mean(0) - truth).abs() < 4 * means.std(0) / 300**0.5).all())
    assert float(chains.stats["acceptance_rate"].min()) == 1.0 and chains.kind == "chains"


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_caches_follow_the_resampling(kind):
    """log p0 of every text as found on the way is what one pass finds, for several prompts, a guide and a network twist."""
    lm, other = (tiny.language_model(kind, seed=seed).double() for seed in (0, 1))
    guide = bind(finetuned, other.copy())
    twist = tiny.language_model(kind, seed=2).double()
    prompts = ["the soup", "she said that it was", ""]
    model = bind(tilted, lm, reward=lambda completions: [len(set(text)) for text in completions], beta=2.0)
    for settings in (
        dict(twist=twist),
        dict(twist=prefix_likelihood(model), candidates=3),
        dict(twist=prefix_likelihood(model)),
        dict(twist=twist, expand=2),
    ):
        for proposal in (None,) if "candidates" in settings else (None, guide):
            how = SMCSettings(threshold=2.0, **settings)
            made = smc(model, proposal, prompts, num_samples=16, num_runs=2, settings=how)
            again = lm(prompts).log_prob(made["x"])
            torch.testing.assert_close(made.log_prior, again, atol=1e-10, rtol=0)
            assert len(made["x"].flatten(0, 2).unique(dim=0)) > 6


def test_it_forwards_each_prompt_once_and_each_open_text_a_token(monkeypatch):
    lm = tiny.language_model("llama", max_new_tokens=12)
    prompts, forwards = ["the soup", "she said that it was", ""], []
    model = bind(tilted, lm, reward=lambda completions: [len(text) for text in completions], beta=20.0)
    plain = lm.logits_next

    def counted(**inputs):
        forwards.append(tuple(inputs["ids"].shape))
        return plain(**inputs)

    monkeypatch.setattr(lm, "logits_next", counted)
    lm.model.lm_head.weight.data[2] += lm.model.lm_head.weight.data.std()  # texts end at various lengths
    open_texts = []
    right = POPULATION._step

    def step(*args):
        made = right(*args)
        open_texts.append(int(made[0].live.sum()))
        return made

    monkeypatch.setattr(POPULATION, "_step", step)
    settings = SMCSettings(twist=prefix_likelihood(model), threshold=2.0)
    with meter.measure() as cost:
        made = smc(model, None, prompts, num_samples=32, settings=settings)
    assert forwards[0] == (3, max(len(lm.vocabulary.encode(p)) for p in prompts))
    assert forwards[1:] == [(n, 1) for n in open_texts[: len(forwards) - 1]] and min(open_texts) < 96
    assert made.cost == cost and cost.lm_tokens == sum(a * b for a, b in forwards)


def test_what_is_impossible_is_told():
    never = bind(constrained, LM, constraint=lambda completions: [False] * len(completions))
    with pytest.raises(NoSupportError, match=r"prompt 0: all 16 texts are impossible.*best"):
        smc(never, None, TEXTS, num_samples=8, num_runs=2)
    rare = bind(constrained, LM, constraint=lambda completions: [text.split() == ["a", "b"] for text in completions])
    made = smc(rare, None, TEXTS, num_samples=4, num_runs=40)  # runs without any possible text count as Ẑ = 0
    log_z = made.by_run().log_weight[0]
    assert bool((log_z == -torch.inf).any()) and not bool(made.log_weight.isnan().any())
    truth = enumerate_posterior(rare, None, TEXTS).log_z.exp()
    assert bool(((log_z.exp().mean(0) - truth).abs() < 4 * log_z.exp().std(0) / 40**0.5).all())
    starts_with_0 = SMCSettings(twist=lambda prompts, x, n: torch.where(x[:, 0] == 0, 0.0, -torch.inf))
    blind = smc(MODEL, None, TEXTS, num_samples=64, settings=starts_with_0)
    assert bool((blind["x"][..., 0] == 0)[blind.log_weight > -torch.inf].all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_samples=1), "num_samples=1; give at least 2"),
        (dict(num_runs=0), "num_runs=0"),
        (dict(expand=0), "expand=0"),
        (dict(threshold=float("nan")), "threshold=nan"),
        (dict(candidates=2), "candidates=2; give at least 1, and a twist"),
        (dict(twist=lambda prompts, x, n: torch.full((len(x),), torch.nan)), "NaN"),
        (dict(twist=lambda prompts, x, n: torch.zeros(len(x), 1)), "one log ψ for each"),
        (dict(twist=table_lm(4, 2)), "twist and target"),
        (dict(guide=bind(finetuned, table_lm(V, T + 1, max_prompt=2).copy())), "same max_new_tokens"),
        (dict(twist=table_lm(V, T + 1, max_prompt=2)), "same max_new_tokens"),
        (dict(guide=GUIDE, candidates=2, twist=TWISTS["network"]), "leave it out, or the guide"),
    ],
)
def test_refusals(settings, message):
    own = {name: settings.pop(name) for name in ("num_samples", "num_runs") if name in settings}
    guide = settings.pop("guide", None)
    with pytest.raises(ValueError, match=message):
        smc(MODEL, guide, TEXTS, settings=SMCSettings(**settings), **own)


def test_no_prompts_are_refused():
    for sampler in (smc, importance):
        with pytest.raises(ValueError, match="no prompt is given"):
            sampler(MODEL, None, [], num_samples=4)


def test_a_chain_of_particle_gibbs_leaves_an_impossible_text():
    """Which the mask that proposes would never write."""
    lm = table_lm(4, 5, concentration=3.0, seed=2)
    automaton = answers(lm.vocabulary)
    target = bind(constrained, lm, constraint=automaton)
    start = importance(target, None, [""], num_samples=200)
    assert float((start.log_weight > -torch.inf).double().mean()) < 0.7
    kernel = particle_gibbs(4, SMCSettings(twist=automaton.mask(lm)))
    chains = mcmc(target, None, [""], num_samples=20, warmup=5, num_chains=64, kernel=kernel)
    assert bool((chains.log_weight > -torch.inf).all())


def test_a_program_with_plates_of_its_own():
    """Z, by importance, SMC and chains, of a model whose texts are rated three times."""

    def rated(prompts):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("x", LM(prompts))
            length = LM.vocabulary.lengths(x).double()
            with pyro.plate("raters", 3, dim=-2):
                pyro.sample("rating", dist.Normal(length, 1.0), obs=torch.tensor([[1.0], [2.0], [1.5]]).double())

    settings = dict(num_samples=400, max_plate_nesting=2)
    right = importance(rated, None, TEXTS, **settings)
    how = SMCSettings(twist=prefix_likelihood(rated), threshold=2.0)
    grown = smc(rated, None, TEXTS, num_runs=30, settings=how, **settings)
    chains = mcmc(rated, None, TEXTS, num_samples=4, warmup=2, max_plate_nesting=2, kernel=particle_gibbs(4))
    assert grown["x"].shape == (30, 400, 2, T) and chains["x"].shape == (32, 4, 2, T)
    log_z = [made.log_weight.flatten(0, 1).exp().mean(0).log() for made in (right, grown)]
    torch.testing.assert_close(*log_z, atol=0.15, rtol=0)
    for made in (right, grown, chains):
        gap = LM.vocabulary.lengths(made["x"]).double().unsqueeze(-1) - torch.tensor([1.0, 2.0, 1.5])
        joint = LM(TEXTS).log_prob(made["x"]) + dist.Normal(0.0, 1.0).log_prob(gap).sum(-1)
        torch.testing.assert_close(made.log_prior + made.log_likelihood, joint, atol=1e-5, rtol=0)


def test_what_is_too_few_runs_is_not_judged():
    made = smc(MODEL, None, TEXTS, num_samples=64, num_runs=4, settings=SMCSettings(twist=TWISTS["likelihood"]))
    assert all(figures["verdict"] == "unknown" for figures in diagnose_draws(made)["prompts"])
    assert "What 4 runs are worth" in diagnose_draws(made)["prompts"][0]["sentence"]


def test_other_latent_sites_are_refused():
    def before(prompts, prior):
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("mood", dist.Normal(0.0, 1.0))
            pyro.sample("x", prior(prompts))

    def after(prompts, prior):
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("x", prior(prompts))
            pyro.sample("mood", dist.Normal(0.0, 1.0))

    for program in (before, after):
        with pytest.raises(ValueError, match="mood.*importance"):
            smc(bind(program, LM), None, TEXTS)


def test_a_planted_text_that_cannot_be_proposed_is_told():
    planted = rejection(MODEL, None, TEXTS, num_samples=20, log_bound=T / BETA)
    blind = table_lm(V, T, max_prompt=2, seed=2)
    blind.model.table.data[:, 0] = -torch.inf  # never writes the first token
    for twist in (None, prefix_likelihood(MODEL)):
        with pytest.raises(ValueError, match="impossible"):
            conditional_smc(MODEL, bind(finetuned, blind), planted, num_samples=4, settings=SMCSettings(twist=twist))
    for candidates in (None, V):
        with pytest.raises(ValueError, match="impossible"):
            twist = lambda prompts, x, n: torch.where(x[:, 0] == 0, 0.0, -torch.inf)  # noqa: E731
            conditional_smc(MODEL, None, planted, num_samples=4, settings=SMCSettings(twist, candidates))


def test_texts_of_an_inner_plate_and_joint_weights_are_refused_for_what_they_are():
    def several(prompts, lm):
        with pyro.plate("prompts", len(prompts), dim=-1), pyro.plate("pair", 2, dim=-2):
            pyro.sample("x", lm(prompts))

    def together(prompts, lm):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("x", lm(prompts))
        pyro.factor("all", 0.1 * (x == 0).sum(-1).sum(-1, keepdim=True))

    for program, message in (
        (several, "'x' stands in the plate 'pair'"),
        (together, "a site outside the prompts' plate"),
    ):
        with pytest.raises(ValueError, match=message):
            smc(bind(program, LM), None, TEXTS, num_samples=4)
