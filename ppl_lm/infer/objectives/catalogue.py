"""All objectives in one place, and by the names that the command line has for them."""

from collections.abc import Callable

from ppl_lm.infer.objectives.balance import SubTB, TrajectoryBalance, vargrad
from ppl_lm.infer.objectives.bounds import iwae
from ppl_lm.infer.objectives.divergences import (
    alpha_divergence,
    chi2,
    forward_kl,
    jensen_shannon,
    reverse_chi2,
    reverse_kl,
    total_variation,
)
from ppl_lm.infer.objectives.protocol import Objective, ObjectiveFunction, as_objective
from ppl_lm.infer.objectives.rl import GRPO, expected_reward

OBJECTIVES: dict[
    str, Callable[[float], Objective | ObjectiveFunction]
] = {  # from the reward's temperature; those with a memory made anew
    "reverse_kl": lambda beta: reverse_kl,
    "forward_kl": lambda beta: forward_kl,
    "jensen_shannon": lambda beta: jensen_shannon,
    "total_variation": lambda beta: total_variation,
    "chi2": lambda beta: chi2,
    "reverse_chi2": lambda beta: reverse_chi2,
    "alpha": lambda beta: alpha_divergence(),
    "iwae": lambda beta: iwae,
    "trajectory_balance": lambda beta: TrajectoryBalance(),
    "vargrad": lambda beta: vargrad,
    "subtb": lambda beta: SubTB(),
    "expected_reward": lambda beta: expected_reward,
    "grpo": GRPO,
}


def objective(name: str, beta: float) -> Objective:
    """:raises ValueError: if there is none of that name; the message lists what there is."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective={name!r} is unknown; give one of {', '.join(OBJECTIVES)}")
    return as_objective(OBJECTIVES[name](beta))


def hard_constraint(refused: Objective) -> ValueError:
    """That this objective cannot serve a posterior that rules texts out, and what can."""
    works = ", ".join(name for name in OBJECTIVES if objective(name, 1.0).allows_hard_constraints)
    return ValueError(
        f"{refused.name} cannot fit a hard constraint: it is infinite for a guide that ever draws an impossible text. "
        f"Objectives that can: {works}. Or draw from this posterior with importance() or rejection(), on the command line with "
        "ppl-lm sample MODEL --sampler rejection"
    )


def truncated_guide(refused: Objective) -> ValueError:
    """That this objective cannot fit a guide whose law is truncated, and what can."""
    works = ", ".join(name for name in OBJECTIVES if not objective(name, 1.0).mass_covering)
    return ValueError(
        f"{refused.name} is infinite for a guide that cannot draw some of the posterior's texts, and this one's law is "
        f"truncated (top-p, min-p or top-k): fit the language model without the truncation, or by one of {works}"
    )
