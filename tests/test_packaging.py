"""The package as a whole: imports run one way, `import ppl_lm` is cheap, and what is built is what is here."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import networkx
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ORDER = [
    *("embedded", "lm", "likelihood", "infer", "criticism", "plot", "run", "report", "cli"),
    *("models", "guides", "experiments"),
]
WITHIN_INFER = [  # a room or a module may import those above it
    *(
        "terms",
        "counts",
        "stored_weights",
        "binding",
        "traces",
        "tables",
        "draws",
        "log_weights",
        "objectives",
        "off_policy",
        "elbo",
        "enumeration",
        "prediction",
    ),
    *("samplers", "twists"),
]
MOST_LINES, MOST_FILES, MOST_NAMES = 300, 20, 50
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


def modules() -> dict[str, Path]:
    """Dotted name -> file, of the package and of the programs that install into it."""
    files = [*(ROOT / "ppl_lm").rglob("*.py"), *(ROOT / "ppl_lm").rglob("*.pyi"), *PROGRAMS]
    named = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "ppl_lm" else ("ppl_lm", *parts)
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.with_suffix(".py")
    return named


def import_graph() -> networkx.DiGraph:
    """From each module to those that it imports, wherever in the file; packages that only name what is in them left out."""
    known, graph = modules(), networkx.DiGraph()
    for module, path in known.items():
        graph.add_node(module)
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                target = name if name in known else name.rpartition(".")[0]
                if target in known and target not in (module, "ppl_lm"):
                    graph.add_edge(module, target)
    return graph


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_library_imports_run_one_way(path):
    layer = path.relative_to(ROOT / "ppl_lm").parts[0].removesuffix(".py")
    later = own_imports(path) - {"__version__", *ORDER[: ORDER.index(layer) + 1]}
    assert not later, f"{relative(path)} imports {sorted(later)}; it may import from {layer} and what comes before it"


def test_no_circle_of_modules_and_none_of_rooms():
    graph = import_graph()
    assert len(graph) > 100 and graph.has_edge("ppl_lm.run.fitting.loop", "ppl_lm.infer.elbo")
    assert [group for group in networkx.strongly_connected_components(graph) if len(group) > 1] == []

    def room(module: str) -> str:
        parts = module.split(".")
        return ".".join(parts[:3] if parts[1] == "infer" else parts[:2])

    rooms = networkx.DiGraph((room(a), room(b)) for a, b in graph.edges if room(a) != room(b))
    assert [group for group in networkx.strongly_connected_components(rooms) if len(group) > 1] == []
    for a, b in rooms.edges:
        if a.startswith("ppl_lm.infer.") and b.startswith("ppl_lm.infer."):
            above, below = (WITHIN_INFER.index(name.removeprefix("ppl_lm.infer.")) for name in (b, a))
            assert above < below, f"{a} imports {b}; see WITHIN_INFER"


@pytest.mark.parametrize("path", LIBRARY + PROGRAMS, ids=relative)
def test_modules_are_short_and_named_apart_from_what_is_in_them(path):
    """Once a function stands in its package under its module's name, that module cannot be reached any more."""
    assert len(path.read_text().splitlines()) <= MOST_LINES
    tree = ast.parse(path.read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    if path not in PROGRAMS and "experiments" not in path.parts:
        assert path.stem not in defined
    assert ast.get_docstring(tree), "say in a sentence what is in it"


def test_rooms_are_small():
    files: dict[Path, int] = {}
    for path in (ROOT / "ppl_lm").rglob("*.py"):
        files[path.parent] = files.get(path.parent, 0) + 1
    assert max(files.values()) <= MOST_FILES and len(files) > 10


def test_the_public_names_are_few_and_each_is_there():
    import ppl_lm

    assert len(ppl_lm.__all__) <= MOST_NAMES
    for name in ppl_lm.__all__:
        assert getattr(ppl_lm, name).__doc__, name
    for package in (
        "lm",
        "likelihood",
        "infer",
        "criticism",
        "plot",
        "run",
        "report",
        "twists",
        "objectives",
        "kernels",
    ):
        module = (
            importlib.import_module(f"ppl_lm.{package}") if package not in ppl_lm.__all__ else getattr(ppl_lm, package)
        )
        for name in getattr(module, "__all__", []):
            assert getattr(module, name) is not None
    assert callable(ppl_lm.diagnose) and callable(ppl_lm.kernels.suffix) and callable(ppl_lm.kernels.independence)
    assert issubclass(ppl_lm.NoSupportError, ValueError) and issubclass(ppl_lm.DivergedError, ValueError)


@pytest.mark.parametrize("path", PROGRAMS, ids=relative)
def test_programs_import_the_prior_and_the_evidence_only(path):
    assert own_imports(path) <= {"lm", "likelihood"}


SITE_KEYS = ("fn", "cond_indep_stack", "is_observed", "infer")  # of what a trace holds of a site


def reads_traces(source: str) -> list[str]:
    """Where a module imports Pyro's handlers, or asks one for a trace."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            asked = isinstance(node, ast.Attribute) and node.attr in ("get_trace", "guide_sites", "model_sites")
            keyed = (
                isinstance(node, ast.Subscript)
                and isinstance(node.slice, ast.Constant)
                and node.slice.value in SITE_KEYS
            )
            names = ["get_trace"] if asked or keyed else []
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
    assert (
        reads_traces("handler.get_trace(prompts)")
        and reads_traces("plates = site['cond_indep_stack']")
        and not reads_traces("from pyro import param")
    )


def test_importing_the_package_is_cheap(tmp_path):
    code = "import sys, ppl_lm; print(*sorted({'arviz', 'matplotlib', 'torch', 'transformers'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def test_a_checkout_is_whole_where_another_copy_is_installed():
    """Python takes the folder where it was started before what is installed; there models and guides lie beside the package."""
    code = (
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        "import ppl_lm.models, ppl_lm.guides\nfrom ppl_lm.models import tilted\nprint(ppl_lm.models.__file__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and Path(ran.stdout.strip()) == ROOT / "models" / "__init__.py", ran.stderr


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
