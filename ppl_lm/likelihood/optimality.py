"""`Optimality`: the reward likelihood as an observed site."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from ppl_lm.lm import pyro_sums  # noqa: F401  # for its effect: enumerated sites beside float64 ones


class Optimality(TorchDistribution):
    """How likely "this text is optimal" (O = 1) is, given its reward: p(O=1 | x) = exp(log_potential(x)).

    With `log_bound`, an upper bound of the log-potential, it is the Bernoulli p(O=1|x) = exp(log_potential - log_bound)
    and can be sampled. Without, it is the unnormalised factor exp(log_potential) at O = 1 (Levine 2018; Korbak et al.
    2022, appendix), and `.sample` raises.

    The log evidence of a program with a bounded site is that of the shifted likelihood; `log_bound` is kept on the
    site, and `ppl_lm` reports log Z for exp(log_potential) throughout.

    :param log_potential: r/β in nats; -inf means impossible.
    :param log_bound: r_max/β in nats.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.boolean  # pyright: ignore[reportAssignmentType]

    def __init__(self, log_potential: Float[Tensor, "*S"], log_bound: float | None = None):
        if log_bound is not None and bool((log_potential > log_bound + 1e-9).any()):
            raise ValueError(
                f"log_bound={log_bound:.4g} nats, but a log-potential reached {float(log_potential.max()):.4g}; "
                "raise r_max, or leave it out"
            )
        self.log_potential = log_potential
        self.log_bound = log_bound
        super().__init__(log_potential.shape, torch.Size(), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Optimality":
        return Optimality(self.log_potential.expand(batch_shape), self.log_bound)

    def log_prob(self, value: Shaped[Tensor, "*#S"]) -> Float[Tensor, "*#S"]:
        """log p(O = value) in nats, (*S,)."""
        value = value.to(self.log_potential.device).bool()
        if self.log_bound is None:
            if not bool(value.all()):
                raise ValueError("observed O=0, whose probability needs a bound of the reward: declare r_max")
            return self.log_potential
        log_p = self.log_potential - self.log_bound
        below = torch.where(value, -1.0, log_p)  # keeps the branch not taken out of the gradient: log(0) at the bound
        return torch.where(value, log_p, torch.log(-torch.expm1(below)))

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Float[Tensor, "*S"]:
        if self.log_bound is None:
            raise ValueError("an Optimality without log_bound is an unnormalised factor; declare r_max to sample it")
        p = (self.log_potential - self.log_bound).exp().expand(torch.Size(sample_shape) + self.batch_shape)
        return torch.bernoulli(p)
