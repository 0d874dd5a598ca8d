from . import baselines as baselines
from .balance import SubTB as SubTB
from .balance import TrajectoryBalance as TrajectoryBalance
from .balance import vargrad as vargrad
from .bounds import iwae as iwae
from .divergences import (
    Divergence as Divergence,
)
from .divergences import (
    alpha_divergence as alpha_divergence,
)
from .divergences import (
    chi2 as chi2,
)
from .divergences import (
    forward_kl as forward_kl,
)
from .divergences import (
    jensen_shannon as jensen_shannon,
)
from .divergences import (
    reverse_chi2 as reverse_chi2,
)
from .divergences import (
    reverse_kl as reverse_kl,
)
from .divergences import (
    total_variation as total_variation,
)
from .protocol import (
    FunctionObjective as FunctionObjective,
)
from .protocol import (
    Objective as Objective,
)
from .rl import GRPO as GRPO
from .rl import expected_reward as expected_reward
