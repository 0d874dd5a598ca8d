"""Learning twists: every loss by its expected gradient over all texts, then whole fits.

| what | property | tolerance |
|---|---|---|
| `ctl` | its gradient is that of Σ_t KL(σ(x_≤t) ‖ π_t), written out over prefixes | 1e-10 |
| `sixo`, `soft_rl`, `fudge`, `log_variance` | value and gradient against sums written out over prefixes | 1e-10 |
| all | gradient 0 at their optimum, and not elsewhere | 1e-10 |
| `bellman_residuals` | as written out over prefixes; Σ δ = log weight of the twisted guide; both KLs by it | 1e-10 |
| the same | CV² of the weights ≤ sinh²(½ Σ_t range of δ_t), of 200 twists; ended texts count 0 in it | exact |
| `fit_twist` | KL(q ‖ p) of the twisted guide and the spread of SMC's log Ẑ fall | a tenth; a half |

Mutants that are rejected: weights of the twist with their gradient; ended texts left out; values one step early; a
bound of the spread without the half.
"""

from dataclasses import replace

import oracle
import pytest
import tiny
import torch

from ppl_lm.criticism.diagnoses.diagnosis import diagnose
from ppl_lm.guides import twisted
from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import NoSupportError
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.twists import fitting as twists
from ppl_lm.infer.twists.bellman import bellman_residuals
from ppl_lm.infer.twists.fitting import fit_twist, rollouts
from ppl_lm.infer.twists.losses import ctl, fudge, log_variance, sixo, soft_rl
from ppl_lm.infer.twists.networks import twist_like
from ppl_lm.lm.table import table_like, table_lm
from ppl_lm.models import constrained, tilted

V, T, END, BETA = 3, 3, 2, 0.7
ROWS = oracle.outcomes(V, T, END)
X = oracle.as_tensor(ROWS, T, END)
TEXTS = ["", "a"]
LOSSES = [ctl, sixo, soft_rl, fudge, log_variance]
QUICK = [ctl, log_variance]  # what `make test` fits with; `make slow` with all


def letters(completions, **_):
    return [text.count("a") - 0.5 * text.count("b") for text in completions]


LM = table_lm(V, T, max_prompt=2, concentration=1.0, seed=1)
MODEL = bind(tilted, LM, reward=letters, beta=BETA)
CONTEXTS = [tuple(LM.vocabulary.encode(text)) for text in TEXTS]
LOG_P = [oracle.log_probs(LM.model.table.detach(), c, ROWS) for c in CONTEXTS]
LOG_PHI = torch.tensor(letters(LM.vocabulary.decode(X)), dtype=torch.float64) / BETA


def all_texts(model=MODEL):
    """Every text once, weighted to be p0's."""
    some, n = importance(model, None, TEXTS, num_samples=2), len(X)
    log_prior = torch.stack(LOG_P, 1)[None]
    return replace(
        some, latents={"x": X[None, :, None].expand(1, n, 2, T)}, records={},
        log_prior=log_prior, log_guide=torch.zeros_like(log_prior), log_likelihood=LOG_PHI[None, :, None].expand(1, n, 2),
    )  # fmt: skip


def random_twist(seed=3):
    twist = table_like(LM, max_prompt=2)
    with torch.no_grad():
        twist.model.table.copy_(torch.randn(twist.model.table.shape, generator=torch.Generator().manual_seed(seed)))
    return twist


def prefixes(b):
    """Of prompt b, for each length t the texts begun or ended by then: row -> Σ of p0, Σ of p0 φ over what follows."""
    made = []
    for t in range(1, T + 1):
        p, joint = {}, {}
        for row, log_p, log_phi in zip(ROWS, LOG_P[b], LOG_PHI, strict=True):
            p[row[:t]] = p.get(row[:t], 0.0) + log_p.exp()
            joint[row[:t]] = joint.get(row[:t], 0.0) + (log_p + log_phi).exp()
        made.append((p, joint))
    return made


def log_psi(table, b, row):
    """A text's last token in the row of the table that stands for what is before it."""
    return table[oracle.table_row((*CONTEXTS[b], *row[:-1]), V), row[-1]]


def value_of(table, b, row):
    """log Σ_v p0(v | row) ψ(row, v)."""
    here = oracle.table_row((*CONTEXTS[b], *row), V)
    return (LM.model.table.detach()[here].log_softmax(-1) + table[here]).logsumexp(-1)


def written_out(loss, table):
    """The same losses as sums over prefixes, mean over prompts."""
    total = 0.0
    for b in range(len(TEXTS)):
        z = (LOG_P[b] + LOG_PHI).logsumexp(0).exp()
        for t, (p, joint) in enumerate(prefixes(b), 1):
            psi = {row: log_psi(table, b, row) for row in p}
            begun = [row for row in p if len(row) == t]  # texts that ended before are not asked again
            if loss is ctl:
                log_pi = torch.stack([p[row].log() + psi[row] for row in p]).log_softmax(0)
                sigma = torch.stack([joint[row] / z for row in p])
                total = total + (sigma * (sigma.log() - log_pi)).sum()
            if loss is sixo:
                for row in p:
                    s = torch.sigmoid(psi[row])
                    total = total - joint[row] / z * s.log() - p[row] * (1 - s).log()
            if loss is fudge:
                for row in begun:
                    total = total + p[row] * psi[row].exp() - joint[row] * psi[row]
            if loss is soft_rl:
                for row in begun:
                    done = row[-1] == END or t == T
                    wanted = (joint[row] / p[row]).log() if done else value_of(table, b, row).detach()
                    total = total + p[row] * (wanted - psi[row]) ** 2
        if loss is log_variance:
            q = torch.stack([
                sum(log_psi(table, b, row[: t + 1]) - value_of(table, b, row[:t]) for t in range(len(row))) for row in ROWS
            ])  # fmt: skip
            surplus, w = LOG_PHI - q, LOG_P[b].exp()
            total = total + 0.5 * (w * (surplus - (w * surplus).sum()) ** 2).sum()
    return total / len(TEXTS)


@torch.no_grad()
def closeness(twist, model=MODEL):
    """KL(q ‖ p) of the proposal that a twist induces, by enumeration; KL(p ‖ q) where the evidence is hard."""
    truth = enumerate_posterior(model, bind(twisted, LM, twist), TEXTS)
    return truth.kl_q_p if model is MODEL else truth.kl_p_q


def gradient(loss, twist, draws=None):
    table = twist.model.table
    made = loss(rollouts(LM, twist, all_texts() if draws is None else draws))
    return made, torch.autograd.grad(made, table)[0]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_expected_gradient(loss):
    twist = random_twist()
    value, found = gradient(loss, twist)
    expected = written_out(loss, twist.model.table)
    torch.testing.assert_close(found, torch.autograd.grad(expected, twist.model.table)[0], atol=1e-10, rtol=0)
    if loss is not ctl:
        torch.testing.assert_close(value, expected, atol=1e-10, rtol=0)


def optimum(loss):
    twist = table_like(LM, max_prompt=2)
    with torch.no_grad():
        for b in range(len(TEXTS)):
            z = (LOG_P[b] + LOG_PHI).logsumexp(0).exp()
            for p, joint in prefixes(b):
                for row in p:
                    worth = (joint[row] / p[row]).log() - (z.log() if loss is sixo else 0.0)
                    twist.model.table[oracle.table_row((*CONTEXTS[b], *row[:-1]), V), row[-1]] = worth
    return twist


@pytest.mark.parametrize("loss", LOSSES)
def test_the_optimum_is_stationary_and_the_posterior(loss):
    twist = optimum(loss)
    assert float(gradient(loss, twist)[1].abs().max()) < 1e-10
    assert float(gradient(loss, random_twist())[1].abs().max()) > 1e-2
    assert float(closeness(twist).max()) < 1e-10


def residuals_written_out(table, b):
    """(N, T + 1), a row for each text."""
    made = torch.zeros(len(ROWS), T + 1, dtype=torch.float64)
    for i, row in enumerate(ROWS):
        for t in range(len(row)):
            made[i, t] = value_of(table, b, row[:t]) - (log_psi(table, b, row[:t]) if t else 0.0)
        made[i, len(row)] = LOG_PHI[i] - log_psi(table, b, row)
    return made


def test_bellman_residuals_are_what_a_twisted_guide_weighs_its_texts_by():
    twist = random_twist()
    delta = bellman_residuals(MODEL, twist, all_texts())
    assert delta.shape == (1, len(X), len(TEXTS), T + 1)
    expected = torch.stack([residuals_written_out(twist.model.table.detach(), b) for b in range(len(TEXTS))], 1)
    torch.testing.assert_close(delta[0], expected, atol=1e-10, rtol=0)
    truth = enumerate_posterior(MODEL, bind(twisted, LM, twist), TEXTS)
    order = (truth.latents["x"][:, 0].unsqueeze(1) == X).all(-1).long().argmax(-1)  # of enumerated texts among X
    total = delta[0].sum(-1)[order]
    torch.testing.assert_close(total, truth.log_joint - truth.log_q, atol=1e-10, rtol=0)
    log_z = truth.log_joint.logsumexp(0)
    below, above = ((law.exp() * total).sum(0) for law in (truth.log_q, truth.log_posterior))
    torch.testing.assert_close(log_z - below, truth.kl_q_p, atol=1e-10, rtol=0)
    torch.testing.assert_close(above - log_z, truth.kl_p_q, atol=1e-10, rtol=0)


def test_the_exact_twist_has_no_residual_but_log_z():
    delta = bellman_residuals(MODEL, optimum(ctl), all_texts())[0]
    log_z = torch.stack([(log_p + LOG_PHI).logsumexp(0) for log_p in LOG_P])
    torch.testing.assert_close(delta[..., 0], log_z.expand(len(X), -1), atol=1e-10, rtol=0)
    assert float(delta[..., 1:].abs().max()) < 1e-10


def test_residuals_bound_the_spread_of_the_weights():
    broken = 0
    for seed in range(200):
        twist = random_twist(seed)
        with torch.no_grad():  # from near the optimum to far from it
            twist.model.table.mul_(seed / 100).add_(optimum(ctl).model.table)
        delta = bellman_residuals(MODEL, twist, all_texts())[0]
        log_q = torch.stack(LOG_P, 1) + LOG_PHI.unsqueeze(-1) - delta.sum(-1)
        w = delta.sum(-1).exp()
        z = (log_q.exp() * w).sum(0)
        spread = (log_q.exp() * w.square()).sum(0) / z.square() - 1
        later = delta[..., 1:]
        osc = (later.amax(0) - later.amin(0)).sum(-1)
        assert bool((spread <= (osc / 2).sinh().square() + 1e-12).all())
        broken += int((spread > (osc / 4).sinh().square() + 1e-12).any())  # without the half
    assert broken > 0


def test_ended_texts_count_in_the_range_of_residuals():
    """With ψ = 1 and an evidence of 1 for texts of one token and e for those of two: all open texts have one residual at each
    token, and yet the weights are not even."""
    lm = table_lm(V, 2, max_prompt=1)
    with torch.no_grad():
        lm.model.table.zero_()
    model = bind(tilted, lm, reward=lambda completions: [float(len(text) > 0) for text in completions], beta=1.0)
    draws = importance(model, None, [""], num_samples=200)
    delta = bellman_residuals(model, table_like(lm), draws)[0, :, 0]
    two = lm.vocabulary.lengths(draws["x"][0, :, 0]) == 2
    assert float(delta[two, 2].std()) < 1e-12 and float(delta[two, 1].abs().max()) < 1e-12
    assert float(draws.log_weight.exp().std()) > 0.1
    assert float((delta[:, 1:].amax(0) - delta[:, 1:].amin(0)).sum()) == pytest.approx(float(draws.log_weight.max()))


def test_a_diagnosis_reports_the_residuals_of_a_twist():
    twist = random_twist()
    found = diagnose(MODEL, bind(twisted, LM, twist), TEXTS, num_samples=400)
    table = twist.model.table.detach()
    for b, one in enumerate(found.prompts):
        delta = residuals_written_out(table, b)
        x = found.guide["x"][0, :, b]
        which = (x.unsqueeze(1) == X).all(-1).long().argmax(-1)
        alive = LM.vocabulary.alive(x)
        here = delta[which, 1:]
        assert one.bellman_rms == pytest.approx(float(here[alive].square().mean().sqrt()), abs=1e-10)
        assert one.bellman_oscillation == pytest.approx(float((here.amax(0) - here.amin(0)).sum()), abs=1e-10)
    mean = sum(one.bellman_rms for one in found.prompts) / len(TEXTS)
    assert found.as_json()["bellman_rms"] == pytest.approx(mean)
    assert type(found.average).from_json(found.as_json()).bellman_rms == found.average.bellman_rms
    other = diagnose(MODEL, bind(lambda prompts, lm: twisted(prompts, lm, lm), LM), TEXTS, num_samples=100)
    assert other.average.bellman_rms is None and "bellman_rms" not in other.as_json()
    unused = diagnose(
        MODEL, bind(lambda prompts, lm, twist: twisted(prompts, lm, lm), LM, twist), TEXTS, num_samples=100
    )
    assert unused.average.bellman_rms is None
    with pytest.raises(ValueError, match="give a network"):
        bellman_residuals(MODEL, lambda *_: torch.zeros(1), all_texts())


@pytest.mark.parametrize("mutant", ["weights with their gradient", "ended texts left out", "values one step early"])
def test_mutants_are_rejected(mutant):
    twist = random_twist()
    r = rollouts(LM, twist, all_texts())
    loss = soft_rl if mutant == "values one step early" else ctl
    if mutant == "weights with their gradient":
        under = (r.prior.unsqueeze(-1) + r.log_psi).softmax(0)
        value = ((under - r.posterior.exp().unsqueeze(-1)) * r.log_psi).sum() / 2
    elif mutant == "ended texts left out":
        value = ctl(replace(r, log_psi=torch.where(r.alive, r.log_psi, r.log_psi.detach())))
    else:
        value = soft_rl(replace(r, log_value=r.log_value.roll(-1, -1)))
    found = torch.autograd.grad(value, twist.model.table)[0]
    expected = torch.autograd.grad(written_out(loss, twist.model.table), twist.model.table)[0]
    assert float((found - expected).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "loss", [loss if loss in QUICK else pytest.param(loss, marks=pytest.mark.slow) for loss in LOSSES]
)
def test_a_fit_comes_close_and_helps_smc(loss):
    twist = table_like(LM, max_prompt=2)
    before = closeness(twist)
    fit_twist(MODEL, twist, TEXTS, loss=loss, steps=300, num_samples=64, learning_rate=0.1)
    after = closeness(twist)
    assert bool((after < 0.1 * before).all()), (before, after)
    spread = {
        name: smc(MODEL, None, TEXTS, num_samples=4, num_runs=200, settings=SMCSettings(twist=t))
        .by_run()
        .log_weight[0]
        .std(0)
        for name, t in (("none", None), ("learned", twist))
    }
    assert bool((spread["learned"] < 0.5 * spread["none"]).all()), spread


@pytest.mark.slow
def test_with_exact_positives_and_a_guide():
    positives = rejection(MODEL, None, TEXTS, num_samples=500, log_bound=T / BETA)
    twist = table_like(LM, max_prompt=2)
    guide = bind(twisted, LM, random_twist())
    before = closeness(twist)
    for loss in (ctl, sixo):
        fit_twist(
            MODEL,
            twist,
            TEXTS,
            loss=loss,
            steps=150,
            num_samples=64,
            learning_rate=0.05,
            guide=guide,
            positives=positives,
        )
        assert bool((closeness(twist) < 0.2 * before).all())


@pytest.mark.parametrize("loss", [ctl, sixo, fudge])
def test_hard_evidence_is_learned_too(loss):
    model = bind(constrained, LM, constraint=lambda completions: [text.count("a") == 1 for text in completions])
    twist = table_like(LM, max_prompt=2)
    before = closeness(twist, model)
    fit_twist(model, twist, TEXTS, loss=loss, steps=150, num_samples=64, learning_rate=0.2)
    assert bool((closeness(twist, model) < 0.2 * before).all())


@pytest.mark.parametrize("loss", [soft_rl, log_variance])
def test_hard_evidence_is_refused_where_it_has_no_square(loss):
    model = bind(constrained, LM, constraint=lambda completions: [text.count("a") == 1 for text in completions])
    with pytest.raises(ValueError, match="use ctl, sixo or fudge"):
        fit_twist(model, table_like(LM, max_prompt=2), TEXTS, loss=loss, steps=2)


@pytest.mark.parametrize("head_only", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_network_learns(head_only):
    """A transformer's twist, from the prior's body: SMC's bound rises."""
    lm = tiny.language_model("llama", max_new_tokens=6)
    reward = lambda completions: [-abs(len(text) - 4.0) for text in completions]  # noqa: E731
    model, twist = bind(tilted, lm, reward=reward, beta=1.0), twist_like(lm, head_only)
    before = [p.clone() for p in lm.parameters()]
    size = dict(num_samples=16, num_runs=60)
    log_z = lambda settings: smc(model, None, [""], settings=settings, **size).by_run().log_weight  # noqa: E731
    spread = [float(log_z(SMCSettings()).std())]
    fit_twist(model, twist, [""], steps=200, num_samples=64, learning_rate=3e-3)
    spread.append(float(log_z(SMCSettings(twist=twist)).std()))
    assert spread[1] < spread[0], spread
    assert all(torch.equal(a, b) for a, b in zip(before, lm.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(twist=table_lm(V, T, max_prompt=2)), "nothing to train"),
        (dict(steps=0), "steps=0"),
        (dict(num_samples=1), "num_samples=1"),
        (dict(learning_rate=1e9, loss=fudge), "the loss is"),
    ],
)
def test_refusals(settings, message):
    twist = settings.pop("twist", None) or table_like(LM, max_prompt=2)
    with pytest.raises(ValueError, match=message):
        fit_twist(MODEL, twist, TEXTS, **{"steps": 5, **settings})


def test_what_is_never_possible_is_told():
    never = bind(constrained, LM, constraint=lambda completions: [False] * len(completions))
    with pytest.raises(NoSupportError, match="prompt 0: none of 128"):
        fit_twist(never, table_like(LM, max_prompt=2), TEXTS)
    with pytest.raises(ValueError, match="exact posterior draws"):
        fit_twist(MODEL, table_like(LM, max_prompt=2), TEXTS, positives=importance(MODEL, None, TEXTS, num_samples=9))
    assert twists.ctl is ctl
