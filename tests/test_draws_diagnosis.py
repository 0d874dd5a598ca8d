"""What `drawn` says of draws of every kind, against enumeration.

| what | property | tolerance |
|---|---|---|
| means, log Z, KL(draws' law ‖ posterior) | the exact figures | 4 of the standard errors that it gives |
| `ess` | Kong's; of chains the smallest that ArviZ finds | 1e-10 |
| `ess_bulk_se`, `ess_tail_se`, `r_hat_se` | the jackknife's of a sum over chains and of a mean, by hand | 1e-10 |
| | their spread over 100 pieces of 8 chains | 30% |
| verdicts | each one, from draws that deserve it | |

Mutants that are rejected: means of the draws as they come; chains that stand still told as converged; effective draws of fewer
chains that are not scaled back; errors of prompts for that of the worst one.
"""

import json
import math
import sys
from dataclasses import replace
from functools import cache

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_lives import dataset

from ppl_lm.criticism.chains import jackknife, r_hat
from ppl_lm.criticism.diagnoses.draws_diagnosis import FIGURES, diagnose_draws
from ppl_lm.criticism.diagnoses.draws_verdicts import CODES_OF_DRAWS
from ppl_lm.criticism.effective_size import ess
from ppl_lm.criticism.inference_data.arviz_groups import to_arviz
from ppl_lm.criticism.weights import ess_se, khat_se, max_weight, psis_khat
from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.best_of_n_sampling import best_of_n
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.kernels import independence, suffix
from ppl_lm.infer.samplers.markov_chains import mcmc
from ppl_lm.infer.samplers.quasi_rejection_sampling import quasi_rejection
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.lm.table import table_lm
from ppl_lm.models import constrained, tilted
from ppl_lm.run.files import write_json

TEXTS = ["", "a"]


def capped(completions, **_):
    return [min(1.0, 0.5 * text.count("a")) for text in completions]


capped.r_max = 1.0
STATISTICS = {"bs": lambda texts: [float(text.count("b")) for text in texts]}


@pytest.fixture(scope="module")
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


@cache
def suffix_(target, guide):
    return mcmc(target, guide, TEXTS, num_samples=300, warmup=50, num_chains=8, kernel=suffix)


@cache
def independence_(target, guide):
    return mcmc(target, guide, TEXTS, num_samples=300, warmup=50, num_chains=8, kernel=independence)


KINDS = {
    importance_: ("weighted", "good"),
    rejection_: ("exact", "exact"),
    quasi_: ("weighted", "good"),
    best_: ("weighted", "good"),
    suffix_: ("chains", "good"),
    independence_: ("chains", "good"),
}


@pytest.mark.parametrize("sampler", KINDS)
def test_figures_are_the_posteriors_within_their_errors(problem, sampler, tmp_path):
    target, guide = problem
    truth, draws = enumerate_posterior(target, guide, TEXTS), sampler(target, guide)
    made = diagnose_draws(draws, STATISTICS)
    assert {(made["kind"], made["verdict"])} == {KINDS[sampler]} and made["sentence"]
    assert [figures["prompt"] for figures in made["prompts"]] == TEXTS
    p, x = truth.log_posterior.detach().exp(), truth.latents["x"]
    log_prior = truth.log_joint.detach() - truth.records["reward"] / 0.5
    length = draws.prompts.vocabulary.lengths(x).double()
    alone = [draws.prompts[b : b + 1].decode(rows) for b, rows in enumerate(x.unbind(1))]
    bs = torch.tensor([STATISTICS["bs"](texts) for texts in alone]).double().T
    for b, figures in enumerate(made["prompts"]):
        for name, value in (
            ("reward", truth.records["reward"]),
            ("length", length),
            ("log_prior", log_prior),
            ("bs", bs),
        ):
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
    assert (made["log_z"] is None) == (draws.kind == "chains") and (made["r_hat"] is None) != (draws.kind == "chains")
    assert made["lm_tokens"] == draws.cost.lm_tokens > 0 and made["reward_calls"] == draws.cost.reward_calls > 0
    if made["kind"] == "weighted":
        assert made["ess"] == pytest.approx(float(ess(draws).mean()), abs=1e-10)
    elif draws.kind == "chains":
        assert made["acceptance_rate"] == pytest.approx(float(draws.stats["acceptance_rate"].mean()))
        posterior = dataset(to_arviz(draws).posterior).assign(bs=(("chain", "draw", "prompt"), numbers_of(draws)))
        for key, method in (("ess", "bulk"), ("ess_bulk", "bulk"), ("ess_tail", "tail")):
            found = az.ess(posterior, method=method, **({"prob": (0.05, 0.95)} if method == "tail" else {}))
            least = [min(float(found[name][b]) for name in found.data_vars) for b in range(2)]
            assert [figures[key] for figures in made["prompts"]] == pytest.approx(least, abs=1e-6)
        assert made["ess_se"] == made["ess_bulk_se"]
    write_json(tmp_path / "d.json", made)
    assert json.loads((tmp_path / "d.json").read_text())["verdict"] == made["verdict"]


def numbers_of(draws):
    """bs, (C, S, B)."""
    shape = draws.log_guide.shape
    return np.array([STATISTICS["bs"](texts) for texts in draws.text()], dtype=float).T.reshape(shape)


def smc_(target, guide):
    return smc(target, None, TEXTS, num_samples=16, num_runs=20)


OF_WEIGHTS = ("ess_se", "max_weight", "khat", "khat_se")
OF_CHAINS = ("ess_se", "ess_bulk", "ess_bulk_se", "ess_tail", "ess_tail_se", "r_hat", "r_hat_se")


@pytest.mark.parametrize("sampler", [importance_, rejection_, suffix_, smc_])
def test_every_key_is_a_figures_or_a_numbers(problem, sampler):
    draws = sampler(*problem)
    made = diagnose_draws(draws, STATISTICS)
    one, two = made["prompts"]
    means = [key for name in ("reward", "length", "log_prior", "bs") for key in (name, f"{name}_se")]
    assert {*made} == {*FIGURES, *means} - {"prompt"} and {*one} == {*FIGURES, *means} - {"prompts"}
    have = {"weighted": OF_WEIGHTS, "exact": ("ess_se",), "chains": OF_CHAINS, "runs": ("max_weight",)}[made["kind"]]
    for figures in (made, one, two):
        if made["kind"] != "runs":  # whose weights depend on each other
            assert (figures["khat_se"] is None) == (figures["khat"] is None)  # of a tied tail
        for key in {*OF_WEIGHTS, *OF_CHAINS} - {"khat", "khat_se"}:
            assert (figures[key] is not None) == (key in have), key
        assert all(math.isfinite(v) for v in figures.values() if isinstance(v, float))
    if made["kind"] == "exact":
        assert made["ess_se"] == 0 and made["ess"] == 2000


def test_errors_of_the_worst_prompt(problem):
    """A mutant has the errors of k-hat averaged as those of means are."""
    draws = importance(*problem, TEXTS, num_samples=500)
    x = torch.empty(1, 500, 2, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
    log_w = x * torch.tensor([0.3, 0.8])
    made = diagnose_draws(replace(draws, log_guide=draws.log_prior + draws.log_likelihood - log_w))
    one, two = made["prompts"]
    for b, figures in enumerate(made["prompts"]):
        own = log_w[0, :, b]
        of_weights = {"ess": ess, "ess_se": ess_se, "max_weight": max_weight, "khat": psis_khat, "khat_se": khat_se}
        for key, function in of_weights.items():
            assert figures[key] == pytest.approx(float(function(own)), rel=1e-9), key
    assert (made["khat"], made["khat_se"]) == (two["khat"], two["khat_se"]) and one["khat_se"] != two["khat_se"]
    assert made["max_weight"] == max(one["max_weight"], two["max_weight"])
    assert made["ess_se"] == pytest.approx(math.hypot(one["ess_se"], two["ess_se"]) / 2)


@pytest.mark.parametrize("chains", [4, 7, 32])
def test_the_jackknife_by_hand(monkeypatch, chains):
    """Of what adds up over chains, as effective draws do, √C times the deviation of a chain's; of a mean that over √C."""
    column = np.random.default_rng(0).standard_normal((chains, 5))
    statistics = {"ess": np.sum, "rhat": np.mean}
    module = sys.modules[jackknife.__module__]
    monkeypatch.setattr(module, "of_chains", lambda columns, name, _: [statistics[name](columns[0])])
    pairs = column.reshape(16, 2, 5).mean(1) if chains == 32 else column  # sixteen groups at most
    deviation, groups = pairs.mean(1).std(ddof=1), len(pairs)
    assert jackknife([column], "ess", "bulk") == pytest.approx(deviation * 5 * chains / groups**0.5, abs=1e-10)
    assert jackknife([column], "rhat", "rank") == pytest.approx(deviation / groups**0.5, abs=1e-10)
    assert jackknife([column[:3]], "ess", "bulk") is None


@pytest.mark.slow
def test_errors_of_convergence_are_as_large_as_they_say(problem):
    pieces, chains = 100, 8
    pool = mcmc(*problem, [""], num_samples=150, warmup=20, num_chains=pieces * chains, kernel=suffix)
    made = [diagnose_draws(pool.map(lambda v, i=i: v[i * chains : (i + 1) * chains])) for i in range(pieces)]
    for key in ("ess_bulk", "ess_tail", "r_hat"):
        found, se = torch.tensor([[figures[key], figures[f"{key}_se"]] for figures in made]).T
        print(f"{key}: {found.mean():.4g}, spread {found.std():.4g}, standard error {se.mean():.4g}")
        assert abs(float(se.mean() / found.std()) - 1) < 0.3, key
    few = diagnose_draws(pool.map(lambda v: v[:3]))
    assert few["r_hat"] and few["ess_tail"] and few["r_hat_se"] is few["ess_tail_se"] is few["ess_se"] is None


def test_statistics_count_as_numbers(problem):
    """A number of a user's alone finds that chains disagree; it is asked once for each prompt."""
    draws, calls = independence_(*problem), []

    def steps(texts):  # of another size in each chain
        calls.append(texts)
        return [float(i // 300) + 0.1 * (i % 3) for i in range(len(texts))]

    plain, made = diagnose_draws(draws), diagnose_draws(draws, {"steps": steps})
    assert plain["verdict"] != "not_converged" == made["verdict"] and made["r_hat"] > 1.5 > plain["r_hat"]
    assert calls == draws.text() and made["ess"] < plain["ess"] and made["steps"] == pytest.approx(3.6)
    assert {k: v for k, v in made.items() if k in ("reward", "length_se")}.items() <= plain.items()
    weighted = importance_(*problem)
    for name in ("ess", "khat_se", "unique", "prompts", "length", "reward"):
        with pytest.raises(ValueError, match=rf"\['{name}'\] have the names"):
            diagnose_draws(weighted, {name: steps})
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            diagnose_draws(weighted, {"s": lambda texts, wrong=wrong: [wrong] * len(texts)})
    with pytest.raises(ValueError, match="shape"):
        diagnose_draws(weighted, {"s": lambda texts: [1.0]})


def test_the_average_is_over_prompts_and_the_worst_decides(problem):
    draws = importance(*problem, TEXTS, num_samples=500)
    log_w = draws.log_weight.clone()
    x = torch.empty(500, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
    log_w[0, :, 1] = 1.3 * x  # no finite mean
    made = diagnose_draws(replace(draws, log_guide=draws.log_prior + draws.log_likelihood - log_w))
    one, two = made["prompts"]
    assert (one["verdict"], two["verdict"]) == ("good", "unreliable") and made["verdict"] == "unreliable"
    assert made["khat"] == two["khat"] > 1 and "k-hat" in made["sentence"]
    assert made["sentence"].startswith("1 of 2 prompts, first 'a': ")
    assert made["reward"] == pytest.approx((one["reward"] + two["reward"]) / 2)
    assert made["reward_se"] == pytest.approx((one["reward_se"] ** 2 + two["reward_se"] ** 2) ** 0.5 / 2)
    assert made["num_samples"] == 500 and made["ess"] == pytest.approx((one["ess"] + two["ess"]) / 2)


def test_runs_whose_weights_have_a_heavy_tail_are_told_so(problem):
    """As of a guide that proposes and of which nothing is resampled: the spread of runs' means does not show what none has."""
    draws = smc(problem[0], None, [""], num_samples=64, num_runs=16)
    assert diagnose_draws(draws)["verdict"] == "good"
    x = torch.empty(draws.log_weight.shape, dtype=torch.float64).exponential_(
        generator=torch.Generator().manual_seed(0)
    )
    for shape, verdict in ((0.3, "good"), (1.3, "unreliable")):
        made = diagnose_draws(replace(draws, log_guide=draws.log_prior + draws.log_likelihood - shape * x))
        assert made["verdict"] == verdict and abs(made["khat"] - shape) < 0.35 and made["khat_se"] is None
        assert ("k-hat" in made["sentence"]) == (verdict == "unreliable")


def test_chains_that_stand_apart_are_not_the_posteriors(problem):
    draws = mcmc(*problem, TEXTS, num_samples=50, warmup=0, num_chains=4)
    still = draws.map(lambda v: v[:, :1].expand(-1, 50, *v.shape[2:]) if v.dim() > 2 else v)
    assert diagnose_draws(still)["verdict"] == "not_converged", "each where it began"
    shifted = replace(draws, records={"reward": draws["reward"] + torch.arange(4.0)[:, None, None]})
    made = diagnose_draws(shifted)
    assert made["verdict"] == "not_converged" and made["r_hat"] == pytest.approx(r_hat(shifted)) and made["r_hat"] > 1.5
    same = draws.map(lambda v: v[:1, :1].expand(4, 50, *v.shape[2:]))
    assert diagnose_draws(same)["verdict"] == "unknown" and diagnose_draws(same)["r_hat"] is None, (
        "the same text everywhere"
    )
    assert diagnose_draws(same)["unique"] == 1 / 200
    short = diagnose_draws(draws.map(lambda v: v[:, :2]))
    assert short["verdict"] == "unknown" and short["ess"] is None
    assert diagnose_draws(draws.map(lambda v: v[:, :8]))["verdict"] in ("unreliable", "not_converged")


def test_draws_that_say_nothing_are_told_so():
    lm = table_lm(4, 3, concentration=1.0, seed=3)
    never = bind(constrained, lm, constraint=lambda completions, **_: [False] * len(completions))
    made = diagnose_draws(importance(never, None, [""], num_samples=200))
    assert made["verdict"] == "impossible" and made["ess"] == 0 and made["log_z"] is made["holds"] is None
    some = bind(constrained, lm, constraint=lambda completions, **_: ["a" in text for text in completions])
    made = diagnose_draws(importance(some, None, [""], num_samples=400))
    assert made["verdict"] == "good" and made["holds"] == 1 and 0 < made["possible"] < 1
    assert made["khat"] is None and "impossible under the posterior" in made["sentence"]
    for few in (1, 2, 60):
        made = diagnose_draws(importance(some, None, [""], num_samples=few))
        assert made["verdict"] in ("unknown", "impossible") and made["num_samples"] == few
    truth = enumerate_posterior(some, bind(finetuned, lm.copy()), [""])
    x = truth.latents["x"][(truth.log_q.exp()[:, 0] - 0.02).abs().argmin()]
    (word,) = lm.vocabulary.decode(x)
    rare = bind(constrained, lm, constraint=lambda completions, **_: [text == word for text in completions])
    made = diagnose_draws(importance(rare, None, [""], num_samples=400))
    assert made["verdict"] == "unreliable" and 0 < made["ess"] < 30


def test_a_joint_weight_is_of_all_prompts():
    lm = table_lm(3, 2, concentration=1.0)

    def shared(prompts, prior, reward):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3).double()))
        with pyro.plate("prompts", len(prompts)):
            r = pyro.deterministic("r", reward(prompts, pyro.sample("x", prior(prompts))) * z, event_dim=0)
            pyro.sample("o", dist.Bernoulli(torch.sigmoid(r)), obs=torch.ones(len(prompts)).double())

    draws = importance(bind(shared, lm, reward=capped), None, ["", ""], num_samples=300)
    made = diagnose_draws(draws)
    assert len(made["prompts"]) == 1 and made["verdict"] == "good"
    w = draws.log_weight.flatten().softmax(0)
    assert abs(made["r"] - float(w @ draws["r"][0].mean(-1))) < 2 * made["r_se"]


def test_every_verdict_is_ordered():
    assert len(set(CODES_OF_DRAWS)) == len(CODES_OF_DRAWS) and CODES_OF_DRAWS[0] == "exact"
