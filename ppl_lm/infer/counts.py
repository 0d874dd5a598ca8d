"""Counts: how many draws, steps or tokens a user asks for."""

from numbers import Integral
from typing import Any


def require_count(name: str, value: Any, least: int = 1) -> None:
    """:raises ValueError: unless the value is a whole number, at least `least`; the message has the parameter's name.

    >>> require_count("num_samples", 0)
    Traceback (most recent call last):
    ValueError: num_samples=0; give at least 1
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r}; give a whole number, at least {least}")
    if int(value) < least:
        raise ValueError(f"{name}={value}; give at least {least}")
