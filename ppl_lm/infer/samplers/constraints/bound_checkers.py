"""Which checkers a model is bound to."""

from typing import Any

from ppl_lm.infer.binding import Bound
from ppl_lm.likelihood.checker import Checker


def checkers_of(model: Any) -> list[Checker]:
    """Among the arguments of a bound model, also in lists, tuples and dictionaries; none of a plain function."""
    return _among(model.arguments) if isinstance(model, Bound) else []


def require_bound(model: Any, checker: Checker) -> None:
    """:raises ValueError: if a bound model does not have this checker as evidence: what the checker rules out would be missing
    from the posterior, and no weight would say so. Of a plain function it cannot be known."""
    if isinstance(model, Bound) and not any(found is checker for found in checkers_of(model)):
        raise ValueError(
            f"the model is not bound to the checker {checker.name!r}, so its posterior has texts that the checker rules out: "
            "give it as evidence too, bind(constrained, prior, constraint=checker)"
        )


def _among(value: Any) -> list[Checker]:
    if isinstance(value, Checker):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [found for item in items for found in _among(item)]
