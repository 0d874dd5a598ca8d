"""What the README and the site say is there: commands, options, names, keys, verdicts, files.

That their code runs is in `test_tutorials.py`; that their links among each other hold is `make docs`."""

import re
import shlex
import tomllib
import typing
from dataclasses import fields
from pathlib import Path

import click
import pytest
import typer

import ppl_lm
from ppl_lm.cli.app import app
from ppl_lm.criticism.diagnoses.draws_verdicts import CODES_OF_DRAWS
from ppl_lm.criticism.diagnoses.figures import DrawsFigures, GuideFigures
from ppl_lm.criticism.diagnoses.verdicts import CODES
from ppl_lm.experiments.__main__ import NAMES
from ppl_lm.run.fitting.loop import Fit
from ppl_lm.run.fitting.step_metrics import StepMetrics
from ppl_lm.run.named_samplers import SAMPLERS
from ppl_lm.run.names import OBJECTIVES, shipped
from ppl_lm.run.typed_diagnosis import DrawsDiagnosis, GuideDiagnosis

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "tutorials" / "site" / "pages"
TEXTS = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in sorted(PAGES.rglob("*.md"))}
TEXTS |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
VALUES = {"--objective": OBJECTIVES, "--sampler": tuple(SAMPLERS), "--guide": tuple(shipped("guides"))}


def written_commands(text: str) -> list[str]:
    """The lines of console blocks and the commands in running text, comments and continued lines undone."""
    blocks = re.findall(r"^```(\w*).*?\n(.*?)^```$", text, re.S | re.M)
    lines = [line for kind, block in blocks if kind in ("", "sh") for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`((?:ppl-lm|make|pip install|python -m) [^`\n]+)`", text)
    return [line for line in [*lines, *spans] if line.strip() and not line.startswith("#")]


def faults(line: str) -> list[str]:
    """What a command asks for that is not there."""
    words = shlex.split(line, comments=True)
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group | typer.core.TyperGroup)
    if words[0] == "ppl-lm" and len(words) > 1 and not words[1].startswith("-") and words[1] != "COMMAND":
        if words[1] not in group.commands:
            return [f"no command {words[1]}"]
        known = {option for parameter in group.commands[words[1]].params for option in parameter.opts} | {"--help"}
        lacking = [word for word in words if word.startswith("--") and word not in known]
        pairs = [(a, b) for a, b in zip(words, words[1:], strict=False) if a in VALUES and not b.isupper()]
        lacking += [f"{a} {b}" for a, b in pairs if b not in VALUES[a] and "/" not in b and ".py:" not in b]
        return lacking
    if words[0] == "make":
        return [word for word in words[1:] if "=" not in word and word not in TARGETS]
    if words[:2] == ["pip", "install"]:
        asked = [name for word in words for extra in re.findall(r"\[([\w,]+)\]", word) for name in extra.split(",")]
        return [f"no extra {name}" for name in asked if name not in EXTRAS]
    if words[:3] == ["python", "-m", "ppl_lm.experiments"]:
        return [word for word in words[3:4] if word not in NAMES]
    return []


@pytest.mark.parametrize("name", TEXTS)
def test_commands_and_their_options_are_there(name):
    for line in written_commands(TEXTS[name]):
        assert not faults(line), f"{line!r}: {faults(line)}"


def test_a_command_that_is_not_there_is_seen():
    wrong = (
        *("ppl-lm fitt tilted", "ppl-lm fit tilted --steps 3", "ppl-lm fit tilted --objective elbo"),
        *(
            "ppl-lm sample runs/mine --sampler nuts",
            "make it",
            "pip install '.[lora]'",
            "python -m ppl_lm.experiments all",
        ),
    )
    for line in wrong:
        assert faults(line)
    assert sum(len(written_commands(text)) for text in TEXTS.values()) > 60


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_linked_are_there(name):
    made = ("notebooks/", "gallery/")  # when the site is built
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        path = target.partition("#")[0]
        if path and "://" not in path and not path.startswith(made):
            assert (ROOT / name).parent.joinpath(path).exists(), f"{name} links to {target}"


def test_the_readme_is_one_page():
    assert len(TEXTS["README.md"].split()) <= 1000


def coded(text: str) -> set[str]:
    """Words in `code`."""
    return {word for span in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"\w+", span)}


def test_every_figure_and_every_verdict_is_explained():
    text = TEXTS["tutorials/site/pages/figures.md"]
    guide, draws = text.index("## Figures of a guide"), text.index("## Figures of draws")
    of_guide = {f.name for kind in (GuideFigures, GuideDiagnosis) for f in fields(kind)} - {"average"}
    of_draws = {f.name for kind in (DrawsFigures, DrawsDiagnosis) for f in fields(kind)} - {"average", "means"}
    for names, part in ((of_guide, text[guide:draws]), (of_draws, text[draws:])):
        assert {name for name in names if not name.endswith("_se")} <= coded(part)
    assert {*CODES, *CODES_OF_DRAWS} <= coded(text[:guide])


def test_what_goes_by_name_is_in_the_tables():
    commands = TEXTS["tutorials/site/pages/commands.md"]
    assert {*OBJECTIVES} <= coded(TEXTS["tutorials/site/pages/objectives.md"])
    assert {*SAMPLERS} <= coded(TEXTS["tutorials/site/pages/samplers.md"])
    assert {*shipped("models"), *shipped("guides")} <= coded(commands)
    assert {name for name in NAMES if name not in ("calibration", "verdicts")} <= coded(
        TEXTS["tutorials/site/pages/objectives.md"]
    )
    kept = {f.name for f in fields(Fit)} - {"metrics"}
    steps = set(typing.get_type_hints(StepMetrics))
    assert {name for name in kept | steps if not name.endswith("_se")} <= coded(commands)


def test_every_public_name_has_its_place_in_the_reference():
    listed = {name for text in TEXTS.values() for name in re.findall(r"^::: (\S+)$", text, re.M)}
    for name in ppl_lm.__all__:
        assert any(f"{entry}.".startswith(f"ppl_lm.{name}.") for entry in listed), f"{name} is on no page of api/"
    for room in ("objectives", "twists", "plot", "graphs"):
        names = {f"ppl_lm.{room}.{name}" for name in getattr(ppl_lm, room).__all__} - {"ppl_lm.objectives.baselines"}
        assert names <= listed, names - listed
    for kind in ("models", "guides"):
        assert {f"{kind}.{name}.{name}" for name in shipped(kind)} <= listed
