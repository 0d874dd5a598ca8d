"""Pyro programs that define one posterior over text each. A new posterior is a new file here, and no edit anywhere else."""

from importlib import import_module
from pkgutil import iter_modules

__all__ = [module.name for module in iter_modules(__path__)]  # pyright: ignore[reportUnsupportedDunderAll]

for _name in __all__:  # each file's program, by the file's name
    globals()[_name] = getattr(import_module(f"{__name__}.{_name}"), _name)
