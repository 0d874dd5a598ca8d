from .fitting import fit_twist as fit_twist
from .functions import exact_twist as exact_twist
from .functions import prefix_likelihood as prefix_likelihood
from .functions import tempered as tempered
from .losses import (
    Rollouts as Rollouts,
)
from .losses import (
    ctl as ctl,
)
from .losses import (
    fudge as fudge,
)
from .losses import (
    log_variance as log_variance,
)
from .losses import (
    sixo as sixo,
)
from .losses import (
    soft_rl as soft_rl,
)
from .networks import twist_like as twist_like
