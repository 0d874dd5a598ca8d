"""The bracket, the weights' diagnostics and the verdict, against enumeration."""

import math

import numpy as np
import oracle
import pytest
import torch

from ppl_lm.criticism.diagnoses.diagnosis import diagnose
from ppl_lm.criticism.effective_size import ess
from ppl_lm.criticism.evidence import log_evidence
from ppl_lm.criticism.weights import khat_threshold, psis_khat
from ppl_lm.guides import finetuned, prior
from ppl_lm.infer.binding import bind
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.rejection_sampling import accept, rejection, select
from ppl_lm.lm.table import table_lm
from ppl_lm.models import constrained, tilted


def capped(completions, **_):
    return [min(1.0, 0.5 * text.count("a")) for text in completions]


capped.r_max = 1.0


@pytest.fixture(params=[3, 11])
def problem(request):
    lm = table_lm(5, 4, concentration=1.0, seed=request.param)
    target = bind(tilted, lm, reward=capped, beta=0.5)
    guide = bind(finetuned, lm.copy())
    noise = torch.randn(guide.lm.model.table.shape, generator=torch.Generator().manual_seed(request.param))
    with torch.no_grad():
        guide.lm.model.table += 0.3 * noise
    return target, guide, bind(prior, lm), enumerate_posterior(target, guide, [""])


def test_bracket_agrees_with_enumeration(problem):
    """Every bound and both KLs within four standard errors of their exact values; the standard errors are small enough
    that a swapped direction, a lost β or the prior's log q would be seen."""
    target, guide, start, truth = problem
    draws = importance(target, guide, [""], num_samples=8000)
    kept = rejection(target, start, [""], num_samples=4000).under(guide)
    made = log_evidence(draws, kept)
    want = {
        "elbo": truth.elbo,
        "log_z": truth.log_z,
        "upper": truth.log_z + truth.kl_p_q,
        "kl_q_p": truth.kl_q_p,
        "kl_p_q": truth.kl_p_q,
    }
    for name, value in want.items():
        gap, se = float(getattr(made, name) - value.detach()), float(getattr(made, f"{name}_se"))
        assert abs(gap) < 4 * se and se < 0.05, (name, gap, se)
    assert made.upper_exact and float(made.elbo) < float(made.iwae) < float(made.upper)
    assert abs(float(truth.kl_q_p.detach()) - float(truth.kl_p_q.detach())) > 0.02 or float(truth.kl_q_p.detach()) > 0.2
    approximate = log_evidence(draws)
    assert not approximate.upper_exact and "approximate" in str(approximate)
    assert abs(float(approximate.upper - want["upper"].detach())) < 5 * float(approximate.upper_se)


def test_standard_errors_cover(problem):
    """Over 200 repetitions the 2-SE intervals of ELBO, log Z and KL(q‖p) cover the truth 95 ± 4.6% of the time
    (three binomial standard errors). Catches a standard error that forgets that log Z and ELBO share their draws."""
    target, guide, _, truth = problem
    whole = importance(target, guide, [""], num_samples=200 * 400)
    names = ("elbo", "log_z", "kl_q_p")
    want = torch.stack([getattr(truth, name)[0].detach() for name in names])
    parts = [log_evidence(whole.map(lambda v, i=i: v[:, i * 400 : (i + 1) * 400])) for i in range(200)]
    gap = torch.stack([torch.cat([getattr(made, name) for name in names]) for made in parts]) - want
    se = torch.stack([torch.cat([getattr(made, f"{name}_se") for name in names]) for made in parts])

    def covers(se):
        share = (gap.abs() < 1.96 * se).double().mean(0)  # (3,)
        return bool((share >= 0.95 - 0.046 - 0.02).all()) and float(share[2]) <= 0.999

    assert covers(se)
    apart = torch.stack([se[:, 0], se[:, 1], se[:, :2].square().sum(1).sqrt()], 1)
    assert not covers(apart), "log Z and ELBO taken for independent"
    assert not covers(0.7 * se), "a standard error that is too small"


@pytest.mark.parametrize("tilt", [2.0, 0.0], ids=["over-tilted", "the prior"])
def test_exact_draws_and_their_proposals_are_not_independent(tilt):
    """The standard error of KL(p ‖ q) is the spread over 200 repeats; taken for independent, EUBO and log Z would give 0.8
    of it for a guide beyond the posterior, and more than 1.3 times for the prior."""
    lm = table_lm(3, 4, concentration=1.0, seed=3)
    target, guide, rows = (
        bind(tilted, lm, reward=capped, beta=0.5),
        bind(finetuned, lm.copy()),
        oracle.outcomes(3, 4, 2),
    )
    r = torch.tensor(capped(lm.vocabulary.decode(oracle.as_tensor(rows, 4, 2))), dtype=torch.float64)
    log_prior = oracle.log_probs(lm.model.table, (2,), rows).detach()
    oracle.condition(guide.lm.model.table, (2,), rows, log_prior + tilt * r / 0.5)
    torch.manual_seed(0)
    from_prior = importance(target, None, [""], num_samples=200 * 1000)
    draws, found, independent = importance(target, guide, [""], num_samples=100), [], []
    for i in range(200):
        part = from_prior.map(lambda v, i=i: v[:, i * 1000 : (i + 1) * 1000])
        keep = accept(part, 2.0)
        made = log_evidence(draws, select(part, keep, int(keep.sum())).under(guide))
        found.append((float(made.kl_p_q), float(made.kl_p_q_se)))
        independent.append(float((made.upper_se**2 + made.log_z_se**2).sqrt()))
    values, errors = torch.tensor(found).T
    assert float(errors.mean() / values.std()) == pytest.approx(1, abs=0.16)
    assert float(torch.tensor(independent).mean() / values.std()) != pytest.approx(1, abs=0.16)


def test_an_infinite_error_is_no_nan():
    """A guide that draws impossible texts has an ELBO of -inf, of which nothing is known."""
    lm = table_lm(3, 2, concentration=1.0)
    target = bind(constrained, lm, constraint=lambda completions, **_: ["a" in text for text in completions])
    made = log_evidence(importance(target, None, [""], num_samples=200))
    assert float(made.kl_q_p) == float(made.kl_q_p_se) == math.inf


def test_mislabelled_draws_are_refused(problem):
    target, guide, start, _ = problem
    draws = importance(target, guide, [""], num_samples=100)
    kept = rejection(target, start, [""], num_samples=50)
    with pytest.raises(ValueError, match="must hold exact"):
        log_evidence(draws, draws)
    with pytest.raises(ValueError, match="guide's own draws"):
        log_evidence(kept)


@pytest.mark.parametrize("k", [0.3, 0.7, 1.2])
def test_khat_recovers_a_pareto_tail(k):
    w = np.random.default_rng(0).pareto(1 / k, 100_000) + 1
    assert psis_khat(torch.as_tensor(w).log()) == pytest.approx(k, abs=0.1)


def test_tied_weights_have_no_khat_and_full_ess():
    """ArviZ answers k-hat = inf for them, which would condemn a perfect guide."""
    tied = torch.zeros(500, dtype=torch.float64)
    assert psis_khat(tied) is None and float(ess(tied)) == pytest.approx(500)
    assert psis_khat(torch.full((500,), -torch.inf)) is None and float(ess(torch.full((500,), -torch.inf))) == 0
    assert khat_threshold(1000) == pytest.approx(1 - 1 / 3) and khat_threshold(10**6) == 0.7


def test_ess_is_kishs():
    w = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    assert float(ess(w.log())) == pytest.approx(float(w.sum() ** 2 / (w * w).sum()))


def test_diagnosis_of_many_prompts(problem):
    target, guide, start, truth = problem
    prompts = target.lm.prompts(["", ""])
    made = diagnose(target, guide, prompts, num_samples=3000)
    record = made.as_json()
    assert len(record["prompts"]) == 2 and record["iwae_upper_exact"] is True
    for figures in record["prompts"]:
        gap = abs(figures["kl_q_p"] - float(truth.kl_q_p.detach()))
        assert gap < 4 * figures["kl_q_p_se"] and figures["verdict"] in ("good", "poor", "worse_than_prior")
        for key in ("elbo", "iwae", "upper", "log_z", "kl_q_p", "kl_p_q", "kl_prior_p", "reward"):
            assert math.isfinite(figures[key]) and figures[f"{key}_se"] >= 0
        assert figures["kl_q_p"] == pytest.approx(figures["log_z"] - figures["elbo"], abs=1e-9)
        assert figures["kl_p_q"] == pytest.approx(
            figures["upper"] - figures["log_z"], abs=1e-9
        )  # under one name one estimate
        assert abs(figures["kl_p_q"] - float(truth.kl_p_q.detach())) < 4 * figures["kl_p_q_se"] < 0.2
        assert abs(figures["upper"] - float((truth.log_z + truth.kl_p_q).detach())) < 4 * figures["upper_se"]
    mean = sum(f["elbo"] for f in record["prompts"]) / 2
    assert record["elbo"] == pytest.approx(mean)
    assert record["elbo_se"] == pytest.approx(math.hypot(*(f["elbo_se"] for f in record["prompts"])) / 2)


def test_a_guide_that_misses_mass_is_found_out():
    """It never draws "a", and its own weights look perfect; the proposals behind the exact draws know better."""
    lm = table_lm(3, 2, concentration=1.0, seed=1)
    target, guide = (
        bind(tilted, lm, reward=lambda completions, **_: [0.0] * len(completions)),
        bind(finetuned, lm.copy()),
    )
    target.arguments["reward"].r_max = 0.0
    with torch.no_grad():
        guide.lm.model.table[:, 0] -= 30.0
    made = diagnose(target, guide, lm.prompts([""]), num_samples=3000)
    figures = made.prompts[0]
    assert abs(figures.log_z) < 4 * figures.log_z_se + 1e-9
    assert figures.kl_q_p > 0.05 and figures.kl_p_q > 1 and made.verdict.code == "misses_mass"
    blind = log_evidence(importance(target, guide, [""], num_samples=3000))
    assert float(blind.log_z) < -0.05 and not blind.upper_exact


def test_no_error_where_there_is_none():
    """At the posterior every weight is equal: the standard error of KL(p ‖ q) is 0, from the guide's own draws too."""
    lm = table_lm(4, 2, concentration=1.0)
    target = bind(tilted, lm, reward=lambda completions, **_: [0.0] * len(completions), beta=1.0)
    made = log_evidence(importance(target, bind(finetuned, lm.copy()), [""], num_samples=1000))
    assert float(made.kl_p_q_se) < 1e-9 and float(made.kl_q_p_se) < 1e-9


@pytest.mark.parametrize("n", [1, 2, 3])
def test_bounds_by_several_draws_and_the_law_of_resampling(n):
    """By enumeration of all n-tuples: E_q[log Ẑ] ≤ log Z ≤ E_σ[log Ẑ] ≤ log Z + log(1 + CV²/n), and what is picked from n
    draws by its weight (soft best-of-n) is no further from the posterior than these gaps; `log_evidence` finds both."""
    lm = table_lm(3, 2, concentration=1.0, seed=3)
    target, guide = bind(tilted, lm, reward=capped, beta=0.5), bind(finetuned, lm.copy())
    truth = enumerate_posterior(target, guide, [""])
    log_q, log_w = truth.log_q[:, 0].detach(), (truth.log_joint - truth.log_q)[:, 0].detach()
    log_p, log_z = truth.log_posterior[:, 0], float(truth.log_z)
    tuples = torch.cartesian_prod(*[torch.arange(len(log_q))] * n).reshape(-1, n)
    chance = log_q[tuples].sum(1).exp()
    log_mean = log_w[tuples].logsumexp(1) - math.log(n)
    lower = float((chance * log_mean).sum())
    planted = (log_p[tuples[:, 0]] + log_q[tuples[:, 1:]].sum(1)).exp()  # the posterior's draw comes first
    upper = float((planted * log_mean).sum())
    soft = torch.zeros_like(log_q).index_add(
        0, tuples.flatten(), (chance[:, None] * log_w[tuples].softmax(1)).flatten()
    )
    spread = float((log_q.exp() * (log_w - log_z).exp().square()).sum()) - 1
    assert lower < log_z < upper <= log_z + math.log(1 + spread / n) + 1e-12
    assert float((soft * (soft.log() - log_p)).sum()) <= log_z - lower + 1e-12
    assert float((log_p.exp() * (log_p - soft.log())).sum()) <= upper - log_z + 1e-12
    torch.manual_seed(0)
    draws = importance(target, guide, [""], num_samples=6000)
    kept = rejection(target, bind(prior, lm), [""], num_samples=2000).under(guide)
    for exactly in (kept, None):
        made = log_evidence(draws, exactly, iwae_particles=n)
        assert abs(float(made.iwae) - lower) < 4 * float(made.iwae_se) < 0.1
        assert abs(float(made.iwae_upper) - upper) < 4 * float(made.iwae_upper_se) < 0.1
    if n > 1:
        assert float(made.iwae_upper) < float(made.upper) and abs(lower - upper) > 8 * float(made.iwae_upper_se)
