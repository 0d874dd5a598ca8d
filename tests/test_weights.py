"""Pareto-smoothed importance weights.

| what | property | tolerance |
|---|---|---|
| `smoothed` | log Ẑ stays | 1e-10 |
| | the spread of a posterior mean over 200 repetitions, weights of shape k = 0.7: at most 0.7 of the raw weights' | |
| | its bias, which smoothing adds to: at most the raw weights' own standard deviation | 4 standard errors |

Mutants that are rejected: weights as ArviZ normalises them; zeros among the smoothed ones.
"""

from dataclasses import replace

import pytest
import torch

from ppl_lm.diagnose import psis_khat, smoothed
from ppl_lm.diagnose.weights import weighted_mean
from ppl_lm.infer import bind, importance
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted


@pytest.fixture(scope="module")
def draws():
    lm = table_lm(3, 2, concentration=1.0)
    target = bind(tilted, lm, reward=lambda completions, **_: [0.0] * len(completions))
    return importance(target, None, ["", ""], num_samples=4)


def weighted(draws, log_w):
    """Draws with given weights, (S, B)."""
    zeros, columns = torch.zeros_like(log_w)[None], log_w.shape[1]
    return replace(
        draws, prompts=draws.prompts[:columns], log_prior=zeros, log_likelihood=log_w[None], log_guide=zeros,
        latents={}, records={}, texts=(),
    )  # fmt: skip


def heavy(count, shape=0.7, seed=0):
    """Draws of an exponential of rate 1 with weights for one of rate 1 - shape: their tail has that shape."""
    x = torch.empty(count, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(seed))
    return x, torch.log(torch.tensor(1 - shape)) + shape * x


def test_posterior_means_vary_less(draws):
    truth, count, found = 1 / 0.3, 500, []
    for seed in range(200):
        x, log_w = heavy(count, seed=seed)
        raw = weighted(draws, log_w[:, None])
        found.append([float(weighted_mean(x[:, None], made)[0]) for made in (raw, smoothed(raw))])
    raw, smooth = torch.tensor(found).T
    assert float(smooth.std()) < 0.7 * float(raw.std())
    assert abs(float(smooth.mean()) - truth) < float(raw.std()) + 4 * float(smooth.std()) / 200**0.5
    assert float((smooth - truth).square().mean()) < float((raw - truth).square().mean())


def test_the_evidence_and_zeros_stay(draws):
    _, log_w = heavy(900)
    both = torch.stack([log_w - 800, log_w.flip(0)], 1)  # nats: far below what exp can hold
    both[::3, 0] = -torch.inf
    raw = weighted(draws, both)
    made = smoothed(raw)
    torch.testing.assert_close(made.log_weight.logsumexp(1), raw.log_weight.logsumexp(1), atol=1e-10, rtol=0)
    zero = both == -torch.inf
    assert torch.equal(made.log_weight[0] == -torch.inf, zero) and bool(made.log_guide.isfinite().all())
    assert bool(((made.log_weight[0] - both)[~zero[:, 0]].abs().amax(0) > 0.01).all()), "nothing was smoothed"
    order = both[~zero[:, 0], 0].argsort()
    assert bool((made.log_weight[0, ~zero[:, 0], 0][order].diff() >= -1e-12).all())
    alone = smoothed(weighted(draws, both[:, :1]))
    torch.testing.assert_close(alone.log_weight[..., 0], made.log_weight[..., 0], atol=1e-10, rtol=0)


def test_weights_stay_where_khat_does_not_apply(draws):
    constant, few = torch.full((500, 1), -3.0).double(), heavy(15)[1][:, None]
    bounded = torch.cat([torch.zeros(250, 1), -torch.ones(250, 1)]).double()
    nothing = torch.full((500, 1), -torch.inf).double()
    for log_w in (constant, few, bounded, nothing):
        assert psis_khat(log_w[:, 0]) is None
        assert torch.equal(smoothed(weighted(draws, log_w)).log_weight[0], log_w)
    for kind in ("exact", "markov"):
        same = replace(weighted(draws, heavy(500)[1][:, None]), **{kind: True})
        assert smoothed(same) is same


def test_chains_and_other_draws_keep_their_shape(draws):
    log_w = heavy(600)[1]
    raw = weighted(draws, log_w[:, None])
    by_chain = raw.map(lambda v: v.reshape(3, 200, 1))
    made = smoothed(by_chain)
    assert made.log_weight.shape == (3, 200, 1)
    torch.testing.assert_close(made.log_weight.flatten(), smoothed(raw).log_weight.flatten(), atol=0, rtol=0)
