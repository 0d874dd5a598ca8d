from .fitting import Fit as Fit
from .fitting import fit as fit
