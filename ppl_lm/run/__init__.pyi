from .fitting.loop import Fit as Fit, fit as fit
from .measuring import Measurement as Measurement, measure as measure
from .read_run import read as read
from .run_record import FittedRun as FittedRun, Run as Run, SampledRun as SampledRun
