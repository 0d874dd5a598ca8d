"""Constraints by a checker, held against every outcome of all random choices; no seed where that is possible.

| what | property | tolerance |
|---|---|---|
| a token by adaptive weighted rejection | E[ŵ 1(x)] = q(x) 1[x ∈ C]; mean number of questions at most its bound | 1e-12 |
| `smc` with a checker | E[weight of each text] = p(x, evidence): twists, guides, thresholds | 1e-10 |
| `adaptive_rejection`, trials | given any past the accepted text is the posterior's; E[(1 - p0(B)) 1[accepted]] = Z | 1e-10 |
| its bounds | Σ of the distinct accepted ≤ Z ≤ (1 - p0(B)) · bound, after every outcome | exact |
| `DeadPrefixes` | p0(B) and p0(B given a beginning) against sums over all texts | 1e-12 |
| regular expressions and JSON schemas | the same law as their automata, on every outcome | exact |
| stories260K | every draw passes; log Z against the prior's own | 4 SE |

Mutants that are rejected: ŵ = 1 - what was rejected, 1/tries, 2/n; next tokens renormalised by themselves; a live beginning
called dead; texts that lost the coin's toss called dead; no weight for what was not allowed.
"""

import itertools
import json
import math
import re
import sys
from dataclasses import replace

import oracle
import pyro
import pytest
import tiny
import torch
import walk

from ppl_lm.criticism.evidence import log_evidence
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import NoSupportError
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.conditional import conditional_smc
from ppl_lm.infer.samplers.constraints.adaptive_rejection_sampling import adaptive_rejection
from ppl_lm.infer.samplers.constraints.allowed_tokens import draw_allowed
from ppl_lm.infer.samplers.constraints.dead_prefixes import DeadPrefixes
from ppl_lm.infer.samplers.constraints.trials import run_trials
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.resampling import stratified, systematic
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.twists.functions import prefix_likelihood
from ppl_lm.likelihood.automata import Automaton
from ppl_lm.likelihood.checker import Checker
from ppl_lm.likelihood.optimality import Optimality
from ppl_lm.likelihood.reward import RewardError
from ppl_lm.lm import meter
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.table import table_lm
from ppl_lm.models import constrained, tilted
from ppl_lm.run.named_samplers import SAMPLERS

NEXT, POPULATION, SMC, TRIALS, SEARCH = (
    sys.modules[f"ppl_lm.infer.samplers.{name}"]
    for name in (
        "next_tokens",
        "population",
        "sequential",
        "constraints.trials",
        "constraints.adaptive_rejection_sampling",
    )
)
P = torch.tensor([0.34, 0.25, 0.18, 0.12, 0.07, 0.04], dtype=torch.float64)
ALLOWED = torch.tensor([False, True, False, False, True, True])
BETA = 0.7
CONTEXTS = ["", "a"]


# One token


def token_weights(monkeypatch, p=P, allowed=ALLOWED, weigh=None):
    """E[ŵ 1(x)] of each token over all that can be drawn, and the mean number of questions."""

    def program(w, runs):
        tries = torch.zeros(runs)
        rejected = torch.zeros(runs, dtype=torch.float64)
        firsts = torch.full((runs,), -1)

        def answer(rows, tokens):
            tries[rows] += 1
            found = allowed[tokens]
            first = firsts[rows] < 0
            rejected[rows] += torch.where(first & ~found, p[tokens], 0.0)
            firsts[rows] = torch.where(first & found, tries[rows].long(), firsts[rows])
            return found

        law = p.log().expand(runs, -1)
        token, log_w = draw_allowed(law, answer, lambda left, rows: w.choose(left, rows, 1)[:, 0])
        weight = log_w.exp() if weigh is None else weigh(rejected, firsts, tries)
        return [[(int(v), float(x), float(n))] for v, x, n in zip(token, weight, tries, strict=True)]

    (found,) = walk.explore(program)
    total = torch.zeros(len(p), dtype=torch.float64)
    for chance, (token, weight, _) in found:
        total[token] += chance * weight
    return total, sum(chance * tries for chance, (_, _, tries) in found)


@pytest.mark.parametrize("allowed", [ALLOWED, torch.tensor([True] * 6), torch.tensor([False] * 5 + [True]), ~ALLOWED])
def test_a_token_is_properly_weighted(monkeypatch, allowed):
    total, asked = token_weights(monkeypatch, allowed=allowed)
    torch.testing.assert_close(total, P * allowed, atol=1e-12, rtol=0)
    z = float(P[allowed].sum())
    assert asked <= 2 + float((P / (P + z))[~allowed].sum()) + 1e-9


def test_nothing_allowed_weighs_nothing(monkeypatch):
    total, asked = token_weights(monkeypatch, allowed=torch.zeros(6, dtype=torch.bool))
    assert float(total.sum()) == 0.0
    assert asked == pytest.approx(6.0)


@pytest.mark.parametrize(
    "weigh",
    [
        lambda rejected, first, tries: 1 - rejected,
        lambda rejected, first, tries: 1 / first.double(),
        lambda rejected, first, tries: 2 / tries.double(),
    ],
)
def test_other_weights_are_not_proper(monkeypatch, weigh):
    total, _ = token_weights(monkeypatch, weigh=weigh)
    assert float((total - P * ALLOWED).sum()) > 0.1


# Growing texts


def squeezed(text):
    return text.replace(" ", "")


def few_bs(text, whole):
    """No b after a c, and at least one letter; "not yet known" of what may go on."""
    if "cb" in squeezed(text):
        return False
    return bool(text) if whole else None


def both(prompts, prior, reward, constraint, beta):
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("x", prior(prompts))
        holds = constraint(prompts, x)
        pyro.sample(
            "satisfied", Optimality(holds.log()), obs=torch.ones(holds.shape), infer={"log_bound": 0.0, "hard": True}
        )
        score = reward(prompts, x)
        pyro.sample("optimal", Optimality(score / beta, 1.0 / beta), obs=torch.ones(score.shape))
    return x


def letters(completions, **_):
    return [0.5 * min(2, text.count("a")) - 0.5 * text.count("b") for text in completions]


letters.r_max = 1.0


class World:
    """A posterior with a checker and a reward over few texts, known by enumeration."""

    def __init__(self, size=4, steps=2, function=few_bs, cut_off=True, reward=letters):
        self.lm = table_lm(size, steps, max_prompt=2, concentration=1.0, seed=1)
        self.steps = steps
        self.checker = Checker(function, cut_off)
        self.model = bind(both, self.lm, reward=reward, constraint=self.checker, beta=BETA)
        self.guide = bind(finetuned, table_lm(size, steps, max_prompt=2, concentration=2.0, seed=2).copy())
        rows = oracle.outcomes(size, steps, size - 1)
        self.x = oracle.as_tensor(rows, steps, size - 1)
        texts = self.lm.vocabulary.decode(self.x)
        finished = torch.tensor([row[-1] == size - 1 for row in rows])
        two = self.checker.reads_beginnings
        self.holds = torch.tensor([bool(function(text, True) if two else function(text)) for text in texts])
        self.holds &= finished | cut_off
        contexts = [tuple(self.lm.vocabulary.encode(text)) for text in CONTEXTS]
        self.log_prior = torch.stack([oracle.log_probs(self.lm.model.table.detach(), c, rows) for c in contexts], 1)
        self.score = torch.tensor(reward(texts), dtype=torch.float64)
        log_l = torch.where(self.holds, self.score / BETA, -math.inf)
        self.joint = self.log_prior + log_l[:, None]
        self.z = self.joint.logsumexp(0).exp()

    def which(self, x):
        return (x.unsqueeze(-2) == self.x).all(-1).long().argmax(-1)

    def by_text(self, log_w, x):
        hit = torch.nn.functional.one_hot(self.which(x), len(self.x)).double()
        return (hit * log_w.exp().unsqueeze(-1)).sum(1) / log_w.shape[1]


SMALL = World()
WHOLE_ONLY = World(function=lambda text: "b" not in text, cut_off=False)
SELDOM = World(
    size=3, steps=2, function=lambda text, whole: squeezed(text) == "b" if whole else squeezed(text) in ("", "b")
)


def expected_weights(monkeypatch, world, guide=None, resample=systematic, count=2, **settings):
    def program(w, runs):
        with monkeypatch.context() as patch:
            patch.setattr(NEXT, "choose", w.choose)
            patch.setattr(SMC, "texts_a_piece", lambda *_: 10**9)
            patch.setattr(SMC, "require_support", lambda draws: None)  # of runs side by side some have no text
            patch.setattr(POPULATION, "_needed", w.needed(POPULATION._needed))
            how = SMCSettings(resample=w.rule(resample), checker=world.checker, **settings)
            made = smc(world.model, guide, CONTEXTS, num_samples=count, num_runs=runs, settings=how)
        return world.by_text(made.log_weight, made["x"])

    found = walk.explore(program, len(CONTEXTS))
    return torch.stack([sum(chance * value for chance, value in each) for each in found], 1)


TINY = World(size=3, steps=2, function=lambda text, whole: not squeezed(text).startswith("b"))
CASES = [
    dict(world=TINY, threshold=0.0),
    dict(world=TINY, threshold=2.0, resample=stratified),
    dict(world=TINY, threshold=0.75, twist="likelihood"),
    dict(world=TINY, threshold=0.0, guide=True),
    dict(world=TINY, threshold=2.0, twist="network"),
    dict(world=SELDOM, threshold=0.0),
    dict(world=World(size=3, steps=2, function=lambda text: "b" not in text, cut_off=False), threshold=2.0),
]


@pytest.mark.parametrize("case", CASES)
def test_smc_with_a_checker_is_unbiased(monkeypatch, case):
    case = dict(case)
    world = case.pop("world")
    twists = {
        None: None,
        "likelihood": prefix_likelihood(bind(tilted, world.lm, reward=letters, beta=BETA)),
        "network": table_lm(world.lm.vocabulary.size, world.steps, max_prompt=2, concentration=1.0, seed=3),
    }
    twist, guide = twists[case.pop("twist", None)], world.guide if case.pop("guide", False) else None
    found = expected_weights(monkeypatch, world, guide, twist=twist, **case)
    torch.testing.assert_close(found, world.joint.exp(), atol=1e-10, rtol=0)


def test_a_checker_that_counts_for_nothing_is_seen(monkeypatch):
    """Mutant: the draws are allowed ones, and their weights say nothing of how many were not."""
    right = NEXT.draw_allowed
    monkeypatch.setattr(NEXT, "draw_allowed", lambda *args: (right(*args)[0], torch.zeros(len(args[0])).double()))
    found = expected_weights(monkeypatch, TINY, threshold=0.0)
    assert float((found.sum(0) / TINY.z - 1).abs().max()) > 0.1


def test_a_planted_text_and_a_checker_are_refused():
    exact = rejection(TINY.model, None, CONTEXTS, num_samples=2)
    with pytest.raises(ValueError, match="checker"):
        conditional_smc(TINY.model, None, exact, num_samples=2, settings=SMCSettings(checker=TINY.checker))
    with pytest.raises(ValueError, match="expand"):
        SMCSettings(checker=TINY.checker, expand=2)


# What is known to be dead


def test_dead_beginnings_add_up():
    """p0(B) against the sum over all texts, beginnings added in any order, some of them within others."""
    lm, world = SMALL.lm, SMALL
    (context,) = [tuple(lm.vocabulary.encode(text)) for text in CONTEXTS[:1]]
    table = lm.model.table.detach()

    def log_p(begun):
        return [float(oracle.log_prob(table, (*context, *begun[:t]), begun[t : t + 1])) for t in range(len(begun))]

    begun = [(0, 1), (2,), (2, 1), (1, 3), (0, 0), (3,), (0,)]
    for order in itertools.permutations(begun, 4):
        dead = DeadPrefixes(4)
        for n, row in enumerate(order):
            dead.add(row, log_p(row))
            known = order[: n + 1]
            lost = [any(tuple(x[: len(k)]) == k for k in known) for x in world.x.tolist()]
            expected = float(world.log_prior[torch.tensor(lost), 0].exp().sum())
            assert dead.probability == pytest.approx(expected, abs=1e-12)


def outcomes_of_trials(monkeypatch, world, count, teach=None, without=None):
    """For each context all (chance, trials): of each trial what was known, whether it was accepted, and which text it is."""

    def program(w, runs):
        batch = len(CONTEXTS)
        with monkeypatch.context() as patch:
            patch.setattr(TRIALS, "choose", w.choose)
            if without is not None:
                patch.setattr(TRIALS, "_without", without)
            law = world.lm(CONTEXTS)
            rows = torch.arange(batch).repeat(runs)
            dead = [DeadPrefixes(world.lm.vocabulary.size) for _ in range(runs * batch)]
            made = [[] for _ in range(runs * batch)]
            for _ in range(count):
                known = [each.probability for each in dead]
                done = run_trials(law, world.checker, dead, rows)
                for i in range(len(rows)):
                    row, chance = world.which(done.x[i]), world.score[world.which(done.x[i])]
                    tossed = (
                        bool(done.allowed[i]) and w.pick(i, [1 - (p := float(((chance - 1.0) / BETA).exp())), p]) == 1
                    )
                    made[i].append((known[i], tossed, int(row) if tossed else -1))
                    for begun in done.dead[i]:
                        dead[i].add(*begun)
                    if teach is not None:
                        teach(dead[i], done, i, tossed)
                for i in range(len(rows)):
                    made[i][-1] = (*made[i][-1], dead[i].probability)
        return [[tuple(made[r * batch + b]) for b in range(batch)] for r in range(runs)]

    return walk.explore(program, len(CONTEXTS))


def worst_of(world, found, count):
    """How far the law of what is accepted is from the posterior given any past (total variation), and how far the mean of
    (1 - p0(B)) 1[accepted] is from Z · bound^-1 (relative), over contexts and trials."""
    law_off = mean_off = 0.0
    scale = math.exp(-1.0 / BETA)
    for b, each in enumerate(found):
        posterior = (world.joint[:, b].exp() / world.z[b]).tolist()
        for n in range(count):
            given, mean = {}, 0.0
            for chance, trials in each:
                known, accepted, row, _ = trials[n]
                if accepted:
                    past = given.setdefault(trials[:n], [0.0] * len(posterior))
                    past[row] += chance
                    mean += chance * (1 - known)
            for law in given.values():
                total = sum(law)
                law_off = max(law_off, 0.5 * sum(abs(p / total - q) for p, q in zip(law, posterior, strict=True)))
            mean_off = max(mean_off, abs(mean / (float(world.z[b]) * scale) - 1))
    return law_off, mean_off


@pytest.mark.parametrize("world, count", [(SMALL, 2), (SELDOM, 3), (WHOLE_ONLY, 2)])
def test_what_trials_accept_is_exact_given_any_past(monkeypatch, world, count):
    found = outcomes_of_trials(monkeypatch, world, count)
    law_off, mean_off = worst_of(world, found, count)
    assert law_off < 1e-10
    assert mean_off < 1e-10
    for b, each in enumerate(found):
        allowed = float(world.log_prior[world.holds, b].exp().sum())
        for _, trials in each:
            assert allowed <= 1 - trials[-1][3] + 1e-12  # what is dead takes nothing of what is allowed
    assert any(trials[-1][0] > 0.05 for each in found for _, trials in each)  # and something was learned


def test_acceptance_rises(monkeypatch):
    found = outcomes_of_trials(monkeypatch, SELDOM, 3)
    for each in found:
        rates = [sum(chance for chance, trials in each if trials[n][1]) for n in range(3)]
        assert rates[0] < rates[1] < rates[2]


def test_wrong_ways_to_learn_are_seen(monkeypatch):
    def local(log_p, at):
        """Dead tokens are left out and the others renormalised by themselves: what is dead further on is not reckoned."""
        log_q = log_p.clone()
        for i, node in enumerate(at):
            for v, child in node.children.items() if node else ():
                if child.is_dead:
                    log_q[i, v] = -math.inf
        return log_q

    world = World(
        size=3, steps=3, function=lambda text, whole: not squeezed(text).startswith("aa") and (not whole or bool(text))
    )
    law_off, mean_off = worst_of(world, outcomes_of_trials(monkeypatch, world, 2, without=local), 2)
    assert max(law_off, mean_off) > 0.02

    def coin(dead, done, i, tossed):
        if done.allowed[i] and not tossed:
            n = int(done.length[i])
            dead.add(done.x[i, :n].tolist(), done.token_log_p[i, :n].tolist())

    law_off, _ = worst_of(SMALL, outcomes_of_trials(monkeypatch, SMALL, 2, teach=coin), 2)
    assert law_off > 0.02

    def eager(dead, done, i, tossed):
        if not done.allowed[i]:
            dead.add(done.x[i, :1].tolist(), done.token_log_p[i, :1].tolist())

    law_off, _ = worst_of(SMALL, outcomes_of_trials(monkeypatch, SMALL, 2, teach=eager), 2)
    assert law_off > 0.02


# The sampler


def test_draws_are_the_posteriors():
    """Frequencies of 4,000 draws against enumeration; bounds that are certain; the trials' own estimate of Z."""
    torch.manual_seed(0)
    draws = adaptive_rejection(SMALL.model, CONTEXTS, num_samples=4000)
    assert draws.kind == "exact" and draws["x"].shape == (1, 4000, 2, 2)
    share = torch.nn.functional.one_hot(SMALL.which(draws["x"][0]), len(SMALL.x)).double().mean(0)  # (B, N)
    posterior = (SMALL.joint.exp() / SMALL.z).T
    z = (share - posterior) / (posterior * (1 - posterior) / 4000).sqrt().clamp_min(1e-9)
    assert float(z.abs().max()) < 4.5
    lower, upper = (draws.stats[name][0, 0] for name in ("log_z_lower", "log_z_upper"))
    assert bool((lower <= SMALL.z.log() + 1e-6).all() and (SMALL.z.log() <= upper + 1e-6).all())
    known = log_evidence(importance(SMALL.model, None, CONTEXTS, num_samples=64), exact=draws)
    assert float(((known.log_z - SMALL.z.log()) / known.log_z_se).abs().max()) < 4
    log_joint = (draws.log_prior + draws.log_likelihood)[0]
    torch.testing.assert_close(log_joint, SMALL.joint.gather(0, SMALL.which(draws["x"][0])), atol=1e-6, rtol=0)


def test_one_draw_and_what_it_cost():
    with meter.measure() as cost:
        draws = adaptive_rejection(SMALL.model, CONTEXTS, num_samples=1)
    assert draws["x"].shape == (1, 1, 2, 2)
    assert draws.cost.checker_calls > 0 and draws.cost.lm_tokens > 0
    assert cost.checker_calls == draws.cost.checker_calls


@pytest.mark.parametrize("how", ["rejection", "smc"])
def test_asked_of_the_same_texts(how):
    """The constraint as it is called by rejection and by SMC without the checker's help."""
    draws = (
        rejection(SMALL.model, None, CONTEXTS, num_samples=200)
        if how == "rejection"
        else smc(SMALL.model, None, CONTEXTS, num_samples=200)
    )
    x = draws["x"].flatten(0, 1)[draws.log_weight.flatten(0, 1) > -math.inf]
    assert bool(SMALL.holds[SMALL.which(x)].all())


def test_wrong_checkers_are_refused():
    def of_wholes(text, whole):  # says of a beginning what is true of it as a whole text
        return squeezed(text) != "a"

    lm = SMALL.lm
    wrong = bind(constrained, lm, constraint=Checker(of_wholes, cut_off=True))
    with pytest.raises(ValueError, match="beginning of a text that it allows"):
        adaptive_rejection(wrong, [""], num_samples=3)
    other = bind(constrained, lm, constraint=Checker(lambda text: "b" not in text, cut_off=True))
    with pytest.raises(ValueError, match="model finds possible"):
        adaptive_rejection(other, [""], checker=SMALL.checker, num_samples=3)
    with pytest.raises(ValueError, match="bound to 0 checkers"):
        adaptive_rejection(bind(tilted, lm, reward=letters, beta=1.0), [""])
    nothing = bind(constrained, lm, constraint=Checker(lambda text: False))
    with pytest.raises(NoSupportError):
        adaptive_rejection(nothing, [""], num_samples=3, max_proposals=2000)
    with pytest.raises(ValueError, match="has to say True or False"):
        Checker(lambda text: "yes")(lm.prompts([""]), torch.tensor([[0, 3]]))
    with pytest.raises(TypeError, match="function"):
        Checker("yes")
    with pytest.raises(TypeError, match=r"function\(text, whole\)"):
        Checker(lambda: True)
    with pytest.raises(RewardError, match="raised KeyError"):
        Checker(lambda text: {}[text])(lm.prompts([""]), torch.tensor([[0, 3]]))


def test_smc_needs_the_checker_as_evidence():
    plain = bind(tilted, SMALL.lm, reward=letters, beta=1.0)
    with pytest.raises(ValueError, match="model finds possible"):
        smc(plain, None, [""], num_samples=4, settings=SMCSettings(checker=SMALL.checker))


def test_a_checker_that_is_no_hard_evidence_is_refused():
    """Bound as a reward, so that what it does not allow is only less likely."""
    soft = bind(tilted, SMALL.lm, reward=SMALL.checker, beta=1.0)
    with pytest.raises(ValueError, match="model finds possible"):
        smc(soft, None, [""], num_samples=4, settings=SMCSettings(checker=SMALL.checker))
    draws, how = SAMPLERS["smc"](soft, None, SMALL.lm.prompts([""]), num_samples=8)
    assert "checker" not in how and draws.cost.checker_calls > 0


def test_a_scaled_prior_is_refused():
    def scaled(prompts, prior, constraint):
        with pyro.poutine.scale(scale=2.0):
            return constrained(prompts, prior, constraint)

    model = bind(scaled, SMALL.lm, constraint=SMALL.checker)
    with pytest.raises(ValueError, match="another law"):
        adaptive_rejection(model, [""], num_samples=3)


def test_a_program_that_changes_its_prompts():
    """The model is given the prompts as they came, and its own law draws."""

    def longer(prompts, prior, constraint, reward):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("x", prior(prior.prompts([f"{text} a" for text in prompts.texts])))
            holds = constraint(prompts, x)
            obs = torch.ones(holds.shape)
            pyro.sample("satisfied", Optimality(holds.log()), obs=obs, infer={"log_bound": 0.0, "hard": True})
            pyro.sample("optimal", Optimality(reward(prompts, x), 1.0), obs=obs)

    def of_prompt(prompts, completions, **_):
        return [
            1.0 if prompt == "b" and "c" in text else 0.0 for prompt, text in zip(prompts, completions, strict=True)
        ]

    lm = table_lm(4, 2, max_prompt=3, concentration=1.0, seed=1)
    model = bind(longer, lm, constraint=Checker(few_bs, cut_off=True), reward=of_prompt)
    truth = enumerate_posterior(model, None, ["b"]).log_z
    draws = adaptive_rejection(model, ["b"], num_samples=2000)
    assert draws.prompts.texts == ["b"]
    known = log_evidence(importance(model, None, ["b"], num_samples=64), exact=draws)
    assert abs(float(known.log_z - truth)) < 4 * float(known.log_z_se)


def test_an_end_token_that_writes_text():
    """A letter ends the text, as "." may: of a text begun the checker is not told of an end."""
    lm = tiny.table(4, 3, ends=2, pad=3, max_prompt=3, bos=3)
    wanted = ("a b c", "b a c", "c")

    def among(text, whole):
        text = text.strip()
        return text in wanted if whole else any(each.startswith(text) for each in wanted)

    model = bind(constrained, lm, constraint=Checker(among))
    truth = float(enumerate_posterior(model, None, [""]).log_z)
    assert truth > -math.inf
    run = smc(model, None, [""], num_samples=64, num_runs=64, settings=SMCSettings(checker=Checker(among), threshold=0))
    z = run.log_weight.exp().mean(1).flatten()
    assert abs(float(z.mean()) - math.exp(truth)) < 4 * float(z.std()) / 8
    draws = adaptive_rejection(model, [""], num_samples=20)
    assert {text.strip() for text in draws.text()[0]} <= set(wanted)


def test_tokens_of_no_probability():
    """They are never drawn, and what has nothing else left is dead."""
    token, log_w = draw_allowed(
        torch.tensor([[0.0, -1.0, -1e9]]),
        lambda rows, tokens: torch.zeros(len(rows), dtype=torch.bool),
        lambda left, rows: left.argmax(-1),
    )
    assert float(log_w) == -math.inf and int(token) in (0, 1)
    lm = table_lm(4, 2, max_prompt=2, concentration=1.0, seed=1).copy()
    with torch.no_grad():
        lm.model.table[:, 2] = -1e9
    nothing = bind(constrained, lm.requires_grad_(False), constraint=Checker(lambda text: False, cut_off=True))
    with pytest.raises(NoSupportError):
        adaptive_rejection(nothing, [""], num_samples=3, max_proposals=2000)


def test_two_latents_are_refused():
    def two(prompts, prior, constraint):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("x", prior(prompts))
            pyro.sample("again", prior(prompts))
            holds = constraint(prompts, x)
            pyro.sample("satisfied", Optimality(holds.log()), obs=torch.ones(holds.shape), infer={"log_bound": 0.0})

    model = bind(two, SMALL.lm, constraint=SMALL.checker)
    with pytest.raises(ValueError, match="again"):
        adaptive_rejection(model, [""], num_samples=3)


def test_an_optional_second_argument_is_not_whether_it_is_whole():
    assert not Checker(lambda text, strict=True: bool(text)).reads_beginnings
    assert Checker(lambda text, whole=True: bool(text)).reads_beginnings
    assert not Checker(str.isalpha).reads_beginnings


# Automata and checkers


def pieces_lm(pieces, steps):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from ppl_lm.lm.table import TableConfig, TableForCausalLM

    words = [*pieces, "<end>"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=pieces[0]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<end>", eos_token="<end>")
    return LanguageModel(
        TableForCausalLM(TableConfig(len(words), 1 + steps, eos_token_id=len(pieces))), tokenizer, steps
    )


@pytest.mark.parametrize("pattern", ["(ab)*", "a(b|ba)?", "[ab]{2}"])
def test_a_regular_expression_has_one_law(pattern):
    lm = pieces_lm(("a", "b", "ab", "ba"), 3)
    same_law(lm, pattern)


def test_a_json_schema_has_one_law():
    outlines_core = pytest.importorskip("outlines_core")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 12]}}, "required": ["a"]}
    pattern = outlines_core.json_schema.build_regex_from_schema(json.dumps(schema))
    lm = pieces_lm(('{"a":', "a", "1", "2", " ", "}"), 5)
    same_law(lm, pattern)


def same_law(lm, pattern):
    models = [
        bind(constrained, lm, constraint=each)
        for each in (Automaton.regex(pattern, lm.vocabulary), Checker.regex(pattern))
    ]
    automaton, checker = (enumerate_posterior(model, None, [""]) for model in models)
    torch.testing.assert_close(automaton.log_joint, checker.log_joint, atol=0, rtol=0)
    assert float(automaton.log_joint.max()) > -math.inf
    torch.manual_seed(0)
    draws = adaptive_rejection(models[1], [""], num_samples=50)
    assert all(re.fullmatch(pattern, text) for (texts,) in [draws.text()] for text in texts)
    # whatever begins an allowed text may begin one, and what the checker allows whole is allowed
    allowed = {
        tuple(x)
        for x, j in zip(automaton.latents["x"][:, 0].tolist(), automaton.log_joint[:, 0], strict=True)
        if j > -math.inf
    }
    prompts = lm.prompts([""])
    for row in allowed:
        x = torch.tensor([row])
        for n in range(1, int(lm.vocabulary.lengths(x)) + 1):
            assert bool(models[1].arguments["constraint"].allows(prompts, x, torch.tensor([n])))


def test_half_a_character_is_not_yet_known():
    lm = tiny.language_model("llama", max_new_tokens=6)
    checker = Checker.regex("é")
    ids = lm.vocabulary.plain("é")
    assert len(ids) > 1
    x = lm.completions(["é"])
    for n in range(1, len(ids) + 2):
        assert bool(checker.allows(lm.prompts(["the"]), x, torch.tensor([n])))
    assert not bool(checker.allows(lm.prompts(["the"]), lm.completions(["e"]), torch.tensor([1])))


def test_control_tokens_are_no_text():
    lm = tiny.language_model("llama", max_new_tokens=4)
    checker = Checker(lambda text, whole: True)
    plain, control = torch.tensor([[10, 11, 2, 0]]), torch.tensor([[10, 3, 2, 0]])
    assert checker.allows(lm.prompts([""]), plain, torch.tensor([3])).tolist() == [True]
    assert checker.allows(lm.prompts([""]), control, torch.tensor([3])).tolist() == [False]
    assert checker(lm.prompts([""]), torch.tensor([[10, 2, 0, 0], [10, 11, 12, 13], [3, 2, 0, 0]])).tolist() == [
        1,
        0,
        0,
    ]


# A language model that was trained


def test_stories_with_a_checker(stories):
    prior = LanguageModel.from_pretrained(stories, max_new_tokens=24)
    checker = Checker(lambda text, whole: "." not in text and (not whole or "little" in text), cut_off=True)
    model = bind(constrained, prior, constraint=checker)
    torch.manual_seed(0)
    draws = adaptive_rejection(model, ["Once upon a time"], num_samples=200)
    assert all("little" in text and "." not in text for text in draws.text()[0])
    plain = rejection(model, None, ["Once upon a time"], num_samples=200)
    estimates = [
        log_evidence(importance(model, None, ["Once upon a time"], num_samples=64), exact=d) for d in (draws, plain)
    ]
    difference = float(estimates[0].log_z - estimates[1].log_z)
    assert abs(difference) < 4 * math.hypot(*(float(e.log_z_se) for e in estimates))
    run = smc(
        model,
        None,
        ["Once upon a time"],
        num_samples=64,
        num_runs=32,
        settings=SMCSettings(checker=checker, threshold=0.5),
    )
    log_z = run.log_weight.logsumexp(1).flatten() - math.log(64)
    mean, se = log_z.exp().mean(), log_z.exp().std() / math.sqrt(32)
    assert abs(float(mean) - float(estimates[1].log_z.exp())) < 4 * math.hypot(
        float(se), float(estimates[1].log_z.exp() * estimates[1].log_z_se)
    )
    assert replace(draws, proposals=None).kind == "exact"
