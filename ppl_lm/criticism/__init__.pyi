from . import graphs as graphs
from .arviz_groups import to_arviz as to_arviz
from .arviz_groups import to_datatree as to_datatree
from .arviz_reading import from_arviz as from_arviz
from .calibration import Calibration as Calibration
from .calibration import sbc as sbc
from .diagnoses.diagnosis import Diagnosis as Diagnosis
from .diagnoses.diagnosis import diagnose as diagnose
from .diagnoses.diagnosis import exact_among as exact_among
from .diagnoses.draws_diagnosis import diagnose_draws as diagnose_draws
from .diagnoses.side_by_side import samples as samples
from .diagnoses.side_by_side import variety as variety
from .diagnoses.verdicts import Verdict as Verdict
from .diagnoses.verdicts import judge as judge
from .evidence import Evidence as Evidence
from .evidence import log_evidence as log_evidence
from .gains import token_gains as token_gains
from .model_comparison import Compared as Compared
from .model_comparison import compare_models as compare_models
from .predictive_checks import PredictiveCheck as PredictiveCheck
from .predictive_checks import predictive_check as predictive_check
from .sensitivity import Sensitivity as Sensitivity
from .sensitivity import power_scale as power_scale
from .text_diversity import diversity as diversity
from .weights import (
    ess as ess,
)
from .weights import (
    ess_se as ess_se,
)
from .weights import (
    khat_se as khat_se,
)
from .weights import (
    khat_threshold as khat_threshold,
)
from .weights import (
    max_weight as max_weight,
)
from .weights import (
    pareto_smooth as pareto_smooth,
)
from .weights import (
    psis_khat as psis_khat,
)
