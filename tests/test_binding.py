"""`bind`: the traps that prototypes fell into without an error, each with its test."""

import gc
import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from ppl_lm.guides import finetuned, prior
from ppl_lm.infer.binding import bind
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.likelihood.reward import Reward
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted


def letters(completions, **_):
    return [float(text.count("a")) for text in completions]


def cell(lm):
    """What a notebook cell does: bind, fit a little, return how far the guide moved."""
    target, guide = bind(tilted, lm, reward=letters, beta=0.5), bind(finetuned, lm.copy())
    before = guide.lm.model.table.detach().clone()
    svi = SVI(target, guide, pyro.optim.Adam({"lr": 0.1}), loss=SequenceELBO(8))
    losses = [svi.step([""]) for _ in range(30)]
    return guide, float((guide.lm.model.table.detach() - before).abs().max()), losses


def test_stock_svi_trains_the_guide_in_both_runs_of_a_cell_and_never_the_prior():
    """With a fixed name in the parameter store the second run would train the first run's tensors."""
    lm = table_lm(3, 3, concentration=1.0)
    untouched = lm.model.table.clone()
    first, moved_first, losses_first = cell(lm)
    kept = first.lm.model.table.detach().clone()
    second, moved_second, losses_second = cell(lm)
    assert moved_first > 0.5 and moved_second > 0.5
    for losses in (losses_first, losses_second):
        assert sum(losses[-5:]) < sum(losses[:5])
    assert torch.equal(first.lm.model.table, kept), "the second run moved the first run's guide"
    assert torch.equal(lm.model.table, untouched), "the prior moved"
    assert first.name != second.name


def test_names_leave_the_store_with_their_module():
    lm = table_lm(3, 2, concentration=1.0)
    guide, *_ = cell(lm)
    name = guide.name
    assert any(key.startswith(name) for key in pyro.get_param_store().keys())  # noqa: SIM118
    del guide
    gc.collect()
    assert not any(key.startswith(name) for key in pyro.get_param_store().keys())  # noqa: SIM118


def test_an_unbound_module_is_refused_instead_of_training_nothing():
    """A plain module without pyro.module under stock SVI trains nothing, silently."""
    lm = table_lm(3, 2, concentration=1.0)
    free = lm.copy()
    svi = SVI(
        bind(tilted, lm, reward=letters), lambda p: finetuned(p, free), pyro.optim.Adam({"lr": 0.1}), SequenceELBO(2)
    )
    with pytest.raises(ValueError, match="nothing to train.*ppl_lm.bind"):
        svi.step(lm.prompts([""]))


def test_shared_trainable_parameters_are_refused():
    lm = table_lm(3, 2, concentration=1.0)
    free = lm.copy()
    target, guide = bind(tilted, free, reward=letters), bind(finetuned, free)
    for run in (
        lambda: SequenceELBO(2).loss_and_grads(target, guide, [""]),
        lambda: SequenceELBO(2)(target, guide)([""]),
        lambda: importance(target, guide, [""], num_samples=2),
    ):
        with pytest.raises(ValueError, match="shares 1 trainable weights with its target"):
            run()


def test_frozen_networks_may_be_shared():
    lm = table_lm(3, 2, concentration=1.0)
    importance(bind(tilted, lm, reward=letters), bind(prior, lm), [""], num_samples=2)


def test_different_tokenizers_are_refused():
    a, b = table_lm(3, 2, concentration=1.0), table_lm(4, 2, concentration=1.0)
    with pytest.raises(ValueError, match="different tokenizers"):
        importance(bind(tilted, a, reward=letters), bind(finetuned, b.copy()), [""], num_samples=2)


def test_functions_become_rewards_and_keep_their_own_call():
    lm = table_lm(3, 2, concentration=1.0)
    target = bind(tilted, lm, reward=letters)
    assert isinstance(target.arguments["reward"], Reward)
    assert bind(tilted, lm, reward=Reward(letters, r_max=2.0)).arguments["reward"].r_max == 2.0


def test_other_functions_are_passed_on_as_they_are():
    def model(prompts, prior, squash, shift):
        return squash(shift(torch.zeros(1)))

    def shift(x):
        return x + 1

    target = bind(model, table_lm(3, 2, concentration=1.0), squash=torch.exp, shift=shift)
    assert float(target([""])) == pytest.approx(math.e)


def test_networks_in_lists_and_dictionaries_are_networks():
    """Otherwise their weights would silently not be trained, moved or refused."""
    a, b = table_lm(3, 2, concentration=1.0), table_lm(3, 2, concentration=1.0, seed=1)

    def mixed(prompts, experts, named):
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("x", experts[1](prompts))
        return named["b"] is experts[1]

    guide = bind(mixed, [a, b.copy()], {"b": b})
    assert guide.lm is a
    assert len([p for p in guide.parameters() if p.requires_grad]) == 1
    assert guide([""]) is False
    assert [n for n in pyro.get_param_store().keys() if n.startswith("mixed")]  # noqa: SIM118


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "missing a required argument: 'reward'"), ({"reward": letters, "temperature": 1.0}, "temperature")],
)
def test_wrong_arguments_are_named_when_binding(arguments, message):
    with pytest.raises(TypeError, match=message):
        bind(tilted, table_lm(3, 2), **arguments)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_beta_must_be_positive(beta):
    lm = table_lm(3, 2)
    with pytest.raises(ValueError, match=f"beta={beta}"):
        importance(bind(tilted, lm, reward=letters, beta=beta), bind(prior, lm), [""], num_samples=2)


def test_module_door_with_a_torch_optimiser():
    lm = table_lm(3, 3, concentration=1.0)
    target, guide = bind(tilted, lm, reward=letters, beta=0.5), bind(finetuned, lm.copy())
    loss = SequenceELBO(32)(target, guide)
    trainable = [p for p in loss.parameters() if p.requires_grad]
    assert len(trainable) == 1
    optimiser = torch.optim.Adam(trainable, lr=0.1)
    values = []
    for _ in range(30):
        optimiser.zero_grad()
        value = loss([""])
        value.backward()
        optimiser.step()
        values.append(float(value.detach()))
    assert sum(values[-5:]) < sum(values[:5])


def test_pyros_own_elbo_takes_the_same_programs():
    """Model and inference are independent: Trace_ELBO runs unchanged, if slower."""
    lm = table_lm(3, 2, concentration=1.0)
    target, guide = bind(tilted, lm, reward=letters, beta=0.5), bind(finetuned, lm.copy())
    svi = SVI(
        target, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1)
    )
    assert torch.isfinite(torch.tensor([svi.step([""]) for _ in range(3)])).all()


def test_copies_have_a_name_of_their_own():
    """A copy under the same name in the parameter store would train nothing, without an error."""
    import copy

    lm = table_lm(3, 3, concentration=1.0)
    target, guide = bind(tilted, lm, reward=letters, beta=0.5), bind(finetuned, lm.copy())
    guide([""])
    twin = copy.deepcopy(guide)
    assert twin.name != guide.name and twin.lm is not guide.lm
    before = guide.lm.model.table.detach().clone()
    svi = SVI(target, twin, pyro.optim.Adam({"lr": 0.1}), loss=SequenceELBO(8))
    for _ in range(5):
        svi.step([""])
    assert torch.equal(guide.lm.model.table.detach(), before)
    assert float((twin.lm.model.table.detach() - before).abs().max()) > 0.1
