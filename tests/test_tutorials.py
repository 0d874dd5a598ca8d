"""The notebooks run, and so does the code of the README and of every page of the site, as a reader would paste it."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pyro
import pytest
from nbclient import NotebookClient

import ppl_lm

ROOT = Path(__file__).parents[1]
SITE = ROOT / "tutorials" / "site"
CODE = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
WITH_CODE = [p for p in sorted((SITE / "pages").rglob("*.md")) if CODE.search(p.read_text(encoding="utf-8"))]
pytestmark = pytest.mark.notebook


@pytest.mark.parametrize("path", sorted((ROOT / "tutorials").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs_and_keeps_its_outputs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert sum(bool(cell.outputs) for cell in code) >= len(code) - 2, "the outputs are kept, so that it reads well"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


def pasted(page: Path) -> dict:
    """The namespace that all blocks of the page leave, run in turn."""
    space: dict = {}
    for block in CODE.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, page.name, "exec"), space)
    return space


def test_the_readmes_code_runs_verbatim(capsys):
    space = pasted(ROOT / "README.md")
    assert space["draws"].num_samples == 1000
    assert space["draws"]["reward"].mean() > 0.2, "the guide has not moved towards praise"
    assert "EUBO" in capsys.readouterr().out


@pytest.mark.parametrize("page", [p for p in WITH_CODE if p.stem != "gallery"], ids=lambda p: p.stem)
def test_a_pages_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pyro.set_rng_seed(0)
    space = pasted(page)
    if page.stem == "from-pyro":
        target = ppl_lm.bind(space["tilted"], space["prior"], reward=ppl_lm.rewards.vader)
        exact = ppl_lm.rejection(target, None, ["The soup was"], num_samples=20)
        assert exact.kind == "exact", "the listing declares a bound"
        mean, error = space["strictness"].item()
        assert mean > 1.0 + 3 * error and error < 0.05, (
            "texts that please make a strict critic likelier; its prior mean is 1"
        )


def test_the_gallery_draws_every_picture_that_it_shows(tmp_path):
    spec = importlib.util.spec_from_file_location("made_pages", SITE / "made_pages.py")
    assert spec and spec.loader
    made_pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made_pages)
    page = SITE / "pages" / "gallery.md"
    drawn = made_pages.draw(page, tmp_path)
    assert sorted(drawn) == sorted(re.findall(r"\]\((gallery/\w+\.png)\)", page.read_text(encoding="utf-8")))
    assert sorted(Path(name).stem for name in drawn) == sorted(ppl_lm.plot.__all__)
    assert min((tmp_path / name).stat().st_size for name in drawn) > 5_000
