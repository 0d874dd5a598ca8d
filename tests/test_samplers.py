"""Importance and rejection: their laws against enumeration, their random choices walked through where possible."""

import math
import sys

import oracle
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats

from ppl_lm.criticism.diagnoses.diagnosis import diagnose
from ppl_lm.criticism.inference_data.arviz_groups import to_arviz
from ppl_lm.guides import finetuned, prior
from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import NoSupportError
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.prediction import predictive
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.rejection_sampling import accept, rejection, select
from ppl_lm.infer.traces.observations import likelihood_bound
from ppl_lm.likelihood.optimality import Optimality
from ppl_lm.lm.table import table_lm
from ppl_lm.models import constrained, tilted

V, T, END = 5, 6, 4


def letters(completions, **_):
    return [text.count("a") - 0.5 * text.count("b") for text in completions]


letters.r_max = 6.0


def capped(completions, **_):
    """Bounded by 1, so that rejection from the prior is quick."""
    return [min(1.0, 0.5 * text.count("a")) for text in completions]


capped.r_max = 1.0


@pytest.fixture(params=[("",), ("", "a")], ids=["one prompt", "left-padded batch"])
def problem(request):
    lm = table_lm(V, T, max_prompt=2, concentration=1.0, seed=1)
    other = table_lm(V, T, max_prompt=2, concentration=3.0, seed=2).copy()
    rows = oracle.outcomes(V, T, END)
    x = oracle.as_tensor(rows, T, END)
    contexts = [tuple(lm.vocabulary.encode(text)) for text in request.param]
    log_prior = torch.stack([oracle.log_probs(lm.model.table, c, rows) for c in contexts], 1)  # (N, B)
    log_q = torch.stack([oracle.log_probs(other.model.table.detach(), c, rows) for c in contexts], 1)
    return {"lm": lm, "other": other, "x": x, "log_prior": log_prior, "log_q": log_q, "texts": list(request.param)}


def test_exact_agrees_with_the_oracle(problem):
    """Enumeration through Pyro's handlers against a walk of the tables: posterior, log Z, both KLs, ELBO identity."""
    lm, texts = problem["lm"], problem["texts"]
    target, guide = bind(tilted, lm, reward=letters, beta=0.7), bind(finetuned, problem["other"])
    made = enumerate_posterior(target, guide, texts)
    reward = torch.tensor(letters(lm.vocabulary.decode(problem["x"])), dtype=torch.float64) / 0.7
    joint = problem["log_prior"] + reward[:, None]
    log_z = joint.logsumexp(0)
    assert torch.allclose(problem["log_prior"].exp().sum(0), torch.ones(len(texts), dtype=torch.float64), atol=1e-10)
    torch.testing.assert_close(made.log_z, log_z, atol=1e-10, rtol=0)
    for b in range(len(texts)):
        assert float(made.kl_q_p[b].detach()) == pytest.approx(
            float(oracle.kl(problem["log_q"][:, b], (joint - log_z)[:, b]))
        )
        assert float(made.kl_p_q[b].detach()) == pytest.approx(
            float(oracle.kl((joint - log_z)[:, b], problem["log_q"][:, b]))
        )
    torch.testing.assert_close(made.elbo, made.log_z - made.kl_q_p, atol=1e-8, rtol=0)


def test_weights_of_every_outcome_are_exact(problem, monkeypatch):
    """Each outcome drawn once, weighted by its probability under the guide: the sum of q·w is Z to 1e-10, and of q·w·f
    the posterior's expectation: no Monte Carlo. Catches an end token's factor lost, truncation scored as finished, a
    prompt paired with another's reward."""
    from ppl_lm.lm.token_sequence import TokenSequence

    lm, texts, n = problem["lm"], problem["texts"], len(problem["x"])
    monkeypatch.setattr(TokenSequence, "sample", lambda self, _=torch.Size(): values)
    monkeypatch.setattr(
        sys.modules["ppl_lm.infer.samplers.importance_sampling"], "texts_a_piece", lambda *_: 10**6
    )  # one call
    values = problem["x"].unsqueeze(1).expand(n, len(texts), T)
    target, guide = bind(tilted, lm, reward=letters, beta=0.7), bind(finetuned, problem["other"])
    draws = importance(target, guide, texts, num_samples=n)
    torch.testing.assert_close(draws.log_guide[0], problem["log_q"], atol=1e-10, rtol=0)
    torch.testing.assert_close(draws.log_prior[0], problem["log_prior"], atol=1e-10, rtol=0)
    truth = enumerate_posterior(target, None, texts)
    mass = (draws.log_guide + draws.log_weight)[0]
    torch.testing.assert_close(mass.logsumexp(0), truth.log_z, atol=1e-10, rtol=0)
    mean = ((mass - truth.log_z).exp() * draws["reward"][0]).sum(0)
    expected = (truth.log_posterior.exp() * truth.records["reward"]).sum(0)
    torch.testing.assert_close(mean, expected, atol=1e-10, rtol=0)


def test_acceptance_probability_of_every_outcome_is_exact(problem, monkeypatch):
    """Rejection's only choice is a uniform: over a grid of it each outcome is accepted in proportion to exp(log w -
    bound), so the law of what is kept is the posterior."""
    lm, texts, n = problem["lm"], problem["texts"], len(problem["x"])
    from ppl_lm.lm.token_sequence import TokenSequence

    values = problem["x"].unsqueeze(1).expand(n, len(texts), T)
    monkeypatch.setattr(TokenSequence, "sample", lambda self, _=torch.Size(): values)
    monkeypatch.setattr(
        sys.modules["ppl_lm.infer.samplers.importance_sampling"], "texts_a_piece", lambda *_: 10**6
    )  # one call
    target = bind(tilted, lm, reward=capped, beta=0.7)
    draws = importance(target, bind(prior, lm), texts, num_samples=n)
    cells, kept = 1000, torch.zeros(n, len(texts))
    for i in range(cells):
        monkeypatch.setattr(torch, "rand_like", lambda v, i=i: torch.full_like(v, (i + 0.5) / cells))
        kept += accept(draws, 1 / 0.7)
    truth = enumerate_posterior(target, None, texts)
    probability = (truth.log_posterior - problem["log_prior"] + truth.log_z - 1 / 0.7).exp()
    assert float((kept / cells - probability).abs().max()) <= 0.5 / cells + 1e-9


def test_rejection_draws_follow_the_posterior():
    """G-test at α = 1e-5 on cells of expected count ≥ 5; the mutant (prior draws) must be rejected."""
    lm = table_lm(V, 4, concentration=1.0, seed=3)
    target, start = bind(tilted, lm, reward=capped, beta=0.5), bind(prior, lm)
    truth = enumerate_posterior(target, None, [""])
    n = 4000
    kept = rejection(target, start, [""], num_samples=n)
    assert kept.kind == "exact" and kept["x"].shape == (1, n, 1, 4) and kept.proposals.num_samples > n

    def p_value(x):
        index = {tuple(row): i for i, row in enumerate(truth.latents["x"][:, 0].tolist())}
        counts = torch.bincount(torch.tensor([index[tuple(row)] for row in x.tolist()]), minlength=len(index)).double()
        expected = truth.log_posterior[:, 0].exp() * len(x)
        big = expected >= 5
        seen = torch.cat([counts[big], counts[~big].sum()[None]])
        want = torch.cat([expected[big], expected[~big].sum()[None]])
        g = 2 * torch.where(seen > 0, seen * (seen / want).log(), 0.0).sum()
        return stats.chi2.sf(float(g), len(seen) - 1)

    assert p_value(kept["x"][0, :, 0]) > 1e-5
    assert p_value(importance(target, start, [""], num_samples=n)["x"][0, :, 0]) < 1e-5
    rate = n / kept.proposals.num_samples  # the last round is kept whole, so the rate is only near Z·exp(-bound)
    assert rate <= float((truth.log_z - 1 / 0.5).exp()) * 1.2


def test_score_is_the_guides_log_probability():
    lm = table_lm(V, 4, concentration=1.0, seed=3)
    other = bind(finetuned, table_lm(V, 4, concentration=3.0, seed=4).copy())
    target = bind(tilted, lm, reward=capped, beta=0.5)
    kept = rejection(target, bind(prior, lm), ["", ""], num_samples=30)
    scored = kept.under(other)
    with torch.no_grad():
        expected = other.lm(["", ""]).log_prob(kept["x"][0])
    torch.testing.assert_close(scored.log_guide[0], expected, atol=1e-12, rtol=0)
    assert scored.kind == "exact" and torch.equal(scored["x"], kept["x"])


def test_a_violated_bound_is_an_error_not_a_clamp():
    lm = table_lm(V, 4, concentration=1.0, seed=3)
    target = bind(tilted, lm, reward=capped, beta=0.5)
    with pytest.raises(ValueError, match=r"log_bound=0\.50 nats, but a draw reached 2\.00"):
        rejection(target, bind(prior, lm), [""], num_samples=50, log_bound=0.5)


def test_rejection_needs_a_bound_and_says_what_else_works():
    lm = table_lm(V, 4, concentration=1.0, seed=3)
    unbounded = bind(tilted, lm, reward=lambda completions, **_: [float(len(c)) for c in completions], beta=1.0)
    with pytest.raises(ValueError, match="r_max.*importance"):
        rejection(unbounded, bind(prior, lm), [""], num_samples=5)
    bounded = bind(tilted, lm, reward=capped, beta=1.0)
    with pytest.raises(ValueError, match="must come from the prior"):
        rejection(bounded, bind(finetuned, table_lm(V, 4, concentration=1.0, seed=9).copy()), [""], num_samples=5)


def test_constraint_is_drawn_by_rejection_and_importance():
    lm = table_lm(V, 4, concentration=1.0, seed=3)
    target = bind(constrained, lm, constraint=lambda completions, **_: ["a" in c for c in completions])
    kept = rejection(target, bind(prior, lm), [""], num_samples=100)
    assert all("a" in text for text in kept.text()[0])
    draws = importance(target, bind(prior, lm), [""], num_samples=2000)
    rate, se = float(draws.log_weight.exp().mean()), float(draws.log_weight.exp().std()) / math.sqrt(2000)
    assert abs(rate - float(enumerate_posterior(target, None, [""]).log_z.exp())) < 5 * se


def test_an_impossible_constraint_is_no_support():
    lm = table_lm(3, 2, concentration=1.0)
    target = bind(constrained, lm, constraint=lambda completions, **_: [False] * len(completions))
    with pytest.raises(NoSupportError, match="0 of 500 proposals"):
        rejection(target, bind(prior, lm), [""], num_samples=5, max_proposals=500)
    draws = importance(target, bind(prior, lm), [""], num_samples=50)
    assert bool((draws.log_weight == -torch.inf).all())
    with pytest.raises(NoSupportError, match="all weights are zero"):
        draws.reweighted()


def test_a_constraint_must_answer_yes_or_no():
    lm = table_lm(3, 2, concentration=1.0)
    with pytest.raises(ValueError, match="yes or no"):
        importance(bind(constrained, lm, constraint=letters), bind(prior, lm), [""], num_samples=20)


def test_select_keeps_each_prompts_own_draws():
    lm = table_lm(3, 2, concentration=1.0)
    draws = importance(bind(tilted, lm, reward=letters), bind(prior, lm), ["", ""], num_samples=4)
    mask = torch.tensor([[False, True], [True, False], [False, True], [True, True]])
    kept = select(draws, mask, 2)
    assert torch.equal(kept["x"][0, :, 0], draws["x"][0, [1, 3], 0])
    assert torch.equal(kept["x"][0, :, 1], draws["x"][0, [0, 2], 1])
    assert torch.equal(kept.log_likelihood[0, :, 1], draws.log_likelihood[0, [0, 2], 1])


def test_costs_are_counted():
    """Forward tokens of every network, once: the prior as its own proposal is not scored again."""
    lm = table_lm(3, 4, concentration=1.0)
    target = bind(tilted, lm, reward=letters)
    own = importance(target, bind(prior, lm), [""], num_samples=100)
    assert own.cost.reward_calls == 100 and 100 <= own.cost.lm_tokens <= 1 + 100 * 3
    both = importance(target, bind(finetuned, lm.copy()), [""], num_samples=100)
    assert both.cost.lm_tokens > own.cost.lm_tokens


@pytest.mark.parametrize("n", [0, -3])
def test_num_samples_must_be_positive(n):
    lm = table_lm(3, 2)
    target, start = bind(tilted, lm, reward=letters), bind(prior, lm)
    for sampler in (importance, rejection):
        with pytest.raises(ValueError, match=f"num_samples={n}"):
            sampler(target, start, [""], num_samples=n)


def test_a_guide_must_draw_every_latent_site():
    """Otherwise the site's prior would be counted as likelihood, silently."""
    lm = table_lm(3, 2, concentration=1.0)

    def story(prompts, prior, reward):
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("topic", dist.Bernoulli(0.3))
            x = pyro.sample("x", prior(prompts))
            pyro.sample(
                "good", dist.Bernoulli(torch.sigmoid(reward(prompts, x))), obs=torch.ones(len(prompts)).double()
            )

    target = bind(story, lm, reward=letters)
    with pytest.raises(ValueError, match="guide has no site 'topic'"):
        importance(target, bind(prior, lm), ["", ""], num_samples=5)
    draws = importance(target, None, ["", ""], num_samples=4001)
    truth = enumerate_posterior(target, None, ["", ""])
    z, se = draws.log_weight[0].exp().mean(0), draws.log_weight[0].exp().std(0) / 4001**0.5
    assert bool(((z - truth.log_z.exp()).abs() < 5 * se).all())
    assert set(draws.latents) == {"topic", "x"}


@pytest.mark.parametrize("n", [1, 2, 2049])
def test_any_number_of_draws_with_a_shared_latent(n):
    """One joint weight for all prompts; a chunk of a single draw is like any other."""
    lm = table_lm(3, 2, concentration=1.0)

    def shared(prompts, prior, reward):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("x", prior(prompts))
            pyro.sample(
                "o", dist.Bernoulli(torch.sigmoid(reward(prompts, x) * z)), obs=torch.ones(len(prompts)).double()
            )

    draws = importance(bind(shared, lm, reward=letters), None, ["", ""], num_samples=n)
    assert draws.log_weight.shape == (1, n, 1) and draws["z"].shape[:2] == (1, n)


def test_exact_knows_scale():
    lm = table_lm(3, 2, concentration=1.0)
    target = bind(tilted, lm, reward=letters, beta=1.0)
    whole, half = (
        enumerate_posterior(target, None, [""]),
        enumerate_posterior(poutine.scale(target, scale=0.5), None, [""]),
    )
    torch.testing.assert_close(half.log_joint, whole.log_joint / 2)


def answers(prompts, prior, reward):
    """Two texts for each prompt in an inner plate, a vector and a topic beside them, and a shared switch."""
    switch = pyro.sample("switch", dist.Bernoulli(torch.tensor(0.3).double()))
    with pyro.plate("prompts", len(prompts), dim=-1):
        pyro.sample("topic", dist.Categorical(torch.ones(3).double()))
        pyro.sample("where", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("answers", 2, dim=-2):
            x = pyro.sample("x", prior(prompts))
            pyro.sample("good", Optimality(reward(prompts, x) * switch, log_bound=1.0), obs=torch.ones(1))


def test_inner_plates_keep_prompts_third():
    """Latents are (C, S, B, *inner, *event) whatever plates there are, and a guide scores them as it drew them."""
    lm = table_lm(3, 2, concentration=1.0)
    target, texts = bind(answers, lm, reward=capped), ["", "", ""]
    torch.manual_seed(0)
    draws = importance(target, None, texts, num_samples=7, max_plate_nesting=2)
    shapes = {name: tuple(value.shape) for name, value in draws.latents.items()}
    assert shapes == {
        "switch": (1, 7, 1),
        "topic": (1, 7, 3),
        "where": (1, 7, 3, 2),
        "x": (1, 7, 3, 2, 2),
    }
    assert draws.texts == ("x",) and [len(t) for t in draws.text()] == [14, 14, 14]
    law = lm([""])
    found = law.log_prob(draws["x"]).sum((2, 3)).unsqueeze(-1)
    found = found + dist.Bernoulli(torch.tensor(0.3).double()).log_prob(draws["switch"].double())
    found = found - 3 * math.log(3) + dist.Normal(0.0, 1.0).log_prob(draws["where"]).sum((2, 3)).unsqueeze(-1)
    torch.testing.assert_close(draws.log_prior, found, atol=1e-6, rtol=0)

    @poutine.block(hide=["good"])
    def guide(prompts):
        answers(prompts, lm, lambda _, x: torch.zeros(x.shape[:-1]))

    for part in (draws, draws.map(lambda v: v[:, :1])):
        again = part.under(guide, max_plate_nesting=2)
        torch.testing.assert_close(again.log_guide, part.log_prior, atol=1e-6, rtol=0)
    posterior = to_arviz(draws).posterior
    assert posterior["where"].dims[:3] == ("chain", "draw", "prompt") and posterior["topic"].shape == (1, 28, 3)


def test_a_joint_weight_is_bounded_by_all_prompts():
    """Where a latent is shared, rejection keeps or drops all prompts together, and needs the sum of their bounds."""
    lm = table_lm(3, 2, concentration=1.0)
    target = bind(answers, lm, reward=capped)
    assert likelihood_bound(target, ["", "", ""]) == 2.0 and likelihood_bound(target, ["", "", ""], joint=True) == 6.0
    torch.manual_seed(0)
    kept = rejection(target, None, ["", "", ""], num_samples=500, max_plate_nesting=2)
    rows = oracle.outcomes(3, 2, 2)
    x = oracle.as_tensor(rows, 2, 2)
    good = torch.tensor(capped(lm.vocabulary.decode(x)), dtype=torch.float64).exp()
    z = float((oracle.log_probs(lm.model.table, tuple(lm.vocabulary.encode("")), rows).exp() * good).sum())
    on, of_one_prompt = (0.3 * z**texts / (0.3 * z**texts + 0.7) for texts in (6, 2))
    share, error = float(kept["switch"].double().mean()), math.sqrt(on * (1 - on) / 500)
    assert abs(share - on) < 4 * error
    assert abs(share - of_one_prompt) > 4 * error, "the mutant: each prompt kept or dropped for itself"


def agreeing(prompts, prior, reward):
    """The texts of all prompts should contain the letter a, or none of them: evidence that no prompt has for itself."""
    with pyro.plate("prompts", len(prompts)):
        has = reward(prompts, pyro.sample("x", prior(prompts)))
    same = 3.0 * (has[..., :1] == has).all(-1, keepdim=has.dim() > 1).double()
    pyro.sample("agree", Optimality(same), obs=torch.ones_like(same), infer={"log_bound": 3.0})


def test_evidence_shared_by_prompts_makes_one_joint_weight():
    """Taken for each prompt's own, the shared factor would count once a prompt, and rejection would not be exact."""
    lm = table_lm(3, 2, max_prompt=2, concentration=1.0, seed=4)
    has_a = lambda completions, **_: [float("a" in text) for text in completions]  # noqa: E731
    target, texts, rows = bind(agreeing, lm, reward=has_a), ["", "b"], oracle.outcomes(3, 2, 2)
    has = torch.tensor(has_a(lm.vocabulary.decode(oracle.as_tensor(rows, 2, 2))), dtype=torch.bool)
    contexts = [tuple(lm.vocabulary.encode(text)) for text in texts]
    one, two = (float(oracle.log_probs(lm.model.table, c, rows).exp()[has].sum()) for c in contexts)
    agree = math.exp(3) * (one * two + (1 - one) * (1 - two))
    z = agree + one * (1 - two) + (1 - one) * two
    torch.manual_seed(0)
    draws = importance(target, None, texts, num_samples=4000)
    assert not draws.is_local and draws.log_weight.shape == (1, 4000, 1)
    w = draws.log_weight.flatten().exp()
    assert abs(float(w.mean()) - z) < 4 * float(w.std()) / 4000**0.5
    x = rejection(target, None, texts, num_samples=2000)["x"][0]
    both = (x == 0).any(-1)
    share, p = float((both[:, 0] == both[:, 1]).double().mean()), agree / z
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 2000)
    with pytest.raises(ValueError, match="'agree' lies outside the prompt plate"):
        enumerate_posterior(target, None, texts)


def test_diagnose_bounds_a_joint_weight_by_all_prompts():
    """Each prompt's own bound, 2 nats, would be exceeded by the joint weight's 6."""
    lm = table_lm(3, 2, concentration=1.0)
    target, texts = bind(answers, lm, reward=capped), ["", "", ""]

    @poutine.block(hide=["good"])
    def guide(prompts):
        answers(prompts, lm, lambda _, x: torch.zeros(x.shape[:-1]))

    made = diagnose(target, guide, texts, num_samples=10000, max_plate_nesting=2)
    rows = oracle.outcomes(3, 2, 2)
    good = torch.tensor(capped(lm.vocabulary.decode(oracle.as_tensor(rows, 2, 2))), dtype=torch.float64)
    q = oracle.log_probs(lm.model.table, tuple(lm.vocabulary.encode("")), rows).exp()
    log_z = math.log(0.3 * float((q * good.exp()).sum()) ** 6 + 0.7)
    average = made.average
    assert average.iwae_upper_exact and abs(average.log_z - log_z) < 4 * average.log_z_se < 0.2
    kl = log_z - 0.3 * 6 * float((q * good).sum())
    assert abs(average.kl_q_p - kl) < 4 * average.kl_q_p_se < 0.3


def test_a_masked_site_is_bounded_by_one():
    """Where the mask is False the factor is 1, which a bound below 0 does not hold for."""
    lm = table_lm(3, 2, max_prompt=2, concentration=1.0)

    def half(prompts, prior, reward):
        with pyro.plate("prompts", len(prompts)), poutine.mask(mask=torch.tensor([True, False])):
            x = pyro.sample("x", prior(prompts).mask(True))
            pyro.sample("o", Optimality(reward(prompts, x) - 5.0), obs=torch.ones(1), infer={"log_bound": -1.0})

    assert likelihood_bound(bind(half, lm, reward=letters), ["", "b"]) == 0.0


def test_a_guides_own_plate_at_the_prompts_dim_is_refused():
    """Its three values would be taken for three prompts."""
    lm = table_lm(3, 2, concentration=1.0)

    def model(prompts, prior, reward):
        with pyro.plate("topics", 3):
            pyro.sample("topic", dist.Bernoulli(torch.full((3,), 0.3).double()))
        with pyro.plate("prompts", len(prompts)):
            r = reward(prompts, pyro.sample("x", prior(prompts)))
            pyro.sample("o", Optimality(r), obs=torch.ones_like(r))

    target = bind(model, lm, reward=letters)
    for texts in ([""], ["", ""], ["", "", ""]):
        with pytest.raises(ValueError, match="'topic' lies in the plate 'topics' at dim -1, which is the prompts'"):
            importance(target, None, texts, num_samples=5)


def test_more_prompts_than_rows_are_drawn_once():
    lm = table_lm(3, 2, concentration=1.0)
    draws = importance(bind(tilted, lm, reward=letters), None, [""] * 1500, num_samples=4)
    assert draws.cost.reward_calls == 4 * 1500 and draws.log_weight.shape == (1, 4, 1500)


def test_rejection_holds_the_values_of_what_is_kept_only(monkeypatch):
    """At an acceptance of one in a thousand the proposals' texts would fill the memory."""
    lm = table_lm(V, 4, concentration=1.0, seed=3)
    target = bind(tilted, lm, reward=capped, beta=0.5)
    sizes = []
    whole = sys.modules["ppl_lm.infer.samplers.rejection_sampling"].concatenate

    def spy(parts):
        sizes.extend((len(p.latents), p.num_samples) for p in parts)
        return whole(parts)

    monkeypatch.setattr(sys.modules["ppl_lm.infer.samplers.rejection_sampling"], "concatenate", spy)
    kept = rejection(target, None, [""], num_samples=3000)
    held = sum(n for latents, n in sizes if latents)
    accepted = kept.proposals.log_weight.exp().mean() / math.exp(2)
    assert held == pytest.approx(float(accepted) * kept.proposals.num_samples, rel=0.1) and kept["x"].shape[1] == 3000
    assert kept.proposals.latents == {} and kept.proposals.log_prior.shape[1] == kept.proposals.num_samples


def test_exact_refuses_inner_plates():
    """Their dimension is the one that enumeration uses: of the same size as the support, they would be mixed up."""
    lm = table_lm(2, 2, concentration=1.0)  # 3 outcomes

    def rated(prompts, prior, reward):
        with pyro.plate("prompts", len(prompts)):
            r = reward(prompts, pyro.sample("x", prior(prompts)))
            with pyro.plate("raters", 3, dim=-2):
                pyro.sample("y", dist.Normal(r, 1.0), obs=torch.tensor([0.3, -0.2, 1.5]).double()[:, None])

    with pytest.raises(ValueError, match="'y' lies outside the prompt plate, or in one inside it"):
        enumerate_posterior(bind(rated, lm, reward=letters), None, [""])


def test_a_scaled_prior_is_weighted_by_what_drew_the_texts():
    """p^s L: the prior draws from p whatever the scale, so its weights are p^(s - 1) L, and rejection has no bound."""
    lm, other = (table_lm(3, 2, concentration=1.0, seed=seed) for seed in (1, 2))

    def tempered(prompts, prior, reward):
        with pyro.plate("prompts", len(prompts)):
            with poutine.scale(scale=0.3):
                x = pyro.sample("x", prior(prompts))
            r = reward(prompts, x)
            pyro.sample("o", Optimality(r), obs=torch.ones_like(r), infer={"log_bound": 2.0})

    target, guide = bind(tempered, lm, reward=letters), bind(prior, other)
    rows = oracle.outcomes(3, 2, 2)
    r = torch.tensor(letters(lm.vocabulary.decode(oracle.as_tensor(rows, 2, 2))), dtype=torch.float64)
    truth = (0.3 * oracle.log_probs(lm.model.table, (2,), rows) + r).logsumexp(0)
    torch.testing.assert_close(enumerate_posterior(target, None, [""]).log_z, truth[None])
    for proposal, law in ((None, lm), (guide, other), (poutine.scale(guide, scale=0.5), other)):
        draws = importance(target, proposal, [""], num_samples=50)
        reward = torch.tensor(letters(lm.vocabulary.decode(draws["x"].flatten(0, 2))), dtype=torch.float64).view(
            1, 50, 1
        )
        want = 0.3 * lm([""]).log_prob(draws["x"]) + reward - law([""]).log_prob(draws["x"])
        torch.testing.assert_close(draws.log_weight, want)
        torch.testing.assert_close(draws.under(proposal or bind(prior, lm)).log_guide, draws.log_guide)
    with pytest.raises(ValueError, match="a scale or mask makes another one"):
        rejection(target, None, [""], num_samples=5)


def test_a_bound_is_one_number():
    lm = table_lm(3, 2, concentration=1.0)

    def program(prompts, lm):
        with pyro.plate("prompts", len(prompts)):
            s = pyro.sample("s", pyro.distributions.Uniform(0.5, 1.0))
            r = -(pyro.sample("x", lm(prompts)) == 0).sum(-1) * s
            pyro.sample("o", Optimality(r), obs=torch.ones_like(r), infer={"log_bound": 0 * s})

    with pytest.raises(ValueError, match=r"'o' declares a log_bound of 2 numbers; give one"):
        rejection(bind(program, lm), None, ["", "a"], num_samples=5)


@pytest.mark.parametrize("wrapped", ["mask", "to_event", "expand_by", "half masked"])
@pytest.mark.parametrize("bounded", [True, False])
def test_log_z_and_bound_see_through_what_a_likelihood_is_wrapped_in(wrapped, bounded):
    """Once, a masked or `.to_event` Optimality lost its shift in log Z, and an unbounded one had the bound 0."""
    lm = table_lm(3, 2, concentration=1.0, seed=4)
    yes = torch.ones(2, dtype=torch.bool)

    def program(prompts, lm, plain):
        with pyro.plate("prompts", len(prompts)):
            r = 2.0 * (pyro.sample("x", lm(prompts)) == 0).sum(-1).double()
            law, value = Optimality(r, 4.0 if bounded else None), torch.ones_like(r)
            if plain:
                factor = torch.tensor([1.0, 0.0]) if wrapped == "half masked" else torch.ones(2)
                pyro.sample("o", Optimality(r * factor), obs=value)
            elif wrapped == "to_event":
                law = Optimality(r.unsqueeze(-1) / 2 * torch.ones(2), 2.0 if bounded else None).to_event(1)
                pyro.sample("o", law, obs=torch.ones(*r.shape, 2))
            elif wrapped == "expand_by":
                pyro.sample("o", law.expand(r.shape), obs=value)
            else:
                pyro.sample("o", law.mask(torch.tensor([True, False]) if wrapped == "half masked" else yes), obs=value)

    model, plain = (bind(program, lm, plain=flag) for flag in (False, True))
    truth = enumerate_posterior(plain, None, ["", "a"])
    torch.testing.assert_close(enumerate_posterior(model, None, ["", "a"]).log_z, truth.log_z, atol=1e-9, rtol=0)
    draws = importance(model, None, ["", "a"], num_samples=20)
    other = (2.0 * (draws["x"] == 0).sum(-1)) * (torch.tensor([1.0, 0.0]) if wrapped == "half masked" else 1.0)
    torch.testing.assert_close(draws.log_likelihood, other.double(), atol=1e-9, rtol=0)
    assert likelihood_bound(model, ["", "a"]) == (4.0 if bounded else None)


def test_bounds_of_likelihoods_that_are_scaled():
    """By prompt; by a latent site, which no run can bound: once, the first crashed and the second was of one random run."""
    lm = table_lm(3, 2, concentration=1.0, seed=4)

    def program(prompts, lm, by_latent=False):
        with pyro.plate("prompts", len(prompts)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            r = 1.0 * (pyro.sample("x", lm(prompts)) == 0).sum(-1)
            with poutine.scale(scale=1 + k if by_latent else torch.tensor([0.5, 1.5])):
                pyro.sample("o", Optimality(r), obs=torch.ones_like(r), infer={"log_bound": 2.0})

    model, hidden = bind(program, lm), bind(program, lm, by_latent=True)
    assert likelihood_bound(model, ["", "a"]) == 3.0 and likelihood_bound(model, ["", "a"], joint=True) == 4.0
    assert [likelihood_bound(hidden, ["", "a"]) for _ in range(8)] == [None] * 8
    truth = enumerate_posterior(model, None, ["", "a"])
    draws = rejection(model, None, ["", "a"], num_samples=500)
    exact = truth.log_joint.softmax(0).mul((truth.latents["x"] == 0).sum(-1)).sum(0)
    found = (draws["x"][0] == 0).sum(-1).double()
    assert bool(((found.mean(0) - exact).abs() < 5 * found.std(0) / 500**0.5).all())
    assert diagnose(model, bind(finetuned_beside_k, lm.copy()), ["", "a"], num_samples=100).prompts[0].bounded
    with pytest.raises(ValueError, match="declares no bound|log_bound"):
        rejection(hidden, None, ["", "a"], num_samples=5)


def finetuned_beside_k(prompts, lm):
    with pyro.plate("prompts", len(prompts)):
        pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", lm(prompts))


@pytest.mark.parametrize("declared", [None, -2.0])
@pytest.mark.parametrize(
    "wrap", [lambda law, mask: law.mask(mask), lambda law, mask: law.expand(mask.shape).mask(mask)]
)
def test_a_mask_that_a_latent_decides_leaves_the_bound_what_it_may_be(declared, wrap):
    """Once, the bound was that of one random run, 0 or 4, and rejection stopped half of the time."""
    lm = table_lm(3, 2, concentration=1.0, seed=4)
    top = 4.0 if declared is None else -2.0

    def program(prompts, lm):
        with pyro.plate("prompts", len(prompts)):
            seen = (pyro.sample("x", lm(prompts)) == 0).sum(-1)
            law = Optimality(top - 2.0 + seen.double(), 4.0 if declared is None else None)
            infer = {} if declared is None else {"log_bound": declared}
            pyro.sample("o", wrap(law, seen > 0), obs=torch.ones(seen.shape), infer=infer)

    model, bound = bind(program, lm), max(top, 0.0)
    assert [likelihood_bound(model, ["a"]) for _ in range(8)] == [bound] * 8
    truth = enumerate_posterior(model, None, ["a"])
    draws = rejection(model, None, ["a"], num_samples=400)
    exact = truth.log_joint.softmax(0).mul((truth.latents["x"] == 0).sum(-1)).sum(0)
    found = (draws["x"][0] == 0).sum(-1).double()
    assert bool(((found.mean(0) - exact).abs() < 5 * found.std(0) / 400**0.5).all())
    assert set(predictive(model, draws)["o"].unique().tolist()) <= {0.0, 1.0}


def test_a_mask_within_an_event_takes_its_elements_out_of_the_bound():
    lm = table_lm(3, 2, concentration=1.0, seed=4)
    kept = torch.tensor([[True, False], [False, False]])

    def program(prompts, lm):
        with pyro.plate("prompts", len(prompts)):
            r = -1.0 * (pyro.sample("x", lm(prompts)) == 0)
            pyro.sample("o", Optimality(r, 3.0).mask(kept).to_event(1), obs=torch.ones(*r.shape[:-1], 2))

    assert likelihood_bound(bind(program, lm), ["", "a"]) == 3.0
