from .fitting import Fit as Fit, fit as fit
