from . import (
    objectives as objectives,
)
from . import (
    off_policy as off_policy,
)
from . import (
    samplers as samplers,
)
from . import (
    traces as traces,
)
from . import (
    twists as twists,
)
from .binding import Bound as Bound
from .binding import bind as bind
from .draws import Draws as Draws
from .draws import NoSupportError as NoSupportError
from .elbo import SequenceELBO as SequenceELBO
from .enumeration import EnumeratedPosterior as EnumeratedPosterior
from .enumeration import enumerate_posterior as enumerate_posterior
from .objectives import baselines as baselines
from .objectives.protocol import Objective as Objective
from .prediction import predictive as predictive
from .terms import Estimate as Estimate
from .terms import Terms as Terms
