"""`SequenceKernel` inside Pyro's `MCMC`. That its steps leave the posterior invariant is shown in test_markov_chains.py.

| what | property | tolerance |
|---|---|---|
| `MCMC.run` | the law of the samples: each outcome's share | 4 standard errors from ArviZ's ESS |

Mutants that are rejected: the guide's law in place of the posterior's.
"""

import sys

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC

from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.draws import NoSupportError
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.kernels import independence, suffix
from ppl_lm.infer.samplers.pyro_mcmc import SequenceKernel
from ppl_lm.lm.table import table_lm
from ppl_lm.models import constrained, tilted

V, T, TEXTS = 3, 2, ["", "a"]


def letters(completions, **_):
    return [text.count("a") - 0.5 * text.count("b") for text in completions]


def problem():
    lm = table_lm(V, T, max_prompt=2, concentration=1.0, seed=1)
    guide = lm.copy()
    guide.model.table.data.mul_(0.7)  # the prior at a higher temperature
    return bind(tilted, lm, reward=letters, beta=1.5), bind(finetuned, guide)


def chain(kernel, **kwargs):
    return MCMC(kernel, **{"num_samples": 20, "warmup_steps": 5, "disable_progbar": True, **kwargs})


def off(samples, cells, law):
    """How many standard errors the share of each outcome is from its probability, the worst; errors by ArviZ's ESS."""
    worst = 0.0
    for b in range(law.shape[1]):
        for cell, p in zip(cells[:, b], law[:, b].tolist(), strict=True):
            hit = (samples[:, b] == cell).all(-1).double()
            if p * len(hit) < 20:
                continue
            ess = float(az.ess(hit.numpy()[None]))
            assert ess > 100
            worst = max(worst, abs(float(hit.mean()) - p) / (p * (1 - p) / ess) ** 0.5)
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [suffix, independence])
def test_the_samples_law_is_the_posterior(kernel):
    target, guide = problem()
    pyro.set_rng_seed(0)
    made = chain(SequenceKernel(target, guide, kernel=kernel), num_samples=1200, warmup_steps=100)
    made.run(TEXTS)
    truth = enumerate_posterior(target, guide, TEXTS)
    samples = made.get_samples()["x"]
    assert off(samples, truth.latents["x"], truth.log_posterior.detach().exp()) < 4
    assert off(samples, truth.latents["x"], truth.log_q.detach().exp()) > 6  # the mutant: the guide's draws
    rate = made.kernel.diagnostics()["acceptance_rate"]
    moved = (samples[1:] != samples[:-1]).any(-1).double().mean(0)
    assert rate.shape == (2,) and bool((moved < rate + 0.05).all()) and bool((rate < 1).all())


def test_samples_are_token_ids_and_a_seed_repeats_them():
    target, guide = problem()
    found = []
    for seed in (3, 3, 4):
        pyro.set_rng_seed(seed)
        made = chain(SequenceKernel(target, guide))
        made.run(TEXTS)
        found.append(made.get_samples()["x"])
    assert found[0].shape == (20, 2, T) and found[0].dtype == torch.int64
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(made.get_samples(group_by_chain=True)["x"], found[2].unsqueeze(0))
    assert made.get_samples(num_samples=7)["x"].shape == (7, 2, T)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_several_chains_start_apart_and_each_has_its_acceptance_rate(monkeypatch):
    """Side by side in processes of their own, or one after the other where there are too few processors."""
    target, guide = problem()
    apart = "fork" if sys.platform == "linux" and torch.get_num_threads() == 1 else "spawn"
    for processors in (4, 1):
        monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda n=processors: n)
        kernel = SequenceKernel(target, guide)
        if processors == 1:
            with pytest.warns(UserWarning, match="drawn sequentially"):
                made = chain(kernel, num_chains=2)
        else:
            made = chain(kernel, num_chains=2, mp_context=apart)
        made.run(TEXTS)
        x = made.get_samples(group_by_chain=True)["x"]
        assert x.shape == (2, 20, 2, T) and x.dtype == torch.int64 and not torch.equal(x[0], x[1])
        rates = [d["acceptance_rate"] for d in made._diagnostics]
        assert len(rates) == 2 and not torch.equal(*rates)


def test_a_chain_starts_where_it_is_told():
    target, guide = problem()
    start = torch.tensor([[0, 2], [1, 1]])
    kernel = SequenceKernel(target, guide)
    seen = []
    first = chain(kernel, warmup_steps=0, initial_params={"x": start}, hook_fn=lambda k, p, s, i: seen.append(p["x"]))
    monkey = kernel.kernel

    def stay(*args):
        propose = monkey(*args)
        return lambda state: (propose(state)[0], torch.full_like(state.log_guide[0], -torch.inf))

    kernel.kernel = stay
    first.run(TEXTS)
    assert all(torch.equal(x, start) for x in seen) and len(seen) == 20
    other = torch.tensor([[2, 2], [0, 0]])  # a sweep over several kernels may hand back another value
    assert torch.equal(kernel.sample({"x": other})["x"], other)
    with pytest.raises(ValueError, match=r"got values of \['y'\]; this program's latent sites are \['x'\]"):
        chain(kernel, initial_params={"y": start}).run(TEXTS)


def test_sites_of_other_dtypes_keep_them():
    lm = table_lm(3, 2, concentration=1.0)

    def story(prompts, prior, reward):
        with pyro.plate("prompts", len(prompts)):
            topic = pyro.sample("topic", dist.Bernoulli(torch.tensor(0.3)))
            r = reward(prompts, pyro.sample("x", prior(prompts))) * topic
            pyro.sample("o", dist.Bernoulli(torch.sigmoid(r)), obs=torch.ones(len(prompts)).double())

    made = chain(SequenceKernel(bind(story, lm, reward=letters), kernel=independence))
    made.run(["", ""])
    samples = made.get_samples()
    assert samples["x"].dtype == torch.int64 and samples["x"].shape == (20, 2, 2)
    assert samples["topic"].dtype == torch.float32 and samples["topic"].shape == (20, 2)
    with pytest.raises(ValueError, match="use kernel=independence"):
        chain(SequenceKernel(bind(story, lm, reward=letters))).run(["", ""])


def test_a_constraint_is_met_after_the_warm_up_or_refused():
    lm = table_lm(4, 4, concentration=1.0, seed=3)
    target = bind(constrained, lm, constraint=lambda completions, **_: ["a" in c for c in completions])
    made = chain(SequenceKernel(target), warmup_steps=50)
    made.run([""])
    assert bool((made.get_samples()["x"] == 0).any(-1).all())
    never = bind(constrained, lm, constraint=lambda completions, **_: [False] * len(completions))
    with pytest.raises(NoSupportError, match="best log weight is -inf"):
        chain(SequenceKernel(never)).run([""])
