"""A truncated guide cannot draw all of the posterior's texts: whatever claims to stand for the whole posterior says so, or
refuses. Against enumeration of what is on its support.

| what | property |
|---|---|
| importance, smc | log Z is that of the support, below log Z, and told |
| `log_evidence`, `diagnose` | upper bounds and KL(p ‖ q) are inf, also where no draw shows it; "support is truncated" |
| rejection, mcmc, conditional SMC, mass-covering objectives | refused |
| the same truncated prior, a mixture with the prior | nothing is lacking, nothing is refused |
| enumerated divergences | gradients finite, KL(p ‖ q) inf |

The mutant: `lacks_support` taken away. Then a finite upper bound lies below log Z, and draws are called good.
"""

import json
import math
from dataclasses import replace

import oracle
import pyro
import pytest
import torch
from pyro.infer import MCMC

import ppl_lm
from ppl_lm.guides import finetuned
from ppl_lm.guides import tempered as tempered_guide
from ppl_lm.guides import truncated as truncated_guide
from ppl_lm.infer.binding import bind
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.objectives.divergences import chi2, forward_kl, reverse_kl
from ppl_lm.infer.samplers.pyro_mcmc import SequenceKernel
from ppl_lm.lm.experts import cuts_of, product
from ppl_lm.lm.laws.support import truncated
from ppl_lm.lm.laws.temperature import FILE, load_temperature, tempered
from ppl_lm.lm.table import table_like, table_lm
from ppl_lm.lm.text_mixture import mixture
from ppl_lm.models import tilted
from ppl_lm.run.fitting.learning_rate import _kl
from ppl_lm.run.fitting.loop import fit
from ppl_lm.run.saved_guide import read_guide, save_guide

V, T, END = 4, 3, 3
X = oracle.as_tensor(oracle.outcomes(V, T, END), T, END)
PRIOR = table_lm(V, T, max_prompt=2, concentration=2.0, seed=1)
with torch.no_grad():
    PRIOR.model.table[oracle.table_row((END,), V), 2] -= 14  # texts that begin with "c": about one in a million
HAS_B = ppl_lm.Reward(lambda completions, **_: [float("b" in text) for text in completions], r_max=1.0)
TARGET = bind(tilted, PRIOR, reward=HAS_B, beta=1.0)
CUT = bind(finetuned, truncated(PRIOR, top_p=0.7))
SLIGHT = bind(finetuned, truncated(PRIOR, min_p=1e-4))  # what it cannot draw is too rare to be seen
WHOLE = bind(finetuned, mixture([truncated(PRIOR, top_p=0.7), PRIOR], [0.9, 0.1]))


def on_support(guide=CUT, prompts=("",)):
    """log Z, and log of what of it the guide's support has."""
    exact = ppl_lm.enumerate_posterior(TARGET, guide, list(prompts))
    assert exact.log_q is not None
    inside = exact.log_joint.masked_fill(exact.log_q == -torch.inf, -torch.inf).logsumexp(0)
    return exact.log_z.detach(), inside.detach()


def test_enumerated_divergences_have_gradients_where_the_guide_has_zeros():
    free = table_like(PRIOR, max_prompt=2)
    with torch.no_grad():
        free.model.table.copy_(PRIOR.model.table)
    exact = ppl_lm.enumerate_posterior(TARGET, bind(truncated_guide, free, top_p=0.7), [""])
    assert float(exact.kl_p_q.detach()) == math.inf and 0 < float(exact.kl_q_p.detach()) < math.inf
    (grad,) = torch.autograd.grad(exact.kl_q_p.sum(), free.model.table)
    assert bool(grad.isfinite().all()) and float(grad.abs().max()) > 0.01
    q, log_p = exact.log_q.detach().exp(), exact.log_posterior.detach()
    right = torch.where(q > 0, q * (exact.log_q.detach() - log_p), 0.0).sum()
    assert float(exact.kl_q_p.detach()) == pytest.approx(float(right), abs=1e-10)


def test_weights_stand_for_what_the_posterior_has_on_the_support():
    log_z, inside = on_support()
    assert float(log_z - inside) > 0.2
    draws = ppl_lm.importance(TARGET, CUT, [""], num_samples=4000)
    runs = ppl_lm.smc(TARGET, CUT, [""], num_samples=50, num_runs=40)
    picked = ppl_lm.best_of_n(TARGET, CUT, [""], num_samples=200, n=2)
    kept = ppl_lm.quasi_rejection(TARGET, CUT, [""], num_samples=200)
    for made in (draws, runs, picked, kept):
        assert made.lacks_support
        figures = ppl_lm.diagnose_draws(made)
        assert figures["verdict"] == "unknown" and "support is truncated" in figures["sentence"]
    for made in (draws, runs):
        figures = ppl_lm.diagnose_draws(made)
        assert abs(figures["log_z"] - float(inside)) < 5 * figures["log_z_se"] + 1e-9 < float(log_z - inside) / 2
        assert ppl_lm.diagnose_draws(replace(made, lacks_support=False))["verdict"] == "good"  # the mutant


def test_upper_bounds_are_infinite_and_the_lower_ones_hold():
    log_z, inside = on_support()
    draws = ppl_lm.importance(TARGET, CUT, [""], num_samples=2000)
    exact = ppl_lm.rejection(TARGET, None, [""], num_samples=500).under(CUT)
    for given in (None, exact):
        evidence = ppl_lm.log_evidence(draws, given)
        assert all(float(getattr(evidence, name)) == math.inf for name in ("upper", "iwae_upper", "kl_p_q"))
        assert not any(bool(getattr(evidence, f"{name}_se").isnan()) for name in ("upper", "iwae_upper", "kl_p_q"))
        assert float(evidence.elbo) < float(inside) < float(log_z)
        assert ("truncated support" in str(evidence)) == (given is None)
    assert float(evidence.log_z) == pytest.approx(float(log_z), abs=5 * float(evidence.log_z_se))  # by the proposals
    mutant = ppl_lm.log_evidence(replace(draws, lacks_support=False))
    assert float(mutant.upper) < float(log_z)  # an upper bound that is none


@pytest.mark.parametrize(("guide", "shown"), [(CUT, True), (SLIGHT, False)], ids=["seen", "too rare"])
def test_the_diagnosis_says_that_the_support_is_truncated(guide, shown):
    log_z, inside = on_support(guide)
    assert float(inside) < float(log_z)
    found = ppl_lm.diagnose(TARGET, guide, [""], num_samples=1000)
    one, exactly = found.prompts[0], ppl_lm.enumerate_posterior(TARGET, guide, [""])
    assert one.kl_p_q == one.upper == one.iwae_upper == math.inf == float(exactly.kl_p_q)
    assert found.verdict.code == "misses_mass" and "support is truncated" in found.verdict.sentence
    assert one.log_z == pytest.approx(
        float(log_z), abs=5 * one.log_z_se
    )  # the prior's draws see what the guide's do not
    assert one.kl_q_p == pytest.approx(float(exactly.kl_q_p), abs=5 * one.kl_q_p_se)
    lost = -math.expm1(float(inside - log_z))
    assert one.missing == pytest.approx(lost, abs=5 * one.missing_se + 1e-3) and (lost > 0.1) == shown
    stored = json.loads(json.dumps({k: None if v == math.inf else v for k, v in one.as_json().items()}))
    assert type(one).from_json(stored).kl_p_q == math.inf
    whole = ppl_lm.diagnose(TARGET, WHOLE, [""], num_samples=1000)
    assert whole.prompts[0].kl_p_q == pytest.approx(
        float(ppl_lm.enumerate_posterior(TARGET, WHOLE, [""]).kl_p_q), abs=5 * whole.prompts[0].kl_p_q_se
    )


def test_what_claims_the_whole_posterior_is_refused():
    planted = ppl_lm.rejection(TARGET, None, [""], num_samples=5)
    with pytest.raises(ValueError, match="rejection gives exact.*truncated"):
        ppl_lm.rejection(TARGET, CUT, [""], num_samples=5, log_bound=3.0)
    with pytest.raises(ValueError, match="conditional SMC .*truncated"):
        ppl_lm.conditional_smc(TARGET, SLIGHT, planted, num_samples=8)
    for kernel in (ppl_lm.kernels.suffix, ppl_lm.kernels.independence, ppl_lm.kernels.particle_gibbs(4)):
        with pytest.raises(ValueError, match="Markov chain .*truncated"):
            ppl_lm.mcmc(TARGET, CUT, [""], num_samples=5, warmup=5, num_chains=4, kernel=kernel)
    with pytest.raises(ValueError, match="Markov chain .*truncated"):
        MCMC(SequenceKernel(TARGET, CUT), num_samples=2, disable_progbar=True).run([""])
    for objective in (forward_kl, chi2):
        free = bind(truncated_guide, PRIOR.copy(), top_p=0.7)
        with pytest.raises(ValueError, match=f"{objective.name} is infinite .*truncated"):
            SequenceELBO(num_particles=8, objective=objective).loss(TARGET, free, [""])


def test_where_nothing_is_lacking_nothing_is_refused():
    cut = truncated(PRIOR, top_p=0.7)
    same = bind(tilted, cut, reward=HAS_B, beta=1.0)  # the posterior itself is of the truncated prior
    twist = bind(finetuned, product([cut, table_like(PRIOR, max_prompt=2).requires_grad_(False)]))
    for target, guide in ((same, None), (same, bind(finetuned, cut)), (same, twist), (TARGET, WHOLE), (TARGET, None)):
        exact = ppl_lm.enumerate_posterior(target, guide or bind(finetuned, target.lm), [""])
        assert float(exact.kl_p_q.detach()) < math.inf
        draws = ppl_lm.importance(target, guide, [""], num_samples=2000)
        assert not draws.lacks_support and ppl_lm.diagnose_draws(draws)["verdict"] == "good"
        found = ppl_lm.log_evidence(draws)
        assert float(found.log_z) == pytest.approx(float(exact.log_z), abs=5 * float(found.log_z_se) + 1e-9)
        chains = ppl_lm.mcmc(target, guide, [""], num_samples=3, warmup=3, num_chains=4)
        assert not bool(chains.log_weight.isnan().any())
    assert len(ppl_lm.rejection(same, None, [""], num_samples=20).text()[0]) == 20
    assert cuts_of(product([cut, PRIOR], [0.0, 1.0]).model) == frozenset()  # an expert that says nothing


def test_what_is_impossible_to_both_has_no_weight():
    """A chain's text, scored anew beside others, may lie across a border by rounding: it is to be left, and not NaN."""
    made = ppl_lm.importance(TARGET, CUT, [""], num_samples=4)
    nothing = torch.full_like(made.log_guide, -torch.inf)
    assert bool((replace(made, log_prior=nothing, log_guide=nothing).log_weight == -torch.inf).all())
    assert bool((replace(made, log_guide=nothing).log_weight == torch.inf).all())


def test_draws_that_are_written_still_know_it():
    draws = ppl_lm.importance(TARGET, CUT, [""], num_samples=200)
    for made in (draws, replace(draws, lacks_support=False)):
        back = ppl_lm.from_arviz(ppl_lm.to_arviz(made), PRIOR.prompts([""]))
        assert back.lacks_support == made.lacks_support


def test_a_truncated_guide_is_fitted_without_a_given_learning_rate():
    """A step may take a token out of what is kept, or bring one in, by which the step's length is measured."""
    old = torch.tensor([[[0.5, 0.3, 0.2, 0.0]]], dtype=torch.float64).log()
    new = torch.tensor([[[0.6, 0.4, 0.0, 0.1]]], dtype=torch.float64).log()
    assert 0 < _kl(old, new) < 1
    guide = bind(truncated_guide, PRIOR.copy(), top_p=0.7)
    made = fit(TARGET, guide, [""], SequenceELBO(num_particles=16, objective=reverse_kl), max_steps=25, seed=0)
    assert made.outcome != "diverged" and all(math.isfinite(row["learning_rate"]) for row in made.metrics)


def test_a_fitted_temperature_is_saved_as_one_number(tmp_path):
    q = tempered(PRIOR, 0.8, trainable=True)
    guide = bind(tempered_guide, q)
    save_guide(tmp_path / "guide", guide, PRIOR.prompts([""]), PRIOR)
    assert [path.name for path in (tmp_path / "guide").iterdir()] == [FILE]
    back = read_guide(tmp_path / "guide", PRIOR)
    assert back.model.temperature == pytest.approx(0.8, abs=1e-12)
    assert [w.shape for w in back.parameters() if w.requires_grad] == [torch.Size([])]
    x = X[:, None]
    torch.testing.assert_close(back([""]).log_prob(x), q([""]).log_prob(x), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="another language model"):
        load_temperature(table_lm(V, T, max_prompt=2, concentration=2.0, seed=2), tmp_path / "guide")
    (tmp_path / "guide" / FILE).write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        load_temperature(PRIOR, tmp_path / "guide")


def test_svi_trains_what_is_truncated():
    free = PRIOR.copy()
    guide = bind(truncated_guide, free, top_p=0.9)
    before = float(ppl_lm.enumerate_posterior(TARGET, guide, [""]).kl_q_p.detach())
    svi = pyro.infer.SVI(TARGET, guide, pyro.optim.Adam({"lr": 0.05}), loss=SequenceELBO(num_particles=32))
    for _ in range(40):
        svi.step([""])
    assert float(ppl_lm.enumerate_posterior(TARGET, guide, [""]).kl_q_p.detach()) < 0.7 * before
