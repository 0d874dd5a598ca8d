"""Sources of texts, and what must not leak: memories, graphs, scales. Each test is of a fault that was found."""

import copy
import itertools
import math

import oracle
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from ppl_lm.criticism.diagnoses.diagnosis import diagnose
from ppl_lm.guides import finetuned, prior
from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import NoSupportError
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.objectives.balance import SubTB, TrajectoryBalance, vargrad
from ppl_lm.infer.objectives.baselines import MovingAverage, constant, known, no_baseline
from ppl_lm.infer.objectives.divergences import forward_kl, jensen_shannon, reverse_kl
from ppl_lm.infer.objectives.rl import GRPO
from ppl_lm.infer.off_policy import Proposal, Replay, Reuse
from ppl_lm.likelihood.best_of import BestOfN
from ppl_lm.likelihood.reward import Reward
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted
from ppl_lm.run.fitting.gain import Gain
from ppl_lm.run.fitting.loop import fit

LM = table_lm(4, 2, max_prompt=2, concentration=1.0, seed=1)


def length(completions, **_):
    return [float(len(text)) for text in completions]


def problem(reward=length, beta=1.0):
    return bind(tilted, LM, reward=reward, beta=beta), bind(finetuned, LM.copy())


def answers(completions, answer, **_):
    return [float(a) for a in answer]  # the guide that is the prior is the posterior, log Z the answer


# ----- proposals -----


def test_a_proposal_never_moves_another_program():
    """It takes over the guide's weights into a copy: built around the prior, it would move the target."""
    torch.manual_seed(0)
    lm = LM.copy().requires_grad_(False)
    target, guide = bind(tilted, lm, reward=length), bind(finetuned, lm.copy())
    before = lm.model.table.clone()
    source = Proposal(bind(finetuned, lm), every=2)
    svi = pyro.infer.SVI(
        target, guide, pyro.optim.Adam({"lr": 0.05}), SequenceELBO(64, objective=forward_kl, source=source)
    )
    for _ in range(40):
        svi.step([""])
    assert source.taken_over > 0 and torch.equal(before, lm.model.table)
    assert all(p.requires_grad for p in guide.parameters())


def test_a_program_that_cannot_take_the_weights_is_refused_at_the_first_step(unchecked):
    target, guide = problem()
    elbo = SequenceELBO(4, objective=forward_kl, source=Proposal(bind(prior, LM), every=5))
    with pytest.raises(ValueError, match=r"Proposal\.like\(guide\)"):
        elbo.loss(target, guide, [""])
    with pytest.raises(ValueError, match="give a bound program"):
        Proposal(lambda prompts: None)


def test_the_rule_for_taking_over_works_with_few_particles():
    """Weights normalised by the step's own few particles would hide what they miss, and refuse the posterior itself."""
    torch.manual_seed(0)
    target, guide = problem(beta=0.5)
    far = bind(finetuned, LM.copy())
    contexts, rows = [(LM.vocabulary.pad_id,)], oracle.outcomes(4, 2, 3)
    reward = torch.tensor(length(LM.vocabulary.decode(oracle.as_tensor(rows, 2, 3))), dtype=torch.float64) / 0.5
    joint = oracle.log_probs(LM.model.table, contexts[0], rows).detach() + reward
    oracle.condition(guide.lm.model.table, contexts[0], rows, joint)
    source = Proposal(far, every=200)
    elbo = SequenceELBO(2, objective=forward_kl, source=source, log_z=known(joint.logsumexp(0)))
    for _ in range(200):
        elbo.loss(target, guide, [""])
    assert source.taken_over == 1


def test_a_source_that_lacks_a_site_is_refused():
    def guide(prompts, lm):
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", lm(prompts))

    def model(prompts, prior):
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", prior(prompts))

    elbo = SequenceELBO(2, objective=forward_kl, source=Proposal(bind(finetuned, LM.copy())))
    with pytest.raises(ValueError, match="the source draws no site 'c'"):
        elbo.loss(bind(model, LM), bind(guide, LM.copy()), [""])


# ----- memories -----


@pytest.mark.parametrize("objective", [jensen_shannon, TrajectoryBalance(0.5), forward_kl])
def test_prompts_that_differ_in_a_column_have_their_own_evidence(objective):
    target, guide = problem(answers)
    rows = {"prompt": ["a", "a"], "answer": [0.0, 5.0]}
    elbo = SequenceELBO(8, objective=objective, baseline=no_baseline)
    assert all(abs(elbo.loss(target, guide, rows)) < 1e-10 for _ in range(4))
    apart = [{"prompt": ["a"], "answer": [v]} for v in (0.0, 5.0)]
    assert all(abs(elbo.loss(target, guide, row)) < 1e-10 for row in apart for _ in range(3))


def test_a_repeated_prompt_learns_from_each_of_its_rows():
    target, guide = problem(answers)
    made = TrajectoryBalance(0.5)
    elbo = SequenceELBO(8, objective=made)
    elbo.loss(target, guide, {"prompt": ["a"], "answer": [0.0]})
    (key,) = made.log_z
    made.log_z[key] = 4.0
    elbo.loss(target, guide, {"prompt": ["a", "a"], "answer": [0.0, 0.0]})
    assert made.log_z[key] == pytest.approx(1.0)  # halved twice


@pytest.mark.parametrize("kind", [jensen_shannon, forward_kl], ids=lambda kind: kind.name)
@pytest.mark.parametrize("count", [1, 2])
def test_estimates_from_earlier_steps_have_not_seen_reused_texts(kind, count):
    """Of the second update by the same texts, the expected gradient, at a log Z that an earlier step has left, is what it is
    at that log Z: not moved by the texts themselves."""
    target, guide = problem(beta=0.7)
    rows = oracle.as_tensor(oracle.outcomes(4, 2, 3), 2, 3)
    prompts, table = LM.prompts([""]), guide.lm.model.table
    kept = []

    def gradient(elbo, pair):
        table.grad = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "ppl_lm.lm.TokenSequence.sample", lambda self, shape=torch.Size(): rows[list(pair)].unsqueeze(1)
            )
            elbo.loss_and_grads(target, guide, prompts)
        return table.grad.clone()

    for pair in itertools.islice(itertools.product(range(len(rows)), repeat=count), 12):
        elbo = SequenceELBO(count, objective=kind, baseline=MovingAverage(), source=Reuse(2))
        elbo.log_z.known[prompts.identities()[0]] = (0.3, 0.0)
        first = gradient(elbo, pair)
        kept.append(float((gradient(elbo, pair) - first).abs().max()))
    assert max(kept) < 1e-12


def test_fit_reuses_texts_whatever_the_batches(monkeypatch):
    drawn = []
    target, guide = problem()
    source = Reuse(4)
    call = Reuse.__call__

    def count(self, draw, prompts):
        return call(self, lambda *a: drawn.append(1) or draw(*a), prompts)

    monkeypatch.setattr(Reuse, "__call__", count)
    fit(target, guide, ["", "a", "b", "a b"], SequenceELBO(4, source=source), batch_size=2, max_steps=20)
    assert len(drawn) == 5


def test_replay_of_no_particle_is_refused_and_lengths_are_kept_apart():
    target, guide = problem()
    with pytest.raises(ValueError, match="share=0.25 of 1 particles is none"):
        SequenceELBO(1, objective=TrajectoryBalance(), baseline=no_baseline, source=Replay()).loss(target, guide, [""])
    replay = Replay(share=0.5)
    elbo = SequenceELBO(8, objective=vargrad, source=replay)
    longer = table_lm(4, 3, max_prompt=2, concentration=1.0, seed=1)
    for lm in (LM, longer, LM, longer):
        elbo.loss(bind(tilted, lm, reward=length), bind(finetuned, lm.copy()), [""])
    assert {key[-1] for key in replay.kept} == {2, 3}


def test_a_moving_baseline_knows_nothing_of_the_step_it_serves():
    cost, ratio = torch.randn(2, 3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    for second in (cost[1], cost[1] + 7.0):
        made = MovingAverage(0.5)
        assert bool((made(cost[0], ratio) == 0).all())
        assert float(made(second, ratio)[0, 0]) == pytest.approx(float(cost[0].mean()))


# ----- graphs, scales, parameters -----


def after_a_normal(prompts, lm):
    loc = pyro.param("loc", torch.tensor(0.4, dtype=torch.float64))
    with pyro.plate("prompts", len(prompts)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("c", dist.Bernoulli(logits=1.5 * z))
        pyro.sample("x", lm(prompts))


def normal_model(prompts, prior):
    with pyro.plate("prompts", len(prompts)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.5).double()))
        pyro.sample("x", prior(prompts))
        pyro.factor("f", c * z)


@pytest.mark.parametrize(("objective", "baseline"), [(reverse_kl, constant(0.0)), (jensen_shannon, no_baseline)])
def test_a_site_after_a_reparameterised_one_has_its_own_score_alone(objective, baseline):
    """By quadrature over z and both values of c; against the mean of many steps."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    loc = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    log_q, log_j = [], []
    for c in (0.0, 1.0):
        log_q.append(dist.Normal(loc, 1.0).log_prob(z) + dist.Bernoulli(logits=1.5 * z).log_prob(torch.tensor(c)))
        log_j.append(dist.Normal(0.0, 1.0).log_prob(z) + math.log(0.5) + c * z)
    log_q, log_j, dz = torch.stack(log_q), torch.stack(log_j).double(), z[1] - z[0]
    log_z = (log_j.exp().sum() * dz).log()
    q, p = log_q.exp(), (log_j - log_z).exp()
    mean = (p + q) / 2
    value = {
        "reverse_kl": (q * (log_q - log_j)).sum() * dz,
        "jensen_shannon": 0.5 * ((p * (p / mean).log()).sum() + (q * (q / mean).log()).sum()) * dz,
    }[objective.name]
    (truth,) = torch.autograd.grad(value, loc)
    model, guide = bind(normal_model, LM), bind(after_a_normal, LM.copy())
    elbo = SequenceELBO(2000, objective=objective, baseline=baseline, log_z=known(log_z.detach()))
    found = []
    for _ in range(60):
        loss = elbo.differentiable_loss(model, guide, [""])
        (param,) = [v for k, v in pyro.get_param_store().items() if k.endswith("loc")]
        found.append(float(torch.autograd.grad(loss, param)[0]))
    found = torch.tensor(found)
    assert abs(float(found.mean() - truth)) < 4 * float(found.std()) / 60**0.5
    assert float(found.std()) / 60**0.5 < 0.02 * abs(float(truth))


def test_reuse_keeps_no_graph():
    target, guide = bind(normal_model, LM), bind(after_a_normal, LM.copy())
    elbo = SequenceELBO(4, objective=jensen_shannon, source=Reuse(3))
    for _ in range(6):
        elbo.loss_and_grads(target, guide, [""])


def test_parameters_of_the_model_are_refused_beside_a_reparameterised_site():
    def model(prompts, prior):
        w = pyro.param("w", torch.tensor(0.3, dtype=torch.float64))
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("x", prior(prompts))
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("o", dist.Normal(w + z, 1.0), obs=torch.ones(len(prompts)))

    def guide(prompts, lm):
        loc = pyro.param("loc", torch.tensor(0.1, dtype=torch.float64))
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("x", lm(prompts))
            pyro.sample("z", dist.Normal(loc, 1.0))

    with pytest.raises(ValueError, match="only reverse_kl without a source learns them"):
        SequenceELBO(4, objective=forward_kl).loss_and_grads(bind(model, LM), bind(guide, LM.copy()), [""])


def test_masked_texts_and_other_scales_are_refused():
    target, guide = problem()
    with pytest.raises(ValueError, match="masked or scaled by 0"):
        masked = poutine.mask(guide, mask=torch.tensor(False))
        SequenceELBO(4, objective=forward_kl).loss(target, masked, [""])

    def both(scale, prompts, lm):
        with pyro.plate("prompts", len(prompts)):
            with poutine.scale(scale=scale):
                pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", lm(prompts))

    def at(scale, lm):
        return bind(lambda prompts, lm: both(scale, prompts, lm), lm)

    SequenceELBO(4, objective=forward_kl).loss(at(1.0, LM), at(1.0, LM.copy()), [""])
    with pytest.raises(ValueError, match="site 'c' has another scale"):
        SequenceELBO(4, objective=forward_kl).loss(at(3.0, LM), at(3.0, LM.copy()), [""])


def test_a_copy_of_the_elbo_does_the_same():
    target, guide = bind(normal_model, LM), bind(after_a_normal, LM.copy())
    elbo = SequenceELBO(4)
    assert copy.deepcopy(elbo).pathwise
    torch.manual_seed(0)
    first = elbo.loss(target, guide, [""])
    torch.manual_seed(0)
    assert copy.deepcopy(elbo).loss(target, guide, [""]) == first


def test_one_text_below_an_inner_plate_is_one_text():
    target, guide = problem()
    for objective in (GRPO(1.0), GRPO(1.0, kl_in_reward=True)):
        assert math.isfinite(SequenceELBO(4, max_plate_nesting=2, objective=objective).loss(target, guide, [""]))
    with pytest.raises(ValueError, match="max_plate_nesting=1"):
        SequenceELBO(4, max_plate_nesting=2, objective=SubTB()).loss(target, guide, [""])


# ----- sub-trajectory balance -----


def test_subtb_with_two_ends_is_zero_at_the_posterior_only():
    """A guide whose two ends have another split is not the posterior; a reward may depend on which end it is."""
    base = table_lm(4, 2, concentration=1.0, seed=1)
    made = LanguageModel(base.model, base.vocabulary.tokenizer, 2, end_ids=(2, 3))
    wrong = copy.deepcopy(base.model)
    with torch.no_grad():
        wrong.table[:, 2] += 1.5
    guide = bind(finetuned, LanguageModel(wrong, base.vocabulary.tokenizer, 2, end_ids=(2, 3)).requires_grad_(True))

    def none(completions, **_):
        return [0.0] * len(completions)

    def by_end(completion_ids, **_):
        return [{2: 1.0, 3: -0.5}.get(ids[-1], 0.3) for ids in completion_ids]

    torch.manual_seed(0)
    assert SequenceELBO(64, objective=SubTB()).loss(bind(tilted, made, reward=none), guide, [""]) > 0.05
    exactly = copy.deepcopy(base.model)
    rows = [r for r in itertools.chain(*(itertools.product(range(4), repeat=n) for n in (1, 2)))]
    rows = [r for r in rows if all(t < 2 for t in r[:-1]) and (len(r) == 2 or r[-1] >= 2)]
    context = tuple(made.prompts([""]).unpadded()[0])
    joint = oracle.log_probs(base.model.table, context, rows).detach()
    joint = joint + torch.tensor(by_end([list(r) for r in rows]), dtype=torch.float64)
    oracle.condition(exactly.table, context, rows, joint)
    lm = LanguageModel(exactly, base.vocabulary.tokenizer, 2, end_ids=(2, 3)).requires_grad_(True)
    target = bind(tilted, made, reward=by_end, beta=1.0)
    assert SequenceELBO(64, objective=SubTB()).loss(target, bind(finetuned, lm), [""]) < 1e-20


def test_subtb_refuses_what_it_would_run_otherwise_again():
    def some(prompts, prior, reward):
        with pyro.plate("prompts", len(prompts), subsample_size=1) as rows:
            few = prompts.take(rows)
            x = pyro.sample("x", prior(few))
            pyro.factor("r", reward(few, x))

    def few_guide(prompts, lm):
        with pyro.plate("prompts", len(prompts), subsample_size=1) as rows:
            pyro.sample("x", lm(prompts.take(rows)))

    elbo = SequenceELBO(4, objective=SubTB())
    with pytest.raises(ValueError, match="would subsample anew"):
        elbo.loss(bind(some, LM, reward=length), bind(few_guide, LM.copy()), ["", "a"])

    def tempered(prompts, prior, reward):
        with pyro.plate("prompts", len(prompts)):
            with poutine.scale(scale=0.5):
                x = pyro.sample("x", prior(prompts))
            pyro.factor("r", reward(prompts, x))

    with pytest.raises(ValueError, match="one scale in model and guide"):
        elbo.loss(bind(tempered, LM, reward=length), bind(finetuned, LM.copy()), [""])

    def never_short(completions, **_):
        return [0.0 if len(text) > 1 else -math.inf for text in completions]

    lm = table_lm(4, 2, concentration=1.0, seed=1)
    with pytest.raises(ValueError, match="impossible|cannot fit a hard constraint"):
        elbo.loss(bind(tilted, lm, reward=never_short), bind(finetuned, lm.copy()), [""])


# ----- fits and diagnoses -----


def test_a_fit_from_a_proposal_keeps_an_earlier_guide_that_was_better():
    """The gain is watched by importance ratios, so a guide that is spoiled late is not kept."""
    target, guide = problem(beta=0.5)

    def spoil(row):
        if row["step"] == 70:
            with torch.no_grad():
                guide.lm.model.table.add_(3 * torch.randn(guide.lm.model.table.shape, dtype=torch.float64))

    loss = SequenceELBO(64, objective=jensen_shannon, source=Proposal.like(guide, 5))
    made = fit(target, guide, [""], loss, max_steps=72, learning_rate=0.03, seed=0, on_step=spoil)
    assert made.kept == "best" and made.gain > 0.2
    assert all(math.isfinite(row["gain"]) for row in made.metrics)


@pytest.mark.parametrize("source", [lambda guide: Replay(), lambda guide: Proposal.like(guide)])
def test_metrics_are_of_the_guide_not_of_what_drew(source):
    """At the start the guide is the prior: its gain and distance from the prior are 0 within noise, whatever drew."""
    target, guide = problem()
    loss = SequenceELBO(128, objective=vargrad, source=source(guide))
    made = fit(target, guide, [""], loss, max_steps=40, learning_rate=1e-9, seed=0)
    assert abs(sum(row["gain"] for row in made.metrics) / 40) < 0.1
    assert all(abs(row["kl_prior"]) < 1e-6 for row in made.metrics)


def test_impossible_texts_that_show_themselves_late():
    """Rarer than the draws by which fit chooses its measure: it changes over, and answers without NaN."""
    lm = table_lm(6, 4, concentration=3.0, seed=2)
    rows = oracle.outcomes(6, 4, 5)
    chance = oracle.log_probs(lm.model.table, (5,), rows).detach().exp()
    rare = {rows[i] for i in chance.argsort()[:40].tolist()}

    def reward(completion_ids, **_):
        return [-math.inf if tuple(ids) in rare else float(ids.count(1)) for ids in completion_ids]

    for seed in range(3):
        guide = bind(finetuned, lm.copy())
        target, loss = bind(tilted, lm, reward=reward, beta=0.5), SequenceELBO(128, objective=jensen_shannon)
        made = fit(target, guide, [""], loss, max_steps=40, seed=seed, learning_rate=0.003)
        figures = (made.gain, made.gain_se, made.last_gain, made.last_gain_se)
        assert all(map(math.isfinite, figures)) and made.outcome == "finished" and made.gain > 0


def test_a_diagnosis_of_what_is_impossible_says_so():
    target, guide = problem(lambda completions, **_: [-math.inf] * len(completions))
    with pytest.raises(NoSupportError, match="none of 128 draws"):
        diagnose(target, guide, LM.prompts([""]), num_samples=128)


def test_no_figure_is_nan_under_a_hard_constraint():
    def reward(completions, **_):
        return [float(len(text)) if "a" in text else -math.inf for text in completions]

    for bounded in (False, True):
        reward.r_max = 5.0 if bounded else None
        target, guide = problem(reward)
        made = diagnose(target, guide, LM.prompts(["", "b"]), num_samples=500).as_json()
        numbers = [v for row in (made, *made["prompts"]) for v in row.values() if isinstance(v, float)]
        assert not any(map(math.isnan, numbers)) and made["elbo_gain"] is None


def test_the_gain_of_a_step_weighs_where_cover_is_asked_for():
    """KL(p ‖ prior) - KL(p ‖ q) from the guide's draws, against enumeration; unweighted it would be another number."""
    torch.manual_seed(0)
    target, guide = problem(beta=0.5)
    with torch.no_grad():
        guide.lm.model.table[:, 0] += 1.0
    batch = LM.prompts([""])
    gain = Gain(target, guide, batch, forward_kl, 1)
    particles = SequenceELBO(20_000).particles(target, guide, batch)
    log_w = particles.log_prior() + particles.log_likelihood() - particles.log_guide()
    moved = particles.log_guide() - particles.log_prior()
    with torch.no_grad():
        truth = float(
            enumerate_posterior(target, bind(prior, LM), [""]).kl_p_q - enumerate_posterior(target, guide, [""]).kl_p_q
        )
    assert gain.of_step(log_w, moved, torch.tensor([0]), particles.share()) == pytest.approx(truth, abs=0.03)
    assert abs(float(moved.mean()) - truth) > 0.1


# ----- best of n -----


def test_best_of_is_not_unwrapped_and_leaves_the_random_state_alone(unchecked):
    made = BestOfN(length, LM, n=4)
    with pytest.raises(TypeError, match="pass it as it is"):
        Reward(made)
    x = LM(["a"]).sample(torch.Size((3,)))
    state = torch.random.get_rng_state()
    first = made.score(LM.prompts(["a"]), x)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first, BestOfN(length, LM, n=4).score(LM.prompts(["a"]), x)), "the same references for a seed"
    with pytest.raises(ValueError, match="n=2.5"):
        BestOfN(length, LM, n=2.5)


# ----- bad input -----


def test_bad_arguments(unchecked):
    for bad, message in (("forward_kl", "give a function of Terms"), (GRPO, "give a function of Terms")):
        with pytest.raises(ValueError, match=message):
            SequenceELBO(4, objective=bad)
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            GRPO(beta)
    with pytest.raises(ValueError, match="give a source"):
        SequenceELBO(4, clip_ratio=0.2)
    for make in (lambda: Reuse(1.5), lambda: Replay(2.5)):
        with pytest.raises(ValueError, match="give"):
            make()
