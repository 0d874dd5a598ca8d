from . import (
    objectives as objectives,
    off_policy as off_policy,
    samplers as samplers,
    traces as traces,
    twists as twists,
)
from .binding import Bound as Bound, bind as bind
from .draws import Draws as Draws, NoSupportError as NoSupportError
from .elbo import SequenceELBO as SequenceELBO
from .enumeration import EnumeratedPosterior as EnumeratedPosterior, enumerate_posterior as enumerate_posterior
from .objectives import baselines as baselines
from .objectives.protocol import Objective as Objective
from .prediction import predictive as predictive
from .terms import Estimate as Estimate, Terms as Terms
