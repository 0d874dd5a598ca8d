"""Time is kept: what a limit bounds, what is forecast before, and what is said of it."""

import json
import math
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pyro
import pytest
import tiny
import torch
from rich.console import Console
from typer.testing import CliRunner

import ppl_lm
from ppl_lm.cli.app import app
from ppl_lm.criticism.diagnoses.diagnosis import least_draws
from ppl_lm.criticism.diagnoses.verdicts import Verdict
from ppl_lm.guides import finetuned
from ppl_lm.guides import prior as prior_program
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.in_pieces import pieces, texts_a_piece
from ppl_lm.lm import meter
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted
from ppl_lm.report.progress import ProgressBar
from ppl_lm.run.fitting import advice, forecast
from ppl_lm.run.fitting.best_guide import WINDOW
from ppl_lm.run.fitting.forecast import Speed, pilot, plan
from ppl_lm.run.fitting.gain import Gain
from ppl_lm.run.fitting.loop import Fit, fit
from ppl_lm.run.outcome import in_words, verdict_after
from ppl_lm.run.settings import Settings

runner = CliRunner()


class Clock:
    """One that goes on by what a draw takes."""

    def __init__(self, each):
        self.now, self.each = 0.0, each

    def __call__(self):
        return self.now

    def spend(self, sizes):
        for n in sizes:
            self.now += n * self.each
            yield n


def slow(seconds, calls=None):
    """A reward that takes so long a text."""

    def reward(completions):
        if calls is not None:
            calls.append(len(completions))
        time.sleep(seconds * len(completions))
        return [text.count("a") / 4 for text in completions]

    reward.r_max = 1.0
    return reward


def bind_prior(lm):
    return ppl_lm.bind(prior_program, lm)


def problem(reward):
    lm = table_lm(4, 4, max_prompt=2, concentration=1.0, seed=1)
    return ppl_lm.bind(tilted, lm, reward=reward, beta=0.5), ppl_lm.bind(finetuned, lm.copy())


# ----- draws in pieces -----


@pytest.mark.parametrize("each", [0.001, 0.02, 0.3, 5.0])
def test_pieces_end_in_time_and_are_never_too_few(each):
    clock = Clock(each)
    sizes = list(clock.spend(pieces(1000, 64, least=8, seconds=10.0, clock=clock)))
    assert sum(sizes) <= 1000 and max(sizes) <= 64 and sizes[0] == 8
    assert clock.now <= max(10.0, 8 * each) + 1e-9, "the last piece ends before the time is up"
    if each == 0.02:
        assert sum(sizes) >= 0.9 * 10.0 / each, "and it is used"
    assert min(sizes) >= 2, "importance draws no single one"


def test_without_a_limit_pieces_are_all_draws_and_tell_how_far_they_are():
    told = []
    assert list(pieces(10, 4, on_progress=lambda done, words: told.append(done))) == [4, 4, 2]
    assert told == [0.4, 0.8, 1.0]


def test_pieces_of_a_large_network_are_small_and_the_same_on_any_day(monkeypatch):
    target, guide = problem(slow(0))
    prompts = guide.lm.prompts(["a", "b"])
    whole = texts_a_piece(prompts, target, guide)
    assert whole == 2048
    monkeypatch.setattr("ppl_lm.infer.samplers.in_pieces.WORK", 2**16)
    assert 2 <= texts_a_piece(prompts, target, guide) < 100
    told = []
    draws = ppl_lm.importance(target, guide, prompts, num_samples=200, on_progress=lambda *a: told.append(a))
    assert draws.num_samples == 200 and len(told) > 2 and told[-1][0] == 1.0


def test_samplers_say_how_far_they_are():
    """Rejection tells its acceptance rate, which is that of its proposals."""
    target, _ = problem(slow(0))
    told = []
    draws = ppl_lm.rejection(target, None, ["a"], num_samples=40, on_progress=lambda *a: told.append(a))
    rate = 100 * float((draws.proposals.log_weight > -math.inf).sum()) and told[-1][1]
    accepted = re.match(r"([\d.]+)% of (\d+) proposals of each prompt accepted", rate)
    assert accepted and int(accepted[2]) == draws.proposals.num_samples and told[-1][0] == 1.0
    exact = float((draws.proposals.log_weight - 2.0).exp().mean())  # r_max / beta is 2
    assert abs(float(accepted[1]) / 100 - exact) < 5 * (exact * (1 - exact) / draws.proposals.num_samples) ** 0.5
    for sampler, options in ((ppl_lm.mcmc, {"warmup": 3, "num_chains": 2}), (ppl_lm.smc, {"num_runs": 3})):
        told.clear()
        sampler(target, None, ["a"], num_samples=4, on_progress=lambda *a: told.append(a), **options)
        assert told[-1][0] == 1.0 and all(0 < done <= 1 and words for done, words in told)


# ----- the fit -----


def test_a_fit_ends_in_time_whatever_a_text_costs():
    """The 1,024 draws of the prior alone that are made without a limit would take ten seconds."""
    calls: list[int] = []
    target, guide = problem(slow(0.01, calls))
    ppl_lm.importance(target, guide, ["a"], num_samples=2)  # pays for what is done once
    began, seen = time.monotonic(), []
    fitted = fit(target, guide, ["a", "b"], SequenceELBO(4), time_limit=4.0, on_prior=seen.append)
    assert time.monotonic() - began < 1.2 * 4.0
    assert fitted.steps >= 2 and calls and max(calls) <= 64
    assert seen[0].log_guide.shape[-1] == 2 and seen[0].num_samples < 64


def test_with_many_prompts_the_gain_is_measured_on_some():
    """And its mean over steps is still right: of prompts that were not measured it takes the mean of the others."""
    target, guide = problem(slow(0.004))
    batch = guide.lm.prompts(["a", "b", "c", "a b"] * 60)
    gain = Gain(target, guide, batch, SequenceELBO(2).objective, 1, seconds=0.3)
    assert 8 <= len(gain.rows) < 240 and gain.prior.log_guide.shape[-1] == len(gain.rows)
    assert gain._before(gain.rows).tolist() == gain.before.tolist()
    others = torch.tensor(sorted(set(range(240)) - set(gain.rows.tolist())))
    assert torch.allclose(gain._before(others), gain.before.mean())
    value, se = gain.measure(0.2)
    assert abs(value) < 5 * se, "an untouched copy has gained nothing"


def test_the_gains_error_is_that_of_independent_prompts():
    """Pooled over prompts: with two draws of each it is as good as with many of one."""
    target, guide = problem(slow(0))
    batch = guide.lm.prompts(["a", "b", "c", "a b"] * 4)
    objective = SequenceELBO(2).objective
    values, errors = [], []
    for _ in range(60):
        gain = Gain(target, guide, batch, objective, 1)
        few = gain.prior.log_weight.flatten(0, 1)[:2]
        values.append(float(few.mean()))
        errors.append(float((few.var(0).sum() / 2).sqrt()) / 16)
    spread = float(torch.tensor(values).std())
    assert 0.7 * spread < sum(errors) / 60 < 1.4 * spread


# ----- the forecast -----


def test_the_pilot_finds_what_a_text_costs():
    target, guide = problem(slow(0.01))
    state = torch.get_rng_state()
    speed = pilot(target, guide, guide.lm.prompts(["a", "b"]), SequenceELBO, 16, 2)
    assert 0.3 < speed.draw(32) < 1.5 and speed.draw(32) <= speed.step(32) < 3.0, "32 texts of 10 ms"
    assert torch.equal(torch.get_rng_state(), state) and guide.lm.model.table.grad is None


@pytest.fixture
def tokens_as_seconds(monkeypatch):
    """A clock that goes on by a second with each token that a network is given."""
    with meter.measure() as cost:
        monkeypatch.setattr(forecast, "time", SimpleNamespace(monotonic=lambda: float(cost.lm_tokens)))
        yield


@pytest.mark.parametrize("prompts", [["a dog"], ["a dog", "the soup", "she said", "it"]])
def test_a_slow_network_is_timed_by_short_texts(tokens_as_seconds, prompts, monkeypatch):
    """What a whole text costs is told from a few tokens of it, exactly where each token costs the same."""
    lm = LanguageModel(tiny.network("gpt2"), tiny.bpe(), 32, end_ids=[4])
    target = ppl_lm.bind(tilted, lm, reward=lambda completions: [0.0] * len(completions), beta=9.0)
    guide = ppl_lm.bind(finetuned, lm.copy())
    monkeypatch.setattr(forecast, "PILOT", 500.0)  # tokens
    pilots = forecast._Pilot(target, guide, lm.prompts(prompts), SequenceELBO, 8, 64)
    found = pilots.of_short_texts()
    assert found is not None and lm.max_new_tokens == guide.lm.max_new_tokens == 32
    ((count, drawing),), ((same, training),) = found
    whole, drawn, train = pilots.draw(16)
    assert count == same == whole == 16
    assert drawing == pytest.approx(drawn, rel=0.15) and training == pytest.approx(train(), rel=0.15)


def test_a_pilot_of_long_prompts_stays_with_few_texts(tokens_as_seconds, monkeypatch):
    """Where two texts alone take long, sixteen of four prompts would take eight times that."""
    lm = LanguageModel(tiny.network("gpt2"), tiny.bpe(), 32, end_ids=[4])
    target = ppl_lm.bind(tilted, lm, reward=lambda completions: [0.0] * len(completions), beta=9.0)
    pilots = forecast._Pilot(target, ppl_lm.bind(finetuned, lm.copy()), lm.prompts(["a dog"] * 4), SequenceELBO, 8, 64)
    began = forecast.time.monotonic()
    ((count, _),), _ = pilots.of_short_texts()
    many = forecast.time.monotonic() - began
    monkeypatch.setattr(forecast, "PILOT", 1e6)
    assert count == 2
    began = forecast.time.monotonic()
    assert pilots.of_short_texts() is None and forecast.time.monotonic() - began > 2 * many


def test_what_asks_for_whole_texts_is_timed_by_them(tokens_as_seconds):
    lm = LanguageModel(tiny.network("gpt2"), tiny.bpe(), 32, end_ids=[4])

    def whole(prompts, prior):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("x", prior(prompts))
            assert x.shape[-1] == 32
            return x

    pilots = forecast._Pilot(
        ppl_lm.bind(whole, lm), ppl_lm.bind(finetuned, lm.copy()), lm.prompts(["it"]), SequenceELBO, 8, 8
    )
    assert pilots.of_short_texts() is None and lm.max_new_tokens == 32
    assert pilots.of_whole_texts()[0]


def test_a_limit_is_shared_out():
    """Measuring gets what it needs up to a fifth, more where the least number of draws needs it, and the fit all else."""
    fast = plan(Speed((0.0, 1e-4), (0.0, 1e-4), 64), 100.0, 128, 1, 1, 4096)
    assert fast.num_samples == 4096 and fast.measuring < 1.0 and fast.fitting > 99 and fast.particles == 128
    slower = plan(Speed((0.0, 0.02), (0.0, 0.02), 64), 100.0, 8, 16, 20, 819)
    assert slower.measuring == pytest.approx(20.0) and slower.measured == 20
    slow_one = plan(Speed((0.0, 0.15), (0.0, 0.4), 64), 100.0, 8, 16, 20, 819)
    least = 2 * 4 * 20 * 0.15
    assert slow_one.measuring >= least > 20 and slow_one.measuring <= 50 and slow_one.least == 4
    many = plan(Speed((0.0, 0.05), (0.0, 0.4), 64), 100.0, 8, 16, 500, 512)
    assert 16 <= many.measured < 500 and many.measuring <= 50
    lost = plan(Speed((0.0, 1.0), (0.0, 1.0), 64), 60.0, 8, 16, 20, 819)
    assert lost.num_samples is None
    together = plan(Speed((0.0, 0.05), (0.0, 0.4), 64, is_local=False), 1000.0, 8, 16, 20, 512, (True, True))
    assert together.measured == 20 and together.least == 100 and together.batch_size == 16


def test_a_step_gets_fewer_texts_where_that_makes_more_steps():
    speed = Speed((0.0, 0.1), (0.0, 0.3), 64)
    free = plan(speed, 600.0, 8, 16, 20, 819, (True, True))
    assert (free.particles, free.batch_size) == (4, 8) or free.particles * free.batch_size == 16
    assert free.steps > 2 * plan(speed, 600.0, 8, 16, 20, 819).steps
    kept = plan(speed, 600.0, 8, 16, 20, 819, (False, False))
    assert (kept.particles, kept.batch_size) == (8, 16)
    half_fixed = Speed((3.2, 0.11), (0.0, 0.12), 64)  # as SmolLM2 on two cores: 16 texts 6.9 s, 32 10.6 s
    many = plan(half_fixed, 600.0, 8, 16, 20, 819, (True, True))
    assert many.particles * many.batch_size == 32, "half of the texts take 0.65 of the time"
    for prompts, particles in ((5, 25), (20, 8)):
        few = plan(half_fixed, 90.0, particles, min(16, prompts), prompts, 819, (True, True))
        assert few.particles * few.batch_size <= 20, "where so few steps fit any that are more help"
    overhead = Speed((0.9, 1e-3), (0.0, 1e-3), 1000)  # no faster with fewer
    assert plan(overhead, 60.0, 128, 1, 1, 4096, (True, True)).particles == 128


def test_what_the_limit_does_not_allow_is_said_before_with_what_would():
    speed = Speed((0.0, 0.1), (0.0, 0.3), 64)
    few = plan(speed, 90.0, 8, 16, 20, 819)
    (line, *_) = advice.warnings(few, 90.0, 20)
    assert "too few for a sensible fit" in line and "a smaller --batch-size" in line
    wanted = float(re.search(r"--time-limit (\d+)", line)[1])
    assert plan(speed, wanted, 8, 16, 20, 819).steps > 0.9 * forecast.WISHED, "what is advised is enough"
    with pytest.raises(ValueError, match="time_limit=5 s allows not one step of 128 texts"):
        advice.warnings(plan(speed, 5.0, 8, 16, 20, 819), 5.0, 20)
    assert advice.warnings(plan(Speed((0.0, 1e-4), (0.0, 1e-4), 64), 100.0, 8, 16, 20, 819), 100.0, 20) == []


@pytest.mark.parametrize(("beta", "needed"), [(5.0, False), (0.1, True)])
def test_no_fit_is_needed_where_the_priors_draws_are_worth_most(beta, needed):
    lm = table_lm(4, 4, max_prompt=2, concentration=1.0, seed=1)
    target = ppl_lm.bind(tilted, lm, reward=slow(0), beta=beta)
    draws = ppl_lm.importance(target, None, ["a", "b"], num_samples=100)
    said = advice.no_fit_needed(draws, Settings(model="tilted", beta=beta, lm="some lm", prompts=["a", "b"]))
    assert (not said) == needed
    if not needed:
        exact = ppl_lm.enumerate_posterior(target, None, ["a", "b"])
        log_p, prior = exact.log_posterior.detach(), enumerate_posterior(bind_prior(lm), None, ["a", "b"]).log_posterior
        truth = float((1 / (2 * log_p - prior.detach()).exp().sum(0)).mean())
        share, se = advice.worth_of_prior(draws)
        assert abs(share - truth) < 5 * se + 0.02
        assert "ppl-lm sample tilted" in said and f"--beta {beta:g}" in said and "--lm 'some lm'" in said
    few = draws.map(lambda v: v[:, :8])
    assert advice.no_fit_needed(few, Settings(model="tilted")) == "", "of 8 draws the share is never small"


# ----- the advice after a fit -----


@pytest.mark.parametrize("code", ["worse_than_prior", "collapsed"])
def test_after_a_handful_of_steps_nothing_is_said_of_learning_rates(code):
    judged = Verdict(code, "It is off.", "Lower the learning rate, raise the particles.")
    for outcome in ("finished", "worse_than_prior", "diverged"):
        for steps in (1, WINDOW - 1, WINDOW, 300):
            fitted = Fit(outcome, "start", 0, steps, 9.0, 0.0, 0.05, -4.0, 0.1)
            said = f"{in_words(fitted)} {verdict_after(fitted, judged).remedy}"
            assert ("learning" in said) == (steps >= WINDOW), said
    good = Verdict("good", "It is near.", "Use its draws as they are.")
    assert verdict_after(Fit("finished", "last", 1, 1, 9.0, 0.0, 0.05, 0.1, 0.1), good) is good


# ----- the command -----


@pytest.fixture
def reward_file(tmp_path):
    (tmp_path / "r.py").write_text(
        "import time\n"
        "def slow(completions, **_):\n"
        "    time.sleep(0.005 * len(completions))\n"
        "    return [min(1.0, len(c.split()) / 20) for c in completions]\n"
        "slow.r_max = 1.0\n"
    )
    return f"{tmp_path}/r.py:slow"


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [1, 20])
def test_the_whole_command_ends_in_time(tmp_path, reward_file, prompts):
    """Once it drew 1,024 texts of the prior before the first step, and 16,384 after the last: here 5 and 160 seconds."""
    (tmp_path / "p.txt").write_text("".join(f"The soup number {i} was\n" for i in range(prompts)))
    stamps, say = [], ProgressBar.say

    def stamped(self, line):
        stamps.append((time.monotonic(), line))
        say(self, line)

    limit, out = 20.0, tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressBar, "say", stamped)
        words = [
            "fit",
            "tilted",
            "--reward",
            reward_file,
            "--prompts",
            str(tmp_path / "p.txt"),
            "--max-new-tokens",
            "8",
        ]
        result = runner.invoke(app, [*words, "--time-limit", f"{limit:g}", "--output-dir", str(out)])
        ended = time.monotonic()
    assert result.exit_code == 0, result.output
    (forecast_at, line) = next(s for s in stamps if "steps fit into the limit" in s[1])
    assert ended - (forecast_at - 6.0) < 1.2 * limit + 6.0  # the pilot itself takes 6 s at most
    assert re.search(r"a step of \d+ texts .* takes about [\d.]+ s: \d+ steps fit into the limit of 20 s", line)
    made = json.loads((out / "diagnosis.json").read_text())
    assert least_draws(prompts) <= made["num_samples"] < 1000


def test_the_verdict_is_of_held_out_prompts(tmp_path):
    """Measured on them, recorded, and read back: by report, by diagnose, and by compare as another posterior."""
    (tmp_path / "p.txt").write_text("The soup was\nMy new phone\n")
    (tmp_path / "h.jsonl").write_text('{"prompt": "The bread was"}\n{"prompt": "She said"}\n{"prompt": "A dog"}\n')
    out = tmp_path / "run"
    words = ["fit", "tilted", "--max-steps", "2", "--particles", "4", "--max-new-tokens", "6", "--num-samples", "100"]
    files = [
        "--prompts",
        str(tmp_path / "p.txt"),
        "--eval-prompts",
        str(tmp_path / "h.jsonl"),
        "--output-dir",
        str(out),
    ]
    result = runner.invoke(app, [*words, *files])
    assert result.exit_code == 0, result.output
    made = json.loads((out / "diagnosis.json").read_text())
    held = ["The bread was", "She said", "A dog"]
    assert [one["prompt"] for one in made["prompts"]] == held
    assert "3 held-out prompts, none of which it was fitted on" in made["sentence"]
    run = ppl_lm.run.read(out)
    assert run.draws.prompts.texts == held and run.posterior.prompts == held
    assert run.settings.prompts == ["The soup was", "My new phone"]
    again = runner.invoke(app, ["diagnose", str(out), "--num-samples", "100", "--json"])
    assert [one["prompt"] for one in json.loads(again.stdout)["prompts"]] == held
    other = runner.invoke(
        app, ["diagnose", str(out), "--num-samples", "100", "--prompts", str(tmp_path / "p.txt"), "--json"]
    )
    assert len(json.loads(other.stdout)["prompts"]) == 2 and "held-out" not in other.stdout
    drawn = runner.invoke(app, ["sample", str(out), "--num-samples", "2", "--json"])
    assert {json.loads(row)["prompt"] for row in drawn.stdout.splitlines()} == {"The soup was", "My new phone"}
    page = runner.invoke(app, ["report", str(out)])
    assert page.exit_code == 0 and "held-out" in (out / "report.html").read_text()
    empty = tmp_path / "none.txt"
    refused = runner.invoke(
        app, [*words, *files[:2], "--eval-prompts", str(empty), "--output-dir", str(tmp_path / "b")]
    )
    assert refused.exit_code == 2 and not (tmp_path / "b").exists()


def test_what_the_figures_are_of():
    settings = Settings(model="tilted", prompts=["a", "b", "c"])
    assert settings.measured_words == "" and settings.measured == (["a", "b", "c"], {})
    some = replace(settings, columns={"word": [1, 2, 3]}).measured_on([0, 2])
    assert some.measured == (["a", "c"], {"word": [1, 3]})
    assert some.measured_words == "2 of the 3 prompts that it was fitted on"
    assert replace(settings, eval_prompts=["a", "x"]).measured_words == "2 prompts, 1 of which it was fitted on"


# ----- progress -----


def test_lines_in_a_pipe_begin_at_once(monkeypatch, capsys):
    console, now = Console(width=100, force_terminal=False), [0.0]
    monkeypatch.setattr("ppl_lm.report.progress.time.monotonic", lambda: now[0])
    with ProgressBar("drawing [b]texts[/b]", console) as progress:
        assert capsys.readouterr().out == "drawing [b]texts[/b]\n"
        for now[0] in (1.0, 9.0, 11.0, 12.0, 22.0):
            progress(now[0] / 44, f"at {now[0]:g}")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["at 11", "at 22"]
    assert lines[0].endswith("33 s left") and "GiB" in lines[0]


def test_a_notebook_gets_a_bar_that_changes(monkeypatch):
    """Without widgets, in one cell output."""
    IPython = pytest.importorskip("IPython.display")
    shown = []

    class Handle:
        def update(self, content):
            shown.append(content.data)

    monkeypatch.setattr(IPython, "display", lambda content, display_id: shown.append(content.data) or Handle())
    monkeypatch.setattr("ppl_lm.report.progress.OFTEN", 0.0)
    console = Console(force_jupyter=True)
    monkeypatch.setattr(console, "print", lambda *a, **k: None)
    with ProgressBar("drawing", console) as progress:
        progress(0.25, "a <b> quarter")
        progress(1.0, "all")
    assert 'value="0.250"' in shown[0] and "a &lt;b&gt; quarter" in shown[0] and 'value="1.000"' in shown[1]


def test_pieces_that_have_no_time_left_come_to_an_end():
    told = []
    assert sum(pieces(100, 3, 4, 0.0, on_progress=lambda share, words: told.append(share))) == 4
    assert told == [1.0] * len(told) and told
