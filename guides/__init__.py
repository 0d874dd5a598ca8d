"""Pyro programs with parameters that approximate a posterior over text. A new one is a new file here."""

from ppl_lm.guides.finetuned import finetuned
from ppl_lm.guides.prior import prior
from ppl_lm.guides.tabular import tabular

__all__ = ["finetuned", "prior", "tabular"]
