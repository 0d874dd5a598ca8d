"""`WeightedRewards`: several rewards as one, r = Σ w_i r_i, each of them recorded."""

import itertools
import re
from collections.abc import Callable, Sequence
from math import inf, isfinite
from typing import Any

import pyro
import torch
from jaxtyping import Float64, Int
from pyro.ops.provenance import detach_provenance
from torch import Tensor

from ppl_lm.likelihood.reward import Reward
from ppl_lm.likelihood.reward_values import RewardError, as_number, short
from ppl_lm.likelihood.rewards import length
from ppl_lm.lm.prompt_names import distinct
from ppl_lm.lm.prompts import Prompts

TAKEN = ("reward", "x", "optimal", "log_prior", "log_likelihood", "log_guide", "log_weight", "length")


class WeightedRewards(Reward):
    """r(x | prompt) = Σ_i w_i r_i(x | prompt). In a program each r_i is recorded, `pyro.deterministic`, without its weight:
    so it stands among the draws' records, by its name, beside the total that the program records.

    `r_max` is Σ w_i r_max_i where every reward with a weight above 0 has one and no weight is below 0. A reward of weight 0 is
    recorded and does not count, whatever it is.

    :param rewards: as for `Reward`, one or more.
    :param weights: finite numbers; of a unit for each reward that makes the products add. None: 1 each.
    :raises ValueError: if there are not as many weights as rewards, or one is no finite number; `RewardError` where a sum is
        not below infinity, as of rewards of -inf with a weight below 0.

    >>> from ppl_lm.likelihood import rewards
    >>> WeightedRewards([rewards.vader, rewards.contains("soup")], weights=[1.0, 0.5])
    WeightedRewards(1 × vader + 0.5 × contains:soup, r_max=1.5)
    """

    def __init__(self, rewards: Sequence[Callable[..., Any]], weights: Sequence[float] | None = None):
        if not isinstance(rewards, (list, tuple)) or not rewards:
            raise ValueError(f"rewards={short(rewards)}; give a list of one or more")
        self.rewards = [reward if isinstance(reward, Reward) else Reward(reward) for reward in rewards]
        self.weights = _checked([1.0] * len(self.rewards) if weights is None else weights, len(self.rewards))
        super().__init__(self._sum)
        self.name = self.__name__ = " + ".join(f"{w:g} × {r.name}" for w, r in self._pairs())
        bounds = [0.0 if w == 0 else None if w < 0 or r.r_max is None else w * r.r_max for w, r in self._pairs()]
        self.r_max = sum(bound for bound in bounds if bound is not None) if None not in bounds else None
        taken = [name for name in TAKEN if name != "length" or length not in [r.function for r in self.rewards]]
        self.names = distinct([*taken, *(_site_name(r.name) for r in self.rewards)])[len(taken) :]

    def __repr__(self) -> str:
        return f"WeightedRewards({self.name}, r_max={self.r_max})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `Reward`'s; of prompts and token ids it records each reward."""
        if not (len(args) == 2 and not kwargs and isinstance(args[0], Prompts) and isinstance(args[1], Tensor)):
            return super().__call__(*args, **kwargs)
        parts = [reward(*args) for reward in self.rewards]
        return self._total([_recorded(name, part) for name, part in zip(self.names, parts, strict=True)])

    def _scored(self, prompts: Prompts, x: Int[Tensor, "*#S T"], shape: torch.Size) -> Float64[Tensor, "*S"]:
        return self._total([reward.score(prompts, x) for reward in self.rewards])

    def _total(self, parts: list[Tensor]) -> Tensor:
        total = sum(w * part for w, part in zip(self.weights, parts, strict=True) if w)
        total = total if isinstance(total, Tensor) else torch.zeros_like(parts[0])
        if not bool((detach_provenance(total) < inf).all()):  # NaN is not
            raise RewardError(
                f"the sum {self.name} is {float(detach_provenance(total).max())}: a reward of -inf, for texts that must "
                "not occur, takes a weight above 0"
            )
        return total

    def _sum(self, **inputs: Any) -> list[float]:
        """The total in the signature of a reward function."""
        columns = [reward.function(**reward._accepted(inputs)) for reward in self.rewards]
        return [sum(w * r for w, r in zip(self.weights, row, strict=True) if w) for row in zip(*columns, strict=True)]

    def _pairs(self) -> list[tuple[float, Reward]]:
        return list(zip(self.weights, self.rewards, strict=True))


def _checked(weights: Sequence[float], count: int) -> list[float]:
    if len(weights) != count:
        raise ValueError(
            f"weights={short(list(weights))}: {len(weights)} weights for {count} rewards; give one for each"
        )
    numbers = [as_number(weight) for weight in weights]
    if not all(number is not None and isfinite(number) for number in numbers):
        raise ValueError(f"weights={short(list(weights))}; give finite numbers")
    return [number for number in numbers if number is not None]


def _site_name(name: str) -> str:
    """A name that files can hold, as variables of NetCDF."""
    return re.sub(r"[^\w.:()+ -]", "_", name).strip() or "_"


def _recorded(name: str, value: Tensor) -> Tensor:
    """The value, as a site of this name; where the program has one already, as of another text's reward, " (2)" is added."""
    for n in itertools.count(1):
        try:
            return pyro.deterministic(name if n == 1 else f"{name} ({n})", value, event_dim=0)
        except RuntimeError as error:
            if not str(error).startswith("Multiple sample sites"):
                raise
    raise AssertionError
