"""Which programs ship, found without importing any."""

from importlib.util import find_spec
from pkgutil import iter_modules


def shipped(package: str) -> list[str]:
    """Names of the programs in `ppl_lm.models` or `ppl_lm.guides`: one a file."""
    spec = find_spec(f"ppl_lm.{package}")
    return sorted(m.name for m in iter_modules(spec.submodule_search_locations if spec else None))
