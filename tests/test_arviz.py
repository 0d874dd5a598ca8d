"""`to_arviz`: what ArviZ summarises is the posterior, not the guide; both of ArviZ's lives; NetCDF and back."""

import warnings

import arviz as az
import arviz_base
import matplotlib.pyplot
import numpy as np
import pyro
import pytest
import tiny
import torch
from arviz_lives import SINCE_1, groups, plot_ppc

from ppl_lm.criticism.diagnoses.diagnosis import diagnose, exact_among
from ppl_lm.criticism.diagnoses.draws_diagnosis import diagnose_draws
from ppl_lm.criticism.inference_data.arviz_groups import to_arviz, to_datatree
from ppl_lm.criticism.inference_data.arviz_reading import from_arviz
from ppl_lm.criticism.inference_data.arviz_variables import storable
from ppl_lm.guides import finetuned, prior
from ppl_lm.infer.binding import bind
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.prediction import predictive
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.quasi_rejection_sampling import quasi_rejection
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.samplers.sequential import smc
from ppl_lm.likelihood.optimality import Optimality
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted


def capped(completions, **_):
    return [min(1.0, 0.5 * text.count("a")) for text in completions]


capped.r_max = 1.0


@pytest.fixture
def problem():
    lm = table_lm(5, 4, concentration=1.0, seed=3)
    target = bind(tilted, lm, reward=capped, beta=0.3)
    return target, bind(finetuned, lm.copy()), bind(prior, lm)


def test_summary_is_the_posteriors_not_the_guides(problem):
    """az.summary ignores weights: weighted draws must be resampled before it sees them."""
    target, guide, _ = problem
    draws = importance(target, guide, ["", ""], num_samples=20_000)
    truth = enumerate_posterior(target, guide, ["", ""])
    posterior = float((truth.log_posterior.exp() * truth.records["reward"]).sum(0)[0])
    before = float((truth.log_q.exp() * truth.records["reward"]).sum(0)[0].detach())
    assert posterior - before > 0.1
    data = to_arviz(draws)
    summary = az.summary(data, var_names=["reward"])
    w = draws.log_weight[0, :, 0].softmax(0)
    se = float((w.square() * (draws["reward"][0, :, 0] - posterior).square()).sum().sqrt())
    for row in range(2):
        assert abs(summary["mean"].iloc[row] - posterior) < 4 * se + 1e-3  # az.summary rounds to three digits
    attributes = data.posterior.attrs
    assert attributes["num_samples"] == 80_000 and 0 < attributes["unique_fraction"] < 1
    assert 0 < attributes["weighted_ess"] < 20_000
    assert all(value is not None for value in attributes.values())


def test_groups_and_dimensions(problem):
    target, guide, start = problem
    data = to_arviz(rejection(target, start, ["", ""], num_samples=40))
    assert groups(data) == {
        *(
            "posterior",
            "completions",
            "unnormalised_log_likelihood",
            "log_prior",
            "guide",
            "proposals",
            "observed_data",
            "constant_data",
        )
    }
    assert data.posterior["reward"].dims == ("chain", "draw", "prompt") and data.posterior.sizes["draw"] == 40
    assert {"reward", "length", "log_prior"} <= set(data.posterior.data_vars)
    assert data.completions["x_text"].dtype.kind == "U" and data.guide["x_tokens"].shape == (1, 40, 2, 4)
    assert {"log_prior", "log_likelihood", "log_guide", "log_weight"} <= set(data.guide.data_vars)
    assert data.posterior.attrs["unique_fraction"] == 1.0 and data.posterior.attrs["kind"] == "exact"
    az.summary(data)
    az.ess(data)


def test_every_group_of_the_schema(problem, tmp_path):
    """What is observed, replicated, constant and prior; and ArviZ's own functions find what they look for."""
    target, guide, _ = problem
    draws = importance(target, guide, ["", "a"], num_samples=300)
    replicated = predictive(target, draws)
    data = to_arviz(
        draws,
        prior=importance(target, None, ["", "a"], num_samples=50),
        posterior_predictive=replicated,
        constant_data={"beta": 0.3, "rate": [1.0, 2.0]},
        attributes={"seed": 7},
    )
    assert data.prior["reward"].shape == (1, 50, 2) and data.posterior_predictive["optimal"].shape == (1, 1200, 2)
    assert data.observed_data["optimal"].values.tolist() == [1.0, 1.0]
    assert float(data.constant_data["beta"]) == 0.3 and data.constant_data["rate"].dims == ("prompt",)
    reward, log_lik = data.posterior["reward"].values, data.unnormalised_log_likelihood["optimal"].values
    assert abs(reward / 0.3 - log_lik).max() < 1e-9, "the same draws, in the same order"
    assert abs(data.log_prior["latent"].values - data.posterior["log_prior"].values).max() == 0
    assert data.posterior.attrs["seed"] == 7 and data.posterior.attrs["torch_version"]
    data.to_netcdf(str(tmp_path / "all.nc"))
    again = az.from_netcdf(str(tmp_path / "all.nc"))
    assert groups(again) == groups(data)
    assert az.summary(again, var_names=["reward"]).shape[0] == 2
    az.plot_trace(again, var_names=["reward"])
    az.plot_forest(again, var_names=["reward"])
    matplotlib.pyplot.close("all")
    assert set(to_datatree(draws).children) == groups(to_arviz(draws))


def test_replicates_have_the_observed_sites_law(problem):
    """Each is O ~ Bernoulli(exp((r - r_max)/β)); so the prior's replicates are 1 as often as rejection accepts."""
    target, _, _ = problem
    draws = importance(target, None, ["", "a"], num_samples=20_000)
    p = ((draws["reward"] - 1.0) / 0.3).exp()
    made = predictive(target, draws)["optimal"]
    assert made.shape == p.shape and set(made.unique().tolist()) == {0.0, 1.0}
    se = (p * (1 - p)).sum(1).sqrt() / 20_000
    assert bool(((made.double().mean(1) - p.mean(1)).abs() < 4 * se).all())
    high = p > p.median()
    assert float(made[high].double().mean()) > float(made[~high].double().mean()) + 0.1, "each goes with its own text"
    nothing = lambda completions, **_: [0.0] * len(completions)  # noqa: E731
    unbounded = bind(tilted, table_lm(5, 4, concentration=1.0, seed=3), reward=nothing, beta=1.0)
    with pytest.raises(ValueError, match="declare r_max"):
        predictive(unbounded, importance(unbounded, None, [""], num_samples=2))


def test_netcdf_round_trip(problem, tmp_path):
    target, guide, _ = problem
    data = to_arviz(importance(target, guide, [""], num_samples=200))
    data.to_netcdf(str(tmp_path / "draws.nc"))
    again = az.from_netcdf(str(tmp_path / "draws.nc"))
    assert (again.posterior["reward"] == data.posterior["reward"]).all()
    assert again.completions["x_text"].values.tolist() == data.completions["x_text"].values.tolist()
    log_w = again.guide["log_weight"].values[0, :, 0]
    assert SINCE_1 or az.psislw(log_w)[1] < 1
    assert np.isfinite(log_w).all() and log_w.std() > 0


def test_datatree_is_what_arviz_1_reads(problem):
    target, guide, _ = problem
    draws = importance(target, guide, [""], num_samples=300)
    tree = to_datatree(draws)
    stacked = arviz_base.extract(tree, group="posterior", var_names="reward")
    assert stacked.sizes["sample"] == 1200
    assert float(stacked.mean()) == pytest.approx(float(to_arviz(draws).posterior["reward"].mean()))


def test_random_state_is_left_alone(problem):
    target, guide, _ = problem
    draws = importance(target, guide, [""], num_samples=50)
    before = torch.random.get_rng_state()
    first, second = to_arviz(draws), to_arviz(draws)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (first.posterior["reward"] == second.posterior["reward"]).all()


@pytest.mark.parametrize("life", [to_arviz, to_datatree], ids=["InferenceData", "DataTree"])
def test_draws_come_back_from_a_file_as_they_were(problem, tmp_path, life):
    """What can be said of the draws can be said of those that are read again, to the last bit."""
    target, guide, _ = problem
    made = diagnose(target, guide, ["", "a"], num_samples=400)
    data = to_arviz(made.guide, prior=made.prior)
    if life is to_arviz:
        data.to_netcdf(str(tmp_path / "draws.nc"))
        data = az.from_netcdf(str(tmp_path / "draws.nc"))
    else:
        data = to_datatree(made.guide, None, made.prior)
    prompts = guide.lm.prompts(["", "a"])
    for group, draws in {"guide": made.guide, "prior": made.prior}.items():
        again = from_arviz(data, prompts, group)
        for name in ("log_prior", "log_likelihood", "log_guide"):
            assert torch.equal(getattr(again, name), getattr(draws, name))
        assert torch.equal(again["x"], draws["x"]) and torch.equal(again["reward"], draws["reward"])
        assert again.texts == draws.texts and again.stats.keys() == draws.stats.keys()
        assert again.text() == draws.text() and again.records.keys() == draws.records.keys()
    assert again.from_prior and torch.equal(again.stats["log_q"], made.prior.stats["log_q"])
    for one, other in zip(made.exact, [exact_among(again.of_prompt(b)) for b in range(2)], strict=True):
        assert (
            other.kind == "exact" and torch.equal(one["x"], other["x"]) and torch.equal(one.log_guide, other.log_guide)
        )
    kept = from_arviz(to_arviz(rejection(target, None, ["", "a"], num_samples=30)), prompts)
    assert kept.kind == "exact" and kept.num_samples == 30 and kept.cost.lm_tokens > 0
    bound = torch.tensor(1.0)
    kinds = [rejection(target, None, ["", "a"], num_samples=30)]
    kinds.append(quasi_rejection(target, guide, ["", "a"], num_samples=30, log_bound=bound))
    for draws in kinds:
        told, again = diagnose_draws(draws), diagnose_draws(from_arviz(to_arviz(draws), prompts))
        assert {k: again[k] for k in told if k != "prompts"} == {k: told[k] for k in told if k != "prompts"}, (
            "log Z too"
        )
    assert diagnose_draws(from_arviz(data, prompts, "prior"))["lm_tokens"] == made.prior.cost.lm_tokens
    with pytest.raises(ValueError, match="prompts"):
        from_arviz(data, guide.lm.prompts(["a", ""]))
    with pytest.raises(ValueError, match="no group"):
        from_arviz(to_arviz(made.guide), prompts, "prior")
    with pytest.raises(ValueError, match="give one of"):
        from_arviz(data, prompts, "posterior")


def test_what_prompts_share_and_what_is_no_text_come_back_as_they_were(tmp_path):
    """Sites outside the prompt plate: only the joint weight exists, and no prompt must be given it for itself. Vectors, whole
    numbers, a site below a scope, and a record that has the name of a log-probability."""
    lm = table_lm(4, 3, concentration=1.0, seed=3)
    half = torch.full((2,), 0.5, dtype=torch.float64)

    def approximate(prompts, lm):
        pyro.sample("k", pyro.distributions.Categorical(half))
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("a/z", pyro.distributions.Normal(0 * half, 1.0).to_event(1))
            pyro.sample("x", lm(prompts))

    def shared(prompts, lm):
        k = pyro.sample("k", pyro.distributions.Categorical(half))
        with pyro.plate("prompts", len(prompts)):
            z = pyro.sample("a/z", pyro.distributions.Normal(0 * half, 1.0).to_event(1))
            x = pyro.sample("x", lm(prompts))
            pyro.deterministic("log_prior", 0 * x.sum(-1) - 1.0, event_dim=0)
            pyro.deterministic("length", 0 * x.sum(-1) + 7.0, event_dim=0)
            log_p = 0.1 * z.sum(-1) * (x == 1).sum(-1) - 0.1 * k - 5.0
            pyro.sample("o", Optimality(log_p.clamp_max(0.0)), obs=torch.ones_like(log_p), infer={"log_bound": 0.0})

    made = diagnose(bind(shared, lm), bind(approximate, lm), ["", "a"], num_samples=200)
    path = str(tmp_path / "draws.nc")
    to_arviz(made.guide, prior=made.prior).to_netcdf(path)
    for group, draws in {"guide": made.guide, "prior": made.prior}.items():
        again = from_arviz(az.from_netcdf(path), lm.prompts(["", "a"]), group)
        assert not again.is_local and torch.equal(again.log_weight, draws.log_weight)
        assert set(again.latents) == {"k", "a.z", "x"} and again["a.z"].shape == draws["a/z"].shape == (1, 200, 2, 2)
        assert torch.equal(again["a.z"], draws["a/z"]) and torch.equal(again["k"].long(), draws["k"].long())
        assert all(torch.equal(again.stats[name], draws.stats[name]) for name in draws.stats)
        assert diagnose_draws(again)["ess"] == diagnose_draws(draws)["ess"]
    guide = from_arviz(az.from_netcdf(path), lm.prompts(["", "a"]))
    assert "log_prior" not in guide.records and bool((guide["length"] == 7).all())


@pytest.mark.parametrize("life", [to_arviz, to_datatree], ids=["InferenceData", "DataTree"])
def test_the_steps_of_smc_come_back_by_chain_prompt_and_token(problem, tmp_path, life):
    target, guide, _ = problem
    draws = smc(target, None, ["", "a"], num_samples=8, num_runs=5)
    data = life(draws)
    if life is to_arviz:
        data.to_netcdf(str(tmp_path / "draws.nc"))
        data = az.from_netcdf(str(tmp_path / "draws.nc"))
    length = draws["x"].shape[-1]
    for name in ("ess", "resampled", "log_z_increment"):
        variable = data["sample_stats"][name]
        assert variable.dims == ("chain", "prompt", "token") and variable.shape == (5, 2, length)
    again = from_arviz(data, guide.lm.prompts(["", "a"]))
    assert again.stats.keys() == draws.stats.keys()
    for name, value in draws.stats.items():
        assert torch.equal(again.stats[name], value) and again.stats[name].dtype == value.dtype, name


def test_what_no_string_can_hold_is_written_all_the_same(tmp_path):
    """A byte-level vocabulary writes a NUL now and then, and a prompt from JSON may hold half of a surrogate pair."""
    lm = tiny.language_model("gpt2", max_new_tokens=3)
    nul = lm.vocabulary.tokenizer.convert_tokens_to_ids("\N{LATIN CAPITAL LETTER A WITH MACRON}")
    assert lm.vocabulary.decode(torch.tensor([[nul, 2, 0]])) == ["\0"]
    quiet = bind(tilted, lm, reward=capped, beta=0.3)
    draws = importance(quiet, None, ["the\0soup"], num_samples=30)
    draws.latents["x"][0, 0, 0] = torch.tensor([nul, 2, 0])
    data = to_arviz(draws, prior=draws)
    data.to_netcdf(str(tmp_path / "draws.nc"))
    again = az.from_netcdf(str(tmp_path / "draws.nc"))
    assert again.prior_completions["x_text"].values[0, 0, 0] == "\N{SYMBOL FOR NULL}"
    assert torch.equal(from_arviz(again, draws.prompts, "prior")["x"], draws["x"]), "the tokens are what counts"
    assert storable("a\ud800b") == "a?b"


def test_prompts_are_coordinates_by_name(problem, tmp_path):
    """Also of two that are alike; and what is read back is what was written."""
    target, guide, _ = problem
    prompts = ["a", "b", "a"]
    draws = importance(target, guide, prompts, num_samples=60)
    data = to_arviz(draws, prior=draws, posterior_predictive=predictive(target, draws))
    data.to_netcdf(str(tmp_path / "draws.nc"))
    again = az.from_netcdf(str(tmp_path / "draws.nc"))
    for one in (data, again, to_datatree(draws)):
        assert one["posterior"]["prompt"].values.tolist() == ["a", "b", "a (2)"]
        assert (one["guide"]["reward"].sel(prompt="b").values == draws["reward"][..., 1].numpy()).all()
    assert again.constant_data["prompt_text"].values.tolist() == prompts
    assert torch.equal(from_arviz(again, guide.lm.prompts(prompts))["x"], draws["x"])
    assert az.summary(again, var_names=["reward"]).index.tolist() == [f"reward[{name}]" for name in ("a", "b", "a (2)")]
    for kind in ("ecdf",) if SINCE_1 else ("kde", "cumulative", "scatter"):
        plot_ppc(data, kind=kind)  # of whole numbers: bars
    matplotlib.pyplot.close("all")


def judged(prompts, prior, pairs, ratings, scale=1.0):
    """Global weights, raters whom all prompts share, pairs that lie in a plate of their own, ratings of each text."""
    dist = pyro.distributions
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("raters", 3, dim=-2):
        strictness = pyro.sample("strictness", dist.LogNormal(0.0, 0.5))
    with pyro.plate("pairs", len(pairs)):
        pyro.sample("preferred", dist.Normal(theta.sum(-1), 1.0), obs=pairs)
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("x", prior(prompts))
        n = (x == 1).sum(-1).double()
        pyro.sample("optimal", Optimality(n / 0.5, log_bound=8.0), obs=torch.ones(len(prompts)))
        with pyro.plate("ratings", 3, dim=-2), pyro.poutine.scale(scale=scale):
            pyro.sample("rating", dist.Bernoulli(logits=(n - 1) * strictness), obs=ratings)
            pyro.deterministic("level", (n - 1) * strictness)
    pyro.factor("wish", theta.sum(-1))


PAIRS, RATINGS = torch.tensor([0.3, -1.0, 0.2, 1.5, 0.0]), torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])


def test_plates_are_dimensions_and_likelihoods_are_pointwise(tmp_path):
    lm = table_lm(4, 3, concentration=1.0, seed=3)
    model = bind(judged, lm, pairs=PAIRS, ratings=RATINGS)
    draws = importance(model, None, ["a", "b"], num_samples=200, max_plate_nesting=2)
    assert set(draws.factors) == {"optimal", "wish"}
    shares = torch.stack([v.flatten(2).sum(-1) for v in draws.log_likelihoods.values()]).sum(0)
    torch.testing.assert_close(shares, draws.log_likelihood[..., 0])
    replicates = predictive(model, draws, max_plate_nesting=2)
    data = to_arviz(draws, posterior_predictive={name: replicates[name] for name in ("rating", "preferred", "optimal")})
    assert data.posterior["strictness"].dims == ("chain", "draw", "raters"), "once, not for each prompt"
    assert data.posterior["theta"].dims == ("chain", "draw", "theta_dim_0")
    assert data.posterior["log_prior"].dims == ("chain", "draw") and "prompt" in data.posterior["length"].dims
    assert set(data.log_likelihood.data_vars) == {"preferred", "rating"}
    assert data.log_likelihood["preferred"].dims == ("chain", "draw", "pairs")
    assert data.log_likelihood["rating"].dims == ("chain", "draw", "prompt", "ratings")
    assert data.observed_data["rating"].dims == ("prompt", "ratings")
    assert data.observed_data["rating"].dtype.kind == "i" and data.observed_data["preferred"].dims == ("pairs",)
    assert data.posterior_predictive["rating"].dims == ("chain", "draw", "prompt", "ratings")
    assert set(data.unnormalised_log_likelihood.data_vars) == {"optimal", "wish"}
    theta = data.posterior["theta"].sum("theta_dim_0")
    expected = torch.distributions.Normal(torch.as_tensor(theta.values)[..., None], 1.0).log_prob(PAIRS)
    assert abs(data.log_likelihood["preferred"].values - expected.numpy()).max() < 1e-6, "the same draws, in order"
    n = (data.completions["x_tokens"] == 1).sum("x_tokens_dim_0")
    logits = torch.as_tensor(((n - 1) * data.posterior["strictness"]).transpose(..., "prompt", "raters").values)
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(RATINGS.T.expand_as(logits))
    assert abs(data.log_likelihood["rating"].values - expected.numpy()).max() < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # k-hat is high from so few draws
        sizes = {"preferred": 5} if SINCE_1 else {"preferred": 5, "rating": 6}  # ArviZ 1 has no loo of tied likelihoods
        assert {name: az.loo(data, var_name=name).n_data_points for name in sizes} == sizes
    plot_ppc(data, var_names=["rating"])
    matplotlib.pyplot.close("all")
    data.to_netcdf(str(tmp_path / "draws.nc"))
    again = from_arviz(az.from_netcdf(str(tmp_path / "draws.nc")), lm.prompts(["a", "b"]))
    for name in ("theta", "strictness", "x"):
        assert torch.equal(again[name], draws[name]) and again.plates[name] == draws.plates[name]
    for name in ("rating", "preferred", "optimal"):
        assert torch.equal(again.observed[name], draws.observed[name]) and again.plates[name] == draws.plates[name]
        assert again.observed[name].dtype == draws.observed[name].dtype
    assert to_arviz(again).posterior["strictness"].dims == data.posterior["strictness"].dims
    assert {n: v.dims for n, v in to_arviz(again).posterior.items()} == {n: v.dims for n, v in data.posterior.items()}
    one = importance(model, None, ["a", "b"], num_samples=1, max_plate_nesting=2)
    assert to_arviz(one).posterior["strictness"].shape == (1, 4, 3)


@pytest.mark.parametrize("site", ["optimal", "bounded", "factor", "scaled"])
def test_what_is_no_density_cannot_be_compared_by_arviz(site):
    """r/β is larger at a smaller β, and so would be its mean: az.compare would rank temperatures by their number."""
    lm = table_lm(5, 4, concentration=1.0, seed=3)

    def program(prompts, prior, beta):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("x", prior(prompts))
            r = (x == 1).sum(-1).double()
            if site == "factor":
                pyro.factor("evidence", r / beta)
            elif site == "scaled":
                with pyro.poutine.scale(scale=1 / beta):
                    pyro.sample("evidence", pyro.distributions.Bernoulli(logits=r), obs=torch.ones(len(prompts)))
            else:
                law = Optimality(r / beta, 4 / beta if site == "bounded" else None)
                pyro.sample("evidence", law, obs=torch.ones(len(prompts)))

    made = {}
    for beta in (1.5, 0.3):
        draws = importance(bind(program, lm, beta=beta), None, ["", "a"], num_samples=100)
        assert "log_likelihood" not in to_datatree(draws).children
        made[str(beta)] = to_arviz(draws)
        kept = made[str(beta)].unnormalised_log_likelihood["evidence"]
        assert kept.dims == ("chain", "draw", "prompt")
    with pytest.raises((TypeError, ValueError)):
        az.compare(made)
    with pytest.raises(TypeError, match="log likelihood not found"):
        az.loo(made["1.5"])


@pytest.mark.parametrize("life", [to_arviz, to_datatree], ids=["InferenceData", "DataTree"])
def test_few_runs_of_smc_have_no_errors_and_that_is_said(problem, life, pytestconfig):
    """Its draws grew together; ArviZ takes them for independent ones. The warning names the line of the user's, but where the
    checks of annotations lie between."""
    target, _, _ = problem
    for runs in (1, 2):
        with pytest.warns(UserWarning, match=f"of {runs} SMC run.*num_runs=8") as seen:
            life(smc(target, None, [""], num_samples=30, num_runs=runs))
        assert pytestconfig.getoption("--jaxtyping-packages") or "ppl_lm/criticism" not in seen[0].filename
    life(smc(target, None, [""], num_samples=30, num_runs=3))


@pytest.mark.parametrize("life", [to_arviz, to_datatree], ids=["InferenceData", "DataTree"])
def test_log_weights_are_among_the_sample_stats(problem, life):
    target, guide, _ = problem
    draws = importance(target, guide, ["", "a"], num_samples=50)
    assert (life(draws)["sample_stats"]["log_weight"].values == draws.log_weight.numpy()).all()
    assert "log_weight" not in from_arviz(life(draws), guide.lm.prompts(["", "a"])).stats


def test_a_plate_may_be_called_like_a_number_or_a_dimension_of_arviz():
    lm = table_lm(4, 3, concentration=1.0, seed=3)

    def awkward(prompts, lm):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("x", lm(prompts))
            with pyro.plate("draw", 2, dim=-3), pyro.plate("length", 3, dim=-2):
                pyro.sample("z", pyro.distributions.Normal(0.0 * x.sum(-1), 1.0))
        with pyro.plate("prompt", 4):
            pyro.sample("seen", pyro.distributions.Normal(torch.zeros(4), 1.0), obs=torch.zeros(4))

    draws = importance(bind(awkward, lm), None, ["a", "b"], num_samples=30, max_plate_nesting=3)
    data = to_arviz(draws)
    assert data.guide["z"].dims == ("chain", "draw", "prompt", "draw_plate", "length")
    assert data.posterior["z"].dims == ("chain", "draw", "prompt", "draw_plate", "z_length"), "a length is there, too"
    assert data.log_likelihood["seen"].dims == ("chain", "draw", "prompt_plate")
    assert torch.equal(from_arviz(data, lm.prompts(["a", "b"]))["z"], draws["z"])
