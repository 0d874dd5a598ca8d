"""The package as a whole: imports run one way, `import ppl_lm` is cheap, and what is built is what is here."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ORDER = [
    "embedded",
    "lm",
    "likelihood",
    "infer",
    "criticism",
    "plot",
    "run",
    "report",
    "cli",
    "models",
    "guides",
    "experiments",
]
PROGRAMS = [p for folder in ("models", "guides") for p in sorted((ROOT / folder).glob("[!_]*.py"))]
LIBRARY = sorted((ROOT / "ppl_lm").glob("[!_]*.py")) + sorted((ROOT / "ppl_lm").glob("*/**/*.py"))


def own_imports(path: Path) -> set[str]:
    """The second part of every `ppl_lm.…` that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import in full"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {(name + ".").split(".")[1] for name in names if name.split(".")[0] == "ppl_lm"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_library_imports_run_one_way(path):
    layer = path.relative_to(ROOT / "ppl_lm").parts[0].removesuffix(".py")
    later = own_imports(path) - {"__version__", *ORDER[: ORDER.index(layer) + 1]}
    assert not later, f"{relative(path)} imports {sorted(later)}; it may import from {layer} and what comes before it"


@pytest.mark.parametrize("path", PROGRAMS, ids=relative)
def test_programs_import_the_prior_and_the_evidence_only(path):
    assert own_imports(path) <= {"lm", "likelihood"}


def reads_traces(source: str) -> list[str]:
    """Where a module imports Pyro's handlers, or asks one for a trace."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = ["get_trace"] if isinstance(node, ast.Attribute) and node.attr == "get_trace" else []
        found += [
            f"line {node.lineno}: {name}" for name in names if f"{name}.".startswith(("pyro.poutine.", "get_trace."))
        ]
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_pyros_traces_are_read_in_one_folder(path):
    """A Pyro that changes what a trace holds changes one folder here. Experiments are programs of their own."""
    if path.is_relative_to(ROOT / "ppl_lm" / "experiments"):
        return
    here = path.is_relative_to(ROOT / "ppl_lm" / "infer" / "traces")
    found = reads_traces(path.read_text())
    assert here or not found, f"{relative(path)} reads a trace ({found}); give ppl_lm/infer/traces a function that does"


def test_a_module_that_reads_a_trace_is_seen():
    for line in ("from pyro import poutine", "import pyro.poutine", "from pyro.poutine.messenger import Messenger"):
        assert reads_traces(line)
    assert reads_traces("handler.get_trace(prompts)") and not reads_traces("from pyro import param")


def test_importing_the_package_is_cheap(tmp_path):
    code = "import sys, ppl_lm; print(*sorted({'arviz', 'matplotlib', 'transformers'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def test_every_package_is_listed_and_installs_below_ppl_lm():
    """A folder that pyproject.toml forgets is missing from the wheel alone, where no other test looks."""
    found = {"ppl_lm.models", "ppl_lm.guides"}
    found |= {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "ppl_lm").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_dependency_is_pinned_to_a_version_that_it_allows():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {name.lower().replace("_", "-"): v for name, v in (x.split("==") for x in lines if not x.startswith("#"))}
    extras = PROJECT["project"]["optional-dependencies"]
    listed = PROJECT["project"]["dependencies"] + [
        r for extra in extras.keys() - {"all", "bench"} for r in extras[extra]
    ]
    for requirement in map(Requirement, listed):
        assert pins[requirement.name.lower().replace("_", "-")] in requirement.specifier, requirement
    assert set(Requirement(extras["all"][0]).extras) == extras.keys() - {"all", "bench"}
