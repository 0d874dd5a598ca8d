from . import baselines as baselines
from .balance import SubTB as SubTB, TrajectoryBalance as TrajectoryBalance, vargrad as vargrad
from .bounds import iwae as iwae
from .divergences import (
    Divergence as Divergence,
    alpha_divergence as alpha_divergence,
    chi2 as chi2,
    forward_kl as forward_kl,
    jensen_shannon as jensen_shannon,
    reverse_chi2 as reverse_chi2,
    reverse_kl as reverse_kl,
    total_variation as total_variation,
)
from .protocol import FunctionObjective as FunctionObjective, Objective as Objective
from .rl import GRPO as GRPO, expected_reward as expected_reward
