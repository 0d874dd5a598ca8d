"""`Objective`: what a fit minimises, and what it says of itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ppl_lm.infer.terms import Estimate, Terms

ObjectiveFunction = Callable[[Terms], Estimate]
FLAGS = ("allows_hard_constraints", "mass_covering", "is_negative_elbo")


@runtime_checkable
class Objective(Protocol):
    """A function from `Terms` to an `Estimate`, with what `SequenceELBO` and `fit` have to know of it.

    A plain function will do where an objective is asked for: it gets the flags' defaults, all False, and its own name. One that
    needs others is a `FunctionObjective` of it, or a class with these fields."""

    @property
    def name(self) -> str:
        """As the command line and error messages have it."""
        ...

    @property
    def allows_hard_constraints(self) -> bool:
        """Whether its costs stay finite where the posterior is 0, so that it can fit evidence which rules texts out."""
        ...

    @property
    def mass_covering(self) -> bool:
        """Whether it asks for all of the posterior's mass before all of the guide's, so that KL(p ‖ q), and not the ELBO, says
        how a fit goes."""
        ...

    @property
    def is_negative_elbo(self) -> bool:
        """Whether it is E_q[log q - log p(z, evidence)]. Then, on the guide's own draws, reparameterised sites get pathwise
        gradients, the model's own parameters theirs, and sites may lie outside the prompt plate, all from the programs' own
        densities: it is not called. Any other objective gives every site of the guide a score function, and the model
        nothing."""
        ...

    def __call__(self, terms: Terms) -> Estimate: ...


@dataclass(frozen=True)
class FunctionObjective:
    """An `Objective` that is a function and flags.

    >>> FunctionObjective(my_divergence, "mine", allows_hard_constraints=True)   # doctest: +SKIP"""

    function: ObjectiveFunction
    name: str
    allows_hard_constraints: bool = False
    mass_covering: bool = False
    is_negative_elbo: bool = False

    def __call__(self, terms: Terms) -> Estimate:
        return self.function(terms)


def as_objective(value: Objective | ObjectiveFunction) -> Objective:
    """A plain function with the flags' defaults; an `Objective` as it is.

    :raises ValueError: if it is no function of `Terms`, or has some of the flags but not all."""
    if isinstance(value, type) or not callable(value):
        raise ValueError(
            f"objective={value!r}; give a function of Terms, such as ppl_lm.objectives.forward_kl or ppl_lm.objectives.SubTB()"
        )
    if isinstance(value, Objective):
        return value
    name = value.__name__ if hasattr(value, "__name__") else type(value).__name__
    if some := [flag for flag in FLAGS if hasattr(value, flag)]:
        lacking = [field for field in ("name", *FLAGS) if not hasattr(value, field)]
        raise ValueError(f"objective {name} has {', '.join(some)} but not {', '.join(lacking)}; give it all of them")
    return FunctionObjective(value, name)
