"""Inference: how a posterior is approximated, whatever it is."""

from ppl_lm.infer import baselines, objectives, off_policy, resampling, twists
from ppl_lm.infer.best_of_n import best_of_n
from ppl_lm.infer.bind import Bound, bind
from ppl_lm.infer.conditional_smc import conditional_smc, particle_gibbs
from ppl_lm.infer.draws import Draws, NoSupportError
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.exact import Exact, exact
from ppl_lm.infer.importance import importance, score
from ppl_lm.infer.kernel import SequenceKernel
from ppl_lm.infer.mcmc import mcmc
from ppl_lm.infer.quasi_rejection import quality, quasi_rejection
from ppl_lm.infer.rejection import rejection
from ppl_lm.infer.replicate import replicate
from ppl_lm.infer.smc import smc
from ppl_lm.infer.twist import exact_twist, prefix_likelihood, tempered
from ppl_lm.infer.twists import fit_twist

__all__ = [
    "Bound",
    "Draws",
    "Exact",
    "NoSupportError",
    "SequenceELBO",
    "SequenceKernel",
    "baselines",
    "best_of_n",
    "bind",
    "conditional_smc",
    "exact",
    "exact_twist",
    "fit_twist",
    "importance",
    "mcmc",
    "objectives",
    "off_policy",
    "particle_gibbs",
    "prefix_likelihood",
    "quality",
    "quasi_rejection",
    "rejection",
    "replicate",
    "resampling",
    "score",
    "smc",
    "tempered",
    "twists",
]
