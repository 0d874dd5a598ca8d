"""Annealed SMC and splitting, held against every outcome of what they leave to chance.

| what | property | tolerance |
|---|---|---|
| `annealed_smc`, by each kernel | E[weight of each text] = p(x, evidence), so E[Ẑ] = Z | 1e-10 |
| `splitting`, by each kernel, with ties, of 2 and 3 texts | E[weight of each text] = p0(x) 1[r(x) ≥ c] | 1e-10 |

Mutants that are rejected: a kernel for the temperature before, or of another level; no resampling; levels that a run's own
texts choose; moves of the copies alone; no factor of lengths.
"""

import sys
from dataclasses import replace

import oracle
import pytest
import torch
import walk

from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import NoSupportError
from ppl_lm.infer.samplers.chances import either
from ppl_lm.infer.samplers.kernels import independence, substitution, suffix
from ppl_lm.infer.samplers.rare_events.annealing import annealed_smc
from ppl_lm.infer.samplers.rare_events.splitting_levels import splitting
from ppl_lm.infer.samplers.resampling import systematic
from ppl_lm.lm.table import table_lm
from ppl_lm.models import at_least, tilted

BETA = 0.8
PATH = sys.modules["ppl_lm.infer.samplers.rare_events.annealing"]
SPLITTING = sys.modules["ppl_lm.infer.samplers.rare_events.splitting_levels"]
CHAINS = sys.modules["ppl_lm.infer.samplers.markov_chains"]
KERNELS = sys.modules["ppl_lm.infer.samplers.kernels"]
DECODER = sys.modules["ppl_lm.lm.decoding.decoder"]
TOKENS = sys.modules["ppl_lm.lm.token_sequence"]


def letters(completions, **_):
    return [text.count("a") + 0.5 * text.count("b") for text in completions]


class World:
    """All texts of a small table, with their rewards."""

    def __init__(self, size, steps):
        self.lm = table_lm(size, steps, max_prompt=2, concentration=1.0, seed=3)
        rows = oracle.outcomes(size, steps, size - 1)
        self.x = oracle.as_tensor(rows, steps, size - 1)
        self.reward = torch.tensor(letters(self.lm.vocabulary.decode(self.x)), dtype=torch.float64)
        context = tuple(self.lm.vocabulary.encode(""))
        self.log_prior = oracle.log_probs(self.lm.model.table.detach(), context, rows)
        self.steps = steps

    def of(self, draws):
        """Each run's mean weight on each text."""
        which = (draws["x"][:, :, 0].unsqueeze(-2) == self.x).all(-1).long().argmax(-1)
        hit = torch.nn.functional.one_hot(which, len(self.x)).double()
        return (hit * draws.log_weight[:, :, 0].exp().unsqueeze(-1)).mean(1)


TWO, ONE, WIDE, LONG = World(2, 2), World(3, 1), World(3, 2), World(2, 3)


class Chosen:
    """Stands in for all random numbers of a sampler; a row is of the run that `runs` says."""

    def __init__(self, w, world, count, columns):
        self.w, self.world = w, world
        self.runs = [i // count for i in range(count * columns)]
        self.start = None

    def places(self, n):
        picked = [self.w.pick(self.runs[i], [1 / k] * k) if k else 0 for i, k in enumerate(n.flatten().tolist())]
        self.start = picked
        return torch.tensor(picked).reshape(n.shape)

    def accepted(self, ratio):
        self.start = None
        chances = ratio.exp().clamp_max(1).flatten().tolist()
        picked = [self.w.pick(self.runs[i], [1 - a, a]) for i, a in enumerate(chances)]
        return torch.tensor(picked).reshape(ratio.shape) == 1

    def uniforms(self, *shape, **_):
        """Numbers that say which row and token they are for."""
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)

    def tokens(self, log_probs, u):
        laws, picked = log_probs.double().softmax(-1).tolist(), []
        for law, number in zip(laws, u.tolist(), strict=True):
            row, t = divmod(int(number), self.world.steps)
            kept = self.start is not None and t < self.start[row]
            picked.append(0 if kept else self.w.pick(self.runs[row], law))
        return torch.tensor(picked), torch.ones(len(picked), dtype=torch.bool)

    def token(self, log_q, u):
        laws = log_q.double().softmax(-1).tolist()
        self.start = [self.world.steps] * len(self.runs) * 2  # what follows is kept
        return torch.tensor([self.w.pick(self.runs[int(i)], law) for i, law in zip(u.tolist(), laws, strict=True)])


def expected(monkeypatch, world, sampler, count, mutant=None):
    """E of `World.of` over every outcome.

    :param sampler: (runs) -> draws."""

    def program(w, runs):
        with monkeypatch.context() as patch:
            chosen = Chosen(w, world, count, runs)
            patch.setattr(CHAINS, "accepted", chosen.accepted)
            patch.setattr(KERNELS, "places", chosen.places)
            patch.setattr(KERNELS, "invert", chosen.token)
            patch.setattr(torch, "rand", chosen.uniforms)
            patch.setattr(DECODER, "_quantiles", chosen.tokens)
            patch.setattr(PATH, "systematic", w.rule(systematic))
            if mutant is not None:
                mutant(patch)
            try:
                found = world.of(sampler(runs))
            except NoSupportError:
                found = torch.zeros(runs, len(world.x), dtype=torch.float64)
        return [[value] for value in found]

    (found,) = walk.explore(program)
    return sum(chance * value for chance, value in found)


def annealed(monkeypatch, world, kernel, path, mutant=None):
    model = bind(tilted, world.lm, reward=letters, beta=BETA)

    def sampler(runs):
        return annealed_smc(model, [""], path=path, num_samples=2, num_runs=runs, kernel=kernel)

    return expected(monkeypatch, world, sampler, 2, mutant), (world.log_prior + world.reward / BETA).exp()


def split(monkeypatch, world, kernel, levels, count=2, mutant=None):
    model = bind(at_least, world.lm, reward=letters, level=levels[-1])

    def sampler(runs):
        return splitting(model, [""], levels=levels, num_samples=count, num_runs=runs, moves=1, kernel=kernel)

    truth = torch.where(world.reward >= levels[-1], world.log_prior.exp(), 0.0)
    return expected(monkeypatch, world, sampler, count, mutant), truth


PATHS = [
    (TWO, suffix, [1.0]),
    (TWO, substitution, [0.3, 1.0]),
    (TWO, independence, [0.3, 1.0]),
    (ONE, suffix, [0.3, 1.0]),
    (ONE, independence, [0.5, 1.0]),
]
LEVELS = [
    (TWO, suffix, [1.0, 2.0], 2),
    (TWO, independence, [1.0, 2.0], 2),
    (TWO, substitution, [0.5, 1.0, 2.0], 3),
    (ONE, suffix, [0.5, 1.0], 3),
    (WIDE, substitution, [0.5, 1.5], 2),
    (WIDE, suffix, [1.0, 1.5], 2),
    pytest.param(LONG, suffix, [1.0, 2.0, 3.0], 2, marks=pytest.mark.slow),
]


def name_of(case):
    worlds = {id(TWO): "two", id(ONE): "one", id(WIDE): "wide", id(LONG): "long"}
    return worlds.get(id(case)) or getattr(case, "__name__", str(case))


@pytest.mark.parametrize("world, kernel, path", PATHS, ids=name_of)
def test_a_path_is_exact(world, kernel, path, monkeypatch):
    found, truth = annealed(monkeypatch, world, kernel, path)
    torch.testing.assert_close(found, truth, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("world, kernel, levels, count", LEVELS, ids=name_of)
def test_splitting_is_exact(world, kernel, levels, count, monkeypatch):
    found, truth = split(monkeypatch, world, kernel, levels, count)
    torch.testing.assert_close(found, truth, atol=1e-10, rtol=1e-10)


def before(patch):
    right = PATH._moved
    patch.setattr(PATH, "_moved", lambda state, propose, power: right(state, propose, {1.0: 0.3, 0.3: 0.01}[power]))


def not_resampled(patch):
    right = PATH.resampled
    patch.setattr(PATH, "resampled", lambda state, log_w: right(state, torch.zeros_like(log_w)))


def a_level_below(patch):
    right = SPLITTING._Climb.moved
    patch.setattr(SPLITTING._Climb, "moved", lambda self, state, z: right(self, state, z - 1))


def its_own_levels(patch):
    """Each is the second smallest reward of the run's own texts."""
    right = SPLITTING._Climb.runs

    def runs(self, levels, count, runs):
        state, log_p = self.start(count), 0.0
        while self.rewards(state).min() < min(self.level, self.rewards(state).max()):
            rewards = self.rewards(state).unique()
            log_p += float((self.rewards(state) >= rewards[1]).double().mean().log())
            state = self.climbed(state, float(rewards[1]), 1)
        patch.setattr(self, "start", lambda _: state)
        draws = right(self, [self.level], count, 1)
        return replace(draws, log_guide=draws.log_guide - log_p)

    patch.setattr(SPLITTING._Climb, "runs", runs)


def copies_alone(patch):
    """The first of each text's copies is left where it is."""
    rule, right, seen = PATH.systematic, SPLITTING._Climb.moved, []

    def watched(columns, count):
        made = rule(columns, count)
        seen[:] = [made.index]
        return made

    def moved(self, state, z):
        index = seen[0]
        first = torch.stack([(index[:n] != index[n]).all(0) for n in range(len(index))])  # (N, C)
        return either(replace(state, stats={}), right(self, state, z), ~first.T.reshape(-1, 1))

    patch.setattr(PATH, "systematic", watched)
    patch.setattr(SPLITTING._Climb, "moved", moved)


@pytest.mark.parametrize("mutant", [before, not_resampled], ids=lambda f: f.__name__)
def test_wrong_paths_are_rejected(mutant, monkeypatch):
    found, truth = annealed(monkeypatch, ONE, independence, [0.3, 1.0], mutant)
    assert float((found / truth - 1).abs().max()) > 0.01


WRONG = [
    (a_level_below, LONG, suffix, [1.0, 2.0, 3.0]),
    pytest.param(its_own_levels, WIDE, substitution, [1.5], marks=pytest.mark.slow),
    pytest.param(copies_alone, WIDE, suffix, [1.0, 1.5, 2.0], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mutant, world, kernel, levels", WRONG, ids=name_of)
def test_wrong_splitting_is_rejected(mutant, world, kernel, levels, monkeypatch):
    """Also what is wrong by a thousandth: no number is left to chance."""
    monkeypatch.setattr(walk, "BATCH", 1 if mutant is its_own_levels else walk.BATCH)
    found, truth = split(monkeypatch, world, kernel, levels, 2, mutant)
    assert float((found - truth).abs().max()) > 1e-6


def test_a_kernel_without_the_factor_of_lengths_is_rejected(monkeypatch):
    def wrong(*given):
        propose = suffix(*given)
        return lambda state: (propose(state)[0], torch.zeros_like(state.log_guide[0]))

    found, truth = annealed(monkeypatch, TWO, wrong, [1.0])
    assert float((found / truth - 1).abs().max()) > 0.01
