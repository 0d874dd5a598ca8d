"""What a run gives the gradient of -ELBO: the cost of each site's choice, what ordinary sites add to it, and texts."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import MultiFrameTensor
from torch import Tensor

from ppl_lm.infer.traces.particles import Particles
from ppl_lm.infer.traces.sites import is_sequence


@dataclass(frozen=True)
class PlateCost:
    """What the choices of the guide's sites in one set of plates cost.

    :param plates: names; `sites` those of the sites that lie in them.
    :param cost: log q - log p of all that these choices reach, detached, nats, scaled and masked, (K, *plates, B), with 1 for a
        plate that the sites lie outside of.
    :param scale: of the sites themselves, above 0, broadcasts to `cost`."""

    plates: tuple[str, ...]
    sites: tuple[str, ...]
    cost: Tensor
    scale: Tensor


def plate_costs(particles: Particles) -> list[PlateCost]:
    """By plates (Schulman et al. 2015): what lies in other cells of a plate does not depend on a site's choice."""
    total = MultiFrameTensor()
    for name, log_q in particles.log_q.items():
        total.add((particles.guide_sites[name]["cond_indep_stack"], log_q.detach()))
    for name, log_p in particles.log_p.items():
        total.add((particles.model_sites[name]["cond_indep_stack"], -log_p.detach()))
    costs: dict[tuple[str, ...], PlateCost] = {}
    for name, site in particles.guide_sites.items():
        frames = site["cond_indep_stack"]
        plates = tuple(sorted(frame.name for frame in frames))
        if plates in costs:
            costs[plates] = replace(costs[plates], sites=(*costs[plates].sites, name))
            continue
        log_q = particles.log_q[name].detach()
        cost: Tensor = total.sum_to(frames)  # pyright: ignore[reportAssignmentType]
        cost = cost[(None,) * (log_q.dim() - cost.dim())]  # dimensions of 1 that Pyro has dropped
        scale = scale_and_mask(torch.ones_like(log_q), site["scale"], site["mask"])
        costs[plates] = PlateCost(plates, (name,), cost, torch.where(scale > 0, scale, 1.0))
    return list(costs.values())


def ordinary_surrogate(particles: Particles, coefficients: dict[str, Tensor], pathwise: bool) -> Tensor:
    """A scalar whose gradient is that of the mean over particles, as far as ordinary sites go.

    :param coefficients: of the score function of each site of the guide, (K, *plates, B), detached.
    :param pathwise: whether reparameterised sites and the model's own parameters get the gradient of log q - log p through
        its graph, as -ELBO has it; else every site of the guide gets a score function, and the model nothing."""
    surrogate = torch.zeros((), dtype=torch.float64)
    for name, site in particles.model_sites.items():
        if pathwise and name in particles.log_p and not is_sequence(site):
            surrogate = surrogate - particles.log_p[name].sum()
    for name, site in particles.guide_sites.items():
        if is_sequence(site):
            continue
        if pathwise and site["fn"].has_rsample:
            surrogate = surrogate + particles.log_q[name].sum()
        elif particles.log_q[name].requires_grad:
            score = site["fn"].log_prob(site["value"].detach())
            surrogate = surrogate + (score * coefficients[name]).sum()
    return surrogate / particles.count


def sloped(parts: Iterable[Tensor], weights: list[Tensor]) -> Tensor:
    """0, whose derivative by each weight is that of the sum of `parts`, each of which is differentiated as it comes."""
    slopes: list[Tensor | None] = [None] * len(weights)
    for part in parts:
        grads = torch.autograd.grad(part, weights, allow_unused=True)
        slopes = [
            grad if slope is None else slope if grad is None else slope + grad
            for slope, grad in zip(slopes, grads, strict=True)
        ]
    zero: Any = _Sloped.apply(slopes, *weights)
    return zero


class _Sloped(torch.autograd.Function):
    @staticmethod
    def forward(slopes: list[Tensor | None], *weights: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=weights[0].device if weights else None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *(None if slope is None else grad.to(slope.dtype) * slope for slope in ctx.saved_tensors)
