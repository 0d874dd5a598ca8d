"""Inference: how a posterior is approximated, whatever it is."""

from ppl_lm.infer import baselines, objectives, off_policy
from ppl_lm.infer.bind import Bound, bind
from ppl_lm.infer.draws import Draws, NoSupportError
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.exact import Exact, exact
from ppl_lm.infer.importance import importance, score
from ppl_lm.infer.rejection import rejection

__all__ = [
    "Bound",
    "Draws",
    "Exact",
    "NoSupportError",
    "SequenceELBO",
    "baselines",
    "bind",
    "exact",
    "importance",
    "objectives",
    "off_policy",
    "rejection",
    "score",
]
