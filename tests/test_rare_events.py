"""Paths of temperatures and what is made of their draws, held against enumeration.

| what | property | tolerance |
|---|---|---|
| `annealed_smc` | E[weight of each text] = p(x, evidence), so E[Ẑ] = Z, with few texts | 4.5 SE of 20,000 runs |
| `splitting` | E[p̂ 1(x)] = p0(x) 1[r(x) ≥ c], with ties and few texts; lost runs count as 0 | 4.5 SE of 4,000 runs |
| `mbar` | Z of each law at draws in proportion to their laws; with one law the mean weight | 1e-9 |
| its errors | 95% intervals of log P(r ≥ c), P = 0.01, hold in 400 runs of 60 draws a law | binomial, 1 in 1,000 |
| `splitting` | 95% intervals of log P, P = 1e-2 and 1e-4, hold in 100 times 20 runs | binomial, 1 in 1,000 |
| a path's draws and `mbar` together | log Z and P(r ≥ c) within their errors | 4 SE |

Mutants that are rejected: those that tie with a level killed with the others; a kernel for the level before; a kernel for the
temperature before; weights without the last stage; errors of the prior's draws alone; of a path's texts as if they were
independent.
"""

import math
import sys

import oracle
import pyro
import pytest
import scipy.stats
import torch
from bigram import bigram

from ppl_lm.criticism.evidence import log_evidence
from ppl_lm.criticism.path_estimates import mbar, path_constants
from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import NoSupportError
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.kernels import independence, particle_gibbs
from ppl_lm.infer.samplers.rare_events.annealing import annealed_smc
from ppl_lm.infer.samplers.rare_events.splitting_levels import splitting
from ppl_lm.likelihood.reward import Reward
from ppl_lm.lm.table import table_lm
from ppl_lm.models import at_least, constrained, tilted

V, T, END, BETA = 4, 3, 3, 0.7
PATH = sys.modules["ppl_lm.infer.samplers.rare_events.annealing"]
LM = table_lm(V, T, max_prompt=2, concentration=1.0, seed=1)
ROWS = oracle.outcomes(V, T, END)
X = oracle.as_tensor(ROWS, T, END)
TEXTS = ["", "a"]


def letters(completions, **_):
    return [text.count("a") - 0.5 * text.count("b") for text in completions]


MODEL = bind(tilted, LM, reward=letters, beta=BETA)
REWARD = torch.tensor(letters(LM.vocabulary.decode(X)), dtype=torch.float64)
CONTEXTS = [tuple(LM.vocabulary.encode(text)) for text in TEXTS]
LOG_PRIOR = torch.stack([oracle.log_probs(LM.model.table.detach(), c, ROWS) for c in CONTEXTS], 1)  # (N, B)
JOINT = LOG_PRIOR + REWARD[:, None] / BETA
Z = JOINT.logsumexp(0).exp()


def by_text(draws):
    """Each run's mean weight on each text, (C, B, N)."""
    which = (draws["x"].unsqueeze(-2) == X).all(-1).long().argmax(-1)
    hit = torch.nn.functional.one_hot(which, len(X)).double()
    return (hit * draws.log_weight.exp().unsqueeze(-1)).mean(1)


def largest_z(draws, truth, least):
    """|z| of the mean weight on each text, of those above `least`, and of their sum.

    :param truth: (B, N)."""
    found = by_text(draws)
    found, truth = (torch.cat([v, v.sum(-1, keepdim=True)], -1) for v in (found, truth))
    z = (found.mean(0) - truth) / (found.std(0) / math.sqrt(len(found))).clamp_min(1e-12)
    return float(z[truth > least].abs().max())


def worst(path, runs=20_000, **how):
    """Of many runs of two texts along a path, of the texts that are not too rare for that."""
    draws = annealed_smc(MODEL, TEXTS, path=path, num_samples=2, num_runs=runs, **how)
    return largest_z(draws, JOINT.T.exp(), 0.005 * float(Z.min()))


@pytest.mark.parametrize("how", [{}, {"moves": 2}, {"kernel": independence}])
@pytest.mark.parametrize("path", [[1.0], [0.3, 1.0], [0.1, 0.3, 0.6, 1.0]])
def test_a_path_is_unbiased(path, how):
    torch.manual_seed(0)
    assert worst(path, **how) < 4.5


@pytest.mark.parametrize("mutant", ["the temperature before", "no last stage"])
def test_wrong_paths_are_seen(monkeypatch, mutant):
    torch.manual_seed(0)
    right, path = PATH._moved, [0.3, 1.0]
    if mutant == "the temperature before":
        monkeypatch.setattr(
            PATH, "_moved", lambda state, propose, power: right(state, propose, {1.0: 0.3, 0.3: 0.05}[power])
        )
    else:
        resampled = PATH.resampled
        monkeypatch.setattr(PATH, "resampled", lambda state, log_w: resampled(state, torch.zeros_like(log_w)))
    assert worst(path) > 8


def scaled(prompts, prior, reward):
    with pyro.poutine.scale(scale=2.0):
        return tilted(prompts, prior, reward, BETA)


def test_what_would_move_by_another_law_is_refused():
    for kernel in (particle_gibbs(2),):
        with pytest.raises(ValueError, match="particle Gibbs"):
            annealed_smc(MODEL, TEXTS, path=[1.0], kernel=kernel)
        with pytest.raises(ValueError, match="particle Gibbs"):
            splitting(event(1.0), TEXTS, kernel=kernel)
    with pytest.raises(ValueError, match="another law"):
        annealed_smc(bind(scaled, LM, reward=letters), TEXTS, path=[1.0])


def test_what_makes_no_path_is_refused():
    for path in ([], [0.5], [0.5, 0.5, 1.0], [0.0, 1.0], [0.5, 2.0]):
        with pytest.raises(ValueError, match="rise"):
            annealed_smc(MODEL, TEXTS, path=path)
    with pytest.raises(NoSupportError, match="prompt 0"):
        annealed_smc(
            bind(constrained, LM, constraint=lambda completions, **_: [False for _ in completions]), TEXTS, path=[1.0]
        )
    endless = bind(at_least, LM, reward=letters, level=0.0)
    with pytest.raises(ValueError, match="inf"):
        annealed_smc(
            lambda p: tilted(LM.prompts(p), LM, lambda p, x: torch.full(x.shape[:-1], math.inf), 1.0), TEXTS, path=[1.0]
        )
    assert splitting(endless, TEXTS, num_samples=4, num_runs=2).num_samples


def test_texts_of_likelihood_zero_have_no_weight():
    """Also where they are so rare that no run meets one: what is refused by chance would bias what is not."""
    torch.manual_seed(0)
    rows = torch.tensor(["b" not in text for text in LM.vocabulary.decode(X)])
    hard = bind(
        tilted,
        LM,
        reward=lambda completions, **_: [
            r if "b" not in t else -math.inf for r, t in zip(letters(completions), completions, strict=True)
        ],
        beta=BETA,
    )
    truth = torch.where(rows[:, None], JOINT, -math.inf).T.exp()
    draws = annealed_smc(hard, TEXTS, path=[0.3, 1.0], num_samples=2, num_runs=20_000)
    assert largest_z(draws, truth, 0.005 * float(truth.sum(-1).min())) < 4.5
    constants = path_constants(annealed_smc(hard, TEXTS, path=[0.3, 1.0], num_samples=200, num_runs=20))[0]
    assert abs(float(constants.log_z[-1]) - float(truth[0].sum().log())) < 4 * float(constants.log_z_se[-1])


# Splitting

SPLITTING = sys.modules["ppl_lm.infer.samplers.rare_events.splitting_levels"]
ESTIMATES = sys.modules["ppl_lm.criticism.path_estimates"]


def event(level):
    return bind(at_least, LM, reward=letters, level=level)


def worst_of_splitting(level, runs=4000, texts=TEXTS, **how):
    """Of many runs of a few texts, and of the event's probability."""
    draws = splitting(event(level), texts, num_runs=runs, **{"num_samples": 4, "moves": 1, **how})
    return largest_z(draws, torch.where(level <= REWARD, LOG_PRIOR.T.exp(), 0.0)[: len(texts)], 2e-3)


@pytest.mark.parametrize(
    "how", [{}, {"kept": 0.6}, {"num_samples": 2}, {"kernel": independence, "moves": 2}, {"kept": 0.2}]
)
@pytest.mark.parametrize("level", [1.0, 2.0])
def test_splitting_is_unbiased(level, how):
    torch.manual_seed(0)
    assert worst_of_splitting(level, **how) < 4.5


@pytest.mark.parametrize("mutant", ["ties are killed", "the level before"])
def test_wrong_splitting_is_seen(monkeypatch, mutant):
    torch.manual_seed(0)
    climb = SPLITTING._Climb
    if mutant == "ties are killed":
        right = climb.climbed
        monkeypatch.setattr(climb, "climbed", lambda self, state, z, runs: right(self, state, z + 1e-9, runs))
    else:
        right = climb.moved
        monkeypatch.setattr(climb, "moved", lambda self, state, z: right(self, state, z - 1))
    assert worst_of_splitting(2.0, runs=8000, levels=[0.5, 1.0, 2.0]) > 6


def test_an_event_that_no_run_reaches():
    with pytest.raises(NoSupportError, match="a pilot came to reward ≥ 3, and not to 50"):
        splitting(event(50.0), [""], num_samples=8, num_runs=4)
    with pytest.raises(NoSupportError, match="none of 4 runs"):
        splitting(event(50.0), [""], num_samples=8, num_runs=4, levels=[1.0, 50.0])
    with pytest.raises(ValueError, match="evidence is not the event"):
        splitting(MODEL, [""], level=2.0)
    with pytest.raises(ValueError, match="level="):
        splitting(MODEL, [""])
    for wrong in ({"kept": 1.0}, {"levels": [0.5, 0.5, 2.0]}, {"levels": [1.0]}, {"levels": []}):
        with pytest.raises(ValueError, match="kept=1|levels="):
            splitting(event(2.0), [""], num_samples=8, **wrong)
    with pytest.raises(ValueError, match="records"):
        splitting(event(2.0), [""], record="score")


def test_prompts_of_a_plain_function():
    """Given as texts, to a program that is not bound."""

    def plain(prompts):
        return at_least(LM.prompts(prompts) if isinstance(prompts, list) else prompts, LM, Reward(letters), 1.0)

    draws = splitting(plain, TEXTS, level=1.0, num_samples=64, num_runs=4)
    assert draws.prompts.texts == TEXTS and len(draws.text()) == 2
    assert draws.observed["reached"].shape == (2,) and draws.of_prompt(1).observed["reached"].shape == (1,)


def test_splitting_of_a_certain_event():
    draws = splitting(event(-9.0), TEXTS, num_samples=4, num_runs=3)
    torch.testing.assert_close(draws.log_weight, torch.zeros_like(draws.log_weight), atol=1e-12, rtol=0)
    assert draws.stats["levels"].flatten().tolist() == [-9.0] * 6


# MBAR

U = [0.0, 1.0, 2.0, 4.0, 8.0]
LEVEL = float(REWARD.unique()[-1])


def exact(context=0):
    """Laws p0 e^{u r} over all texts, their log Z, and P(r ≥ LEVEL)."""
    logs = torch.stack([LOG_PRIOR[:, context] + u * REWARD for u in U])
    rare = float(LOG_PRIOR[:, context][REWARD >= LEVEL].logsumexp(0))
    return logs, logs.logsumexp(1) - float(LOG_PRIOR[:, context].logsumexp(0)), rare


def states(reward):
    event = torch.where(reward >= LEVEL, 0.0, -math.inf)
    return torch.stack([*(u * reward for u in U), event])


def test_mbar_of_draws_in_proportion_is_exact():
    """Every text as often as each law gives it: numbers of draws need not be whole."""
    logs, log_z, rare = exact()
    share = (logs - logs.logsumexp(1, keepdim=True)).exp()  # (K, N)
    # Σ_k N_k p_k(x) is the number of draws at x: as weights of the sum over draws
    density = states(REWARD) + share.sum(0).log()
    counts = [1.0] * len(U) + [0.0]
    found = mbar(density, counts)
    # a draw's own number cancels in the denominator, where it stands in every law alike
    torch.testing.assert_close(found.log_z[: len(U)], _fixed_point(share), atol=1e-9, rtol=0)
    assert rare < math.log(0.05)


def _fixed_point(share):
    """By its own equations, from the numbers of draws at each text."""
    number, log_z = share.sum(0), torch.zeros(len(U), dtype=torch.float64)
    for _ in range(5000):
        below = sum(torch.exp(u * REWARD - z) * number for u, z in zip(U, log_z, strict=True))
        log_z = torch.stack([(torch.exp(u * REWARD) * number / below).sum().log() for u in U])
        log_z = log_z - log_z[0]
    return log_z


def test_one_law_is_the_mean_weight():
    reward = torch.randn(200, dtype=torch.float64)
    found = mbar(torch.stack([torch.zeros(200).double(), reward]), [200, 0])
    assert float(found.log_z[1]) == pytest.approx(float(reward.logsumexp(0) - math.log(200)), abs=1e-10)
    w = reward.exp()
    assert float(found.log_z_se[1]) == pytest.approx(float(w.std(unbiased=False) / w.mean() / math.sqrt(200)), rel=1e-6)


def test_intervals_hold():
    """400 runs, 60 draws of each of five laws: 95% intervals of log Z at the last law and of log P(r ≥ c); and with the error
    that log P(r ≥ c) would have of the prior's draws alone."""
    generator = torch.Generator().manual_seed(0)
    logs, log_z, rare = exact()
    hits, wide, alone = torch.zeros(2), 0, 0
    for _ in range(400):
        rows = torch.cat([torch.multinomial(law.softmax(0), 60, replacement=True, generator=generator) for law in logs])
        found = mbar(states(REWARD[rows]), [60] * len(U) + [0])
        truth = torch.tensor([float(log_z[-1]), rare])
        z = (found.log_z[[len(U) - 1, len(U)]] - truth) / found.log_z_se[[len(U) - 1, len(U)]]
        hits += z.abs() <= 1.96
        wide += 1
        of_prior = math.sqrt((1 - math.exp(rare)) / (math.exp(rare) * 60))
        alone += int(abs(float(found.log_z[-1]) - rare) <= 1.96 * of_prior)
    for hit in hits.tolist():
        assert scipy.stats.binomtest(int(hit), wide, 0.95).pvalue > 1e-3
    assert scipy.stats.binomtest(alone, wide, 0.95).pvalue < 1e-3


def test_many_equal_laws_overlap():
    found = mbar(torch.zeros(60, 600, dtype=torch.float64), [10] * 60)
    torch.testing.assert_close(found.overlap, torch.ones(59, dtype=torch.float64))
    torch.testing.assert_close(found.log_z, torch.zeros(60, dtype=torch.float64), atol=1e-9, rtol=0)


def test_laws_that_do_not_overlap_are_refused():
    reward = torch.cat([torch.zeros(50), torch.full((50,), 40.0)]).double()
    with pytest.raises(ValueError, match="overlap"):
        mbar(torch.stack([0 * reward, reward]), [50, 50])
    with pytest.raises(ValueError, match="no draw is possible"):
        mbar(torch.stack([0 * reward, torch.full_like(reward, -math.inf)]), [100, 0])
    with pytest.raises(ValueError, match="counts"):
        mbar(torch.stack([0 * reward, reward]), [0, 100])


def test_a_paths_draws_give_rare_events():
    """40 paths: 95% intervals of log Z and of log P(r ≥ c) from all texts of each; and with `mbar`'s own errors, as if they
    were independent."""
    torch.manual_seed(0)
    truth = torch.tensor([float(Z[0].log()), exact()[2]])
    hits, own = torch.zeros(2), torch.zeros(2)
    for _ in range(40):
        draws = annealed_smc(MODEL, [""], path=[0.25, 0.5, 1.0], num_samples=32, num_runs=16, moves=4)
        (found,) = path_constants(draws, [LEVEL / BETA - 1e-6])
        error = (found.log_z - torch.tensor([0, 0, 0, *truth]))[-2:].abs()
        hits += error <= 1.96 * found.log_z_se[-2:]
        met = draws.stats["path_log_likelihood"][:, :, 0]
        plain = ESTIMATES._of_runs(met, draws.stats["power"][0, 0, 0], [LEVEL / BETA - 1e-6])
        own += error <= 1.96 * plain.log_z_se[-2:]
    for hit in hits.tolist():
        assert scipy.stats.binomtest(int(hit), 40, 0.95).pvalue > 1e-3
    assert min(scipy.stats.binomtest(int(hit), 40, 0.95).pvalue for hit in own.tolist()) < 1e-3
    assert draws.kind == "runs" and found.log_z.shape == (5,)
    with pytest.raises(ValueError, match="no path"):
        path_constants(importance(MODEL, None, [""], num_samples=4))


# Intervals of rare events, on a language model of more texts than can be enumerated, by dynamic programming


def holding(level, repeats, runs=20, **how):
    """In how many of so many repeats the 95% interval of log P holds."""
    lm, tail = bigram(14)
    model = bind(
        at_least, lm, reward=lambda completions: [float(t.count("a")) for t in completions], level=float(level)
    )
    draws = splitting(model, [""], num_samples=64, num_runs=runs * repeats, **how)
    hits = 0
    for r in range(repeats):
        one = log_evidence(draws.map(lambda v, r=r: v[r * runs : (r + 1) * runs]))
        hits += abs(float(one.log_z) - tail[level]) <= 1.96 * float(one.log_z_se)
    return hits


@pytest.mark.slow
@pytest.mark.parametrize("level", [10, 13])
def test_intervals_of_rare_events_hold(level):
    """P = 1e-2 and 1e-4: of 100 at least 83, which a coverage of 0.92 gives 999 times in 1,000; 20 runs are few."""
    torch.manual_seed(0)
    assert holding(level, 100) >= 83


@pytest.mark.slow
def test_moves_that_keep_another_law_are_seen(monkeypatch):
    """Mutant: a moved text that is in the event is taken, whatever the law says of it."""
    torch.manual_seed(0)

    def always(propose):
        def made(at):
            proposal, correction = propose(at)
            return proposal, torch.full_like(correction, 50.0)

        return made

    right = SPLITTING.step
    monkeypatch.setattr(SPLITTING, "step", lambda state, propose: right(state, always(propose)))
    assert holding(10, 100) < 83
