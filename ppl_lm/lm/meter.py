"""What a run costs, counted where it is spent: tokens forwarded through a language model, reward calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields


@dataclass
class Cost:
    """`lm_tokens`: tokens forwarded through any language model, prompts and wasted ones included.
    `reward_calls`: completions given to a reward. `checker_calls`: texts, whole or begun, that a `Checker`'s function was
    asked of."""

    lm_tokens: int = 0
    reward_calls: int = 0
    checker_calls: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))


_open: list[Cost] = []


@contextmanager
def measure() -> Iterator[Cost]:
    """Counts what is spent inside the block; blocks may be nested, each counts everything inside it.

    >>> with measure() as cost:
    ...     add(lm_tokens=3)
    >>> cost.lm_tokens
    3
    """
    cost = Cost()
    _open.append(cost)
    try:
        yield cost
    finally:
        _open[:] = [c for c in _open if c is not cost]


@contextmanager
def unmeasured() -> Iterator[None]:
    """What is spent inside is not counted: checks are no part of a run."""
    kept, _open[:] = _open[:], []
    try:
        yield
    finally:
        _open[:] = kept


def add(lm_tokens: int = 0, reward_calls: int = 0, checker_calls: int = 0) -> None:
    """Adds to every open `measure` block."""
    for cost in _open:
        cost.lm_tokens += lm_tokens
        cost.reward_calls += reward_calls
        cost.checker_calls += checker_calls
