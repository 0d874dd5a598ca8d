"""The power posterior p0^alpha, held against enumeration; no random numbers but in the last test.

| what | property | tolerance |
|---|---|---|
| `power` | log Z and the posterior of every text, for powers below, at and above 1 | 1e-10 |
| `suffix`, `independence` | one step of many chains in equilibrium leaves each text's share | 4 standard errors |

Mutant that is rejected: the LM at temperature 1/alpha, of which the posterior is at least 0.1 in total variation away.
"""

import oracle
import pytest
import torch
from scipy import stats

from ppl_lm.guides import finetuned
from ppl_lm.infer.binding import bind
from ppl_lm.infer.enumeration import enumerate_posterior
from ppl_lm.infer.samplers.importance_sampling import draw, importance
from ppl_lm.infer.samplers.kernels import independence, suffix
from ppl_lm.infer.samplers.markov_chains import step
from ppl_lm.infer.samplers.rejection_sampling import rejection
from ppl_lm.infer.traces.layout import Given
from ppl_lm.infer.traces.observations import likelihood_bound
from ppl_lm.lm import meter
from ppl_lm.lm.table import table_lm
from ppl_lm.models import power

V, T, END = 3, 4, 2
ROWS = oracle.outcomes(V, T, END)
TEXTS = ["", "a"]


@pytest.fixture
def lm():
    return table_lm(V, T, max_prompt=2, concentration=1.0, seed=1)


def law(lm, alpha, by_token=False):
    """Of all texts: log Z, and the posterior (N, B); or the law of the LM at temperature 1/alpha."""
    contexts, table = [tuple(lm.vocabulary.encode(text)) for text in TEXTS], lm.model.table
    each = torch.stack([oracle.log_probs(table * (alpha if by_token else 1), c, ROWS) for c in contexts], 1)
    joint = each if by_token else alpha * each
    return joint.logsumexp(0), joint.softmax(0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_enumeration(lm, alpha):
    made = enumerate_posterior(bind(power, lm, alpha=alpha), None, TEXTS)
    log_z, posterior = law(lm, alpha)
    where = [made.latents["x"][:, 0].tolist().index(row) for row in oracle.as_tensor(ROWS, T, END).tolist()]
    torch.testing.assert_close(made.log_z, log_z, atol=1e-10, rtol=0)
    torch.testing.assert_close(made.log_posterior.exp()[where], posterior, atol=1e-10, rtol=0)


def test_it_is_not_a_low_temperature(lm):
    _, posterior = law(lm, 4.0)
    log_one, cooled = law(lm, 4.0, by_token=True)
    torch.testing.assert_close(log_one, torch.zeros(2, dtype=torch.float64), atol=1e-10, rtol=0)
    assert bool((0.5 * (posterior - cooled).abs().sum(0) > 0.1).any())


def test_weights_are_a_power_of_the_prior_at_the_cost_of_one_pass(lm):
    target = bind(power, lm, alpha=3.0)
    draws = importance(target, None, TEXTS, num_samples=50)
    torch.testing.assert_close(draws.log_weight, 2 * draws.log_prior, atol=1e-10, rtol=0)
    with meter.measure() as once:
        draw(bind(power, lm, alpha=1.0), None, TEXTS, 50, 1)
    with meter.measure() as prior:
        lm(lm.prompts(TEXTS)).sample(torch.Size((50,)))
    assert abs(once.lm_tokens - prior.lm_tokens) < 0.2 * prior.lm_tokens, "the prior scores its own draws again"


def test_impossible_texts_stay_impossible():
    """Below 1 the log-potential of probability 0 is +inf, which must not meet the prior's -inf."""
    lm = table_lm(V, 2, concentration=1.0)
    with torch.no_grad():
        lm.model.table[:, 0] = -torch.inf
    for alpha in (0.5, 1.0, 2.0):
        target = bind(power, lm, alpha=alpha)
        made = enumerate_posterior(target, None, [""])
        some = (made.latents["x"] == 0).any(-1)
        assert bool((made.log_joint[some] == -torch.inf).all()) and bool(made.log_z.isfinite().all())
        with Given({"x": torch.tensor([[[0, END]], [[END, END]]])}, 1):
            log_w = draw(target, bind(finetuned, table_lm(V, 2).copy()), [""], 2, 1).log_weight.flatten()
        assert log_w[0] == -torch.inf and bool(log_w[1].isfinite())


@pytest.mark.parametrize("kernel", [suffix, independence])
def test_chains_and_rejection_draw_from_it(lm, kernel):
    """Exact draws by rejection, moved on by one step: a χ² of each text's share, before and after."""
    target, n = bind(power, lm, alpha=2.0), 4000
    assert likelihood_bound(target, TEXTS) == 0.0 and likelihood_bound(bind(power, lm, alpha=0.5), TEXTS) is None
    torch.manual_seed(0)
    state = rejection(target, None, TEXTS, num_samples=n)
    guide = lm.copy()
    guide.model.table.data.mul_(1.5)
    guide = bind(finetuned, guide)
    with Given({"x": state["x"][0]}, 1):
        state = draw(target, guide, TEXTS, n, 1)
    moved, info = step(state, kernel(target, guide, TEXTS))
    assert 0.1 < float(info.accepted.double().mean()) < 0.99
    _, posterior = law(lm, 2.0)
    _, cooled = law(lm, 2.0, by_token=True)

    def worst(x, probabilities):
        found = []
        for b in range(2):
            count = (x[:, b, None] == oracle.as_tensor(ROWS, T, END)).all(-1).sum(0)
            few = probabilities[:, b] * n < 5
            seen, due = ([*v[~few].tolist(), float(v[few].sum())] for v in (count, probabilities[:, b] * n))
            found.append(stats.chisquare(seen, [d * sum(seen) / sum(due) for d in due]).pvalue)
        return min(found)

    for x in (state["x"][0], moved["x"][0]):
        assert worst(x, posterior) > 1e-4
        assert worst(x, cooled) < 1e-9  # the mutant


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_powers_are_refused(lm, alpha):
    with pytest.raises(ValueError, match="the prior's power must be above 0"):
        bind(power, lm, alpha=alpha)(TEXTS)
