"""What is subtracted from costs, and what log Z is taken to be: estimates that leave the gradient right."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_lm.lm.prompts import Prompts


@runtime_checkable
class Baseline(Protocol):
    """What is subtracted from costs: from those of all particles and their importance ratios, (K, B) both, to (K, B). Of sites
    with plates of their own, or outside the prompts', reverse KL gives (K, *plates, B).

    It must not depend on the particle's own cost, or the gradient is biased. A plain function will do where one is asked
    for: it remembers nothing."""

    @property
    def remembers_steps(self) -> bool:
        """Whether each call moves what later calls give. Then it is called once for each step's draws."""
        ...

    def __call__(self, cost: Tensor, ratio: Tensor, /) -> Tensor: ...


@runtime_checkable
class LogZ(Protocol):
    """What log Z is taken to be: from log weights, (K, B), and the prompts, to (B,) or (K, B), nats. A plain function will do
    where one is asked for."""

    @property
    def remembers_steps(self) -> bool:
        """As of a `Baseline`."""
        ...

    def __call__(self, log_w: Tensor, prompts: Prompts, /) -> Tensor: ...


BaselineFunction = Callable[[Tensor, Tensor], Tensor]
LogZFunction = Callable[[Tensor, Prompts], Tensor]


@dataclass(frozen=True)
class Memoryless:
    """A plain function as a `Baseline` or a `LogZ`."""

    function: Callable[..., Tensor]
    remembers_steps: ClassVar[bool] = False

    def __call__(self, *args: Any) -> Tensor:
        return self.function(*args)


def as_estimate(value: Any) -> Any:
    """A plain function with the field's default; a `Baseline` or `LogZ` as it is."""
    return value if hasattr(value, "remembers_steps") else Memoryless(value)


def no_baseline(cost: Float[Tensor, "K *S"], ratio: Float[Tensor, "K *S"]) -> Float[Tensor, "K *S"]:
    return torch.zeros_like(cost)


def leave_one_out(cost: Float[Tensor, "K *S"], ratio: Float[Tensor, "K *S"]) -> Float[Tensor, "K *S"]:
    """Mean cost of the other particles of the prompt: independent of this one's draw (Kool et al. 2019)."""
    weighted = ratio * cost
    return (weighted.sum(0) - weighted) / (len(cost) - 1)


def constant(value: float) -> BaselineFunction:
    """The same for every text. For `forward_kl` the mean cost is -1 whatever the guide: with `constant(-1.0)` the gradient
    is (P/Z - q)/b · ∇ log q, DPG's baseline Z · q/b (Korbak et al. 2022, GDC++)."""
    return lambda cost, ratio: torch.full_like(cost, value)


class MovingAverage:
    """Mean cost over earlier steps, of all prompts, exponentially weighted; for few particles, even one.

    :param decay: weight of what was known against a step's own mean."""

    def __init__(self, decay: float = 0.9):
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}; give a number from 0, which keeps only the last step, to below 1")
        self.decay, self.known, self.weight = decay, 0.0, 0.0

    remembers_steps = True

    def __call__(self, cost: Float[Tensor, "K *S"], ratio: Float[Tensor, "K *S"]) -> Float[Tensor, "K *S"]:
        before = self.known / self.weight if self.weight else 0.0
        self.known = self.decay * self.known + (1 - self.decay) * float((ratio * cost).mean())
        self.weight = self.decay * self.weight + (1 - self.decay)
        return torch.full_like(cost, before)


def of_particles(log_w: Float[Tensor, "K B"], prompts: Prompts) -> Float[Tensor, "B"]:
    """log of the mean weight of the step's particles: in a function that is not linear in it, biased by O(1/K)."""
    return log_w.logsumexp(0) - math.log(len(log_w))


def of_others(log_w: Float[Tensor, "K B"], prompts: Prompts) -> Float[Tensor, "K B"]:
    """The same without the particle itself. It makes the expected gradient of `forward_kl` exact up to one positive
    factor a prompt, Z · E[1/Ẑ]; not with `leave_one_out`, though, since the others' costs hold this particle's weight."""
    return log_sum_of_others(log_w) - math.log(max(1, len(log_w) - 1))  # -inf if there are no others


def log_sum_of_others(log_w: Float[Tensor, "K *S"]) -> Float[Tensor, "K *S"]:
    """log Σ_{j ≠ k} w_j for each k along the first dimension, from sums of those before and after: no subtraction."""
    edge = torch.full_like(log_w[:1], -torch.inf)
    before = torch.cat([edge, log_w[:-1].logcumsumexp(0)]) if len(log_w) > 1 else edge
    after = torch.cat([log_w[1:].flip(0).logcumsumexp(0).flip(0), edge]) if len(log_w) > 1 else edge
    return torch.logaddexp(before, after)


def known(log_z: Float[Tensor, "B"] | Float[Tensor, ""]) -> LogZFunction:
    """log Z that is known, of each prompt or of all; by enumeration, say."""
    return lambda log_w, prompts: log_z.expand(log_w.shape[1])


class MovingLogZ:
    """log Z of each prompt from all steps so far, weighted exponentially; the first step's own is `of_others`.

    Later it uses earlier steps alone: independent of this step's draws, so that costs are exact for the Ẑ at hand. In a
    prompt's first step the bias is O(1/K): with prompts that come once, give many particles.

    :param decay: weight of the past against a step."""

    def __init__(self, decay: float = 0.95):
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}; give a number from 0, which keeps only the last step, to below 1")
        self.decay = decay
        self.known: dict[tuple[Any, ...], tuple[float, float]] = {}  # prompt -> log Σ of weighted Ẑ, log of Σ weights

    remembers_steps = True

    def __call__(self, log_w: Float[Tensor, "K B"], prompts: Prompts) -> Float[Tensor, "K B"]:
        now, others = of_particles(log_w, prompts), of_others(log_w, prompts)
        columns = []
        for b, key in enumerate(prompts.identities()):
            total, weight = self.known.get(key, (-math.inf, -math.inf))
            columns.append(others[:, b] if total == -math.inf else torch.full_like(others[:, b], total - weight))
            step = math.log1p(-self.decay) if self.decay else 0.0
            past = math.log(self.decay) if self.decay else -math.inf
            self.known[key] = (_log_add(past + total, step + float(now[b])), _log_add(past + weight, step))
        return torch.stack(columns, 1)


def _log_add(a: float, b: float) -> float:
    top = max(a, b)
    return top if top == -math.inf else top + math.log(math.exp(a - top) + math.exp(b - top))
