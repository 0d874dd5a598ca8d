"""Weights in Pyro's parameter store: saved, loaded, gone on with; and refused where they do not fit."""

import gc
import weakref

import pyro
import pytest
import tiny
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import Adam

from ppl_lm.guides import finetuned
from ppl_lm.infer import stored_weights
from ppl_lm.infer.binding import bind
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.traces.structure import plate_nesting
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted


def letters(completions, **_):
    return [float(text.count("a")) for text in completions]


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """Nothing that other tests bound is alive."""
    monkeypatch.setattr(stored_weights, "_bound", weakref.WeakSet())


@pytest.fixture
def lm():
    return table_lm(3, 3, concentration=1.0)


def fit(lm, guide, optim, steps, seed):
    torch.manual_seed(seed)
    svi = SVI(bind(tilted, lm, reward=letters, beta=0.5), guide, optim, loss=SequenceELBO(8))
    return [svi.step([""]) for _ in range(steps)]


def saved(tmp_path, lm, name="guide", steps=3):
    """A store as another process left it on disk, with the guide's weights."""
    guide, optim = bind(finetuned, lm.copy(), name=name), Adam({"lr": 0.1})
    fit(lm, guide, optim, steps, 0)
    pyro.get_param_store().save(tmp_path / "store")
    optim.save(tmp_path / "optim")
    weights = guide.lm.model.table.detach().clone()
    pyro.clear_param_store()
    return weights


def test_a_fit_goes_on_after_save_and_load_as_if_it_had_not_stopped(lm, tmp_path):
    whole, optim = bind(finetuned, lm.copy(), name="guide"), Adam({"lr": 0.1})
    first = fit(lm, whole, optim, 3, 0)
    pyro.get_param_store().save(tmp_path / "store")
    optim.save(tmp_path / "optim")
    expected = fit(lm, whole, optim, 3, 1)
    reached = whole.lm.model.table.detach().clone()

    pyro.clear_param_store()
    bind(finetuned, lm.copy())  # a new process may have bound anything before
    again, optim = bind(finetuned, lm.copy(), name="guide"), Adam({"lr": 0.1})
    pyro.get_param_store().load(tmp_path / "store")
    optim.load(tmp_path / "optim")
    assert fit(lm, again, optim, 3, 1) == expected != first
    assert torch.equal(again.lm.model.table, reached)


@pytest.mark.parametrize("bound_first", [True, False])
@pytest.mark.parametrize("use", ["sampler", "lm", "torch optimiser"])
def test_loaded_weights_are_the_guides(lm, tmp_path, bound_first, use):
    weights = saved(tmp_path, lm)
    if not bound_first:
        pyro.get_param_store().load(tmp_path / "store")
    guide = bind(finetuned, lm.copy(), name="guide")
    target = bind(tilted, lm, reward=letters, beta=0.5)
    optimiser = torch.optim.SGD(guide.parameters(), lr=1.0)
    if bound_first:
        pyro.get_param_store().load(tmp_path / "store")
    if use == "lm":
        assert guide.lm is guide.networks["lm"]
    elif use == "sampler":
        importance(target, guide, [""], num_samples=2)
    else:
        SequenceELBO(8)(target, guide)([""]).backward()
    assert torch.equal(guide.networks["lm"].model.table, weights)
    if use == "torch optimiser":  # made before: the weights must still be the tensors that it holds
        optimiser.step()
        assert not torch.equal(guide.networks["lm"].model.table, weights)


def test_the_default_name_does_not_count_what_came_before(lm):
    for _ in range(3):
        bind(finetuned, lm.copy())
        bind(tilted, lm, reward=letters)
    gc.collect()
    first, second = bind(finetuned, lm.copy()), bind(finetuned, lm.copy())
    assert (first.name, second.name) == ("finetuned", "finetuned_1")
    with pytest.raises(TypeError, match="bind takes name= for itself"):
        bind(lambda prompts, name: None)
    for bad in ("", "a$$$b"):
        with pytest.raises(ValueError, match="name="):
            bind(finetuned, lm.copy(), name=bad)


def test_weights_under_a_name_that_nobody_has_are_not_passed_over(lm, tmp_path):
    saved(tmp_path, lm, name="finetuned_1")
    pyro.get_param_store().load(tmp_path / "store")
    for guide in (bind(finetuned, lm.copy()), bind(finetuned, lm.copy(), name="guide")):
        with pytest.raises(ValueError, match=r"loaded under the name 'finetuned_1', .*bind\(..., name='finetuned_1'\)"):
            guide([""])
    bind(finetuned, lm.copy(), name="finetuned_1")([""])
    bind(finetuned, lm.copy(), name="guide")([""])  # now there is nothing that might have been meant


def test_of_two_that_fit_the_one_that_is_meant_must_be_named(lm, tmp_path):
    """A notebook's second guide: its store may hold both, and the first has the name that a new process would give."""
    first = bind(finetuned, lm.copy())
    first([""])
    weights = saved(tmp_path, lm, name="finetuned_1")
    pyro.clear_param_store()
    del first
    gc.collect()
    store = pyro.get_param_store()
    store.load(tmp_path / "store")
    assert len(store) == 2
    with pytest.raises(ValueError, match="'finetuned_1', which no bound program has; this one is 'finetuned'"):
        bind(finetuned, lm.copy())([""])
    assert torch.equal(bind(finetuned, lm.copy(), name="finetuned_1").lm.model.table, weights)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda lm: table_lm(3, 2, concentration=1.0).copy(), "was loaded with shape .* bind the kind of network"),
        (lambda lm: lm.copy().to(torch.bfloat16), "torch.float.*; the network has .*torch.bfloat16"),
        (lambda lm: lm.copy().requires_grad_(False), "trains no such weight"),
        (lambda lm: tiny.language_model("llama").copy(), "trains no such weight"),
    ],
)
def test_what_does_not_fit_is_refused(lm, tmp_path, other, message):
    weights = saved(tmp_path, lm)
    network = other(lm)
    before = [p.clone() for p in network.parameters()]
    guide = bind(finetuned, network, name="guide")
    pyro.get_param_store().load(tmp_path / "store")
    with pytest.raises(ValueError, match=message):
        guide([""])
    assert all(map(torch.equal, before, network.parameters())) and weights is not None


def test_a_part_of_the_weights_is_refused(tmp_path):
    guide = bind(finetuned, tiny.language_model("llama").copy(), name="guide")
    guide([""])
    store = pyro.get_param_store()
    state = store.get_state()
    state["params"] = {k: v.detach().clone().requires_grad_() for k, v in [*state["params"].items()][1:]}
    pyro.clear_param_store()
    store.set_state(state)
    with pytest.raises(ValueError, match="what was loaded into the parameter store lacks 'guide"):
        guide([""])


def test_a_cell_with_a_name_that_runs_twice_trains_two_guides(lm):
    """The first guide may be alive still, or dead and not collected: its weights are no loaded ones."""
    first = bind(finetuned, lm.copy(), name="guide")
    fit(lm, first, Adam({"lr": 0.1}), 3, 0)
    kept = first.lm.model.table.detach().clone()
    second = bind(finetuned, lm.copy(), name="guide")
    second([""])
    assert torch.equal(second.lm.model.table, lm.model.table)
    del first
    gc.collect()
    assert [key for key in pyro.get_param_store().keys() if key.startswith("guide")]  # noqa: SIM118
    fit(lm, second, Adam({"lr": 0.1}), 3, 0)
    assert torch.equal(second.lm.model.table, kept)  # the same steps from the same start


def test_a_value_that_is_set_in_the_store_reaches_the_network(lm):
    guide = bind(finetuned, lm.copy(), name="guide")
    guide([""])
    (key,) = pyro.get_param_store().keys()
    pyro.get_param_store()[key] = torch.zeros_like(guide.lm.model.table)
    assert not guide.lm.model.table.any()


def test_handlers_that_replace_weights_are_refused(lm):
    guide = bind(finetuned, lm.copy(), name="guide")
    guide([""])
    with pytest.raises(ValueError, match="something else was put in the place of 'guide"):
        poutine.substitute(guide, data={"lm.model.table": torch.zeros_like(lm.model.table)})([""])


def test_a_network_that_got_new_weights_trains_them(lm):
    guide = bind(finetuned, lm.copy(), name="guide")
    guide([""])
    guide.lm.model.table = torch.nn.Parameter(torch.zeros_like(lm.model.table).T.contiguous().T)  # not contiguous
    fit(lm, guide, Adam({"lr": 0.1}), 2, 0)
    assert guide.lm.model.table.any()


def test_weights_of_a_guide_that_dies_while_plates_are_counted_do_not_come_back(lm):
    """Once, the store was put back as it had been: weights of nobody, and every later guide was refused."""
    dead = bind(finetuned, lm.copy())
    importance(bind(tilted, lm, reward=letters), dead, [""], num_samples=2)
    assert [*pyro.get_param_store().keys()] == ["finetuned$$$lm.model.table"]
    ring = [dead]
    ring.append(ring)  # which only the garbage collector takes apart
    del dead

    def program(prompts, lm, ring):
        ring.pop() if ring else None
        gc.collect()
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("x", lm(prompts))

    holder = [ring]
    del ring
    importance(bind(lambda prompts, lm: program(prompts, lm, holder), lm), None, [""], num_samples=2)
    assert [*pyro.get_param_store().keys()] == []
    importance(bind(tilted, lm, reward=letters), bind(finetuned, lm.copy(), name="another"), [""], num_samples=2)


def test_counting_plates_leaves_shared_weights_their_name(lm):
    shared = lm.copy()
    first, second = bind(finetuned, shared, name="a"), bind(finetuned, shared, name="b")
    optim, target = Adam({"lr": 0.1}), bind(tilted, lm, reward=letters, beta=0.5)
    SVI(target, first, optim, loss=SequenceELBO(4)).step([""])
    plate_nesting(target, second, [""])
    assert [*pyro.get_param_store().keys()] == ["a$$$lm.model.table"]
    assert {*optim.get_state()} == {"a$$$lm.model.table"}
