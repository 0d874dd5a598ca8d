# The public names, by the step of the workflow that needs them. The package reads this file, and loads each name when it is
# first asked for.

# The prior: what the text is before any evidence.
from .lm.experts import product as product
from .lm.language_model import LanguageModel as LanguageModel
from .lm.network import DivergedError as DivergedError
from .lm.prompts import Prompts as Prompts

# The evidence: what it is conditioned on.
from .likelihood import rewards as rewards
from .likelihood.automata import Automaton as Automaton
from .likelihood.best_of import BestOfN as BestOfN
from .likelihood.optimality import Optimality as Optimality
from .likelihood.reward import Reward as Reward, RewardError as RewardError
from .infer.traces.observations import likelihood_bound as likelihood_bound

# Fitting: programs bound to their networks, and guides fitted to posteriors.
from .infer.binding import bind as bind
from .infer.elbo import SequenceELBO as SequenceELBO
from .infer import objectives as objectives, off_policy as off_policy
from .infer.objectives import baselines as baselines
from .run.fitting.loop import fit as fit

# Sampling: draws of posteriors.
from .infer.draws import Draws as Draws, NoSupportError as NoSupportError
from .infer.enumeration import enumerate_posterior as enumerate_posterior
from .infer.samplers.importance_sampling import importance as importance
from .infer.samplers.rejection_sampling import rejection as rejection
from .infer.samplers.quasi_rejection_sampling import quality as quality, quasi_rejection as quasi_rejection
from .infer.samplers.best_of_n_sampling import best_of_n as best_of_n
from .infer.samplers.markov_chains import mcmc as mcmc
from .infer.samplers import kernels as kernels, resampling as resampling
from .infer.samplers.pyro_mcmc import SequenceKernel as SequenceKernel
from .infer.samplers.sequential import smc as smc
from .infer.samplers.settings import SMCSettings as SMCSettings
from .infer.samplers.conditional import conditional_smc as conditional_smc
from .infer import twists as twists
from .infer.prediction import predictive as predictive

# Criticism: how close an approximation is, in numbers and in pictures.
from .criticism.diagnoses.diagnosis import diagnose as diagnose
from .criticism.diagnoses.draws_diagnosis import diagnose_draws as diagnose_draws
from .criticism.expectations import expectation as expectation
from .criticism.summaries import summary as summary
from .criticism.evidence import log_evidence as log_evidence
from .criticism.effective_size import ess as ess
from .criticism.weights import psis_khat as psis_khat
from .criticism.model_comparison import compare_models as compare_models
from .criticism.calibration import sbc as sbc
from .criticism.predictive_checks import predictive_check as predictive_check
from .criticism.sensitivity import power_scale as power_scale
from .criticism.text_diversity import diversity as diversity
from .criticism.inference_data.arviz_groups import to_arviz as to_arviz
from .criticism.inference_data.arviz_reading import from_arviz as from_arviz
from .criticism import graphs as graphs
from . import plot as plot

__version__: str
