"""SMC that pays: random twists, powers of the prior, fixed steps and moves, held against every outcome of their choices.

| what | property | tolerance |
|---|---|---|
| `at`, with functions, candidates, guides | E[weight of each text] = p(x, evidence) | 1e-10 |
| a twist that is random | the same, over its own outcomes too | 1e-10 |
| `prior_power` | the same of `power`; around planted texts E[1/Ẑ] = 1/Z | 1e-10 |
| `moves` of open and ended texts, by functions, networks, powers and random twists | the same | 1e-10 |
| `look_ahead` where no rollout is possible | mean Ẑ = Z | 4.5 standard errors of 2,000 runs |
| `look_ahead` | mean over rollouts = E[evidence of the text and m more tokens] | 4.5 standard errors of 4,000 |
| `frozen` | the tokens after which a pilot was resampled | exact |

Mutants that are rejected: a random twist drawn afresh where it is divided out; a power's proposals without their normaliser;
moves without the factor of lengths, that keep the prior, or that are made only where the weights are uneven; ended texts that
are not moved.
"""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import walk
from test_sequential import GROW, LONG, POPULATION, SMALL, SMC, TEXTS, TINY, World, conditional_expectations

from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import NoSupportError
from ppl_lm.infer.log_weights import kong_ess
from ppl_lm.infer.samplers.conditional import conditional_smc
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.resampling import multinomial, systematic
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.twists.functions import look_ahead, prefix_likelihood, prior_power
from ppl_lm.models import constrained, power

MOVES = sys.modules["ppl_lm.infer.samplers.rejuvenation"]


class PowerWorld(World):
    """The prior's power over few texts."""

    def __init__(self, size, steps, alpha, gaps=False):
        super().__init__(size, steps, gaps)
        log_prior = self.joint - self.reward[:, None] / 0.7
        self.model, self.joint = bind(power, self.lm, alpha=alpha), alpha * log_prior
        self.z = self.joint.logsumexp(0).exp()
        self.twists["power"] = prior_power(alpha)
        self.twists["another power"] = prior_power(0.6)


SHARP, FLAT, SHARP_TINY = PowerWorld(3, 2, 2.5), PowerWorld(3, 2, 0.5), PowerWorld(2, 2, 2.5)
GAPS, GAPS_ONE = PowerWorld(3, 3, 0.5, gaps=True), PowerWorld(3, 3, 1.0, gaps=True)


def expected_weights(
    monkeypatch, world, guide=None, resample=systematic, count=2, random=False, mutant=None, **settings
):
    """E[(1/K) Σ_k w_k 1(x_k = x)] of each text and prompt, (N, B), over all that SMC can choose; of one prompt and run at a
    time where the twist is random."""
    prompts = TEXTS[:1] if random else TEXTS

    def program(w, runs):
        with monkeypatch.context() as patch:
            patch.setattr(GROW, "choose", w.choose)
            patch.setattr(MOVES, "choose", w.choose)
            columns = runs * len(prompts)
            patch.setattr(MOVES, "places", lambda n: _each(w, columns, [[1 / k] * k for k in n.tolist()]))
            patch.setattr(
                MOVES,
                "accepted",
                lambda ratio: _each(w, columns, [[1 - a, a] for a in ratio.exp().clamp_max(1).tolist()]) == 1,
            )
            patch.setattr(SMC, "texts_a_piece", lambda *_: 10**9)
            patch.setattr(SMC, "require_support", lambda draws: None)  # outcomes without a possible text count too
            patch.setattr(POPULATION, "_needed", w.needed(POPULATION._needed))
            if mutant is not None:
                mutant(patch, w)
            how = dict(settings)
            if random:
                how["twist"] = noisy(world, w)
            how = SMCSettings(resample=w.rule(resample), **how)
            made = smc(world.model, guide, prompts, num_samples=count, num_runs=runs, settings=how)
        return world.by_text(made.log_weight, made["x"])

    if random:
        monkeypatch.setattr(walk, "BATCH", 1)
    found = walk.explore(program, len(prompts))
    return torch.stack([sum(chance * value for chance, value in each) for each in found], 1)


def _each(w, columns, chances):
    """Of texts whose populations run fastest."""
    return torch.tensor([w.pick(i % columns, law) for i, law in enumerate(chances)])


def noisy(world, w):
    """The likelihood of what is written, of an open text times 0.3 or 2.1."""
    likelihood = prefix_likelihood(world.model)

    def twist(prompts, x, n):
        factor = torch.tensor(
            [
                (0.3, 2.1)[w.pick(0, [0.6, 0.4])] if k < length else 1.0
                for k, length in zip(n, world.lm.vocabulary.lengths(x), strict=True)
            ]
        )
        return likelihood(prompts, x, n) + factor.double().log()

    return twist


CASES = [
    dict(world=LONG, twist="likelihood", at=(2,), threshold=2.0),
    dict(world=LONG, twist="likelihood", at=(1, 3), threshold=0.9, resample=multinomial),
    dict(world=SMALL, twist="likelihood", at=(2,), candidates=2, threshold=2.0),
    dict(world=SMALL, twist="likelihood", at=(1,), guide=True, threshold=2.0),
    dict(world=SMALL, twist="network", at=(1,), threshold=2.0),
    dict(world=TINY, random=True, threshold=2.0),
    dict(world=TINY, random=True, threshold=0.8, candidates=2),
    dict(world=TINY, random=True, guide=True, at=(1,), threshold=2.0),
    dict(world=SHARP, twist="power", threshold=0.0),
    dict(world=SHARP, twist="power", threshold=2.0),
    dict(world=FLAT, twist="power", threshold=0.9, resample=multinomial),
    dict(world=SHARP, twist="another power", threshold=2.0),
    dict(world=SHARP, twist="power", guide=True, threshold=2.0),
    dict(world=GAPS, twist="power", guide=True, threshold=0.0),
    dict(world=GAPS_ONE, twist="power", guide=True, threshold=0.0),
    dict(world=SHARP_TINY, twist="power", expand=2, threshold=2.0),
    dict(world=SMALL, twist="likelihood", at=(1,), moves=1, threshold=2.0),
    dict(world=TINY, twist="likelihood", at=(1, 2), moves=1, threshold=0.8),
    dict(world=TINY, twist="hopeless", at=(2,), moves=1, threshold=0.0),
    dict(world=TINY, twist="network", at=(2,), moves=1, threshold=2.0),
    dict(world=TINY, twist="network", at=(1,), moves=2, threshold=2.0, guide=True),
    dict(world=SHARP_TINY, twist="power", at=(2,), moves=1, threshold=2.0),
    dict(world=TINY, random=True, at=(1,), moves=1, threshold=2.0),
]


def name_of(case):
    world = {
        SMALL: "small",
        LONG: "long",
        TINY: "tiny",
        SHARP: "sharp",
        FLAT: "flat",
        SHARP_TINY: "sharp_tiny",
        GAPS: "gaps",
        GAPS_ONE: "gaps_one",
    }[case["world"]]
    return "-".join([world, *(f"{k}={getattr(v, '__name__', v)}" for k, v in case.items() if k != "world")])


def settings_of(case):
    world = case["world"]
    twist = {} if case.get("random") else {"twist": world.twists[case["twist"]]}
    return {**case, **twist, "guide": world.guide if "guide" in case else None}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_weight_of_every_text_is_unbiased(case, monkeypatch):
    found = expected_weights(monkeypatch, **settings_of(case))
    torch.testing.assert_close(found, case["world"].joint.exp()[:, : found.shape[1]], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("world, twist", [(SHARP_TINY, "power"), (TINY, "likelihood")])
def test_around_posterior_texts(world, twist, monkeypatch):
    inverse, law = conditional_expectations(monkeypatch, world, twist=world.twists[twist], at=(1,), threshold=2.0)
    torch.testing.assert_close(inverse, 1 / world.z, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(law, world.joint.softmax(0), atol=1e-10, rtol=1e-10)


def fresh(patch, w):
    """What is gone on from is another answer of the twist than what was weighed."""
    right = POPULATION._step

    def step(state, *args):
        state, info = right(state, *args)
        flat = torch.tensor(
            [math.log((0.3, 2.1)[w.pick(0, [0.6, 0.4])]) for _ in range(state.log_target.numel())]
        ).double()
        return replace(
            state,
            log_target=torch.where(state.live, state.log_target + flat.reshape(state.live.shape), state.log_target),
        ), info

    patch.setattr(POPULATION, "_step", step)


def no_normaliser(patch, w):
    right = GROW.Laws.propose

    def propose(self, *args):
        new = right(self, *args)
        return replace(new, log_increment=torch.zeros_like(new.log_increment))

    patch.setattr(GROW.Laws, "propose", propose)


def no_lengths(patch, w):
    patch.setattr(MOVES, "log_acceptance", lambda psi, new, n, n_new: new - psi)


def keeps_the_prior(patch, w):
    patch.setattr(MOVES, "log_acceptance", lambda psi, new, n, n_new: n.double().log() - n_new.double().log())


def where_uneven(patch, w):
    right = POPULATION.rejuvenate

    def rejuvenate(state, prior, settings, known):
        moved = right(state, prior, settings, known)
        uneven = kong_ess(state.log_w) < 0.75 * len(state.live)
        pick = lambda a, b: torch.where(uneven.reshape(1, -1, *[1] * (a.dim() - 2)), a, b)  # noqa: E731
        return replace(
            state,
            **{k: pick(getattr(moved, k), getattr(state, k)) for k in ("x", "live", "log_target", "token_log_p")},
        )

    patch.setattr(POPULATION, "rejuvenate", rejuvenate)


def only_open(patch, w):
    """Ended texts stay, though open ones may become them."""
    right = POPULATION.rejuvenate

    def rejuvenate(state, prior, settings, known):
        moved = right(state, prior, settings, known)
        pick = lambda a, b: torch.where(state.live.reshape(*state.live.shape, *[1] * (a.dim() - 2)), a, b)  # noqa: E731
        return replace(
            state,
            **{k: pick(getattr(moved, k), getattr(state, k)) for k in ("x", "live", "log_target", "token_log_p")},
        )

    patch.setattr(POPULATION, "rejuvenate", rejuvenate)


MUTANTS = [
    (fresh, dict(world=TINY, random=True, threshold=2.0), 0.05),
    (no_normaliser, dict(world=SHARP, twist="power", threshold=2.0), 0.05),
    (no_lengths, dict(world=SMALL, twist="likelihood", at=(2,), moves=1, threshold=0.0), 0.005),
    (keeps_the_prior, dict(world=TINY, twist="hopeless", at=(1,), moves=1, threshold=0.0), 0.05),
    (where_uneven, dict(world=TINY, twist="hopeless", at=(1,), moves=1, threshold=0.0), 0.01),
    (only_open, dict(world=TINY, twist="likelihood", at=(1,), moves=1, threshold=0.0), 0.01),
]


@pytest.mark.parametrize("mutant, case, least", MUTANTS, ids=[mutant.__name__ for mutant, *_ in MUTANTS])
def test_mutants_are_rejected(mutant, case, least, monkeypatch):
    found = expected_weights(monkeypatch, mutant=mutant, **settings_of(case))
    assert (found / case["world"].joint.exp()[:, : found.shape[1]] - 1).abs().max() > least


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_look_ahead_is_unbiased(tokens):
    """Over rollouts, of the evidence of the text and what was looked ahead at."""
    torch.manual_seed(0)
    world, likelihood = LONG, prefix_likelihood(LONG.model)
    vocabulary = world.lm.vocabulary
    prompts = world.lm.prompts(TEXTS[1:])
    begun = torch.tensor([0])
    x = torch.full((1, world.steps), vocabulary.pad_id)
    x[0, 0], x[0, 1] = begun[0], vocabulary.end_ids[0]
    n = torch.tensor([1])
    log_prior = world.joint[:, 1] - world.reward / 0.7
    starts = world.x[:, 0] == begun[0]
    upto = min(1 + tokens, world.steps)
    cut = world.x.clone()
    open_ = vocabulary.lengths(world.x) > upto
    cut[open_, upto:] = vocabulary.pad_id
    if upto < world.steps:
        cut[open_, upto] = vocabulary.end_ids[0]
    phi = likelihood(prompts.take(torch.zeros(len(cut), dtype=torch.int64)), cut, vocabulary.lengths(cut)).exp()
    exact = float((log_prior[starts].softmax(0) * phi[starts]).sum())
    each = (
        torch.stack(
            [
                look_ahead(world.model, tokens)(
                    prompts.take(torch.zeros(50, dtype=torch.int64)), x.expand(50, -1), n.expand(50)
                )
                for _ in range(80)
            ]
        )
        .exp()
        .flatten()
    )
    assert abs(float(each.mean()) - exact) < 4.5 * float(each.std()) / math.sqrt(len(each))
    several = look_ahead(world.model, tokens, rollouts=4000)(prompts, x, n).exp()
    assert abs(float(several) - exact) < 4.5 * float(each.std()) / math.sqrt(4000)


def hard(completions, **_):
    return [text.count("a") > 2 for text in completions]


def test_a_look_ahead_that_sees_nothing_possible_loses_no_text():
    """Three letters are wanted, and after the first none is seen one token ahead. Mutant: ψ = 0 there."""
    torch.manual_seed(3)
    model = bind(constrained, LONG.lm, constraint=hard)
    possible = torch.tensor(hard(LONG.lm.vocabulary.decode(LONG.x)))
    z = (LONG.joint[:, 1] - LONG.reward / 0.7)[possible].logsumexp(0).exp()
    ahead = look_ahead(model, 1)
    draws = smc(model, None, TEXTS[1:], num_samples=4, num_runs=2000, settings=SMCSettings(twist=ahead, threshold=0.9))
    run = draws.log_weight.exp().mean(1)[:, 0]
    assert abs(float(run.mean() - z)) < 4.5 * float(run.std()) / math.sqrt(len(run))

    def lost(prompts, x, n):
        found = ahead(prompts, x, n)
        return torch.where(found == math.log(0.5), -torch.inf, found)

    with pytest.raises(NoSupportError):
        smc(model, None, TEXTS[1:], num_samples=4, num_runs=100, settings=SMCSettings(twist=lost))


def test_a_text_that_has_ended_is_its_own_look_ahead():
    prompts = SMALL.lm.prompts(TEXTS).take(torch.zeros(len(SMALL.x), dtype=torch.int64))
    n = SMALL.lm.vocabulary.lengths(SMALL.x)
    torch.testing.assert_close(look_ahead(SMALL.model, 2)(prompts, SMALL.x, n), SMALL.reward / 0.7)


def test_runs_that_look_ahead_and_move_reach_log_z():
    """All at once, by the standard error of many runs."""
    torch.manual_seed(1)
    how = SMCSettings(twist=look_ahead(LONG.model, 2), at=(1, 3), moves=1, threshold=0.9)
    draws = smc(LONG.model, None, TEXTS, num_samples=8, num_runs=1500, settings=how)
    z = draws.log_weight.exp().mean(1)  # (C, B)
    assert bool(((z.mean(0) - LONG.z).abs() < 4.5 * z.std(0) / math.sqrt(len(z))).all())
    log_psi = draws.stats["log_z_increment"].sum(-1)[:, 0]
    torch.testing.assert_close(log_psi, draws.log_weight.logsumexp(1) - math.log(8), atol=1e-10, rtol=0)


def test_a_power_and_its_own_twist_leave_only_the_normalisers(monkeypatch):
    """Weights are products of Σ_v p0(v | s)^alpha, and a text that has ended counts 1."""
    draws = smc(SHARP.model, None, TEXTS, num_samples=64, settings=SMCSettings(twist=prior_power(2.5), threshold=0.0))
    law = SHARP.lm(SHARP.lm.prompts(TEXTS))
    x = draws["x"][0]  # (K, B, T)
    assert float(draws.log_weight.std()) > 0.01
    by_token = []
    for t in range(SHARP.steps):
        prefix = x.clone()
        total = torch.zeros(x.shape[:2], dtype=torch.float64)
        for v in range(SHARP.size):
            prefix[..., t:] = SHARP.lm.vocabulary.pad_id
            prefix[..., t] = v
            total += (2.5 * law.token_log_probs(prefix)[..., t]).exp()
        alive = SHARP.lm.vocabulary.alive(x)[..., t]
        by_token.append(torch.where(alive, total.log(), 0.0))
    torch.testing.assert_close(draws.log_weight[0], torch.stack(by_token).sum(0), atol=1e-9, rtol=0)


def test_a_pilot_says_after_which_tokens():
    torch.manual_seed(2)
    how = SMCSettings(twist=prefix_likelihood(LONG.model), threshold=0.8)
    pilot = smc(LONG.model, None, TEXTS, num_samples=16, num_runs=20, settings=how)
    frozen = how.frozen(pilot, share=0.3)
    rate = pilot.stats["resampled"].double().mean((0, 1)).amax(0)
    assert frozen.at == tuple(t + 1 for t in range(LONG.steps) if rate[t] >= 0.3)
    assert replace(frozen, at=None) == how
    with pytest.raises(ValueError, match="give a smaller share"):
        how.frozen(pilot, share=1.1)
    with pytest.raises(ValueError, match="give those of smc"):
        how.frozen(importance(LONG.model, None, TEXTS, num_samples=4))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(at=(0,)), "give numbers of tokens, at least 1"),
        (dict(at=(1,), expand=2), "expand=1"),
        (dict(moves=1), "after how many tokens"),
        (dict(moves=1, at=(1,)), "by which twist"),
        (dict(moves=-1), "moves=-1"),
        (dict(twist=prior_power(2.0), candidates=2), "a power of the prior is known of all tokens"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        SMCSettings(**settings)


def test_more_refusals():
    for alpha in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="the prior's power must be above 0"):
            prior_power(alpha)
    planted = rejection(TINY.model, None, TEXTS, num_samples=2, log_bound=3.0)
    how = SMCSettings(twist=TINY.twists["likelihood"], at=(1,), moves=1)
    with pytest.raises(ValueError, match="a planted text has to stay"):
        conditional_smc(TINY.model, None, planted, settings=how)
    with pytest.raises(ValueError, match="tokens=0"):
        look_ahead(TINY.model, 0)


def test_numbers_of_tokens_may_be_held_by_anything():
    """A generator is read once; another whole number is one."""
    twist = TINY.twists["likelihood"]
    for at in ((n for n in (1, 2)), torch.tensor([1, 2]), [np.int64(1), np.int64(2)]):
        assert SMCSettings(twist, at=at).at == (1, 2)
    for wrong in (2, ["a"], [1.5], [0]):
        with pytest.raises(ValueError, match="at="):
            SMCSettings(twist, at=wrong)
    for name in ("expand", "moves", "candidates"):
        with pytest.raises(ValueError, match=f"{name}=1.5; give a whole number"):
            SMCSettings(twist, **{name: 1.5})
