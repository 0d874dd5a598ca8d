"""What an objective says of itself, and what a plain function is taken to say.

Rejected: a flag that is looked for and silently not found, a plain function that is refused, a baseline whose memory is not
seen, and `reverse_kl` with another slope taken for -ELBO.
"""

from dataclasses import replace

import pytest
import torch

from ppl_lm.guides import finetuned
from ppl_lm.infer import off_policy
from ppl_lm.infer.binding import bind
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.objectives.baselines import MovingAverage, MovingLogZ, as_estimate, constant, known, leave_one_out
from ppl_lm.infer.objectives.catalogue import OBJECTIVES, objective
from ppl_lm.infer.objectives.divergences import forward_kl, reverse_kl
from ppl_lm.infer.objectives.protocol import FunctionObjective, Objective, as_objective
from ppl_lm.infer.terms import scored
from ppl_lm.lm.table import table_lm
from ppl_lm.models import constrained, tilted

HARD = ["forward_kl", "jensen_shannon", "total_variation", "chi2", "alpha"]  # these fit evidence that rules texts out


def mine(terms):
    cost = terms.log_guide - terms.log_joint
    return scored(terms, cost, cost)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_says_all_of_itself(name):
    made = objective(name, 0.7)
    assert isinstance(made, Objective) and made.name == name
    assert made.allows_hard_constraints == (name in HARD)
    assert made.mass_covering == (name in ("forward_kl", "chi2"))
    assert made.is_negative_elbo == (name == "reverse_kl")


def test_a_plain_function_gets_the_defaults():
    for function in (mine, lambda terms: mine(terms)):
        taken = SequenceELBO(2, objective=function).objective
        assert (taken.allows_hard_constraints, taken.mass_covering, taken.is_negative_elbo) == (False, False, False)
    assert not replace(reverse_kl, slope=lambda log_t: 2 * log_t).is_negative_elbo
    assert as_objective(mine).name == "mine" and as_objective(forward_kl) is forward_kl


def test_a_function_is_fitted_as_the_flags_say():
    """A plain function is refused for a hard constraint, under its own name; a wrapped one that says it can is not."""
    lm = table_lm(3, 2, concentration=1.0)
    target = bind(constrained, lm, constraint=lambda completions, **_: ["a" in text for text in completions])
    args = target, bind(finetuned, lm.copy()), [""]
    with pytest.raises(ValueError, match="my_divergence cannot fit a hard constraint: .*forward_kl"):
        my_divergence = lambda terms: forward_kl(terms)  # noqa: E731
        my_divergence.__name__ = "my_divergence"
        SequenceELBO(64, objective=my_divergence).loss_and_grads(*args)
    allowed = FunctionObjective(lambda terms: forward_kl(terms), "mine", allows_hard_constraints=True)
    assert SequenceELBO(64, objective=allowed).loss_and_grads(*args) < torch.inf


def test_half_an_objective_is_refused(unchecked):
    class Half:
        mass_covering = True

        def __call__(self, terms):
            return mine(terms)

    with pytest.raises(ValueError, match="Half has mass_covering but not name, allows_hard_constraints, is_negative"):
        SequenceELBO(2, objective=Half())
    for wrong in (FunctionObjective, "reverse_kl", None):
        with pytest.raises(ValueError, match=r"objective=.*give a function of Terms"):
            SequenceELBO(2, objective=wrong)


def test_a_source_without_its_fields_is_refused(unchecked):
    with pytest.raises(ValueError, match=r"source=.*give a source of texts"):
        SequenceELBO(2, source=lambda draw, prompts: draw())
    assert [source.updates for source in (off_policy.Reuse(3), off_policy.Replay())] == [3, 1]


def test_what_remembers_steps_says_so():
    """For draws that come again its answer stays what it was; a plain function is asked anew each time."""
    assert MovingAverage().remembers_steps and MovingLogZ().remembers_steps
    assert not any(as_estimate(f).remembers_steps for f in (leave_one_out, constant(0.3), known(torch.zeros(1))))
    calls = []

    def plain(cost, ratio):
        calls.append(cost)
        return torch.zeros_like(cost)

    class Remembering:
        remembers_steps = True

        def __call__(self, cost, ratio):
            return plain(cost, ratio)

    lm = table_lm(3, 2, concentration=1.0)
    target = bind(tilted, lm, reward=lambda completions, **_: [len(text) for text in completions], beta=1.0)
    for baseline, asked in ((plain, 4), (Remembering(), 2)):
        guide, prompts = bind(finetuned, lm.copy()), lm.prompts([""])
        elbo = SequenceELBO(2, objective=replace(reverse_kl, name="as it is written"), baseline=baseline)
        elbo.source, before = off_policy.Reuse(2), len(calls)
        for _ in range(4):
            elbo.loss_and_grads(target, guide, prompts)
        assert len(calls) - before == asked
