"""Inference: how a posterior is approximated, whatever it is."""

from ppl_lm.infer.bind import Bound, bind
from ppl_lm.infer.elbo import SequenceELBO

__all__ = ["Bound", "SequenceELBO", "bind"]
