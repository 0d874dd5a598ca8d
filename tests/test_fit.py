"""The fit loop on tiny tables, where the truth is known."""

import importlib
import math

import pyro
import pytest
import tiny
import torch

from ppl_lm.guides import finetuned, lora, prior
from ppl_lm.infer.binding import bind
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.objectives.divergences import reverse_kl
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted
from ppl_lm.run.fitting.gain import Gain
from ppl_lm.run.fitting.learning_rate import ADAPTER, MOST_MOVED, SCALE, Rate, peak
from ppl_lm.run.fitting.loop import fit
from ppl_lm.run.fitting.step_metrics import guide_metrics


def letters(completions, **_):
    return [text.count("a") - 0.5 * text.count("b") for text in completions]


@pytest.fixture
def problem():
    lm = table_lm(4, 4, max_prompt=2, concentration=1.0, seed=1)
    target, guide = bind(tilted, lm, reward=letters, beta=1.0), bind(finetuned, lm.copy())
    return target, guide, bind(prior, lm)


def kls(target, guide, texts):
    with torch.no_grad():
        return enumerate_posterior(target, guide, texts).kl_q_p


def test_fit_closes_most_of_the_distance_for_every_prompt(problem):
    target, guide, start = problem
    texts = ["", "a", "b"]
    before = kls(target, guide, texts)
    fitted = fit(target, guide, texts, SequenceELBO(64), batch_size=2, learning_rate=0.05, max_steps=300)
    after = kls(target, guide, texts)
    assert fitted.outcome == "finished" and fitted.steps == 300
    assert bool((after < 0.15 * before).all()), (before, after)
    truth = float((before - after).mean())
    assert abs(fitted.gain - truth) < 4 * fitted.gain_se, "gain is the fall of the KL, without log Z"


def test_the_learning_rate_is_found_from_the_exact_move(problem, monkeypatch):
    """What `Rate` measures in the warm-up is the exact KL of the guide after a step from the guide before it."""
    target, guide, start = problem
    module = importlib.import_module("ppl_lm.run.fitting.loop")
    schedules: list[Rate] = []

    def remember(*args):
        schedules.append(Rate(*args))
        return schedules[0]

    monkeypatch.setattr(module, "Rate", remember)
    rates, moves, tables = [], [], []

    def watch(row):
        tables.append(guide.lm.model.table.detach().clone())
        rates.append(row["learning_rate"])
        if len(tables) > 1:
            before = bind(finetuned, guide.lm.copy())
            with torch.no_grad():
                before.lm.model.table.copy_(tables[-2])
                a, b = enumerate_posterior(target, before, [""]).log_q, enumerate_posterior(target, guide, [""]).log_q
            moves.append(float((a.exp() * (a - b)).sum()))

    fit(target, guide, [""], max_steps=150, on_step=watch)
    c = torch.tensor(moves) / torch.tensor(rates[:-1], dtype=torch.float64) ** 2  # exact, step by step
    measured = torch.tensor(schedules[0].measured)
    n, c = len(measured), c[2:]  # from the third step on; the texts of a step are drawn from the guide before it
    assert n > 5 and torch.allclose(measured.mean(), c[:n].mean().float(), rtol=0.25), (measured, c[:n])
    assert rates[20] > 10 * rates[5]


def test_a_run_of_few_steps_has_a_short_warmup_where_its_rate_is_found():
    """One that is given warms up as it was told to."""
    rate = Rate(None, 15)
    rate.measured.append(1e6)
    rates = [rate(step, step / 10) for step in range(10)]
    assert rates[0] < 1e-4 < peak(1e6) and max(rates) == rates[1] > 0.97 * peak(1e6)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert Rate(1e-3, 15)(5, 0.5) < 0.5e-3


def test_an_adapters_rate_is_bounded(monkeypatch):
    """By 1e-3, where a step at first moves it so little that it would get more; a rate that is given is taken."""
    rate = Rate(None, 15, ADAPTER)
    rate.measured.append(57.0)
    assert peak(57.0) > 2 * ADAPTER and rate(15, 0.0) == pytest.approx(ADAPTER) and rate.peak == ADAPTER
    assert Rate(5e-3, 1, ADAPTER)(5, 0.0) == pytest.approx(5e-3)
    module, most = importlib.import_module("ppl_lm.run.fitting.loop"), []
    monkeypatch.setattr(module, "Rate", lambda *args: most.append(args[2]) or Rate(*args))
    prior = tiny.language_model("llama", max_new_tokens=3)
    target = bind(tilted, prior, reward=letters, beta=1.0)
    for guide in (bind(lora, prior.adapted(rank=2)), bind(finetuned, prior.copy())):
        fit(target, guide, ["the"], SequenceELBO(4), max_steps=1)
    assert most == [ADAPTER, SCALE]


def moved(problem, rows_of):
    """KL of the guide after a step from the one before, exact and as `Rate` measures it, for 60 steps that move the rows
    `rows_of(texts)` of the table, `texts` being those that the step is made of; each from the same guide."""
    torch.manual_seed(0)
    target, guide, _ = problem
    table, batch, elbo = guide.lm.model.table, guide.lm.prompts([""]), SequenceELBO(8)
    start, both = table.detach().clone(), []
    for _ in range(60):
        particles, schedule = elbo.particles(target, guide, batch), Rate(None, 15)
        (texts,) = particles.latents.values()
        with torch.no_grad():
            before = enumerate_posterior(target, guide, [""]).log_q
            with schedule.watch(2, particles):
                table[rows_of(guide.lm, texts.reshape(-1, 4))] += torch.randn(4, dtype=torch.float64) * 0.2
            after = enumerate_posterior(target, guide, [""]).log_q
            table.copy_(start)
        both.append((float((before.exp() * (before - after)).sum()), schedule.measured[0] * schedule.now**2))
    return torch.tensor(both, dtype=torch.float64).T


def test_a_move_is_measured_on_other_texts_than_made_the_step(problem):
    """Steps move most what follows the rare texts that they are made of; on these alone they would seem far larger."""

    def rows_of(lm, texts):
        prefix = torch.cat([torch.full_like(texts[:, :1], lm.vocabulary.bos_id), texts[:, :3]], 1)
        return lm.model.rows(prefix, torch.ones_like(prefix))[:, 3]

    truth, measured = moved(problem, rows_of)
    error = (measured - truth).std() / 60**0.5
    assert abs(measured.mean() - truth.mean()) < 4 * error < truth.mean(), (truth.mean(), measured.mean(), error)


def test_a_move_of_what_follows_the_end_is_no_move(problem):
    def rows_of(lm, texts):
        end = lm.vocabulary.bos_id
        heads = torch.tensor([[end, end, t, u] for t in range(4) for u in range(4)])
        return lm.model.rows(heads, torch.ones_like(heads))[:, 1:].unique()

    truth, measured = moved(problem, rows_of)
    assert truth.abs().max() < 1e-12 and measured.abs().max() < 1e-12


def test_the_learning_rate_of_networks_of_all_sizes():
    """A table, a small and a large network: the rate falls as they move further, and no step moves one too far."""
    rates = [peak(c) for c in (1.0, 1e4, 1e6, 1e10)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 0.01 and 1e-4 <= rates[2] < rates[1] < 1e-3
    assert all(c * peak(c) ** 2 <= MOST_MOVED * 1.001 for c in (1e-6, 1.0, 1e4, 1e6, 1e10)) and peak(0.0) > 0


def test_same_seed_same_fit(problem):
    target, _, start = problem
    ends = []
    for _ in range(2):
        guide = bind(finetuned, target.lm.copy())
        fit(target, guide, ["", "a"], max_steps=20, learning_rate=0.05, seed=5)
        ends.append(guide.lm.model.table.detach().clone())
    assert torch.equal(*ends)


def test_micro_batches_change_nothing(problem):
    target, _, start = problem
    ends = []
    for size in (7, None):
        guide = bind(finetuned, target.lm.copy())
        fit(target, guide, [""], SequenceELBO(128, micro_batch=size), max_steps=10, learning_rate=0.05, seed=1)
        ends.append(guide.lm.model.table.detach().clone())
    torch.testing.assert_close(*ends, atol=1e-10, rtol=0)


def test_a_ruined_guide_is_named_and_not_kept(problem):
    target, guide, start = problem
    before = kls(target, guide, [""])
    fitted = fit(target, guide, [""], SequenceELBO(8), max_steps=200, learning_rate=30.0)
    assert fitted.outcome == "worse_than_prior" and fitted.kept in ("best", "start")
    assert fitted.last_gain < -3 * fitted.last_gain_se and fitted.steps < 200, "stops early"
    assert float(kls(target, guide, [""])) <= float(before) + 0.05


def test_weights_that_diverge_end_the_fit(problem):
    target, guide, start = problem

    def diverge(row):
        if row["step"] == 5:
            guide.lm.model.table.data.fill_(math.nan)

    fitted = fit(target, guide, [""], SequenceELBO(8), max_steps=100, learning_rate=1e-3, on_step=diverge)
    assert fitted.outcome == "worse_than_prior" and fitted.last_gain == -math.inf and fitted.kept == "start"
    assert bool(torch.isfinite(guide.lm.model.table).all())


def test_an_untrained_guide_is_not_called_worse(problem):
    """False alarms: forty fits of one tiny step each; the reference's own error must count."""
    target, _, start = problem
    outcomes = []
    for seed in range(40):
        guide = bind(finetuned, target.lm.copy())
        fitted = fit(target, guide, [""], SequenceELBO(2), max_steps=1, learning_rate=1e-6, seed=seed)
        outcomes.append(fitted.outcome)
    assert outcomes.count("worse_than_prior") <= 1


def test_interruption_keeps_the_best(problem):
    target, guide, start = problem

    def stop(row):
        if row["step"] == 60:
            raise KeyboardInterrupt

    before = kls(target, guide, [""])
    fitted = fit(target, guide, [""], max_steps=300, learning_rate=0.05, on_step=stop)
    assert fitted.outcome == "interrupted" and fitted.steps == 61
    assert float(kls(target, guide, [""])) < float(before)


def test_interruption_while_measuring_keeps_the_guide(problem, monkeypatch):
    """Ctrl-C after the last step, while guides are compared on fresh draws: the fitted one is not thrown away."""
    target, guide, start = problem
    before, calls = kls(target, guide, [""]), []
    module = importlib.import_module("ppl_lm.run.fitting.gain")

    def second_is_interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return importance(*args, **kwargs)

    monkeypatch.setattr(module, "importance", second_is_interrupted)
    fitted = fit(target, guide, [""], max_steps=100, learning_rate=0.05)
    assert fitted.outcome == "interrupted" and fitted.kept in ("last", "best") and fitted.steps == 100
    assert float(kls(target, guide, [""])) < float(before) / 2


def test_the_gain_is_that_of_draws_that_chose_nothing(problem, monkeypatch):
    """The better of two guides on the same draws looks better than it is, so the one that is kept is measured once more."""
    module, gains = importlib.import_module("ppl_lm.run.fitting.gain"), []

    def remember(*args, **kwargs):
        draws = importance(*args, **kwargs)
        gains.append(float(draws.log_weight.mean()))
        return draws

    monkeypatch.setattr(module, "importance", remember)
    target, guide, start = problem
    fitted = fit(target, guide, [""], max_steps=60, learning_rate=0.02)
    assert len(gains) == 5, "the prior; the last guide, the best earlier one and the start; the one kept, again"
    assert fitted.kept in ("last", "best") and fitted.gain == pytest.approx(gains[4] - gains[0])


@pytest.mark.slow
def test_standard_error_of_the_elbo_with_few_particles(problem):
    """Within prompts, of which there may be many: two particles of eight prompts have 8 degrees of freedom, not 15."""
    target, guide, start = problem
    elbo, batch = SequenceELBO(2), guide.lm.prompts([""] * 8)
    with torch.no_grad():
        guide.lm.model.table[:, 0] += 1.0
    gain = Gain(target, guide, batch, reverse_kl, 1)
    rows = [guide_metrics(elbo.particles(target, guide, batch), gain, torch.arange(8)) for _ in range(400)]
    se = math.sqrt(sum(row["elbo_se"] ** 2 for row in rows) / 400)
    assert se == pytest.approx(float(torch.tensor([row["elbo"] for row in rows]).std()), rel=0.15)


def test_short_fits_find_their_learning_rate_too(problem):
    """Twenty steps, or a network so slow that no more fit into the time: the warm-up then is a tenth of them."""
    target, guide, start = problem
    fitted = fit(target, guide, [""], max_steps=20)
    rates = [row["learning_rate"] for row in fitted.metrics]
    assert rates[0] < 1e-4 < rates[5]


def test_a_late_fault_restores_the_best_and_is_raised(problem):
    _, _, start = problem
    lm, calls, faults = start.lm, [], []

    def breaks(completions, **_):
        calls.append(1)
        return [math.nan if len(calls) > last else float(len(t)) for t in completions]

    target = bind(tilted, lm, reward=breaks)
    for last in (10, 40):  # before and after the first guide that counts as better
        guide = bind(finetuned, lm.copy())
        calls.clear()
        with pytest.raises(ValueError, match="nan"):
            fit(target, guide, [""], max_steps=100, learning_rate=0.01, on_fault=faults.append)
        assert torch.equal(guide.lm.model.table, lm.model.table) == (last == 10)
    assert faults == ["start", "best"]


def test_a_guide_that_cannot_be_saved_does_not_hide_the_fault(problem):
    _, _, start = problem
    calls = []

    def breaks(completions, **_):
        calls.append(1)
        return [math.nan if len(calls) > 4 else 1.0] * len(completions)

    def full(kept):
        raise OSError("the disk is full")

    with pytest.raises(ValueError, match="nan") as raised:
        fit(bind(tilted, start.lm, reward=breaks), bind(finetuned, start.lm.copy()), [""], max_steps=9, on_fault=full)
    assert "the disk is full" in raised.value.__notes__[0]


def test_at_least_one_step_is_made(problem):
    target, guide, _ = problem
    assert fit(target, guide, [""], SequenceELBO(8), time_limit=1e-6).steps == 1


def test_rewards_that_are_all_equal_leave_the_prior_alone(problem):
    _, _, start = problem
    lm = start.lm
    target, guide = (
        bind(tilted, lm, reward=lambda completions, **_: [0.7] * len(completions)),
        bind(finetuned, lm.copy()),
    )
    fit(target, guide, [""], max_steps=30, learning_rate=1.0)
    torch.testing.assert_close(guide.lm.model.table, lm.model.table, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"max_steps": None}, "max_steps= or time_limit="),
        ({"time_limit": -1.0}, "time_limit=-1.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"loss": pyro.infer.Trace_ELBO()}, "give a SequenceELBO"),
        ({"loss": SequenceELBO}, "give a SequenceELBO"),
    ],
)
def test_bad_arguments(problem, change, message, unchecked):
    target, guide, start = problem
    with pytest.raises(ValueError, match=message):
        fit(target, guide, [""], **{"max_steps": 3, "loss": SequenceELBO(4), **change})


def test_parameters_of_the_programs_are_trained_too(problem):
    """`pyro.param` inside a program, beside the networks."""
    _, _, start = problem

    def mine(prompts, prior, reward):
        scale = pyro.param("scale", torch.tensor(0.1, dtype=torch.float64))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("x", prior(prompts))
            good = torch.sigmoid(scale + reward(prompts, x))
            pyro.sample("good", pyro.distributions.Bernoulli(good), obs=torch.ones(good.shape, dtype=torch.float64))

    target, guide = bind(mine, start.lm, reward=letters), bind(finetuned, start.lm.copy())
    fit(target, guide, [""], max_steps=30, learning_rate=0.05, seed=0)
    assert float(pyro.param("scale").detach()) > 0.3


def test_the_seed_is_the_users():
    """Without seed= the global state decides, as `pyro.set_rng_seed` expects."""
    ends = []
    for seed in (1, 2, 1):
        lm = table_lm(3, 2, concentration=1.0)
        guide = bind(finetuned, lm.copy())
        pyro.set_rng_seed(seed)
        fit(bind(tilted, lm, reward=letters), guide, [""], max_steps=3, learning_rate=0.05)
        ends.append(guide.lm.model.table.detach().clone())
    assert torch.equal(ends[0], ends[2]) and not torch.equal(ends[0], ends[1])


@pytest.mark.parametrize(("loss", "count"), [(None, 128), (SequenceELBO(5), 5)])
def test_the_loss_says_how_many_texts_a_step_draws(problem, loss, count):
    """As in Pyro's SVI, the loss comes fourth; a fit that made its own from other settings would draw another number."""
    _, _, start = problem
    asked = []

    def reward(completions, **_):
        asked.append(len(completions))
        return letters(completions)

    fit(bind(tilted, start.lm, reward=reward), bind(finetuned, start.lm.copy()), ["", "a"], loss, max_steps=2)
    assert asked.count(2 * count) == 2
