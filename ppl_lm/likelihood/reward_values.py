"""What a reward function returns, as plain numbers: one for each completion, or an error that shows which is none."""

from decimal import Decimal
from math import inf
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor


class RewardError(ValueError):
    """A reward function failed, or returned something that is not one reward for each completion."""


def as_rewards(returned: Any, texts: list[str], name: str, r_max: float | None) -> list[float]:
    """The rewards as plain floats, one for each text.

    :param returned: a list, tuple, tensor or array of N numbers of any kind: `as_number` says which.
    :param name: of the reward, for the messages.
    :raises RewardError: if it is none of these, or a number is NaN, +inf or above `r_max`."""
    n = len(texts)
    if not isinstance(returned, (Tensor, np.generic)) and hasattr(returned, "__array__"):
        returned = _plain(returned, name, np.asarray)  # pandas and the like
    if not isinstance(returned, (Tensor, np.ndarray, list, tuple)):
        raise RewardError(
            f"reward {name!r} returned {short(returned)} of type {type(returned).__name__}; it needs a list "
            f"of {n} numbers, one for each completion (first completion {short(texts[0])})"
        )
    shape = (len(returned),) if isinstance(returned, (list, tuple)) else tuple(returned.shape)
    if shape != (n,):
        raise RewardError(
            f"reward {name!r} returned {type(returned).__name__} of shape {shape}; it needs shape ({n},), one "
            f"number for each completion, and is not broadcast (first completion {short(texts[0])})"
        )
    items = _plain(returned, name, lambda v: v.tolist()) if isinstance(returned, (Tensor, np.ndarray)) else returned
    most = inf if r_max is None else r_max
    if all(type(item) is float and item < inf and item <= most for item in items):  # NaN is not
        return list(items)
    return [_checked(i, item, texts, name, r_max) for i, item in enumerate(items)]


def as_number(item: Any) -> float | None:
    """A real number of any kind (Python's, also bool, Decimal and Fraction; NumPy's; of a tensor without dimensions) as a
    float; None if it is no number, or one too large for float64."""
    try:
        if not isinstance(item, float) and isinstance(item, (Tensor, np.generic, np.ndarray)) and item.ndim == 0:
            item = item.item()
        # float first: to ask `Real` takes long. `np.longdouble` stays one, and is no Real.
        if not isinstance(item, (float, Real, Decimal, np.floating)):
            return None
        value = float(item)
        return None if value in (inf, -inf) and item != value else value
    except (ArithmeticError, ValueError, TypeError, RuntimeError):  # 10**400, Decimal("sNaN"), a tensor without data
        return None


def short(value: Any, limit: int = 80) -> str:
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, a user's own class
        return f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _checked(i: int, item: Any, texts: list[str], name: str, r_max: float | None) -> float:
    value = as_number(item)
    if value is None or not value < inf:  # `not <`: NaN too
        need = "a real number that float64 can hold, or -inf for a text that must not occur"
    elif r_max is None or value <= r_max:
        return value
    elif value <= r_max + 1e-6 * max(1.0, abs(r_max)):
        return r_max  # float32 may round r_max itself up
    else:
        need = f"at most its declared r_max={r_max:g}"
    raise RewardError(
        f"reward {name!r} returned {short(item)} for completion {i} of {len(texts)}, {short(texts[i])}; it needs {need}"
    )


def _plain(returned: Any, name: str, convert: Any) -> Any:
    try:
        return convert(returned)
    except Exception as error:  # ragged, sparse or without data
        raise RewardError(
            f"reward {name!r} returned {type(returned).__name__}, whose numbers cannot be read: {error}; give a list of floats"
        ) from error
