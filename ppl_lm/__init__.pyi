# The public names, by the step of the workflow that needs them. Read at import, so that each is loaded when first asked for.

# What the text is before any evidence: a language model.
# Criticism: how close an approximation is, in numbers and pictures.
from . import plot as plot
from .criticism import graphs as graphs
from .criticism.arviz_groups import to_arviz as to_arviz
from .criticism.arviz_reading import from_arviz as from_arviz
from .criticism.calibration import sbc as sbc
from .criticism.diagnoses.diagnosis import diagnose as diagnose
from .criticism.diagnoses.draws_diagnosis import diagnose_draws as diagnose_draws
from .criticism.evidence import log_evidence as log_evidence
from .criticism.model_comparison import compare_models as compare_models
from .criticism.predictive_checks import predictive_check as predictive_check
from .criticism.sensitivity import power_scale as power_scale
from .criticism.text_diversity import diversity as diversity
from .criticism.weights import ess as ess
from .criticism.weights import pareto_smooth as pareto_smooth
from .criticism.weights import psis_khat as psis_khat

# Inference: programs bound to their networks, guides fitted to them, and samplers.
from .infer import baselines as baselines
from .infer import objectives as objectives
from .infer import off_policy as off_policy
from .infer import twists as twists
from .infer.binding import bind as bind
from .infer.draws import Draws as Draws
from .infer.draws import NoSupportError as NoSupportError
from .infer.elbo import SequenceELBO as SequenceELBO
from .infer.enumeration import enumerate_posterior as enumerate_posterior
from .infer.prediction import predictive as predictive
from .infer.samplers import kernels as kernels
from .infer.samplers import resampling as resampling
from .infer.samplers.best_of_n_sampling import best_of_n as best_of_n
from .infer.samplers.conditional import conditional_smc as conditional_smc
from .infer.samplers.importance_sampling import importance as importance
from .infer.samplers.markov_chains import mcmc as mcmc
from .infer.samplers.pyro_mcmc import SequenceKernel as SequenceKernel
from .infer.samplers.quasi_rejection_sampling import quality as quality
from .infer.samplers.quasi_rejection_sampling import quasi_rejection as quasi_rejection
from .infer.samplers.rejection_sampling import rejection as rejection
from .infer.samplers.sequential import smc as smc
from .infer.samplers.settings import SMCSettings as SMCSettings

# What it is conditioned on.
from .infer.traces.observations import likelihood_bound as likelihood_bound
from .likelihood import rewards as rewards
from .likelihood.automata import Automaton as Automaton
from .likelihood.best_of import BestOfN as BestOfN
from .likelihood.optimality import Optimality as Optimality
from .likelihood.reward import Reward as Reward
from .likelihood.reward import RewardError as RewardError
from .lm.experts import product as product
from .lm.language_model import LanguageModel as LanguageModel
from .lm.network import DivergedError as DivergedError
from .lm.prompts import Prompts as Prompts
from .run.fitting import fit as fit

__version__: str
