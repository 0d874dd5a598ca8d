from .fitting.loop import Fit as Fit
from .fitting.loop import fit as fit
from .measuring import Measurement as Measurement
from .measuring import measure as measure
from .reading import read as read
from .run_record import FittedRun as FittedRun
from .run_record import Run as Run
from .run_record import SampledRun as SampledRun
