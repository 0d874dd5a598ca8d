"""The notebooks run, and the README's lines run verbatim."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import ppl_lm

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.notebook


@pytest.mark.parametrize("path", sorted((ROOT / "tutorials").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs_and_keeps_its_outputs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert sum(bool(cell.outputs) for cell in code) >= len(code) - 2, "the outputs are kept, so that it reads well"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


def test_the_readmes_code_runs_verbatim(capsys):
    """All of its blocks in turn, in one namespace, as a reader would paste them."""
    lines, *others = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert "ppl_lm.SequenceELBO" in lines and "ppl_lm.log_evidence(draws" in lines
    space: dict = {}
    exec(compile(lines, "README.md", "exec"), space)
    assert space["draws"].num_samples == 1000
    assert space["draws"]["reward"].mean() > 0.2, "the guide has not moved towards praise"
    assert "EUBO" in capsys.readouterr().out
    for block in others:
        exec(compile(block, "README.md", "exec"), space)
    target = ppl_lm.bind(space["tilted"], space["prior"], reward=ppl_lm.rewards.vader)
    assert ppl_lm.rejection(target, None, ["The soup was"], num_samples=20).kind == "exact", (
        "the listing declares no bound"
    )
    posterior = ppl_lm.to_arviz(space["draws"]).posterior["strictness"]
    assert float(posterior.mean()) > 1.06, "texts that please make a strict critic likelier; its prior mean is 1.03"
