"""What the ordinary sites of a run, those that are no text, add to the gradient of a loss."""

import torch
from torch import Tensor

from ppl_lm.infer.traces.particles import Particles
from ppl_lm.infer.traces.sites import is_sequence


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
