"""Markov chains over text: their transition matrices by enumeration, then the whole sampler against exact figures.

| what | property | tolerance |
|---|---|---|
| `resume` | the law of a text whose end is drawn anew | 1e-10 |
| `suffix`, `independence`, `substitution` | π P = π, detailed balance, irreducible, for a guide other than the prior | 1e-10 |
| `mcmc` | the variance of chains' means against the one that P implies; E[r] | 20%; 4 standard errors |

Mutants that are rejected: no ratio of lengths; the mean over tokens for their sum; weights without the guide's density; a token
in place whose consequences for what follows do not count.
"""

import itertools
import sys

import oracle
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_lm.criticism.evidence import log_evidence
from ppl_lm.criticism.inference_data.arviz_groups import to_arviz
from ppl_lm.guides import finetuned, prior
from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import NoSupportError
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.importance_sampling import draw, importance
from ppl_lm.infer.samplers.kernels import independence, mixed, particle_gibbs, substitution, suffix
from ppl_lm.infer.samplers.markov_chains import mcmc, step
from ppl_lm.lm.table import table_lm
from ppl_lm.models import constrained, tilted

V, T, END, BETA = 3, 3, 2, 0.7
ROWS = oracle.outcomes(V, T, END)
X = oracle.as_tensor(ROWS, T, END)


def letters(completions, **_):
    return [text.count("a") - 0.5 * text.count("b") for text in completions]


def make(texts, guide=None, beta=BETA):
    """A target with a guide, by default the prior, and what is known of both by enumeration, (N, B)."""
    lm = table_lm(V, T, max_prompt=2, concentration=1.0, seed=1)
    other = lm.copy() if guide is None else guide
    contexts = [tuple(lm.vocabulary.encode(text)) for text in texts]
    log_prior, log_q = (
        torch.stack([oracle.log_probs(table.detach(), c, ROWS) for c in contexts], 1)
        for table in (lm.model.table, other.model.table)
    )
    reward = torch.tensor(letters(lm.vocabulary.decode(X)), dtype=torch.float64)
    return {
        "target": bind(tilted, lm, reward=letters, beta=beta), "guide": bind(finetuned, other), "texts": list(texts),
        "log_q": log_q, "posterior": (log_prior + reward[:, None] / beta).softmax(0), "lm": other, "reward": reward,
    }  # fmt: skip


@pytest.fixture(params=[("",), ("", "a")], ids=["one prompt", "left-padded batch"])
def problem(request):
    return make(request.param, table_lm(V, T, max_prompt=2, concentration=2.0, seed=2).copy())


def ends(problem, row, start):
    """Law of the outcome that begins as `row` does up to `start`, (N, B)."""
    same = torch.tensor([other[:start] == row[:start] for other in ROWS])
    return torch.where(same[:, None], problem["log_q"], -torch.inf).softmax(0)


def forced(monkeypatch, places, tokens):
    """Random numbers as given: where texts are cut, and their tokens. Returns what `step` asks for next."""
    module, decoder = sys.modules["ppl_lm.infer.samplers.markov_chains"], sys.modules["ppl_lm.lm.decoding.decoder"]
    queue = [u for u in (places, tokens) if u is not None]
    monkeypatch.setattr(module.torch, "rand", lambda *shape, **_: queue.pop(0).reshape(*shape))
    monkeypatch.setattr(decoder, "_quantiles", lambda log_probs, u: (u.long(), torch.ones_like(u, dtype=torch.bool)))


def walk(problem, monkeypatch, kernel, mutant=None):
    """The transition matrix (N, N, B): the production step, run once with every state, every place and every end of it
    forced; each weighted by its probability."""
    n, batch = len(ROWS), len(problem["texts"])
    lengths = [len(row) for row in ROWS]
    if kernel is suffix:
        cells = [
            (i, start, j)
            for i, j in itertools.product(range(n), repeat=2)
            for start in range(lengths[i])
            if ROWS[i][:start] == ROWS[j][:start]
        ]
    else:
        cells = [(i, 0, j) for i, j in itertools.product(range(n), repeat=2)]
    frm, start, to = torch.tensor(cells).unbind(1)

    def every(value):
        return value.unsqueeze(1).expand(-1, batch, *value.shape[1:])

    with monkeypatch.context() as patch:
        forced(patch, None, every(X[frm]).double())
        state = draw(problem["target"], problem["guide"], problem["texts"], len(cells), 1)
    assert torch.equal(state["x"][0, :, 0], X[frm])
    new = X[to].double()
    u = (start + 0.5) / torch.tensor(lengths)[frm]
    with monkeypatch.context() as patch:
        forced(patch, every(u) if kernel is suffix else None, every(new))
        propose = kernel(problem["target"], problem["guide"], problem["texts"])
        _, info = step(state, propose if mutant is None else mutant(propose))
    assert torch.equal(info.proposal["x"][0, :, 0], X[to])
    moves = torch.zeros(n, n, batch, dtype=torch.float64)
    for cell, (i, s, j) in enumerate(cells):
        chance = ends(problem, ROWS[i], s)[j] / (lengths[i] if kernel is suffix else 1)
        moves[i, j] += chance * info.log_accept[cell].exp()
    moves[range(n), range(n)] += 1 - moves.sum(1)
    return moves


def walk_of_substitution(problem, monkeypatch, mutant=None):
    """The same of `substitution`: every state, every place and every token there."""
    n, batch = len(ROWS), len(problem["texts"])
    free = [len(row) - (END in row) for row in ROWS]
    index = {row: i for i, row in enumerate(ROWS)}
    cells = [
        (i, t, v, index[(*ROWS[i][:t], v, *ROWS[i][t + 1 :])])
        for i in range(n)
        for t in range(free[i])
        for v in range(V)
        if v != END
    ]
    frm, place, token, to = torch.tensor(cells).unbind(1)

    def every(value):
        return value.unsqueeze(1).expand(-1, batch, *value.shape[1:])

    with monkeypatch.context() as patch:
        forced(patch, None, every(X[frm]).double())
        state = draw(problem["target"], problem["guide"], problem["texts"], len(cells), 1)
    u = (place + 0.5) / torch.tensor(free)[frm]
    with monkeypatch.context() as patch:
        module, decoder = sys.modules["ppl_lm.infer.samplers.kernels"], sys.modules["ppl_lm.lm.decoding.decoder"]
        queue = [every(u), every(token).double(), every(X[to]).double()]
        patch.setattr(module.torch, "rand", lambda *shape, **_: queue.pop(0).reshape(*shape))
        patch.setattr(decoder, "_quantiles", lambda log_probs, u: (u.long(), torch.ones_like(u, dtype=torch.bool)))
        propose = substitution(problem["target"], problem["guide"], problem["texts"])
        _, info = step(state, propose if mutant is None else mutant(propose))
    assert torch.equal(info.proposal["x"][0, :, 0], X[to])
    moves = torch.zeros(n, n, batch, dtype=torch.float64)
    log_q = problem["log_q"]
    for cell, (i, t, v, j) in enumerate(cells):
        begun = {
            w: torch.stack([log_q[k] for k in range(n) if ROWS[k][: t + 1] == (*ROWS[i][:t], w)]).logsumexp(0)
            for w in range(V)
            if w != END
        }
        chance = (begun[v] - torch.stack(list(begun.values())).logsumexp(0)).exp() / free[i]
        moves[i, j] += chance * info.log_accept[cell].exp()
    moves[range(n), range(n)] += 1 - moves.sum(1)
    return moves


def test_a_token_in_place_leaves_the_posterior_invariant(problem, monkeypatch):
    moves = walk_of_substitution(problem, monkeypatch)
    assert imbalance(problem, moves) < 1e-10
    flow = problem["posterior"][:, None] * moves
    torch.testing.assert_close(flow, flow.transpose(0, 1), atol=1e-10, rtol=0)
    assert float(moves.min()) > -1e-12
    both = 0.5 * moves + 0.5 * walk(problem, monkeypatch, suffix)  # what `mixed` does at each step
    assert bool((torch.linalg.matrix_power(both.permute(2, 0, 1), 2) > 0).all())


def by_what_is_there(propose):
    """Of the guide's density only that of the new token, not of what follows it."""

    def made(state):
        proposal, correction = propose(state)
        return proposal, torch.zeros_like(correction)

    return made


def test_a_wrong_substitution_leaves_another_law(problem, monkeypatch):
    assert imbalance(problem, walk_of_substitution(problem, monkeypatch, by_what_is_there)) > 0.02


def test_mixed_kernels_reach_the_posterior():
    """E[r] by chains that change tokens and ends in turn, within 4 standard errors; the prior proposes, so that the warm-up
    is long enough."""
    torch.manual_seed(4)
    problem = make(["", "a"], beta=3.0)
    kernel = mixed(suffix, substitution)
    draws = mcmc(
        problem["target"], problem["guide"], problem["texts"], num_samples=50, warmup=30, num_chains=600, kernel=kernel
    )
    reward = draws.records["reward"].mean(1)  # (C, B)
    exact = (problem["posterior"] * problem["reward"][:, None]).sum(0)
    assert bool(((reward.mean(0) - exact).abs() < 4 * reward.std(0) / len(reward) ** 0.5).all())
    with pytest.raises(ValueError, match="of no kernel"):
        mixed()


def test_what_cannot_follow_the_new_token_is_left():
    """After a only a may follow, so that b in the place of the first a of a text is never taken, and weights stay numbers."""
    torch.manual_seed(5)
    lm = table_lm(V, T, concentration=1.0, seed=1).copy()
    with torch.no_grad():
        for row in ROWS:
            for t in range(len(row)):
                if t and row[t - 1] == 1:
                    lm.model.table[oracle.table_row(row[:t], V), 0] = -torch.inf
    model = bind(tilted, lm.requires_grad_(False), reward=letters, beta=1.0)
    draws = mcmc(model, None, [""], num_samples=40, warmup=20, num_chains=500, kernel=mixed(suffix, substitution))
    truth = enumerate_posterior(model, None, [""])
    exact = float((truth.log_posterior.exp() * truth.records["reward"]).nansum(0))
    reward = draws.records["reward"].mean(1)[:, 0]
    assert not bool(draws.log_weight.isnan().any())
    assert abs(float(reward.mean()) - exact) < 4 * float(reward.std()) / len(reward) ** 0.5


def imbalance(problem, moves):
    pi = problem["posterior"]
    return float((torch.einsum("ib,ijb->jb", pi, moves) - pi).abs().sum(0).max())


@pytest.mark.parametrize("kernel", [suffix, independence])
def test_the_posterior_is_invariant_and_reached(problem, monkeypatch, kernel):
    moves = walk(problem, monkeypatch, kernel)
    assert imbalance(problem, moves) < 1e-10
    flow = problem["posterior"][:, None] * moves
    torch.testing.assert_close(flow, flow.transpose(0, 1), atol=1e-10, rtol=0)
    assert float(moves.min()) > -1e-12 and bool((torch.linalg.matrix_power(moves.permute(2, 0, 1), 2) > 0).all())


def without_lengths(propose):
    def made(state):
        proposal, correction = propose(state)
        return proposal, torch.zeros_like(correction)

    return made


def by_mean(propose):
    """The guide's density of both texts by the mean over tokens, as QUEST's code has it."""

    def made(state):
        proposal, correction = propose(state)
        old, new = (d.log_guide[0] for d in (state, proposal))
        lengths = [d.prompts.vocabulary.lengths(d["x"][0]) for d in (state, proposal)]
        return proposal, correction + new - old + old / lengths[0] - new / lengths[1]

    return made


def without_the_guide(propose):
    def made(state):
        proposal, correction = propose(state)
        return proposal, correction + (proposal.log_guide - state.log_guide)[0]

    return made


@pytest.mark.parametrize(
    ("kernel", "mutant"), [(suffix, without_lengths), (suffix, by_mean), (independence, without_the_guide)]
)
def test_mutants_leave_another_law_invariant(problem, monkeypatch, kernel, mutant):
    assert imbalance(problem, walk(problem, monkeypatch, kernel, mutant)) > 0.02


def test_a_resumed_text_follows_the_model(problem, monkeypatch):
    """Every end of every text from every place: the tokens' probabilities, as they were drawn, against the oracle."""
    module = sys.modules["ppl_lm.lm.token_sequence"]
    law, texts = problem["lm"](problem["texts"]), problem["texts"]
    original, found = module.sample, []

    def spy(*args):
        made = original(*args)
        found.append(made[1])
        return made

    monkeypatch.setattr(module, "sample", spy)
    for row, start in [(r, s) for r in ROWS for s in range(len(r))]:
        same = [j for j, other in enumerate(ROWS) if other[:start] == row[:start]]
        value = torch.tensor([*row, *[END] * (T - len(row))]).expand(len(same), len(texts), T)
        with monkeypatch.context() as patch:
            new = torch.where(torch.arange(T) < start, END, X[same]).double()  # what is kept is not drawn
            forced(patch, new.unsqueeze(1).expand(-1, len(texts), -1), None)
            made = law.resume(value, torch.full(value.shape[:-1], start))
        assert torch.equal(made, X[same].unsqueeze(1).expand_as(made))
        torch.testing.assert_close(
            found.pop()[:, start:].sum(-1).reshape(-1, len(texts)).exp(),
            ends(problem, row, start)[same],
            atol=1e-10,
            rtol=0,
        )


def test_resumed_texts_keep_what_stands_before_and_cost_what_is_new():
    lm = table_lm(V, 6, max_prompt=2, concentration=1.0, seed=1)
    law = lm(["", "a"])
    torch.manual_seed(0)
    value = law.sample(torch.Size((200,)))
    start = (torch.rand(200, 2) * lm.vocabulary.lengths(value)).long()
    made = law.resume(value, start)
    before = torch.arange(6) < start[..., None]
    assert torch.equal(made[before], value[before]) and bool(lm.vocabulary.is_canonical(made).all())
    assert not torch.equal(made, value)


@pytest.mark.parametrize("kernel", [suffix, pytest.param(independence, marks=pytest.mark.slow)])
def test_chains_are_worth_what_their_transition_matrix_says(monkeypatch, kernel):
    """The variance of a chain's mean reward, over 2500 chains, against the autocorrelations of P, within 4 standard
    errors of at most 5%; and the mean of all. The prior proposes, so that the warm-up is long enough."""
    problem = make(["", "a"], beta=3.0)
    moves, pi, reward = walk(problem, monkeypatch, kernel), problem["posterior"], problem["reward"]
    assert float(torch.linalg.matrix_power(moves.permute(2, 0, 1), 100).std(1).max()) < 1e-2  # of all starts
    chains, length = 2500, 60
    torch.manual_seed(0)
    draws = mcmc(
        problem["target"], problem["guide"], problem["texts"],
        num_samples=length, warmup=100, num_chains=chains, kernel=kernel,
    )  # fmt: skip
    assert draws.log_weight.shape == (chains, length, len(problem["texts"])) and draws.kind == "chains"
    for b in range(len(problem["texts"])):
        truth = float(pi[:, b] @ reward)
        lagged, times = reward - truth, float(pi[:, b] @ (reward - truth) ** 2)
        for k in range(1, length):
            lagged = moves[:, :, b] @ lagged
            times += 2 * (1 - k / length) * float(pi[:, b] @ ((reward - truth) * lagged))
        by_chain = draws["reward"][:, :, b].mean(1)
        error = float(((by_chain - truth) ** 2).std() / by_chain.var()) / chains**0.5
        assert float(by_chain.var()) == pytest.approx(times / length, rel=4 * error) and error < 0.05
        se = (times / length / chains) ** 0.5
        assert abs(float(by_chain.mean()) - truth) < 4 * se
        assert abs(float(problem["log_q"][:, b].exp() @ reward) - truth) > 8 * se  # the mutant: the guide's own draws
    data, accepted = to_arviz(draws), draws.stats["acceptance_rate"]
    assert data.sample_stats["acceptance_rate"].shape == data.posterior["reward"].shape == accepted.shape
    stay = float((pi * torch.diagonal(moves).T).sum(0).max())  # proposals of the same text among them
    assert 1 - stay - 0.01 < float(accepted.mean()) < 1


def test_a_program_with_several_latent_sites_takes_independence():
    lm = table_lm(3, 2, concentration=1.0)

    def story(prompts, prior, reward):
        with pyro.plate("prompts", len(prompts)):
            topic = pyro.sample("topic", dist.Bernoulli(torch.tensor(0.3).double()))
            r = reward(prompts, pyro.sample("x", prior(prompts))) * topic
            pyro.sample("o", dist.Bernoulli(torch.sigmoid(r)), obs=torch.ones(len(prompts)).double())

    target, texts = bind(story, lm, reward=letters), ["", ""]
    with pytest.raises(ValueError, match=r"latent sites \['topic', 'x'\], .*: use kernel=independence"):
        mcmc(target, None, texts, num_samples=2)
    torch.manual_seed(0)
    draws = mcmc(target, None, texts, num_samples=100, num_chains=200, warmup=20, kernel=independence)
    truth = enumerate_posterior(target, None, texts)
    on = float((truth.log_posterior.exp() * truth.latents["topic"]).sum(0)[0])
    by_chain = draws["topic"].double().mean((1, 2))
    assert abs(float(by_chain.mean()) - on) < 4 * float(by_chain.std()) / 200**0.5 < 0.05


def test_a_joint_weight_moves_all_prompts_together():
    lm = table_lm(3, 2, concentration=1.0)

    def shared(prompts, prior, reward):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3).double()))
        with pyro.plate("prompts", len(prompts)):
            r = reward(prompts, pyro.sample("x", prior(prompts))) * z
            pyro.sample("o", dist.Bernoulli(torch.sigmoid(r)), obs=torch.ones(len(prompts)).double())

    target, texts = bind(shared, lm, reward=letters), ["", ""]
    torch.manual_seed(0)
    draws = mcmc(target, None, texts, num_samples=100, num_chains=200, warmup=20, kernel=independence)
    assert draws.log_weight.shape == (200, 100, 1) and draws["x"].shape == (200, 100, 2, 2)
    law = importance(target, None, texts, num_samples=40_000)
    w = law.log_weight.flatten().softmax(0)
    z = law["z"].flatten().double()
    truth, se = float(w @ z), float((w**2 @ (z - w @ z) ** 2) ** 0.5)
    by_chain = draws["z"].double().mean((1, 2))
    assert abs(float(by_chain.mean()) - truth) < 4 * (float(by_chain.var()) / 200 + se**2) ** 0.5


def test_a_constraint_is_met_after_the_warm_up_or_refused():
    lm = table_lm(4, 4, concentration=1.0, seed=3)
    target = bind(constrained, lm, constraint=lambda completions, **_: ["a" in c for c in completions])
    torch.manual_seed(0)
    draws = mcmc(target, None, [""], num_samples=20, warmup=50, num_chains=50)
    assert all("a" in text for text in draws.text()[0])
    never = bind(constrained, lm, constraint=lambda completions, **_: [False] * len(completions))
    with pytest.raises(NoSupportError, match="best log weight is -inf"):
        mcmc(never, None, [""], num_samples=5, warmup=3)


@pytest.mark.parametrize(("wrong", "least"), [({"num_samples": 0}, 1), ({"num_chains": 1}, 2), ({"warmup": -1}, 0)])
def test_bad_numbers_are_refused(wrong, least):
    lm = table_lm(3, 2)
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}; give at least {least}"):
        mcmc(bind(tilted, lm, reward=letters), bind(prior, lm), [""], **wrong)


def test_chains_are_no_guides_draws_for_bounds():
    lm = table_lm(3, 2, concentration=1.0)
    draws = mcmc(bind(tilted, lm, reward=letters), None, [""], num_samples=3, warmup=0, num_chains=2)
    assert draws.cost.reward_calls == 2 + 3 * 2
    with pytest.raises(ValueError, match="guide's own draws"):
        log_evidence(draws)
    assert to_arviz(draws).posterior["reward"].shape == (2, 3, 1)


def test_particle_gibbs_is_not_mixed_with_others():
    """What it leaves as the density of a text is that of its run."""
    with pytest.raises(ValueError, match="cannot be mixed"):
        mixed(suffix, particle_gibbs(2))
    assert callable(mixed(particle_gibbs(2)))
