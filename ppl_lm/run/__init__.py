"""Running: the fit loop and run folders."""

from ppl_lm.run.fit import Fit, fit

__all__ = ["Fit", "fit"]
