from . import graphs as graphs
from .inference_data.arviz_groups import to_arviz as to_arviz, to_datatree as to_datatree
from .inference_data.arviz_reading import from_arviz as from_arviz
from .calibration import Calibration as Calibration, sbc as sbc
from .diagnoses.diagnosis import Diagnosis as Diagnosis, diagnose as diagnose, exact_among as exact_among
from .diagnoses.draws_diagnosis import diagnose_draws as diagnose_draws
from .diagnoses.side_by_side import samples as samples, variety as variety
from .diagnoses.verdicts import Verdict as Verdict, judge as judge
from .effective_size import ess as ess
from .evidence import Evidence as Evidence, log_evidence as log_evidence
from .expectations import Expectation as Expectation, expectation as expectation
from .gains import token_gains as token_gains
from .model_comparison import ComparedModel as ComparedModel, compare_models as compare_models
from .path_estimates import StateConstants as StateConstants, mbar as mbar, path_constants as path_constants
from .predictive_checks import PredictiveCheck as PredictiveCheck, predictive_check as predictive_check
from .reward_frontier import reward_kl_frontier as reward_kl_frontier
from .sensitivity import Sensitivity as Sensitivity, power_scale as power_scale
from .summaries import summary as summary
from .text_diversity import diversity as diversity
from .law_tests.token_quantiles import (
    NextTokenCalibration as NextTokenCalibration,
    next_token_calibration as next_token_calibration,
)
from .law_tests.two_sample_tests import TwoSample as TwoSample, two_sample as two_sample
from .weights import (
    ess_se as ess_se,
    khat_se as khat_se,
    khat_threshold as khat_threshold,
    max_weight as max_weight,
    pareto_smooth as pareto_smooth,
    psis_khat as psis_khat,
)
