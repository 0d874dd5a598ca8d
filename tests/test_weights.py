"""Means by importance weights, Pareto-smoothed ones, and how well effective sample sizes and k-hat are known.

| what | property | tolerance |
|---|---|---|
| `expectation` | its expectation over all pairs of draws, N = 2 | 1e-10 |
| | its bias halves when N doubles | slope -1 ± 0.1 |
| | two standard errors cover the truth in 95% of 2,000 repetitions, of draws and of runs | ± 2% |
| `smoothed` | log Ẑ stays | 1e-10 |
| | the spread of a posterior mean over 200 repetitions, weights of shape k = 0.7: at most 0.7 of the raw weights' | |
| | its bias, which smoothing adds to: at most the raw weights' own standard deviation | 4 standard errors |
| `ess_se` | the spread of the ESS over 400 repetitions, lognormal weights, a third of them zero or none | 20% |
| | the derivative of the ESS by each draw's share, autograd | 1e-10 |
| `khat_se` | the spread of k-hat over 400 repetitions, tails of shape -2 to 1, of 20 to 164 weights | 25% |

Mutants that are rejected: an error around zero instead of the mean, one that takes the texts of a run for independent;
weights as ArviZ normalises them; zeros among the smoothed ones; (Σw)² and Σw² taken for independent, or zeros left out, in the
error of the ESS; the error of the likeliest k for that of ArviZ's, which is drawn to 1/2.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from ppl_lm.criticism.effective_size import ess
from ppl_lm.criticism.expectations import expectation
from ppl_lm.criticism.weights import ess_se, khat_se, max_weight, pareto_smooth, psis_khat
from ppl_lm.experiments.local_masking import resampled
from ppl_lm.infer.binding import bind
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.rejection_sampling import rejection
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
        latents={}, records={}, log_likelihoods={}, texts=(),
    )  # fmt: skip


def heavy(count, shape=0.7, seed=0):
    """Draws of an exponential of rate 1 with weights for one of rate 1 - shape: their tail has that shape."""
    x = torch.empty(count, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(seed))
    return x, torch.log(torch.tensor(1 - shape)) + shape * x


def test_the_expectation_of_a_weighted_mean(draws):
    """Where all outcomes are known: of two draws over every pair, of more by the law of a text that is picked by weight."""
    q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    w = torch.tensor([0.1, 1.0, 3.0, 8.0], dtype=torch.float64)
    f = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for pair in itertools.product(range(4), repeat=2):
        index = torch.tensor(pair)
        made = weighted(draws, w[index].log()[:, None])
        expected += q[index].prod() * expectation(made, f[index].reshape(1, -1, 1)).mean[0]
    torch.testing.assert_close((resampled(q.log(), w.log(), 2).exp() * f).sum(), expected, atol=1e-10, rtol=0)
    truth = (q * w * f).sum() / (q * w).sum()
    bias = torch.stack([(resampled(q.log(), w.log(), n).exp() * f).sum() - truth for n in (200, 400)])
    assert abs(float((bias[1] / bias[0]).log2()) + 1) < 0.1


@pytest.mark.parametrize("runs", [0, 100])
def test_the_error_of_a_weighted_mean_covers(draws, runs):
    """2,000 repetitions side by side, with weights for a normal of mean 0.3; in a run of four texts all have one ancestor."""
    generator = torch.Generator().manual_seed(3)
    shape = (runs, 4, 2000) if runs else (400, 1, 2000)
    alone = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = 0.6 * alone + 0.8 * alone[:, :1] if runs else alone
    x = x / (1.0 if not runs else torch.tensor([1.4, *[1.0] * 3]).unsqueeze(-1))  # each of variance 1
    log_w = 0.3 * x.flatten(0, 1)
    raw = weighted(draws, log_w.expand(-1, 2000))
    made = raw.map(lambda v: v.reshape(shape)) if runs else raw
    made, values = replace(made, kind="runs" if runs else "weighted"), (2.0 + x).reshape(made.log_weight.shape)
    estimate = expectation(made, values)
    centre, se = estimate.mean, estimate.se
    share = lambda error: float(((centre - 2.3).abs() < 1.96 * error).double().mean())  # noqa: E731
    assert abs(share(se) - 0.95) < 0.02
    w = made.log_weight.flatten(0, 1).softmax(0)
    alike = expectation(replace(made, kind="weighted"), values).se  # as if the texts of a run were independent
    wrong = alike if runs else (w * values.flatten(0, 1)).square().sum(0).sqrt()
    assert abs(share(wrong) - 0.95) > 0.02


def test_posterior_means_vary_less(draws):
    truth, count, found = 1 / 0.3, 500, []
    for seed in range(200):
        x, log_w = heavy(count, seed=seed)
        raw = weighted(draws, log_w[:, None])
        found.append([float(expectation(made, x.reshape(1, -1, 1)).mean) for made in (raw, pareto_smooth(raw))])
    raw, smooth = torch.tensor(found).T
    assert float(smooth.std()) < 0.7 * float(raw.std())
    assert abs(float(smooth.mean()) - truth) < float(raw.std()) + 4 * float(smooth.std()) / 200**0.5
    assert float((smooth - truth).square().mean()) < float((raw - truth).square().mean())


def test_the_evidence_and_zeros_stay(draws):
    _, log_w = heavy(900)
    both = torch.stack([log_w - 800, log_w.flip(0)], 1)  # nats: far below what exp can hold
    both[::3, 0] = -torch.inf
    raw = weighted(draws, both)
    made = pareto_smooth(raw)
    torch.testing.assert_close(made.log_weight.logsumexp(1), raw.log_weight.logsumexp(1), atol=1e-10, rtol=0)
    zero = both == -torch.inf
    assert torch.equal(made.log_weight[0] == -torch.inf, zero) and bool(made.log_guide.isfinite().all())
    assert bool(((made.log_weight[0] - both)[~zero[:, 0]].abs().amax(0) > 0.01).all()), "nothing was smoothed"
    order = both[~zero[:, 0], 0].argsort()
    assert bool((made.log_weight[0, ~zero[:, 0], 0][order].diff() >= -1e-12).all())
    alone = pareto_smooth(weighted(draws, both[:, :1]))
    torch.testing.assert_close(alone.log_weight[..., 0], made.log_weight[..., 0], atol=1e-10, rtol=0)


def test_weights_stay_where_khat_does_not_apply(draws):
    constant, few = torch.full((500, 1), -3.0).double(), heavy(15)[1][:, None]
    bounded = torch.cat([torch.zeros(250, 1), -torch.ones(250, 1)]).double()
    nothing = torch.full((500, 1), -torch.inf).double()
    for log_w in (constant, few, bounded, nothing):
        assert psis_khat(log_w[:, 0]) is None
        assert torch.equal(pareto_smooth(weighted(draws, log_w)).log_weight[0], log_w)
    for kind in ("exact", "chains", "runs", "conditional_runs"):
        same = replace(weighted(draws, heavy(500)[1][:, None]), kind=kind)
        assert pareto_smooth(same) is same


def test_chains_and_other_draws_keep_their_shape(draws):
    log_w = heavy(600)[1]
    raw = weighted(draws, log_w[:, None])
    by_chain = raw.map(lambda v: v.reshape(3, 200, 1))
    made = pareto_smooth(by_chain)
    assert made.log_weight.shape == (3, 200, 1)
    torch.testing.assert_close(made.log_weight.flatten(), pareto_smooth(raw).log_weight.flatten(), atol=0, rtol=0)


@pytest.mark.parametrize("top", [95, 105, 119, 140])
def test_a_tail_whose_upper_part_is_tied_leaves_weights_as_they_are(top):
    """ArviZ fits the weights above the tail's lower end; where those are all the same it answers NaN and a finite k-hat."""
    log_w = torch.zeros(2000, dtype=torch.float64)
    log_w[:top] = 1.0
    assert psis_khat(log_w) is None


def test_exact_draws_are_worth_their_number():
    lm = table_lm(5, 4, concentration=1.0, seed=3)
    reward = lambda completions, **_: [-0.5 * text.count("a") for text in completions]  # noqa: E731
    target = bind(tilted, lm, reward=reward, beta=0.5)
    draws = rejection(target, None, ["", ""], num_samples=20, log_bound=0.0)
    assert ess(draws).tolist() == [20.0, 20.0]


@pytest.mark.parametrize("zeros", [0.0, 0.3])
def test_the_error_of_the_ess_is_its_spread(zeros):
    """400 repetitions of 1,000 draws, side by side."""
    generator = torch.Generator().manual_seed(5)
    log_w = 0.5 * torch.randn(1000, 400, generator=generator, dtype=torch.float64)
    log_w = torch.where(torch.rand(1000, 400, generator=generator) < zeros, -torch.inf, log_w)
    spread, se = float(ess(log_w).std()), ess_se(log_w)
    print(f"zeros {zeros}: ESS {ess(log_w).mean():.1f}, spread {spread:.2f}, standard error {se.mean():.2f}")
    assert abs(float(se.mean()) / spread - 1) < 0.2
    w = log_w.softmax(0) * 1000
    parts = [2 * w.std(0), w.square().std(0) / w.square().mean(0)]
    independent = ess(log_w) / 1000**0.5 * torch.stack(parts).norm(dim=0)
    assert abs(float(independent.mean()) / spread - 1) > 0.2, "the mutant: (Σw)² and Σw² as if independent"
    if zeros:
        without = [ess_se(column[column > -torch.inf]) for column in log_w.T]
        assert abs(float(torch.stack(without).mean()) / spread - 1) > 0.2, "the mutant: zeros left out"


def test_the_error_of_the_ess_by_its_derivative():
    """Each draw counted c times: d ESS / dc at c = 1, less its mean, is what one draw adds."""
    log_w = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    count = torch.ones(50, dtype=torch.float64, requires_grad=True)
    w, share = log_w.exp(), count / count.sum()
    (found,) = torch.autograd.grad(50 * (share * w).sum() ** 2 / (share * w**2).sum(), count)
    torch.testing.assert_close(ess_se(log_w), found.std() * 50**0.5, atol=1e-10, rtol=0)
    torch.testing.assert_close(ess_se(log_w - 900), ess_se(log_w), atol=1e-10, rtol=0)


def test_errors_of_weights_that_are_all_the_same_or_zero():
    log_w = torch.stack([torch.full((60,), 5.0), torch.full((60,), -torch.inf), torch.zeros(60)], 1).double()
    log_w[1:, 2] = -torch.inf  # one draw has all the weight
    torch.testing.assert_close(ess_se(log_w)[:2], torch.zeros(2).double(), atol=1e-10, rtol=0)
    assert float(ess_se(log_w)[2]) == pytest.approx(1) and float(ess(log_w)[2]) == pytest.approx(1)
    assert max_weight(log_w).tolist() == pytest.approx([1 / 60, 0, 1]) and khat_se(log_w[:, 0]) is None
    assert float(max_weight(torch.tensor([1.0, 3.0, 0.0]).double().log())) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="at least 2"):
        ess_se(log_w[:1])


@pytest.mark.parametrize("count", [100, 3000])
@pytest.mark.parametrize("shape", [-2.0, 0.3, 0.7, 1.0])
def test_the_error_of_khat_is_its_spread(count, shape):
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(400):
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        log_w = (1 + (u**-shape - 1) / shape).log()  # a generalised Pareto from 1 on, and so above any threshold
        found.append((psis_khat(log_w), khat_se(log_w)))
    khat, se = torch.tensor(found).T
    tail = math.ceil(min(count / 5, 3 * count**0.5))
    print(f"k {shape}, tail of {tail}: mean {khat.mean():.3f}, spread {khat.std():.4f}, standard error {se.mean():.4f}")
    assert abs(float(se.mean() / khat.std()) - 1) < 0.25
    if tail == 20 and shape > 0:
        assert float(((1 + khat) / tail**0.5).mean() / khat.std()) > 1.25, "the mutant: ArviZ's prior left out"
    if shape < 0:
        assert float(((1 + khat).abs() / tail**0.5).mean() / khat.std()) < 0.75, "the mutant: Smith's law below -1/2"


@pytest.mark.parametrize("shape", [0.3, 1.0])
def test_khat_is_of_the_weights_and_not_of_their_inverses(draws, shape):
    """ArviZ 1.3 takes log likelihoods where ArviZ 0.x took log weights: k-hat was -0.83 of weights whose own is 1.13."""
    log_w = heavy(2000, shape)[1] if shape < 1 else heavy(2000, 0.5)[0]
    khat, se = psis_khat(log_w), khat_se(log_w)
    assert abs(khat - shape) < 4 * se < 1 and psis_khat(-log_w) < 0
    smoothed, order = pareto_smooth(weighted(draws, log_w[:, None])).log_weight[0, :, 0], log_w.sort().indices
    moved = (smoothed - log_w)[order]
    assert float(moved[:1800].std()) < 1e-9 < float(moved[-130:].std()), "only the largest weights are smoothed"
    assert bool((smoothed[order].diff() >= -1e-9).all())
