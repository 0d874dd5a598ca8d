"""Say which text you want as a Pyro program. Get it by inference. Know how close you got."""

from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import lazy_loader

if not (Path(__file__).parent / "models").is_dir():  # a checkout, in which models and guides lie beside the package
    __path__.append(str(Path(__file__).parents[1]))

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
_ROOMS = (
    "cli",
    "criticism",
    "embedded",
    "experiments",
    "guides",
    "infer",
    "likelihood",
    "lm",
    "models",
    "report",
    "run",
)


def __getattr__(name: str) -> object:
    """A public name, or one of the rooms, loaded now."""
    return import_module(f"{__name__}.{name}") if name in _ROOMS else _public(name)


__version__ = version("ppl_lm")
