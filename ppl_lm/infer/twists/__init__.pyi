from .bellman import bellman_residuals as bellman_residuals
from .fitting import fit_twist as fit_twist
from .functions import (
    exact_twist as exact_twist,
    look_ahead as look_ahead,
    prefix_likelihood as prefix_likelihood,
    prior_power as prior_power,
    tempered as tempered,
)
from .losses import (
    Rollouts as Rollouts,
    ctl as ctl,
    fudge as fudge,
    log_variance as log_variance,
    sixo as sixo,
    soft_rl as soft_rl,
)
from .networks import twist_like as twist_like
