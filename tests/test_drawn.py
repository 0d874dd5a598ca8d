"""What `drawn` says of draws of every kind, against enumeration.

| what | property | tolerance |
|---|---|---|
| means, log Z, KL(draws' law ‖ posterior) | the exact figures | 4 of the standard errors that it gives |
| `ess` | Kong's; of chains the smallest that ArviZ finds | 1e-10 |
| verdicts | each one, from draws that deserve it | |

Mutants that are rejected: means of the draws as they come; chains that stand still told as converged.
"""

import json
from dataclasses import replace

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_lm.diagnose import drawn, ess, to_arviz
from ppl_lm.diagnose.drawn import r_hat
from ppl_lm.diagnose.verdict import DRAWN
from ppl_lm.guides import finetuned
from ppl_lm.infer import best_of_n, bind, exact, importance, mcmc, quasi_rejection, rejection
from ppl_lm.infer.mcmc import independence, suffix
from ppl_lm.lm.table import table_lm
from ppl_lm.models import constrained, tilted
from ppl_lm.run.folder import write_json

TEXTS = ["", "a"]


def capped(completions, **_):
    return [min(1.0, 0.5 * text.count("a")) for text in completions]


capped.r_max = 1.0


@pytest.fixture
def problem():
    lm = table_lm(4, 3, max_prompt=2, concentration=1.0, seed=3)
    return bind(tilted, lm, reward=capped, beta=0.5), bind(finetuned, lm.copy())


def importance_(target, guide):
    return importance(target, guide, TEXTS, num_samples=4000)


def rejection_(target, guide):
    return rejection(target, None, TEXTS, num_samples=2000)


def quasi_(target, guide):
    return quasi_rejection(target, guide, TEXTS, num_samples=2000, log_bound=0.5)


def best_(target, guide):
    return best_of_n(target, guide, TEXTS, num_samples=1000, n=3)


def suffix_(target, guide):
    return mcmc(target, guide, TEXTS, num_samples=300, warmup=50, num_chains=8, kernel=suffix)


def independence_(target, guide):
    return mcmc(target, guide, TEXTS, num_samples=300, warmup=50, num_chains=8, kernel=independence)


KINDS = {
    importance_: ("weighted", "good"),
    rejection_: ("exact", "exact"),
    quasi_: ("weighted", "good"),
    best_: ("weighted", "good"),
    suffix_: ("markov", "good"),
    independence_: ("markov", "good"),
}


@pytest.mark.parametrize("sampler", KINDS)
def test_figures_are_the_posteriors_within_their_errors(problem, sampler, tmp_path):
    target, guide = problem
    truth, draws = exact(target, guide, TEXTS), sampler(target, guide)
    made = drawn(draws)
    assert {(made["kind"], made["verdict"])} == {KINDS[sampler]} and made["sentence"]
    assert [figures["prompt"] for figures in made["prompts"]] == TEXTS
    p, x = truth.log_posterior.detach().exp(), truth.latents["x"]
    log_prior = truth.log_joint.detach() - truth.records["reward"] / 0.5
    length = draws.prompts.vocabulary.lengths(x).double()
    for b, figures in enumerate(made["prompts"]):
        for name, value in (("reward", truth.records["reward"]), ("length", length), ("log_prior", log_prior)):
            exactly = float((p * value)[:, b].sum())
            assert 0 < figures[f"{name}_se"] < 0.1 and abs(figures[name] - exactly) < 4 * figures[f"{name}_se"]
        if sampler is importance_:
            as_they_come = float(draws["reward"][0, :, b].mean())
            exactly = float((p * truth.records["reward"])[:, b].sum())
            assert abs(as_they_come - exactly) > 4 * figures["reward_se"]  # the mutant
        if figures["log_z"] is not None:
            log_z = float(truth.log_z.detach()[b])
            assert 0 < figures["log_z_se"] < 0.1 and abs(figures["log_z"] - log_z) < 4 * figures["log_z_se"]
        if sampler is importance_:
            kl = float(truth.kl_q_p.detach()[b])
            assert abs(figures["kl_q_p"] - kl) < 4 * figures["kl_q_p_se"] < 0.2
        share = figures["lm_tokens"] / figures["ess"]
        assert figures["lm_tokens_per_effective_draw"] == pytest.approx(share, rel=1e-2)
    assert (made["log_z"] is None) == draws.markov and (made["r_hat"] is None) != draws.markov
    assert made["lm_tokens"] == draws.cost.lm_tokens > 0 and made["reward_calls"] == draws.cost.reward_calls > 0
    if made["kind"] == "weighted":
        assert made["ess"] == pytest.approx(float(ess(draws).mean()), abs=1e-10)
    elif draws.markov:
        assert made["acceptance_rate"] == pytest.approx(float(draws.stats["acceptance_rate"].mean()))
        found = az.ess(to_arviz(draws).posterior)
        least = [min(float(found[name][b]) for name in found.data_vars) for b in range(2)]
        assert [figures["ess"] for figures in made["prompts"]] == pytest.approx(least, abs=1e-6)
    write_json(tmp_path / "d.json", made)
    assert json.loads((tmp_path / "d.json").read_text())["verdict"] == made["verdict"]


def test_the_average_is_over_prompts_and_the_worst_decides(problem):
    draws = importance(*problem, TEXTS, num_samples=500)
    log_w = draws.log_weight.clone()
    x = torch.empty(500, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
    log_w[0, :, 1] = 1.3 * x  # no finite mean
    made = drawn(replace(draws, log_guide=draws.log_prior + draws.log_likelihood - log_w))
    one, two = made["prompts"]
    assert (one["verdict"], two["verdict"]) == ("good", "unreliable") and made["verdict"] == "unreliable"
    assert made["khat"] == two["khat"] > 1 and "k-hat" in made["sentence"]
    assert made["sentence"].startswith("1 of 2 prompts, first 'a': ")
    assert made["reward"] == pytest.approx((one["reward"] + two["reward"]) / 2)
    assert made["reward_se"] == pytest.approx((one["reward_se"] ** 2 + two["reward_se"] ** 2) ** 0.5 / 2)
    assert made["num_samples"] == 500 and made["ess"] == pytest.approx((one["ess"] + two["ess"]) / 2)


def test_chains_that_stand_apart_are_not_the_posteriors(problem):
    draws = mcmc(*problem, TEXTS, num_samples=50, warmup=0, num_chains=4)
    still = draws.map(lambda v: v[:, :1].expand(-1, 50, *v.shape[2:]) if v.dim() > 2 else v)
    assert drawn(still)["verdict"] == "not_converged", "each where it began"
    shifted = replace(draws, records={"reward": draws["reward"] + torch.arange(4.0)[:, None, None]})
    made = drawn(shifted)
    assert made["verdict"] == "not_converged" and made["r_hat"] == pytest.approx(r_hat(shifted)) and made["r_hat"] > 1.5
    same = draws.map(lambda v: v[:1, :1].expand(4, 50, *v.shape[2:]))
    assert drawn(same)["verdict"] == "unknown" and drawn(same)["r_hat"] is None, "the same text everywhere"
    assert drawn(same)["unique"] == 1 / 200
    short = drawn(draws.map(lambda v: v[:, :2]))
    assert short["verdict"] == "unknown" and short["ess"] is None
    assert drawn(draws.map(lambda v: v[:, :8]))["verdict"] in ("unreliable", "not_converged")


def test_draws_that_say_nothing_are_told_so():
    lm = table_lm(4, 3, concentration=1.0, seed=3)
    never = bind(constrained, lm, constraint=lambda completions, **_: [False] * len(completions))
    made = drawn(importance(never, None, [""], num_samples=200))
    assert made["verdict"] == "impossible" and made["ess"] == 0 and made["log_z"] is made["holds"] is None
    some = bind(constrained, lm, constraint=lambda completions, **_: ["a" in text for text in completions])
    made = drawn(importance(some, None, [""], num_samples=400))
    assert made["verdict"] == "good" and made["holds"] == 1 and 0 < made["possible"] < 1
    assert made["khat"] is None and "impossible under the posterior" in made["sentence"]
    for few in (1, 2, 60):
        made = drawn(importance(some, None, [""], num_samples=few))
        assert made["verdict"] in ("unknown", "impossible") and made["num_samples"] == few
    truth = exact(some, bind(finetuned, lm.copy()), [""])
    x = truth.latents["x"][(truth.log_q.exp()[:, 0] - 0.02).abs().argmin()]
    (word,) = lm.vocabulary.decode(x)
    rare = bind(constrained, lm, constraint=lambda completions, **_: [text == word for text in completions])
    made = drawn(importance(rare, None, [""], num_samples=400))
    assert made["verdict"] == "unreliable" and 0 < made["ess"] < 30


def test_a_joint_weight_is_of_all_prompts():
    lm = table_lm(3, 2, concentration=1.0)

    def shared(prompts, prior, reward):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3).double()))
        with pyro.plate("prompts", len(prompts)):
            r = pyro.deterministic("r", reward(prompts, pyro.sample("x", prior(prompts))) * z, event_dim=0)
            pyro.sample("o", dist.Bernoulli(torch.sigmoid(r)), obs=torch.ones(len(prompts)).double())

    draws = importance(bind(shared, lm, reward=capped), None, ["", ""], num_samples=300)
    made = drawn(draws)
    assert len(made["prompts"]) == 1 and made["verdict"] == "good"
    w = draws.log_weight.flatten().softmax(0)
    assert abs(made["r"] - float(w @ draws["r"][0].mean(-1))) < 2 * made["r_se"]


def test_every_verdict_is_ordered():
    assert len(set(DRAWN)) == len(DRAWN) and DRAWN[0] == "exact"
