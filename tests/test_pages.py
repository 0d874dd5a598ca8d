"""The pages that `ppl-lm report` and `ppl-lm compare` write: what is on them, that untrusted text stays text, and how they look
in a browser.

The browser is a Chromium that the system has; without one its tests are skipped. Pictures of the pages are left in
runs/screenshots.

Mutants that are rejected: `autoescape=False`; prompts or sources that are not passed through `shown` or `lines`; a picture by
its address instead of its data; the policy left out (the script that a hostile completion brings runs then).
"""

import html
import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ppl_lm.cli.app import app
from ppl_lm.criticism.diagnoses.draws_verdicts import CODES_OF_DRAWS
from ppl_lm.criticism.diagnoses.verdicts import CODES
from ppl_lm.report.leaderboard_page import boards, fit_rows, leaderboard
from ppl_lm.report.page import lines, pm, shown
from ppl_lm.report.run_page import DRAWS_LABELS, GUIDE_LABELS, bars, formula, report
from ppl_lm.run.config import FORMAT
from ppl_lm.run.files import finite
from ppl_lm.run.read_run import read
from ppl_lm.run.typed_diagnosis import DrawsDiagnosis, GuideDiagnosis

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCRIPT = "<script>document.title='run'</script><img src=http://127.0.0.1:9/x onerror=\"document.title='run'\">"
OVERRIDE = "\u202eecalpmi\u202c"
QUICK = ["--max-steps", "3", "--particles", "8", "--num-samples", "128", "--max-new-tokens", "8"]
pytestmark = pytest.mark.xdist_group("pages")  # which read the same runs


def call(*args):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run whose prompt, reward's source and file name are hostile, and some of whose texts are made so."""
    folder = tmp_path_factory.mktemp("<b>&amp;")
    (folder / "mine.py").write_text(
        f"def reward(completions, **_):\n    # {SCRIPT} {OVERRIDE}\n    return [float('good' in c) for c in completions]\n\n\n"
        "reward.r_max = 1.0\n"
    )
    (folder / "prompts.txt").write_text(f"The soup was {SCRIPT}\nThe {OVERRIDE} soup\n")
    run = folder / "run"
    call("fit", "tilted", *QUICK, "--reward", f"{folder}/mine.py:reward", "--prompts", folder / "prompts.txt",
         "--output-dir", run)  # fmt: skip
    texts = json.loads((run / "samples.json").read_text())
    texts[0]["guide"][0]["tokens"][:2] = [SCRIPT, OVERRIDE]
    (run / "samples.json").write_text(json.dumps(texts))
    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run with one prompt, a sampler's draws beside it and another measurement in its folder."""
    folder = tmp_path_factory.mktemp("runs")
    run, draws = folder / "plain", folder / "draws"
    call("fit", "tilted", *QUICK, "--output-dir", run)
    (folder / "held.txt").write_text("The soup was\n")
    call("diagnose", run, "--prompts", folder / "held.txt", "--num-samples", 200)
    call("sample", run, "--num-samples", 128)
    call("sample", "tilted", "--sampler", "smc", "--max-new-tokens", 8, "--num-samples", 128, "--output-dir", draws)
    return run, draws


class Page(HTMLParser):
    """Elements, what they would fetch, and the text that a reader sees."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.seen: list[str] = []
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster") and v]
        assert not [k for k, _ in attrs if k.startswith("on")], "an element has a handler"
        if tag in ("meta", "img", "br"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], []):
            self.seen.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.seen).split())


def test_the_page_of_a_fit_has_every_part(plain):
    run = read(plain[0])
    page = Page(report(run))
    assert not page.open and "script" not in page.tags
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert page.tags.count("img") >= 6, "graph, tree, training, evidence, frontier, tail"
    diagnosis = run.diagnosis
    verdict, average = diagnosis.verdict, diagnosis.average
    assert page.text.index(GUIDE_LABELS[verdict.code]) < page.text.index("What was asked"), "the verdict comes first"
    for said in (
        *(verdict.sentence, verdict.remedy, pm(average.kl_q_p, average.kl_q_p_se), pm(average.ess, average.ess_se)),
        *("p(x | prompt, O=1) ∝ prior(x | prompt) · exp(reward(prompt, x) / beta)", "def tilted(", "def vader("),
        *(
            "ppl-lm fit tilted --max-new-tokens 8 --max-steps 3",
            run.config.versions["torch"],
            run.hashes["prior_sha256"],
            "Seed 0",
        ),
        *("distinct-2", "self-BLEU", "held", "importance", f"{average.lm_tokens:,} LM tokens"),
    ):
        assert " ".join(said.split()) in page.text, said
    for law in ("prior", "guide", "posterior"):
        for text in run.texts[0][law]:
            assert "".join(text["tokens"]).split()[0] in page.text
            assert text["gains"] is not None and len(text["gains"]) == len(text["tokens"])


def test_a_run_is_read_back_whole(plain):
    """Every key of diagnosis.json, of prompts and other diagnoses too, and every setting: none is lost, none made up."""
    for folder in plain:
        run = read(folder)
        assert finite(run.diagnosis.as_json()) == json.loads((folder / "diagnosis.json").read_text())
        for name, other in run.others.items():
            assert finite(other.as_json()) == json.loads((folder / f"diagnosis_{name}.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        assert finite(run.config.as_json()) == config and config["format"] == FORMAT
    assert {type(other) for other in read(plain[0]).others.values()} == {GuideDiagnosis, DrawsDiagnosis}


def test_heat_is_the_gain_of_each_token(plain):
    """The colour's number is log q - log p0 of that token over 2 nats, from -1 to 1."""
    run = read(plain[0])
    text = run.texts[0]["guide"][0]
    text["gains"][:3] = [1.0, -3.0, 0.0]
    spans = re.findall(r'<span class="token (\w+)" dir="auto" style="--v:(-?[\d.]+)"', report(run))
    assert ("up", "0.500") in spans and ("down", "-1.000") in spans and ("zero", "0.000") in spans


def test_untrusted_text_stays_text(hostile):
    """Of prompts, completions, sources and paths: no element of theirs, and no character that turns text around."""
    source = report(read(hostile))
    page = Page(source)
    assert "script" not in page.tags and page.tags.count("b") == 0
    assert "127.0.0.1" not in "".join(page.links) and html.escape(SCRIPT) in source
    assert "\u202e" not in source and "⟨U+202E⟩ecalpmi⟨U+202C⟩" in page.text
    assert "return [float('good' in c) for c in completions]" in page.text
    board = leaderboard([read(hostile)] * 2)
    assert "script" not in Page(board).tags and "\u202e" not in board


def test_a_page_says_what_cannot_be_drawn(hostile):
    """The guide's draws are enough for the tail; there are too few exact ones for ranks."""
    run = read(hostile)
    run = replace(run, prior=replace(run.prior, stats={"log_q": run.prior.stats["log_q"]}))  # as without a bound
    page = Page(report(run))
    assert "Not drawn: there are too few exact posterior draws to rank" in page.text
    assert "draws of prior and guide, weighted" in page.text


def test_a_page_of_draws_without_a_fit(plain):
    run = read(plain[1])
    page = Page(report(run))
    assert DRAWS_LABELS[run.diagnosis.verdict.code] in page.text and "What are these draws worth?" in page.text
    assert "log weight" in page.text and "bulk ESS" not in page.text and page.tags.count("img") >= 1


def changed(run, code=None, **figures):
    """The run with another verdict, or other figures on average."""
    diagnosis = run.diagnosis
    diagnosis = replace(diagnosis, average=replace(diagnosis.average, **figures))
    return replace(
        run, diagnosis=replace(diagnosis, verdict=replace(diagnosis.verdict, code=code or diagnosis.verdict.code))
    )


def test_figures_that_rest_on_too_little_say_so(plain):
    fitted, draws = read(plain[0]), read(plain[1])
    assert "The prior's draws are worth 3 of the posterior's" in Page(report(changed(fitted, "unknown", seen=3.2))).text
    page = Page(report(changed(draws, "unreliable", khat=None))).text
    assert "These draws are not to be relied on" in page and "k-hat is fine below" not in page
    for sound in (changed(fitted, "good", seen=500.0), changed(draws, "good")):
        page = Page(report(sound)).text
        assert "The prior's draws are worth" not in page and "These draws are not" not in page


def test_runs_of_one_posterior_stand_together_closest_first(plain, hostile):
    one, draws, other = read(plain[0]), read(plain[1]), read(hostile)
    distance = one.diagnosis.average.kl_q_p
    far, near = (
        replace(changed(one, kl_q_p=distance + 5.0), name="far"),
        replace(changed(one, kl_q_p=distance + 1e-4), name="near"),
    )
    grouped = boards([far, one, other, near, draws])
    assert [[run.name for run in board.fits] for board in grouped] == [["plain", "near", "far"], ["run"]]
    assert [[run.name for run in board.samples] for board in grouped] == [["draws"], []]
    first, second, third = fit_rows(grouped[0])
    assert first["behind"] == "closest" and "within error" in second["behind"] and "within" not in third["behind"]
    hotter = replace(one, config=replace(one.config, settings=replace(one.settings, beta=0.3)))
    assert len(boards([one, hotter])) == 2, "another β is another posterior"
    sources = replace(one.config.sources, reward="def other(): ...")
    edited = replace(one, config=replace(one.config, sources=sources))
    assert len(boards([one, edited])) == 2, "and so is a reward whose file was changed"
    page = Page(leaderboard([far, one, other, near, draws]))
    assert "These runs are of 2 posteriors" in page.text and page.text.index(" near ") < page.text.index(" far ")


def test_under_a_hard_constraint_the_other_kl_decides(tmp_path):
    """KL(guide ‖ posterior) is infinite there, which JSON has as null: the page says ∞, and runs are ranked by the other."""
    run = tmp_path / "run"
    call("fit", "constrained", *QUICK, "--reward", "contains:the", "--objective", "forward_kl", "--output-dir", run)
    fitted = read(run)
    diagnosis = fitted.diagnosis
    assert diagnosis.average.kl_q_p == math.inf == diagnosis.prompts[0].kl_prior_p
    assert finite(diagnosis.as_json()) == json.loads((run / "diagnosis.json").read_text()), "null for what is endless"
    page = Page(report(fitted))
    assert "KL(guide ‖ posterior) ∞" in page.text and "ELBO −∞" in page.text and "KL(posterior ‖ guide)" in page.text
    far = replace(changed(fitted, kl_p_q=diagnosis.average.kl_p_q + 1.0), name="far")
    (board,) = boards([far, fitted])
    assert board.hard and [row["name"] for row in fit_rows(board)] == ["run", "far"]
    assert fit_rows(board)[1]["behind"].startswith("1.0") and fit_rows(board)[0]["kl_q_p"] == "∞"


def test_the_commands_write_pages_and_refuse_what_is_no_run(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "report.html" in call("report", plain[0]) and (plain[0] / "report.html").is_file()
    table = call("compare", *plain, "--output", "board.html")
    assert "closest" in table and "plain" in table and Path("board.html").is_file()
    for command in ("report", "compare"):
        refused = CliRunner().invoke(app, [command, str(tmp_path)])
        assert refused.exit_code == 2 and "not a run folder" in refused.stderr
    bare = shutil.copytree(plain[0], tmp_path / "bare")
    (bare / "samples.json").unlink()
    refused = CliRunner().invoke(app, ["report", str(bare)])
    assert refused.exit_code == 2 and "ppl-lm diagnose" in refused.stderr


def test_a_fit_that_went_wrong_is_told_as_such_and_the_kept_guide_beside_it(tmp_path):
    run = tmp_path / "run"
    wrong = ["--max-steps", "26", "--particles", "8", "--num-samples", "256", "--max-new-tokens", "12"]
    result = CliRunner().invoke(app, ["fit", "tilted", *wrong, "--learning-rate", "0.3", "--output-dir", str(run)])
    assert result.exit_code == 1, result.output
    diagnosis = read(run).diagnosis
    assert diagnosis.verdict.code == "worse_than_prior" and "worse_than_prior:" not in diagnosis.verdict.sentence
    page = Page(report(read(run)))
    assert GUIDE_LABELS["worse_than_prior"] in page.text and "What to do. Lower --learning-rate" in page.text
    assert f"The guide that was kept is called {diagnosis.kept_verdict}" in page.text
    assert page.text.count("Lower --learning-rate") == 1


def test_the_draws_of_every_sampler_have_a_page_and_a_rank(tmp_path):
    """Best verdict first, whatever it cost; a reward in brackets is no markup of the terminal's."""
    runs = []
    for sampler in ("importance", "rejection", "independence_mh", "best_of_n"):
        runs.append(tmp_path / sampler)
        call("sample", "tilted", "--sampler", sampler, "--reward", "contains:[/b]", "--beta", 5, "--max-new-tokens", 4,
             "--num-samples", 200, "--output-dir", runs[-1])  # fmt: skip
    for run in map(read, runs):
        page = Page(report(run))
        assert f"drawn by {run.name}" in page.text and "no value" not in page.text
        texts = re.findall(r'<div class="heat">(.*?)</div>', report(run), re.S)
        assert len(texts) == 16 and len(set(texts)) > 4, "of all chains, not of the first alone"
        assert "+0.000 nats" not in report(run)
    (board,) = boards([read(run) for run in runs])
    order = [CODES_OF_DRAWS.index(run.diagnosis.verdict.code) for run in board.samples]
    assert board.samples[0].name == "rejection" and order == sorted(order)
    assert "contains:[/b]" in call("compare", *runs, "--output", tmp_path / "board.html")


MODELS = '''
import pyro, torch
from ppl_lm import Optimality

def other(prompts, prior, reward):
    """p(x) ∝ prior(x) · exp(-|x|/2)"""
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("x", prior(prompts))
        pyro.deterministic("reward", reward(prompts, x), event_dim=0)
        much = -0.5 * (x != 0).sum(-1).double()
        pyro.sample("o", Optimality(much), obs=torch.ones_like(much), infer={"log_bound": 0.0})
'''


def test_a_posterior_that_is_not_the_rewards_is_not_set_on_its_frontier(tmp_path):
    """And no temperature is said of a program that takes none."""
    (tmp_path / "mine.py").write_text(MODELS)
    run = tmp_path / "run"
    call("fit", f"{tmp_path}/mine.py:other", *QUICK, "--output-dir", run)
    page = Page(report(read(run)))
    assert "E[reward] of the guide" in page.text and "Reward against distance" not in page.text
    assert "β =" not in page.text and "p(x) ∝ prior(x) · exp(-|x|/2)" in page.text
    config = read(run).config
    cold = replace(read(run), config=replace(config, settings=replace(config.settings, beta=9.0)))
    assert len(boards([read(run), cold])) == 1, "a β that nothing takes makes no other posterior"


def test_a_damaged_or_foreign_folder_is_refused_in_a_line(plain, tmp_path):
    def refused(file, text, command="report"):
        bare = tmp_path / f"bare{len(list(tmp_path.iterdir()))}"
        shutil.copytree(plain[0], bare)
        if text is None:
            (shutil.rmtree if (bare / file).is_dir() else Path.unlink)(bare / file)
        else:
            (bare / file).write_text(text)
        result = CliRunner().invoke(app, [command, str(bare)])
        assert result.exit_code == 2 and result.stderr.startswith("ppl-lm: ") and not list(bare.glob(".*"))
        return result.stderr

    assert "metrics.jsonl" in refused("metrics.jsonl", '{"step": 0}\n{"ste') and "damaged" in refused("fit.json", "{")
    assert "no fitted guide" in " ".join(refused("guide", None).split())
    vocabulary = json.loads((plain[0] / "guide" / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    one, other = list(ids)[-2:]
    ids[one], ids[other] = ids[other], ids[one]
    assert "not that of the draws" in " ".join(refused("guide/tokenizer.json", json.dumps(vocabulary)).split())
    copy = shutil.copytree(plain[0], tmp_path / "notes")
    (copy / "diagnosis_notes.json").write_text('["mine"]')
    assert "written" in call("report", copy, "--output", tmp_path / "new" / "page.html")
    folder = CliRunner().invoke(app, ["report", str(copy), "--output", str(tmp_path)])
    assert folder.exit_code == 2 and "is a folder" in folder.stderr


def test_bars_of_distances_that_are_nothing(plain):
    """Of a reward that is always the same both are 0 but for rounding."""
    average, kls = read(plain[0]).diagnosis.average, ("kl_prior_p", "kl_q_p", "kl_p_prior", "kl_p_q")
    errors = {f"{key}_se": 0.0 for key in kls}
    zero = bars(replace(average, **dict.fromkeys(kls, -1e-9), **errors))
    assert [bar["width"] for bar in zero] == ["0.0", "0.0", "100.0"]
    hard = bars(replace(average, kl_prior_p=math.inf, kl_q_p=math.inf, kl_p_prior=2.0, kl_p_q=0.4, **errors))
    assert hard[-1]["value"].startswith("0.600"), "twice 15% of 2 nats, as the verdict has it"


def test_small_parts():
    assert set(GUIDE_LABELS) == set(CODES) and set(DRAWS_LABELS) == set(CODES_OF_DRAWS)
    assert pm(float("inf")) == "∞" and pm(float("-inf"), 0.1) == "−∞" and pm(-1.5, 0.25) == "−1.50 ± 0.25"
    assert pm(12_345.678, 120.0) == "12,346 ± 120" and pm(7, None) == "7" and pm(0.25, float("inf")) == "0.250"
    assert (
        shown("") == "(empty)"
        and shown([{"role": "user", "content": "Hi\nyou"}]) == "user: Hi↵you"
        and shown("a\x1b[31m") == "a⟨U+001B⟩[31m"
    )
    assert lines("a\n\n\tb\u202e") == "a\n\n    b⟨U+202E⟩"
    assert formula(None) == formula("lambda x: x") == formula("def f(: 1") == formula("def f():\n    pass") == ""


# in a browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium, which is not installed here (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def pages(plain, hostile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    made = {"report": report(read(plain[0])), "hostile": report(read(hostile)), "draws": report(read(plain[1]))}
    made["leaderboard"] = leaderboard([read(plain[0]), read(hostile), read(plain[1])])
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


SHOWN = list(itertools.product(["report", "hostile", "draws", "leaderboard"], [390, 1280], ["light", "dark"]))
OFTEN = [("report", 390, "dark"), ("hostile", 1280, "light"), ("draws", 390, "light"), ("leaderboard", 1280, "dark")]


@pytest.mark.parametrize(
    "name, width, scheme", [pytest.param(*s, marks=() if s in OFTEN else pytest.mark.slow) for s in SHOWN]
)
def test_in_a_browser(browser, pages, name, width, scheme):
    """No console error, no request but for the page itself, every picture drawn, no script run, nothing wider than the screen,
    and no fault that axe finds."""
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    address = (pages / f"{name}.html").as_uri()
    page.goto(address)
    title = page.title()
    page.wait_for_timeout(100)
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [address]
    drawn = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 100)")
    assert drawn and all(drawn)
    assert page.title() == title != "run"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    screenshots = ROOT / "runs" / "screenshots"
    screenshots.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(screenshots / f"{name}_{width}_{scheme}.png"), full_page=True)
    found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    assert not found, [(v["id"], v["nodes"][0]["html"][:200], v["nodes"][0]["failureSummary"]) for v in found]
    context.close()


def test_the_policy_stops_a_script_that_got_through(browser, pages):
    """Escaping is one wall; this is the other."""
    text = (pages / "report.html").read_text(encoding="utf-8")
    broken = pages / "broken.html"
    broken.write_text(text.replace("<main>", f"<main>{SCRIPT}"), encoding="utf-8")
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("requestfailed", lambda request: asked.remove(request.url) if "csp" in (request.failure or "") else None)
    page.goto(broken.as_uri())
    page.wait_for_timeout(200)
    assert page.title() != "run" and not [url for url in asked if url.startswith("http")]
    without = pages / "without.html"
    without.write_text(re.sub(r"<meta http-equiv[^>]*>", "", broken.read_text(encoding="utf-8")), encoding="utf-8")
    page.goto(without.as_uri())
    page.wait_for_timeout(200)
    assert page.title() == "run", "without the policy the script runs: this test can fail"
    page.close()
