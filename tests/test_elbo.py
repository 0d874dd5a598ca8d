"""`SequenceELBO` against enumeration: every pair of particles is a column of one call, so nothing here is random."""

import itertools
from dataclasses import replace

import oracle
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceGraph_ELBO

from ppl_lm.guides import finetuned, prior, tabular
from ppl_lm.infer import off_policy
from ppl_lm.infer.binding import bind
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.objectives import baselines
from ppl_lm.infer.traces.gradients import plate_costs
from ppl_lm.likelihood.optimality import Optimality
from ppl_lm.lm.table import table_lm
from ppl_lm.lm.token_sequence import TokenSequence
from ppl_lm.models import constrained, tilted

V, T, END = 5, 3, 4


def letters(completions, **_):
    return [text.count("a") - 0.5 * text.count("b") for text in completions]


@pytest.fixture(params=[("",), ("a",), ("", "c")], ids=["bos", "two-token prompt", "left-padded batch"])
def problem(request):
    """A target, a tabular guide, and for each prompt all pairs of outcomes as columns with their probabilities."""
    texts = request.param
    lm = table_lm(V, T, max_prompt=2, concentration=1.0, seed=1)
    table = table_lm(V, T, max_prompt=2, concentration=1.5, seed=2).copy()
    target, guide = bind(tilted, lm, reward=letters, beta=0.7), bind(tabular, table)
    rows = oracle.outcomes(V, T, END)
    x = oracle.as_tensor(rows, T, END)
    reward = torch.tensor(letters(lm.vocabulary.decode(x)), dtype=torch.float64) / 0.7
    contexts = [tuple(lm.vocabulary.encode(text)) for text in texts]
    log_joint = [oracle.log_probs(lm.model.table, c, rows) + reward for c in contexts]
    log_q = [oracle.log_probs(table.model.table, c, rows) for c in contexts]
    kl = sum(oracle.kl(q, joint - joint.logsumexp(0)) for q, joint in zip(log_q, log_joint, strict=True))
    log_z = sum(joint.logsumexp(0) for joint in log_joint)
    pairs = torch.tensor(list(itertools.product(range(len(rows)), repeat=2)))  # (7225, 2)
    values = torch.cat([x[pairs].transpose(0, 1)] * len(texts), 1)  # (K = 2, columns, T)
    weights = torch.cat([q.detach()[pairs].sum(-1).exp() for q in log_q])
    prompts = lm.prompts([text for text in texts for _ in pairs])
    (gradient,) = torch.autograd.grad(kl, table.model.table)
    return {
        "table": table.model.table,
        "model": poutine.scale(target, scale=weights),
        "guide": poutine.scale(guide, scale=weights),
        "prompts": prompts,
        "values": values,
        "loss": float((kl - log_z).detach()),
        "gradient": gradient,
    }


def force(monkeypatch, values):
    """Lets every text be "drawn" as it stands in `values`."""
    monkeypatch.setattr(TokenSequence, "sample", lambda self, sample_shape=torch.Size(): values)


def gradient_of(parameter, elbo, model, guide, *args, door="loss_and_grads"):
    parameter.grad = None
    if door == "loss_and_grads":
        loss = elbo.loss_and_grads(model, guide, *args)
    else:
        tensor = elbo.differentiable_loss(model, guide, *args)
        tensor.backward()
        loss = float(tensor.detach())
    return loss, parameter.grad.clone()


@pytest.mark.parametrize("door", ["loss_and_grads", "differentiable_loss"])
def test_expected_gradient_is_that_of_the_exact_kl(problem, monkeypatch, door):
    """Catches any bias of the estimator: wrong sign, own reward in the baseline, a token's past cut wrongly."""
    force(monkeypatch, problem["values"])
    args = (problem["model"], problem["guide"], problem["prompts"])
    loss, gradient = gradient_of(problem["table"], SequenceELBO(2), *args, door=door)
    assert loss == pytest.approx(problem["loss"], abs=1e-8)
    torch.testing.assert_close(gradient, problem["gradient"], atol=1e-8, rtol=0)
    assert SequenceELBO(2).loss(*args) == pytest.approx(problem["loss"], abs=1e-8)


def test_expected_gradient_equals_pyros_own(problem, monkeypatch):
    """The same through TraceGraph_ELBO, which differentiates each site's log_prob itself."""
    force(monkeypatch, problem["values"])
    args = (problem["model"], problem["guide"], problem["prompts"])
    theirs = TraceGraph_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    loss, gradient = gradient_of(problem["table"], theirs, *args)
    assert loss == pytest.approx(problem["loss"], abs=1e-8)
    torch.testing.assert_close(gradient, problem["gradient"], atol=1e-8, rtol=0)


def test_micro_batches_leave_the_gradient_unchanged(problem, monkeypatch):
    force(monkeypatch, problem["values"])
    args = (problem["model"], problem["guide"], problem["prompts"])
    for size in (1013, 10**6):
        _, gradient = gradient_of(problem["table"], SequenceELBO(2, micro_batch=size), *args)
        torch.testing.assert_close(gradient, problem["gradient"], atol=1e-10, rtol=0)


@pytest.mark.parametrize("mutant", ["own cost in the baseline", "std-normalised", "future instead of past"])
def test_mutants_are_rejected(problem, monkeypatch, mutant):
    """The enumeration has the power to see the usual mistakes."""
    force(monkeypatch, problem["values"])

    class Mutant(SequenceELBO):
        def _minus_baseline(self, cost, baseline):
            if mutant == "own cost in the baseline":
                return cost - cost.mean(0, keepdim=True)
            right = super()._minus_baseline(cost, baseline)
            if mutant == "std-normalised":
                return right / (cost.std(0, keepdim=True) + 1e-4)
            return right.flip(-1)

    _, gradient = gradient_of(problem["table"], Mutant(2), problem["model"], problem["guide"], problem["prompts"])
    assert (gradient - problem["gradient"]).abs().max() > 1e-3


def test_gradient_vanishes_at_the_posterior(monkeypatch):
    """With the guide at the posterior every coefficient is constant, so each single draw's gradient is 0, not only its
    mean (reverse KL with a leave-one-out baseline has no noise at the optimum)."""
    lm = table_lm(V, T, concentration=1.0, seed=1)
    target = bind(tilted, lm, reward=lambda completions, **_: [0.3] * len(completions), beta=1.0)
    guide = bind(finetuned, lm.copy())
    elbo = SequenceELBO(4)
    elbo.loss_and_grads(target, guide, lm.prompts(["", ""]))
    assert guide.lm.model.table.grad.abs().max() < 1e-12


# ----- ordinary Pyro sites beside the text -----


def mixed_model(prompts, prior, reward, **_):
    """A Normal mood and a Categorical topic beside the text, and a learnable scale of the reward."""
    scale = pyro.param("scale", torch.tensor(0.5, dtype=torch.float64))
    with pyro.plate("prompts", len(prompts)):
        topic = pyro.sample("topic", dist.Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)))
        mood = pyro.sample("mood", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        x = pyro.sample("x", prior(prompts))
        r = reward(prompts, x)
        log_potential = scale * r * (1 + topic) + mood * r - 0.1 * mood**2
        pyro.sample("optimal", Optimality(log_potential), obs=torch.ones(log_potential.shape))


def mixed_guide(prompts, lm, **_):
    loc = pyro.param("loc", torch.tensor(0.3, dtype=torch.float64))
    width = pyro.param("width", torch.tensor(0.8, dtype=torch.float64))
    logits = pyro.param("logits", torch.tensor([0.1, -0.3, 0.2], dtype=torch.float64))
    with pyro.plate("prompts", len(prompts)):
        pyro.sample("topic", dist.Categorical(logits=logits))
        pyro.sample("mood", dist.Normal(loc, width))
        pyro.sample("x", lm(prompts))


NAMES = ("scale", "loc", "width", "logits")


def exact_mixed(lm, table, nodes, node_weights, values):
    """-ELBO of the mixed program, the Normal by quadrature at fixed standardised nodes (pathwise: mood = loc + width·ε),
    texts and topics by enumeration; a differentiable function of all parameters."""
    rows = oracle.outcomes(V, 2, END)
    x = oracle.as_tensor(rows, 2, END)
    log_p0 = oracle.log_probs(lm.model.table, (END,), rows)
    log_q = oracle.log_probs(table, (END,), rows)
    r = torch.tensor(letters(lm.vocabulary.decode(x)), dtype=torch.float64)
    log_topic_q = values["logits"].log_softmax(0)
    log_topic_p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    total = torch.zeros((), dtype=torch.float64)
    for eps, w in zip(nodes, node_weights, strict=True):
        mood = values["loc"] + values["width"] * eps
        log_mood = dist.Normal(0.0, 1.0).log_prob(mood) - dist.Normal(values["loc"], values["width"]).log_prob(mood)
        for topic in range(3):
            log_lik = values["scale"] * r * (1 + topic) + mood * r - 0.1 * mood**2
            f = log_p0 - log_q + log_lik + log_mood + log_topic_p[topic] - log_topic_q[topic]
            total = total - w * log_topic_q[topic].exp() * (log_q.exp() * f).sum()
    return total


class Mixed:
    """The mixed program, and its exact loss and gradients by name of the parameter; `table` is the guide's language model."""

    def __init__(self, monkeypatch):
        lm = table_lm(V, 2, concentration=1.0, seed=3)
        table = table_lm(V, 2, concentration=1.5, seed=4).copy()
        rows = oracle.outcomes(V, 2, END)
        x = oracle.as_tensor(rows, 2, END)
        nodes = torch.tensor([-1.1, 0.4], dtype=torch.float64)
        node_weights = torch.tensor([0.45, 0.55], dtype=torch.float64)
        self.values = {
            "scale": torch.tensor(0.5, dtype=torch.float64, requires_grad=True),
            "loc": torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
            "width": torch.tensor(0.8, dtype=torch.float64, requires_grad=True),
            "logits": torch.tensor([0.1, -0.3, 0.2], dtype=torch.float64, requires_grad=True),
        }
        self.table = table.model.table
        loss = exact_mixed(lm, self.table, nodes, node_weights, self.values)
        gradients = torch.autograd.grad(loss, [*self.values.values(), self.table])
        self.loss, self.exact = float(loss.detach()), dict(zip((*NAMES, "table"), gradients, strict=True))

        # Columns: all pairs of particles over (text, topic); both particles of a column share a noise node.
        cells = torch.tensor(list(itertools.product(range(len(rows)), range(3))))
        pairs = torch.tensor(list(itertools.product(range(len(cells)), repeat=2)))
        node = torch.arange(len(nodes)).repeat_interleave(len(pairs))
        pairs = pairs.repeat(len(nodes), 1)
        text, topic = cells[pairs][..., 0].T, cells[pairs][..., 1].T  # (2, columns)
        log_q = oracle.log_probs(self.table, (END,), rows).detach()
        log_topic = torch.tensor([0.1, -0.3, 0.2], dtype=torch.float64).log_softmax(0)
        weights = (log_q[text] + log_topic[topic]).sum(0).exp() * node_weights[node]
        force(monkeypatch, x[text])
        monkeypatch.setattr(dist.Categorical, "sample", lambda self, sample_shape=torch.Size(): topic)
        monkeypatch.setattr(
            torch.distributions.Normal,
            "rsample",
            lambda self, sample_shape=torch.Size(): self.loc + self.scale * nodes[node],
        )
        target = bind(mixed_model, lm, reward=letters)
        guide = bind(mixed_guide, table)
        self.model, self.guide = poutine.scale(target, scale=weights), poutine.scale(guide, scale=weights)
        self.prompts = lm.prompts([""] * len(weights))

    def gradients(self):
        """Of the parameters as they are in Pyro's store, by name."""
        store = pyro.get_param_store()
        return {**{name: store[name].unconstrained().grad for name in NAMES}, "table": self.table.grad}

    def require(self, found):
        for name, expected in self.exact.items():
            torch.testing.assert_close(
                found[name], expected, atol=1e-8, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("door", ["loss_and_grads", "differentiable_loss", "svi"])
def test_mixed_latents_and_model_parameters(monkeypatch, door):
    """Text, Categorical, reparameterised Normal and a learnable model parameter in one program: all pairs of (topic,
    text), the Normal's noise on a grid, the expected gradient of everything exact to 1e-8, through all three doors."""
    mixed, elbo = Mixed(monkeypatch), SequenceELBO(2)
    args = mixed.model, mixed.guide, mixed.prompts
    if door == "svi":  # a step of plain SGD with rate 1 moves each parameter by minus its gradient
        before = {"table": mixed.table.detach().clone(), **{k: v.detach().clone() for k, v in mixed.values.items()}}
        svi = SVI(*args[:2], pyro.optim.SGD({"lr": 1.0}), loss=elbo)
        assert svi.step(mixed.prompts) == pytest.approx(mixed.loss, abs=1e-8)
        after = {name: pyro.get_param_store()[name].unconstrained().detach() for name in NAMES}
        after["table"] = mixed.table.detach()
        return mixed.require({name: before[name] - after[name] for name in after})
    if door == "loss_and_grads":
        assert elbo.loss_and_grads(*args) == pytest.approx(mixed.loss, abs=1e-8)
    else:
        tensor = elbo.differentiable_loss(*args)
        tensor.backward()
        assert float(tensor.detach()) == pytest.approx(mixed.loss, abs=1e-8)
    mixed.require(mixed.gradients())


def remembering():
    """A moving average that has seen a step of mean cost 1.7."""
    baseline = baselines.MovingAverage()
    baseline(torch.full((2, 1), 1.7, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64))
    return baseline


BASELINES = {
    "leave_one_out": lambda: baselines.leave_one_out,
    "no_baseline": lambda: baselines.no_baseline,
    "constant": lambda: baselines.constant(-1.0),
    "moving_average": remembering,
}


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_keeps_pathwise_gradients_and_the_models_parameters(monkeypatch, name):
    """Catches a baseline that turns reparameterised sites into score functions, or leaves the model's parameters out."""
    mixed = Mixed(monkeypatch)
    elbo = SequenceELBO(2, baseline=BASELINES[name]())
    assert elbo.loss_and_grads(mixed.model, mixed.guide, mixed.prompts) == pytest.approx(mixed.loss, abs=1e-8)
    mixed.require(mixed.gradients())


@pytest.mark.parametrize("mutant", ["pathwise dropped", "baseline of the scaled cost", "own cost in the baseline"])
def test_a_baseline_that_changes_the_gradient_is_rejected(monkeypatch, mutant):
    mixed = Mixed(monkeypatch)
    if mutant == "baseline of the scaled cost":
        unscaled = lambda p: [replace(part, scale=torch.ones_like(part.scale)) for part in plate_costs(p)]  # noqa: E731
        monkeypatch.setattr("ppl_lm.infer.elbo.plate_costs", unscaled)

    class Mutant(SequenceELBO):
        def _step(self, particles):
            step = super()._step(particles)
            return replace(step, pathwise=False) if mutant == "pathwise dropped" else step

        def _minus_baseline(self, cost, baseline):
            if mutant == "own cost in the baseline":
                return cost - cost.mean(0, keepdim=True)
            return super()._minus_baseline(cost, baseline)

    Mutant(2, baseline=baselines.constant(-1.0)).loss_and_grads(mixed.model, mixed.guide, mixed.prompts)
    found = mixed.gradients()
    far = {name: found[name] is None or float((found[name] - e).abs().max()) > 1e-3 for name, e in mixed.exact.items()}
    if mutant == "pathwise dropped":
        assert far["scale"] and far["loc"] and far["width"]
    else:
        assert far["table"] or far["logits"]


def test_a_baseline_that_remembers_is_moved_once_a_step():
    """Sites in one plate share its answer, and each set of plates has a memory: else a site's baseline would hold this very
    step's costs."""
    lm = table_lm(3, 2, concentration=1.0, seed=5)
    table = table_lm(3, 2, concentration=2.0, seed=6).copy()

    def model(prompts, prior, reward):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)))
        with pyro.plate("prompts", len(prompts)):
            topic = pyro.sample("topic", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
            x = pyro.sample("x", prior(prompts))
            pyro.sample("optimal", Optimality(reward(prompts, x) * (1 + z + topic)), obs=torch.ones(len(prompts)))

    def guide(prompts, lm):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("z_logit", torch.tensor(0.2, dtype=torch.float64))))
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("topic", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1, dtype=torch.float64))))
            pyro.sample("x", lm(prompts))

    costs = []

    class Recorded(baselines.MovingAverage):
        def __call__(self, cost, ratio):
            costs.append(cost)
            before = super().__call__(cost, ratio)
            assert bool((before == 0).all()) or len(costs) > 2  # nothing is known in the first step
            return before

    elbo = SequenceELBO(4, baseline=Recorded())
    for step in (1, 2):
        elbo.loss_and_grads(bind(model, lm, reward=letters), bind(guide, table), lm.prompts(["", "", ""]))
        assert sorted(tuple(cost.shape) for cost in costs[-2:]) == [(4, 1), (4, 3)] and len(costs) == 2 * step


def test_one_particle_with_a_moving_average():
    """K = 1 keeps the pathwise gradient too, and costs their particle dimension."""
    lm = table_lm(V, 2, concentration=1.0, seed=3)
    shapes = []

    def baseline(cost, ratio):
        shapes.append(tuple(cost.shape))
        return torch.zeros_like(cost)

    guide = bind(mixed_guide, table_lm(V, 2, concentration=1.5, seed=4).copy())
    for prompts in (["", "", ""], [""]):
        SequenceELBO(1, baseline=baseline).loss_and_grads(
            bind(mixed_model, lm, reward=letters), guide, lm.prompts(prompts)
        )
    assert shapes == [(1, 3), (1, 1)]
    assert all(pyro.get_param_store()[name].unconstrained().grad is not None for name in NAMES)


def test_a_source_refuses_what_only_the_guides_own_draws_can_learn():
    lm = table_lm(V, 2, concentration=1.0, seed=3)
    guide = bind(mixed_guide, table_lm(V, 2, concentration=1.5, seed=4).copy())
    elbo = SequenceELBO(4, source=off_policy.Reuse(2))
    with pytest.raises(ValueError, match="parameters of its own: only reverse_kl without a source learns them"):
        elbo.loss_and_grads(bind(mixed_model, lm, reward=letters), guide, lm.prompts([""]))


@pytest.mark.slow
def test_global_latent_and_subsampled_plate():
    """A Normal outside the prompt plate and a plate that subsamples: the gradient's mean over repetitions agrees with
    Pyro's own estimator on the same programs within five standard errors. Catches a model that subsamples other rows
    than its guide."""
    lm = table_lm(3, 2, max_prompt=2, concentration=1.0, seed=5)
    table = table_lm(3, 2, max_prompt=2, concentration=2.0, seed=6).copy()

    def model(prompts, prior, reward):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("prompts", len(prompts), subsample_size=2) as rows:
            batch = prompts[rows]
            x = pyro.sample("x", prior(batch))
            pyro.sample("optimal", Optimality(reward(batch, x) * (1 + 0.5 * z)), obs=torch.ones(2))

    def guide(prompts, lm):
        loc = pyro.param("loc", torch.tensor(0.2, dtype=torch.float64))
        pyro.sample("z", dist.Normal(loc, 0.7))
        with pyro.plate("prompts", len(prompts), subsample_size=2) as rows:
            pyro.sample("x", lm(prompts[rows]))

    target, bound = bind(model, lm, reward=letters), bind(guide, table)
    prompts = lm.prompts(["", "a", "b"])
    means, errors = [], []
    for elbo in (
        SequenceELBO(8),
        TraceGraph_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1),
    ):
        grads = []
        for _ in range(400):
            table.model.table.grad = None
            if "loc" in pyro.get_param_store():
                pyro.get_param_store()["loc"].unconstrained().grad = None
            elbo.loss_and_grads(target, bound, prompts)
            loc = pyro.get_param_store()["loc"].unconstrained().grad
            grads.append(torch.cat([loc.reshape(1), table.model.table.grad.flatten()]))
        grads = torch.stack(grads)
        means.append(grads.mean(0))
        errors.append(grads.std(0) / len(grads) ** 0.5)
    gap = (means[0] - means[1]).abs()
    assert bool((gap <= 5 * (errors[0] ** 2 + errors[1] ** 2).sqrt() + 1e-12).all())
    assert float(gap.max()) > 0 and float(means[0].abs().max()) > 0.1


def test_learnable_language_model_in_the_model():
    """A trainable LM in the target gets -E_q[∇ log p]: catches a sequence prior that is scored without gradient."""
    lm = table_lm(3, 2, concentration=1.0, seed=7).copy()
    proposal = table_lm(3, 2, concentration=1.0, seed=8).copy()
    target, guide = bind(tilted, lm, reward=letters, beta=1.0), bind(finetuned, proposal)
    elbo = SequenceELBO(3)
    pyro.set_rng_seed(1)
    particles = elbo.particles(target, guide, lm.prompts([""]))
    elbo.differentiate(particles).backward()
    x = particles.latents["x"]
    expected = torch.autograd.grad(-lm([""]).log_prob(x).sum() / 3, lm.model.table)[0]
    torch.testing.assert_close(lm.model.table.grad, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("length", "particles", "rate", "steps"),
    [(4, 512, 0.3, 200), pytest.param(6, 4096, 0.12, 750, marks=pytest.mark.slow)],
)
def test_tabular_guide_converges_under_stock_svi(length, particles, rate, steps):
    """Vocabulary 5: stock SVI with a Pyro optimiser brings the exact KL from more than 0.05 to a hundredth of it at most."""
    lm = table_lm(5, length, concentration=1.0, seed=9)
    target = bind(tilted, lm, reward=letters, beta=2.0)
    guide = bind(tabular, lm.copy())
    svi = SVI(target, guide, pyro.optim.Adagrad({"lr": rate}), loss=SequenceELBO(num_particles=particles))
    rows = oracle.outcomes(5, length, END)
    x = oracle.as_tensor(rows, length, END)
    reward = torch.tensor(letters(lm.vocabulary.decode(x)), dtype=torch.float64) / 2.0
    prompts = lm.prompts([""])

    def exact_kl():
        with torch.no_grad():
            joint = lm([""]).log_prob(x.unsqueeze(1))[:, 0] + reward
            return float(oracle.kl(guide.lm([""]).log_prob(x.unsqueeze(1))[:, 0], joint - joint.logsumexp(0)))

    before = exact_kl()
    for _ in range(steps):
        svi.step(prompts)
    after = exact_kl()
    assert before > 0.05 and after < min(1e-3, before / 100), (before, after)


# ----- refusals -----


def test_refuses_one_particle_and_bad_micro_batches():
    with pytest.raises(ValueError, match="num_particles=1"):
        SequenceELBO(1)
    with pytest.raises(ValueError, match="micro_batch=0"):
        SequenceELBO(2, micro_batch=0)


def test_refuses_a_step_with_nothing_to_train():
    lm = table_lm(3, 2, concentration=1.0)
    target, guide = bind(tilted, lm, reward=letters), bind(prior, lm)
    for call in (SequenceELBO(2).loss_and_grads, SequenceELBO(2).differentiable_loss):
        with pytest.raises(ValueError, match="nothing to train"):
            call(target, guide, [""])


def test_refuses_hard_constraints_by_name():
    lm = table_lm(3, 2, concentration=1.0)
    has_a = lambda completions, **_: ["a" in text for text in completions]  # noqa: E731
    target, guide = bind(constrained, lm, constraint=has_a), bind(finetuned, lm.copy())
    with pytest.raises(ValueError, match="reverse_kl cannot fit a hard constraint: .*forward_kl.*importance"):
        SequenceELBO(2).loss_and_grads(target, guide, [""])

    def minus_infinity(completions, **_):
        return [-float("inf")] * len(completions)

    with pytest.raises(ValueError, match="reverse_kl cannot fit a hard constraint"):
        SequenceELBO(2).loss_and_grads(bind(tilted, lm, reward=minus_infinity), guide, [""])
