from .fitting import fit_twist as fit_twist
from .functions import exact_twist as exact_twist, prefix_likelihood as prefix_likelihood, tempered as tempered
from .losses import (
    Rollouts as Rollouts,
    ctl as ctl,
    fudge as fudge,
    log_variance as log_variance,
    sixo as sixo,
    soft_rl as soft_rl,
)
from .networks import twist_like as twist_like
