"""The bound of several particles."""

import math

import torch

from ppl_lm.infer.objectives.baselines import log_sum_of_others
from ppl_lm.infer.terms import Estimate, Terms


def iwae(terms: Terms) -> Estimate:
    """-E[log of the mean of K weights]: log Z from below, tighter with every particle, so that the guide becomes a good
    proposal (Burda et al. 2016), with the gradient of VIMCO (Mnih & Rezende 2016).

    For particle k the bound without it takes for its weight the geometric mean of the others'."""
    terms.require_on_policy("iwae")
    terms.require_particles("iwae")
    log_w, n = terms.log_weight, len(terms.log_weight)
    bound = log_w.logsumexp(0) - math.log(n)
    stand_in = (log_w.sum(0) - log_w) / (n - 1)
    without = torch.logaddexp(log_sum_of_others(log_w), stand_in) - math.log(n)
    return Estimate(-bound, n * (log_w.softmax(0) - (bound - without)))
