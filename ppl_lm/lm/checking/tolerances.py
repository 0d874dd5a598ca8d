"""By how much two ways of finding a log-probability may differ in a network that is sound."""

from typing import Any

Network = Any  # the `Network` whose module imports this one
TOLERANCE = 2e-3  # nats
HALF_PRECISION = 0.5  # nats: what the rounding of 16-bit weights may do to a token of a network that is sound


def is_half(lm: Network) -> bool:
    """Whether some of a network's products are of 16 bits."""
    return lm.compute_dtype is not None or any(w.is_floating_point() and w.itemsize < 4 for w in lm.parameters())


def tolerance_of(lm: Network) -> float:
    """By how much log-probabilities of the same token may differ in a network that is sound, nats."""
    return HALF_PRECISION if is_half(lm) else TOLERANCE
