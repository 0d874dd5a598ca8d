from . import kernels as kernels, resampling as resampling
from .constraints.adaptive_rejection_sampling import adaptive_rejection as adaptive_rejection
from .rare_events.annealing import annealed_smc as annealed_smc
from .best_of_n_sampling import best_of_n as best_of_n
from .conditional import conditional_smc as conditional_smc
from .importance_sampling import importance as importance
from .markov_chains import mcmc as mcmc
from .pyro_mcmc import SequenceKernel as SequenceKernel
from .quasi_rejection_sampling import Quality as Quality, quality as quality, quasi_rejection as quasi_rejection
from .rejection_sampling import rejection as rejection
from .sequential import smc as smc
from .settings import SMCSettings as SMCSettings
from .rare_events.splitting_levels import splitting as splitting
from .twist import Twist as Twist
