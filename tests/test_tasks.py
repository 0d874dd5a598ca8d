"""What users try, each in a few lines through public names alone, against an enumeration written here; each catches a mistake
planted in the program."""

import warnings

import arviz as az
import oracle
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_lives import plot_ppc
from matplotlib import pyplot
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from typer.testing import CliRunner

import ppl_lm
from ppl_lm.cli.app import app
from ppl_lm.guides import finetuned
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted

V, T, END = 3, 2, 2
ROWS = oracle.outcomes(V, T, END)
A = torch.tensor([row.count(0) for row in ROWS], dtype=torch.float64)  # the reward: letters a
SHARE = torch.tensor([0.5, 0.5], dtype=torch.float64)  # p(z)
PROMPTS, TOPICS = ["a", "b"], [(0,), (1, 0)]


@pytest.fixture
def prior():
    return table_lm(V, T, max_prompt=5, concentration=1.0, seed=6)


def letters(completions):
    return [float(text.count("a")) for text in completions]


letters.r_max = 2.0


def law(prior, prompt):
    return oracle.log_probs(prior.model.table, prompt, ROWS).detach()


def agrees(draws, values, exact):
    """Whether posterior means of draws are those of the enumeration, within five standard errors."""
    found = ppl_lm.expectation(draws, values)
    return bool(((found.mean - exact).abs() < 5 * found.se + 1e-9).all())


# ----- a latent chooses the beginning -----


def mixture(prompts, prior, reward, topics):
    with pyro.plate("prompts", len(prompts)):
        z = pyro.sample("z", dist.Categorical(SHARE), infer={"enumerate": "parallel"})
        x = pyro.sample("x", prior(topics.take(z)))
        pyro.sample("optimal", ppl_lm.Optimality(reward(prompts, x), 2.0), obs=torch.ones(len(prompts)))


def topic_guide(prompts, prior, topics):
    with pyro.plate("prompts", len(prompts)):
        logits = pyro.param("logits", torch.zeros(len(prompts), 2))
        z = pyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
        pyro.sample("x", prior(topics.take(z)))


def text_guide(prompts, prior):
    with pyro.plate("prompts", len(prompts)):
        pyro.sample("x", prior(prompts))


@pytest.fixture
def mixed(prior):
    topics = prior.prompts(["a", "b a"])
    target = ppl_lm.bind(mixture, prior, reward=letters, topics=topics)
    guide = ppl_lm.bind(topic_guide, prior.copy(), topics=topics)
    log_joint = torch.stack([SHARE[z].log() + law(prior, TOPICS[z]) + A for z in (0, 1)])  # (z, x)
    return target, guide, log_joint, log_joint.logsumexp((0, 1))


def test_a_latent_chooses_what_the_text_goes_on_from(mixed):
    target, guide, log_joint, log_z = mixed
    second = (log_joint[1].logsumexp(0) - log_z).exp()
    table = ppl_lm.enumerate_posterior(target, guide, PROMPTS)
    torch.testing.assert_close(table.log_z, log_z.expand(2), atol=1e-9, rtol=0)
    draws = {
        "importance": ppl_lm.importance(target, guide, PROMPTS, num_samples=2000),
        "rejection": ppl_lm.rejection(target, None, PROMPTS, num_samples=1000),
        "quasi-rejection": ppl_lm.quasi_rejection(target, guide, PROMPTS, num_samples=500),
        "best of n": ppl_lm.best_of_n(target, None, PROMPTS, num_samples=500, n=2, soft=True),
        "chains": ppl_lm.mcmc(target, guide, PROMPTS, num_samples=20, warmup=10, kernel=ppl_lm.kernels.independence),
    }
    for name, sample in draws.items():
        assert agrees(sample, sample["z"], second), name
        assert not agrees(sample, sample["z"], float(SHARE[1])), f"{name}: the prior's share passes for the posterior's"
    evidence = ppl_lm.log_evidence(draws["importance"], draws["rejection"].under(guide))
    assert bool(
        (evidence.elbo - 5 * evidence.elbo_se < log_z).all() and (log_z < evidence.upper + 5 * evidence.upper_se).all()
    )
    assert bool(((evidence.log_z - log_z).abs() < 5 * evidence.log_z_se).all())
    assert ppl_lm.to_arviz(draws["importance"]).posterior["z"].shape == (1, 4 * 2000, 2)
    assert len(ppl_lm.diagnose(target, guide, PROMPTS, num_samples=200).prompts) == 2
    for refused in (lambda: ppl_lm.smc(target, guide, PROMPTS), lambda: ppl_lm.mcmc(target, guide, PROMPTS)):
        with pytest.raises(ValueError, match="one text a prompt.*independence"):
            refused()


def test_a_mixture_is_fitted(mixed):
    target, guide, log_joint, log_z = mixed
    start = ppl_lm.enumerate_posterior(target, guide, PROMPTS).kl_q_p.mean().item()
    fitted = ppl_lm.fit(target, guide, PROMPTS, ppl_lm.SequenceELBO(32), learning_rate=0.3, max_steps=40)
    end = ppl_lm.enumerate_posterior(target, guide, PROMPTS).kl_q_p.mean().item()
    before = ppl_lm.enumerate_posterior(target, None, PROMPTS)
    exact = float((before.log_joint.logsumexp(0) - log_z).abs().max())
    assert fitted.outcome == "finished" and end < 0.3 * start and exact < 1e-9


def test_pyro_enumerates_the_latent_in_the_model_and_in_the_guide(mixed, prior):
    target, guide, log_joint, log_z = mixed
    assert torch.get_default_dtype() == torch.float32
    both = poutine.infer_config(target, lambda site: {"enumerate": "parallel"} if site["name"] in "xz" else {})
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(both, lambda prompts: None, PROMPTS)
    assert loss == pytest.approx(-2 * float(log_z - 2.0), abs=1e-9)  # r - r_max
    of_guide = poutine.infer_config(guide, lambda site: {"enumerate": "parallel"})
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(target, of_guide, PROMPTS)
    table = ppl_lm.enumerate_posterior(target, guide, PROMPTS)
    assert loss == pytest.approx(-float((table.elbo.detach() - 2.0).sum()), abs=1e-6)  # the guide's logits are float32
    text = ppl_lm.bind(text_guide, prior.copy())
    pyro.set_rng_seed(5)
    site = poutine.trace(text).get_trace(PROMPTS).nodes["x"]
    index = [ROWS.index(tuple(row)) for row in prior.vocabulary.completion_ids(site["value"])]
    q = sum(law(prior, (prompt,))[i] for prompt, i in enumerate(index))
    pyro.set_rng_seed(5)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(target, text, PROMPTS)
    assert loss == pytest.approx(float(q - (log_joint[:, index].logsumexp(0) - 2.0).sum()), abs=1e-9)
    for proposal in (guide, text):
        before = [p.detach().clone() for p in proposal.parameters()]
        SVI(target, proposal, pyro.optim.Adam({"lr": 0.1}), TraceEnum_ELBO(max_plate_nesting=1)).step(PROMPTS)
        assert any(not torch.equal(a, b) for a, b in zip(before, proposal.parameters(), strict=True))


# ----- raters -----

RATINGS = torch.tensor([[1.0, 1.0], [0.0, 1.0]])  # (raters, prompts)


def shared_raters(prompts, prior, reward):
    raters = pyro.plate("raters", 2, dim=-2)
    with raters:
        strict = pyro.sample("strict", dist.Bernoulli(0.5))
        pyro.deterministic("harshness", 2 * strict)
    with pyro.plate("prompts", len(prompts), dim=-1):
        x = pyro.sample("x", prior(prompts))
        r = pyro.deterministic("reward", reward(prompts, x))
        with raters:
            level = pyro.deterministic("level", r - 2 * strict)
            pyro.sample("rating", dist.Bernoulli(logits=level), obs=RATINGS[:, : len(prompts)])


def own_raters(prompts, prior, reward):
    with pyro.plate("prompts", len(prompts), dim=-1):
        x = pyro.sample("x", prior(prompts))
        r = pyro.deterministic("reward", reward(prompts, x))
        with pyro.plate("raters", 2, dim=-2):
            strict = pyro.sample("strict", dist.Bernoulli(0.5))
            level = pyro.deterministic("level", r - 2 * strict)
            pyro.sample("rating", dist.Bernoulli(logits=level), obs=RATINGS)


def rater_guide(prompts, prior):
    with pyro.plate("raters", 2, dim=-2):
        pyro.sample("strict", dist.Bernoulli(logits=pyro.param("strict_logits", torch.zeros(2, 1))))
    with pyro.plate("prompts", len(prompts), dim=-1):
        pyro.sample("x", prior(prompts))


def rated(prior):
    """log p(x, rating | strict) without log p(x), (raters, 2 values of strict, prompts, texts); and log p(x)."""
    level = A.expand(2, 2, 2, -1) - 2 * torch.arange(2.0).reshape(1, 2, 1, 1)
    log_p = dist.Bernoulli(logits=level).log_prob(RATINGS.double().reshape(2, 1, 2, 1))
    return log_p, torch.stack([law(prior, (0,)), law(prior, (1,))])


def test_raters_of_each_prompt(prior):
    log_p, texts = rated(prior)
    log_z = (texts + (log_p + torch.tensor(0.5).log()).logsumexp(1).sum(0)).logsumexp(-1)  # (prompts,)
    target = ppl_lm.bind(own_raters, prior, reward=letters)
    draws = ppl_lm.rejection(target, None, PROMPTS, num_samples=500)
    proposals = ppl_lm.importance(target, None, PROMPTS, num_samples=2000)
    assert draws["strict"].shape == draws["level"].shape == (1, 500, 2, 2) and draws["reward"].shape == (1, 500, 2)
    torch.testing.assert_close(draws["level"], draws["reward"].unsqueeze(-1) - 2 * draws["strict"].double())
    evidence = ppl_lm.log_evidence(proposals)
    assert bool(((evidence.log_z - log_z).abs() < 5 * evidence.log_z_se).all())
    wrong = (texts + (log_p + torch.tensor(0.5).log()).sum(0).logsumexp(0)).logsumexp(-1)  # one strictness for both
    assert not bool(((evidence.log_z - wrong).abs() < 5 * evidence.log_z_se).all())
    posterior = ppl_lm.to_arviz(draws).posterior
    assert posterior["level"].shape == posterior["strict"].shape == (1, 500, 2, 2)


def test_raters_that_all_prompts_share(prior):
    log_p, texts = rated(prior)
    pair = torch.cartesian_prod(torch.arange(2), torch.arange(2))  # strictness of both raters
    log_joint = torch.stack(
        [((log_p[0, i] + log_p[1, j] + texts).logsumexp(-1)).sum() + 2 * torch.tensor(0.5).log() for i, j in pair]
    )
    strict = (log_joint.softmax(0).unsqueeze(-1) * pair).sum(0)  # posterior mean of each rater's
    target = ppl_lm.bind(shared_raters, prior, reward=letters)
    guide = ppl_lm.bind(rater_guide, prior.copy())
    draws = ppl_lm.importance(target, None, PROMPTS, num_samples=4000)
    assert draws["strict"].shape == draws["harshness"].shape == (1, 4000, 1, 2)  # once, not for each prompt
    assert draws["reward"].shape == (1, 4000, 2) and draws["level"].shape == (1, 4000, 2, 2)
    assert agrees(draws, draws["strict"], strict) and not agrees(draws, draws["strict"], strict.flip(0))
    fitted = ppl_lm.fit(target, guide, PROMPTS, ppl_lm.SequenceELBO(32), learning_rate=0.3, max_steps=25)
    joint = ppl_lm.log_evidence(ppl_lm.importance(target, guide, PROMPTS, num_samples=2000))
    before = ppl_lm.log_evidence(draws)
    # gains are of the joint ELBO, for each prompt
    error = 5 * (fitted.gain_se + float((joint.elbo_se + before.elbo_se) / 2))
    assert fitted.gain == pytest.approx(float((joint.elbo - before.elbo) / 2), abs=error) and fitted.gain > error
    assert abs(float(joint.log_z) - float(log_joint.logsumexp(0))) < 5 * float(joint.log_z_se)
    with pytest.raises(ValueError, match="batch_size=1.*all 2 prompts together"):
        ppl_lm.fit(target, guide, PROMPTS, batch_size=1, max_steps=1)
    (shown,) = ppl_lm.diagnose(target, guide, PROMPTS, num_samples=200).prompts
    assert 0 < shown.reward < 2


def test_kernels_move_texts_under_plates_within_the_prompts(prior):
    """Once, the suffix kernel took an inner plate's dimension for the prompts'."""

    def judged(prompts, prior, reward):
        with pyro.plate("prompts", len(prompts), dim=-1):
            r = reward(prompts, pyro.sample("x", prior(prompts)))
            with pyro.plate("raters", 2, dim=-2):
                pyro.sample("rating", dist.Bernoulli(logits=r - 1), obs=RATINGS)

    target = ppl_lm.bind(judged, prior, reward=letters)
    log_p = (
        dist.Bernoulli(logits=A - 1).log_prob(RATINGS.double().unsqueeze(-1)).sum(0) + rated(prior)[1]
    )  # (prompts, N)
    exact = (log_p.softmax(-1) * A).sum(-1)
    chains = ppl_lm.mcmc(target, None, PROMPTS, num_samples=20, warmup=10)
    assert agrees(chains, (chains["x"] == 0).sum(-1), exact)


# ----- infilling -----


def infilling(prompts, first, prior, seen):
    with pyro.plate("prompts", len(prompts)):
        x1 = pyro.sample("x1", first(prompts))
        pyro.sample("x2", prior(prompts.append(x1)), obs=seen)


@pytest.mark.parametrize("begun", [False, True])
def test_a_text_is_filled_in_before_an_observed_one(prior, begun):
    first = ppl_lm.LanguageModel(prior.model, prior.vocabulary.tokenizer, 1) if begun else prior
    rows = oracle.outcomes(V, 1 if begun else T, END)
    target = ppl_lm.bind(infilling, first, prior=prior, seen=prior.completions(["b"]))

    def exact(second):
        x1 = oracle.log_probs(prior.model.table, (0,), rows).detach()
        heads = [(0, *(token for token in row if token != END)) for row in rows]
        return x1 + torch.stack([oracle.log_prob(prior.model.table, head, second) for head in heads]).detach()

    log_joint, unended = exact((1, END)), exact((1,))
    draws = ppl_lm.rejection(target, None, ["a"], num_samples=500)  # an observed text's likelihood is at most 1
    proposals = ppl_lm.importance(target, None, ["a"], num_samples=3000)
    evidence = ppl_lm.log_evidence(proposals)
    assert abs(float(evidence.log_z - log_joint.logsumexp(0))) < 5 * float(evidence.log_z_se)
    assert abs(float(evidence.log_z - unended.logsumexp(0))) > 5 * float(evidence.log_z_se)  # an observed text ends
    empty = rows.index((END,))
    assert agrees(draws, (draws["x1"][..., 0] == END).double(), float(log_joint.softmax(0)[empty]))
    table = ppl_lm.enumerate_posterior(target, None, ["a"])
    torch.testing.assert_close(table.log_z, log_joint.logsumexp(0, keepdim=True), atol=1e-9, rtol=0)


def test_the_only_text_may_be_observed(mixed, prior):
    """Then the latent that chose its beginning is what is sought; once, a program needed a latent text."""
    target, _, _, _ = mixed
    seen = prior.completions(["a", "b"])
    given = poutine.condition(target, {"x": seen})
    log_p = torch.stack(
        [SHARE[z].log() + law(prior, TOPICS[z])[[ROWS.index((i, END)) for i in (0, 1)]] for z in (0, 1)]
    )
    draws = ppl_lm.importance(given, None, PROMPTS, num_samples=2000)
    assert draws.prompts.texts == PROMPTS and draws.texts == ()
    assert ppl_lm.diagnose_draws(draws)["verdict"] == "good"
    assert agrees(draws, draws["z"], log_p.softmax(0)[1]) and not agrees(draws, draws["z"], log_p.softmax(0)[0])


# ----- save, load, go on -----


def step_of(target, guide, optimiser):
    return SVI(target, guide, optimiser, ppl_lm.SequenceELBO(8)).step(PROMPTS)


def test_a_fit_is_saved_loaded_and_gone_on_with(prior, tmp_path):
    target = ppl_lm.bind(tilted, prior, reward=letters, beta=1.0)

    def begun():
        return ppl_lm.bind(finetuned, prior.copy(), name="praise"), pyro.optim.Adam({"lr": 0.3})

    guide, optimiser = begun()
    for _ in range(15):
        step_of(target, guide, optimiser)
    pyro.get_param_store().save(tmp_path / "store")
    optimiser.save(tmp_path / "optimiser")
    guide.lm.save_pretrained(tmp_path / "guide")
    reached = ppl_lm.enumerate_posterior(target, guide, PROMPTS)
    pyro.set_rng_seed(1)
    expected = step_of(target, guide, optimiser)

    pyro.clear_param_store()  # another process
    guide, optimiser = begun()
    pyro.get_param_store().load(tmp_path / "store")
    optimiser.load(tmp_path / "optimiser")
    again = ppl_lm.enumerate_posterior(target, guide, PROMPTS)
    assert torch.equal(again.kl_q_p, reached.kl_q_p)
    folder = ppl_lm.LanguageModel.from_pretrained(tmp_path / "guide", max_new_tokens=T)
    of_folder = ppl_lm.enumerate_posterior(target, ppl_lm.bind(finetuned, folder), PROMPTS)
    torch.testing.assert_close(of_folder.kl_q_p, reached.kl_q_p)
    untouched = ppl_lm.enumerate_posterior(target, ppl_lm.bind(finetuned, prior.copy()), PROMPTS).kl_q_p
    assert bool((reached.kl_q_p < 0.8 * untouched).all())  # the prior would not pass for what was loaded
    pyro.set_rng_seed(1)
    assert step_of(target, guide, optimiser) == expected
    assert not torch.equal(ppl_lm.enumerate_posterior(target, guide, PROMPTS).kl_q_p, reached.kl_q_p)


# ----- several rewards -----


def ends(completion_ids):
    return [float(ids[-1] == END) for ids in completion_ids]


def test_two_rewards_with_weights_each_of_them_shown(prior):
    both = ppl_lm.likelihood.WeightedRewards([letters, ends], weights=[1.0, -0.5])
    target = ppl_lm.bind(tilted, prior, reward=both, beta=0.5)
    draws = ppl_lm.importance(target, None, PROMPTS, num_samples=4000)
    finished = torch.tensor([float(END in row) for row in ROWS], dtype=torch.float64)
    for weights, holds in (((1.0, -0.5), True), ((1.0, 0.0), False)):  # the mutant: the second does not count
        p = [(law(prior, c) + (weights[0] * A + weights[1] * finished) / 0.5).softmax(-1) for c in [(0,), (1,)]]
        exact = torch.stack([(row * finished).sum() for row in p])
        assert agrees(draws, draws["ends"], exact) is holds
    assert {"letters", "ends", "reward"} <= {*ppl_lm.summary(draws).reset_index().iloc[:, 1]}


# ----- how sure am I? -----


def test_a_table_says_how_sure_the_means_are_and_how_many_draws_are_missing(prior):
    target = ppl_lm.bind(tilted, prior, reward=letters, beta=1.0)
    draws = ppl_lm.importance(target, None, PROMPTS, num_samples=1000)
    table = ppl_lm.summary(draws, error=0.01)
    posterior = (torch.stack([law(prior, (0,)), law(prior, (1,))]) + A).softmax(-1)
    mean = (posterior * A).sum(-1)
    of_arviz = az.summary(ppl_lm.to_arviz(draws), var_names=["reward"])
    for b, prompt in enumerate(PROMPTS):
        row = table.loc[(prompt, "reward")]
        assert abs(row["mean"] - float(mean[b])) < 4.5 * row["se"]
        more = ppl_lm.importance(target, None, PROMPTS, num_samples=1000 + int(row["more_draws"]))
        assert ppl_lm.summary(more).loc[(prompt, "reward"), "se"] == pytest.approx(0.01, rel=0.2)
        shown = of_arviz.iloc[b]
        assert shown["mcse_mean"] == pytest.approx(row["se"], rel=0.2)
        assert shown["ess_bulk"] < 2000  # of 4,000 resampled copies


# ----- pointwise -----

PAIRS = torch.randn(300, 2, generator=torch.Generator().manual_seed(4))  # preferred - other, of two features


def preferred(prompts, prior, pairs):
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("pairs", len(pairs)):
        pyro.sample("better", dist.Bernoulli(logits=(pairs * theta).sum(-1)), obs=torch.ones(len(pairs)))
    with pyro.plate("prompts", len(prompts), dim=-1):
        x = pyro.sample("x", prior(prompts))
        features = torch.stack([(x == 0).sum(-1), (x == 1).sum(-1)], -1).double()
        pyro.sample("wish", ppl_lm.Optimality((theta * features).sum(-1)), obs=torch.ones(len(prompts)))


def test_observed_pairs_are_pointwise_in_arviz(prior):
    pairs = PAIRS + torch.tensor([0.3, 0.0])
    target = ppl_lm.bind(preferred, prior, pairs=pairs)
    draws = ppl_lm.importance(target, None, PROMPTS, num_samples=500)
    replicates = ppl_lm.predictive(target, draws, return_sites=["better"])
    data = ppl_lm.to_arviz(draws, posterior_predictive=replicates)
    assert data.log_likelihood["better"].dims == ("chain", "draw", "pairs")
    theta = torch.as_tensor(data.posterior["theta"].values)  # (chain, draw, 2)
    exact = torch.nn.functional.logsigmoid(theta.double() @ pairs.double().T)
    torch.testing.assert_close(torch.as_tensor(data.log_likelihood["better"].values), exact, atol=1e-5, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few draws of the prior show this posterior
        assert az.loo(data, var_name="better").n_data_points == 300
    plot_ppc(data, var_names=["better"])
    pyplot.close("all")
    with pytest.raises((TypeError, KeyError, ValueError)):
        az.loo(data, var_name="wish")  # exp(r / β) is no probability
    for names, message in (
        (None, "'wish' cannot be sampled.*return_sites"),
        (["x"], "'x' is no observed site.*better"),
    ):
        with pytest.raises(ValueError, match=message):
            ppl_lm.predictive(target, draws, return_sites=names)


# ----- what these rest on -----


def test_completions_are_canonical_and_others_are_refused(prior):
    ids = prior.completions(["a", "b a"])
    assert ids.tolist() == [[0, END], [1, 0]] and prior.vocabulary.decode(ids) == ["a", "b a"]
    assert bool((prior(["a", "b"]).log_prob(ids) > -torch.inf).all())
    given = {"empty": "", "at most 2": "a b a", "cannot be encoded": "q"}
    for message, text in given.items():
        with pytest.raises(ValueError, match=f"text 1 .*{message}"):
            prior.completions(["a", text])


def test_what_is_no_text_is_refused(prior, unchecked):
    with pytest.raises(ppl_lm.RewardError, match=r"needs token ids.*not \['a'\].*lm.completions"):
        ppl_lm.Reward(letters)(prior.prompts(["a"]), ["a"])
    with pytest.raises(ValueError, match="text 1 is 3; give a string"):
        prior.completions(["a", 3])
    with pytest.raises(ValueError, match="float32.*whole"):
        prior.prompts(["a"]).take(torch.zeros(1))


def test_taken_prompts_have_the_shape_of_the_rows(prior):
    topics = ppl_lm.Prompts.make({"prompt": ["a", "b a"], "name": ["first", "second"]}, prior.vocabulary)
    z = torch.tensor([[0, 1, 1], [1, 0, 1]])
    taken = topics.take(z)
    assert taken.batch_shape == (2, 3) and taken.columns["name"] == [
        "first",
        "second",
        "second",
        "second",
        "first",
        "second",
    ]
    x = prior.completions(["b"])
    expected = torch.stack([law(prior, topic)[ROWS.index((1, END))] for topic in TOPICS])[z]
    torch.testing.assert_close(prior(taken).log_prob(x), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(prior(topics.take(torch.arange(2)[:, None, None])).log_prob(x)[:, 0, 0], expected[0, :2])
    for rows, message in ((torch.tensor([2]), "there are 2"), (torch.tensor([-1]), "there are 2")):
        with pytest.raises(ValueError, match=message):
            topics.take(rows)


def test_plates_are_counted_without_asking_networks_or_rewards(prior):
    asked = []

    def costly(completions):
        asked.extend(completions)
        return [float(len(text)) for text in completions]

    def nested(prompts, prior, reward):
        with pyro.plate("prompts", len(prompts), dim=-1):
            r = reward(prompts, pyro.sample("x", prior(prompts)))
            with pyro.plate("raters", 2, dim=-2), pyro.plate("days", 3, dim=-3):
                pyro.deterministic("level", r.expand(3, 2, -1) if r.dim() == 1 else r.expand(-1, 3, 2, -1))
                pyro.sample("rating", dist.Bernoulli(logits=r), obs=torch.ones(3, 2, len(prompts)))

    target = ppl_lm.bind(nested, prior, reward=costly)
    pyro.set_rng_seed(1)
    draws = ppl_lm.importance(target, None, PROMPTS, num_samples=5)
    assert len(asked) == 10 and draws.cost.reward_calls == 10 and draws["level"].shape == (1, 5, 2, 3, 2)
    pyro.set_rng_seed(1)
    again = ppl_lm.importance(target, None, PROMPTS, num_samples=5, max_plate_nesting=3)
    assert torch.equal(again["x"], draws["x"])  # nor is a random number taken
    with pytest.raises(ValueError, match="max_plate_nesting=0"):
        ppl_lm.importance(target, None, PROMPTS, max_plate_nesting=0)


def test_counting_plates_leaves_no_parameter_behind(prior):
    """Once, what `pyro.param` makes when it is first asked was made of the empty texts and zero rewards of that run."""

    def program(prompts, prior, reward):
        with pyro.plate("prompts", len(prompts)):
            r = reward(prompts, pyro.sample("x", prior(prompts)))
            level = pyro.param("level", lambda: r.mean().detach())
            pyro.sample("optimal", ppl_lm.Optimality(r - level), obs=torch.ones(r.shape))

    ppl_lm.importance(ppl_lm.bind(program, prior, reward=lambda completions: [5.0] * len(completions)), None, PROMPTS)
    assert pyro.param("level").item() == 5.0


def of_features(prompts, prior, wrong):
    """Where it is wrong, an unsqueeze that is right for one particle pairs each with every other."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("prompts", len(prompts)):
        pyro.sample("x", prior(prompts))
        logits = (PAIRS[:2] * (theta.unsqueeze(-2) if wrong else theta)).sum(-1)
        pyro.sample("better", dist.Bernoulli(logits=logits), obs=torch.ones(2))


def between_plates(prompts, prior, wrong):
    """The particles' dimension is right of that of a plate that this site is not in."""
    with pyro.plate("prompts", len(prompts), dim=-1):
        u = pyro.sample("u", dist.Normal(torch.zeros(len(prompts)), 1.0))
        r = (pyro.sample("x", prior(prompts)) == 0).sum(-1).double()
        r = r.reshape(-1, len(prompts)) if wrong else r
        with pyro.plate("raters", 3, dim=-2):
            pyro.sample("v", dist.Normal(torch.zeros(len(prompts)), 1.0))
        pyro.sample("better", ppl_lm.Optimality(r + u.double(), 9.0), obs=torch.ones(len(prompts)))


def one_too_many(prompts, prior, wrong):
    """The total is right, but there is a dimension of size 1 before the particles'."""
    with pyro.plate("prompts", len(prompts)):
        r = (pyro.sample("x", prior(prompts)) == 0).sum(-1).double()
        pyro.sample("better", dist.Bernoulli(logits=r.unsqueeze(0) if wrong else r), obs=torch.ones(len(prompts)))


def latents_of(prompts, prior, whole):
    with poutine.block(hide=["better"]):
        whole(prompts, prior, wrong=False)


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("program", [of_features, between_plates, one_too_many])
def test_a_dimension_that_is_no_plates_is_refused(prior, program, validated):
    """Such programs are right for one particle; Pyro's own check leaves the dimension to enumeration. Once, log Z was 1852
    instead of -0.39, and az.loo counted 100 observations instead of 2."""
    with pyro.validation_enabled(validated):
        right, wrong = (ppl_lm.bind(program, prior, wrong=wrong) for wrong in (False, True))
        sizes = {
            len(term.flatten(2)[0, 0])
            for term in ppl_lm.importance(right, None, PROMPTS, num_samples=20).log_likelihoods.values()
        }
        assert sizes == {2}
        guide = ppl_lm.bind(latents_of, prior.copy(), whole=program)
        calls = [
            lambda: ppl_lm.importance(wrong, None, PROMPTS, num_samples=20),
            lambda: ppl_lm.SequenceELBO(4).loss(wrong, guide, PROMPTS),
            lambda: ppl_lm.fit(wrong, guide, PROMPTS, max_steps=1),
            lambda: ppl_lm.rejection(wrong, None, PROMPTS, num_samples=5),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="'better' has log-probabilities of shape .*no plate around it"):
                call()


def test_enumeration_pairs_no_values_either(prior):
    def program(prompts, prior, wrong):
        with pyro.plate("prompts", len(prompts)):
            z = pyro.sample("z", dist.Categorical(SHARE))
            r = (pyro.sample("x", prior(prompts)) == 0).sum(-1).double()
            pyro.sample("o", ppl_lm.Optimality(z + (r.unsqueeze(-2) if wrong else r)), obs=torch.ones(len(prompts)))

    right, wrong = (ppl_lm.bind(program, prior, wrong=wrong) for wrong in (False, True))
    z_share = torch.stack([SHARE[z].log() + z + 0.0 * A for z in (0, 1)])
    expected = torch.stack([(z_share + law(prior, (p,)) + A).logsumexp((0, 1)) for p in (0, 1)])
    torch.testing.assert_close(ppl_lm.enumerate_posterior(right, None, PROMPTS).log_z, expected, atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="'o' has log-probabilities of shape .*no latent site is enumerated along"):
        ppl_lm.enumerate_posterior(wrong, None, PROMPTS)


def test_a_guide_that_pairs_particles_is_refused(prior):
    def program(prompts, prior, kind):
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("x", prior(prompts))
            u = pyro.sample("u", dist.Normal(torch.zeros(len(prompts)), 1.0))
            law = dist.Normal(u.unsqueeze(-2) if kind == "wrong" else u, 1.0)
            pyro.sample("v", law)

    target = ppl_lm.bind(program, prior, kind="right")
    guide = ppl_lm.bind(program, prior.copy(), kind="wrong")
    draws = ppl_lm.importance(target, None, PROMPTS, num_samples=4)
    calls = [
        lambda: draws.under(guide),
        lambda: ppl_lm.importance(target, guide, PROMPTS, num_samples=4),
        lambda: ppl_lm.SequenceELBO(4).loss(target, guide, PROMPTS),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="'v' has log-probabilities of shape .*no plate around it"):
            call()


def test_plates_that_lie_deeper_than_was_said(prior):
    def program(prompts, prior):
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("x", prior(prompts))
            with pyro.plate("pair", 3):
                pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(ValueError, match="'z' lies deeper in plates than max_plate_nesting=1: give at least 2"):
        ppl_lm.importance(ppl_lm.bind(program, prior), None, PROMPTS, num_samples=5, max_plate_nesting=1)
    assert ppl_lm.importance(ppl_lm.bind(program, prior), None, PROMPTS, num_samples=5)["z"].shape == (1, 5, 2, 3)


def test_records_that_do_not_fit_are_left_out_with_a_word(prior):
    """Once, a record with a dimension too many gave each prompt the numbers of all."""

    def program(prompts, prior, shape):
        with pyro.plate("prompts", len(prompts)):
            r = (pyro.sample("x", prior(prompts)) == 0).sum(-1).double()
            pyro.deterministic("r", shape(r))

    for shape in (lambda r: r.unsqueeze(-2), lambda r: r.unsqueeze(-2) - r):
        with pytest.warns(UserWarning, match="'r' records values of shape .* left out"):
            draws = ppl_lm.importance(ppl_lm.bind(program, prior, shape=shape), None, PROMPTS, num_samples=5)
        assert "r" not in draws.records
    features = ppl_lm.bind(program, prior, shape=lambda r: torch.stack([r, r + 1, r + 2], -1))
    assert ppl_lm.importance(features, None, PROMPTS, num_samples=5)["r"].shape == (1, 5, 2, 3)


def test_given_texts_end_as_the_model_ends_its_own(prior):
    """The tokenizer's end token, or the first that is given: not the one of the smallest number."""
    lm = ppl_lm.LanguageModel(prior.model, prior.vocabulary.tokenizer, T, end_ids=[END, 0])
    assert lm.completions(["b"]).tolist() == [[1, END]]
    assert (
        ppl_lm.LanguageModel(prior.model, prior.vocabulary.tokenizer, T, end_ids=[0, END]).completions(["b"])[0, 1] == 0
    )


def test_text_of_a_subsampled_plate_may_go_on_from_a_latent(prior):
    topics = prior.prompts(["a", "b a"])

    def program(prompts, lm):
        with pyro.plate("prompts", len(prompts), subsample_size=2):
            z = pyro.sample("z", dist.Categorical(SHARE))
            pyro.sample("x", lm(topics.take(z)))

    guide, target = ppl_lm.bind(program, prior.copy()), ppl_lm.bind(program, prior)
    for elbo in (ppl_lm.SequenceELBO(3), Trace_ELBO()):
        assert elbo.loss(target, guide, ["a", "b", "a b"]) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="subsamples"):
        ppl_lm.importance(target, guide, ["a", "b", "a b"], num_samples=3)


# ----- no fit is needed -----


@pytest.mark.parametrize(("beta", "said"), [(4.0, True), (0.05, False)])
def test_a_fit_that_is_not_needed_is_told_so(tmp_path, beta, said):
    """Two prompts, 8 tokens, a reward that is near the prior, or one that is far: draws of the prior say so before the first
    step, and the fit goes on. After its few steps nothing is said of learning rates."""
    (tmp_path / "p.txt").write_text("The soup was\nMy new phone\n")
    words = ["fit", "tilted", "--beta", str(beta), "--prompts", str(tmp_path / "p.txt"), "--max-new-tokens", "8"]
    words += ["--max-steps", "2", "--particles", "4", "--num-samples", "100", "--output-dir", str(tmp_path / "run")]
    result = CliRunner().invoke(app, words)
    text = " ".join(result.output.split())
    assert result.exit_code in (0, 1) and ("no fit is needed: 100 draws of the prior" in text) == said, text
    assert not said or "ppl-lm sample tilted --reward vader --beta 4" in text
    assert "learning rate" not in text and "--learning-rate" not in text and "KL(guide ‖ posterior)" in text
