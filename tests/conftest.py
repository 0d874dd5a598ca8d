"""Shared by all tests: a clean parameter store and a fixed seed before each; where the real LM lies."""

import gc
import subprocess
import sys
from pathlib import Path

import hypothesis
import jaxtyping
import pyro
import pytest
import torch
import transformers
from fake_device import FAKE

# A busy machine is no fault of a test: how long an example takes says nothing here.
hypothesis.settings.register_profile("any_pace", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any_pace")

CHECKED = pytest.StashKey[bool]()
DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_configure(config):
    """ArviZ's first import of a day writes a stamp to the user's cache; two workers that do so at once fail."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        subprocess.run([sys.executable, "-W", "ignore", "-c", "import arviz"], check=True)


def pytest_addoption(parser):
    parser.addoption(
        "--checked", type=int, default=1, help="with --jaxtyping-packages: of so many tests one is checked"
    )


def pytest_collection_modifyitems(config, items):
    """Annotations are checked in one test of `--checked`: in other ones at each run, since their order is random."""
    for i, item in enumerate(items):
        item.stash[CHECKED] = i % config.getoption("--checked") == 0


def pytest_runtest_setup(item):
    jaxtyping.config.update("jaxtyping_disable", not item.stash[CHECKED])


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not look at all of it again and again (a third of the time)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


@pytest.fixture
def unchecked():
    """Annotations are not checked, as for users: what are they told who pass another type?"""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def stories() -> Path:
    """The folder of a real pretrained LM; skips where it is missing."""
    folder = DATA / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"needs the pretrained LM in {folder.name}, which is not part of the project")
    if transformers.__version__ < "5":
        pytest.skip("transformers 4 does not know the tokenizer class that transformers 5 wrote there")
    return folder


def device_of(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    if name == "fake" and not hasattr(transformers.utils.generic, "maybe_autocast"):
        pytest.skip("transformers of this age asks each device for autocast, which one that is not there has not")
    return FAKE if name == "fake" else torch.device(name)


@pytest.fixture(params=["cpu", "fake", "cuda"])
def device(request) -> torch.device:
    """Each device; `fake` is there everywhere, and catches what mixes devices: see fake_device.py."""
    return device_of(request.param)


@pytest.fixture
def fake() -> torch.device:
    return device_of("fake")


@pytest.fixture(params=["fake", "cuda"])
def elsewhere(request) -> torch.device:
    """A device that is not the CPU."""
    return device_of(request.param)
