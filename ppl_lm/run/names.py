"""What a name on the command line stands for: a program that ships, or `path/to/file.py:name`."""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

OBJECTIVES = (  # those of `ppl_lm.infer.objectives`, whose import is not cheap
    "reverse_kl", "forward_kl", "jensen_shannon", "total_variation", "chi2", "reverse_chi2", "alpha", "iwae",
    "trajectory_balance", "vargrad", "subtb", "expected_reward", "grpo",
)  # fmt: skip

user_files: set[str] = set()  # that were run here: where an error message looks for a line to point at


def shipped(package: str) -> list[str]:
    """Names of the programs in `ppl_lm.models` or `ppl_lm.guides`, one a file, found without importing any."""
    spec = find_spec(f"ppl_lm.{package}")
    return sorted(m.name for m in iter_modules(spec.submodule_search_locations if spec else None))


def is_file(spec: str) -> bool:
    """Whether this is the form `path/to/file.py:name`, its name perhaps forgotten."""
    return split(spec)[0].endswith(".py")


def split(spec: str) -> tuple[str, str]:
    """Path and name; the last colon parts them, since a Windows path has one of its own."""
    if spec.endswith(".py"):
        return spec, ""
    path, _, name = spec.rpartition(":")
    return path, name


def split_folder(spec: str) -> tuple[str, str | None]:
    """Folder, or name on the hub, and label of `hf:FOLDER[:LABEL]`, None without one; of several colons the last one before
    which there is a folder parts them."""
    rest = spec.removeprefix("hf:")
    if Path(rest).is_dir():
        return rest, None
    parts = rest.split(":")
    heads = [":".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
    head = next((head for head in heads if Path(head).is_dir()), heads[0] if heads else rest)
    return head, rest[len(head) + 1 :] if heads else None


def from_file(spec: str, what: str) -> Callable[..., Any]:
    """The function `name` of `path/to/file.py:name`. The file may import its neighbours as it is run, not later.

    :param what: "model", "guide" or "reward", for the messages.
    :raises ValueError: if the file or its function is missing, or running the file fails."""
    path, name = split(spec)
    if not Path(path).is_file():
        raise ValueError(f"{what} {spec!r}: there is no file {path!r}")
    file = Path(path).resolve()
    try:
        module = _module(str(file), file.stat().st_mtime_ns)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what} {spec!r}: {path} raised {type(error).__name__}: {error}") from error
    function = getattr(module, name, None) if name else None
    if not callable(function):
        defined = inspect.getmembers(module, lambda f: inspect.isfunction(f) and f.__module__ == module.__name__)
        raise ValueError(
            f"{what} {spec!r}: {f'{path} has no function {name!r}' if name else 'the name of a function is missing'}; "
            f"give {path}:NAME with one of {', '.join(n for n, _ in defined) or 'its functions (it has none yet)'}"
        )
    return function


@cache
def _module(path: str, version: int) -> ModuleType:
    """Runs a file once, whoever asks: a model and its guide in one file share what the file makes."""
    del version  # of the file: an edited one is run again
    name = f"_ppl_lm_{Path(path).stem}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    folder = Path(path).parent
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    user_files.add(path)
    sys.modules[spec.name] = module  # dataclasses and pickling look a module up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    finally:
        sys.path.remove(str(folder))
        for new in set(sys.modules) - before - {spec.name}:  # another file may have neighbours of the same names
            where = getattr(sys.modules[new], "__file__", None)
            if where and Path(where).is_relative_to(folder):
                del sys.modules[new]
    return module
