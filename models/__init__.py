"""Pyro programs that define one posterior over text each. A new one is a new file here, and no edit anywhere else."""

from ppl_lm.models.constrained import constrained
from ppl_lm.models.tilted import tilted

__all__ = ["constrained", "tilted"]
