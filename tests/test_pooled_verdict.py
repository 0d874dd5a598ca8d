"""Few draws of each of many prompts: the verdict on all of them, and its error, against a population that is known."""

import pytest
import torch

import ppl_lm
from ppl_lm.criticism.averages import over_prompts
from ppl_lm.criticism.diagnoses.diagnosis import least_draws
from ppl_lm.criticism.diagnoses.pool import Pool
from ppl_lm.criticism.diagnoses.pooling import pooled_verdict
from ppl_lm.guides import finetuned
from ppl_lm.infer.enumeration import kl
from ppl_lm.lm.table import table_lm
from ppl_lm.models import tilted

NAMES = {"log_z": "evidence", "kl_q_p": "kl_guide", "kl_prior_p": "kl_prior", "kl_p_q": "kl_posterior"}
NAMES |= {"kl_p_prior": "kl_posterior_prior", "missing": "missing", "entropy_posterior": "entropy"}
NAMES |= {"entropy": "entropy_guide"}
PLAIN = {"elbo_gain": 0.3, "elbo_gain_se": 0.01, "log_likelihood": 0.0, "log_likelihood_se": 0.01, "possible": 1.0}
PLAIN |= {"log_likelihood_prior": 0.0, "log_likelihood_posterior": 0.0, "khat": None, "khat_se": None}


def prompt(generator, share):
    """A posterior over 60 texts, and a guide that has gone a share of the way to it."""
    prior = torch.randn(60, generator=generator, dtype=torch.float64).mul(1.5).log_softmax(0)
    ll = 1.5 * torch.randn(60, generator=generator, dtype=torch.float64)
    return prior, ll, (prior + share * ll).log_softmax(0)


def measured(generator, laws, n, names=tuple(NAMES)):
    prior, ll, guide = laws
    rows = torch.stack([torch.multinomial(law.exp(), n, True, generator=generator) for law in (prior, guide)])
    pool = Pool(prior[rows], ll[rows], guide[rows])
    figures = {"num_samples": n, "seen": pool.seen(None), **PLAIN}
    for name, method in NAMES.items():
        figures[name], figures[f"{name}_se"] = getattr(pool, method)() if name in names else (0.1, 0.1)
    return figures


def test_the_error_of_a_mean_over_prompts_covers_the_population():
    """Of 100 samples of 16 prompts with 4 draws each, 95% of the intervals hold the population's mean. Those that know only
    the noise of the draws do so half as often, and without the correction KL(guide ‖ posterior) is too small."""
    generator, repeats = torch.Generator().manual_seed(0), 100
    many = [prompt(generator, 0.8) for _ in range(1000)]
    truth = {
        "log_z": sum(float((p + ll).logsumexp(0)) for p, ll, _ in many) / len(many),
        "kl_q_p": sum(float(kl(q, (p + ll).log_softmax(0))) for p, ll, q in many) / len(many),
        "kl_prior_p": sum(float(kl(p, (p + ll).log_softmax(0))) for p, ll, _ in many) / len(many),
    }
    inside, within = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0)
    off: dict[str, list[float]] = {"pooled": [], "plain": []}
    for _ in range(repeats):
        figures = [measured(generator, prompt(generator, 0.8), 4, (*truth,)) for _ in range(16)]
        average = over_prompts(figures, shared=("num_samples",))
        pooled, _ = pooled_verdict(figures, average)
        for name, value in truth.items():
            inside[name] += abs(pooled[name] - value) < 1.96 * pooled[f"{name}_se"]
            within[name] += abs(average[name] - value) < 1.96 * average[f"{name}_se"]
        off["pooled"].append(pooled["kl_q_p"] - truth["kl_q_p"])
        off["plain"].append(average["kl_q_p"] - truth["kl_q_p"])
    assert min(inside.values()) >= 87, inside  # 95 ± 2.2: fails by chance once in ten thousand
    assert within["log_z"] < 75, "the noise of the draws alone is no error of a mean over prompts"
    z = {name: float(torch.tensor(v).mean() / torch.tensor(v).std()) * repeats**0.5 for name, v in off.items()}
    assert z["plain"] < -4 < z["pooled"] < 4, z


@pytest.mark.parametrize(
    ("share", "n", "codes"), [(1.0, 16, {"good"}), (0.1, 16, {"poor"}), (0.75, 4, {"unknown", "good"})]
)
def test_the_pooled_verdict(share, n, codes):
    """On a guide that is the posterior, one that is far from it, and one of which 4 draws each cannot tell."""
    generator = torch.Generator().manual_seed(1)
    figures = [measured(generator, prompt(generator, share), n) for _ in range(20)]
    _, verdict = pooled_verdict(figures, over_prompts(figures, shared=("num_samples",)))
    assert verdict.code in codes, verdict
    assert f"Of 20 prompts together, with {n} draws of each" in verdict.sentence
    if verdict.code == "unknown":
        assert f"Give {4 * n} draws of each prompt" in verdict.remedy and "Still some way off" not in verdict.sentence


def test_diagnose_pools_what_few_draws_show():
    """No prompt is judged by itself; with enough draws each is, and too few are refused."""
    lm = table_lm(4, 4, max_prompt=2, concentration=1.0, seed=1)
    target = ppl_lm.bind(tilted, lm, reward=lambda completions: [t.count("a") / 2 for t in completions], beta=1.0)
    guide = ppl_lm.bind(finetuned, lm.copy())
    prompts = ["a", "b", "c", "a b", "b a", "a c", "c a", "b c"]
    diagnosis = ppl_lm.diagnose(target, guide, prompts, 8)
    assert {one.verdict for one in diagnosis.prompts} == {"pooled"} and diagnosis.average.num_samples == 8
    assert diagnosis.average.khat is None and "Of 8 prompts together" in diagnosis.verdict.sentence
    assert diagnosis.average.seen == pytest.approx(sum(one.seen for one in diagnosis.prompts))
    truth = float(ppl_lm.enumerate_posterior(target, guide, prompts).kl_q_p.detach().mean())
    assert abs(diagnosis.average.kl_q_p - truth) < 4 * diagnosis.average.kl_q_p_se
    assert {one.verdict for one in ppl_lm.diagnose(target, guide, prompts, 100).prompts} != {"pooled"}
    for few, count in ((7, 8), (99, 7)):
        with pytest.raises(ValueError, match=f"num_samples={few}; give at least {least_draws(count)} draws"):
            ppl_lm.diagnose(target, guide, prompts[:count], few)


def test_how_few_draws_may_be():
    assert [least_draws(count) for count in (1, 7, 8, 16, 20, 1000)] == [100, 100, 8, 4, 4, 4]
    assert all(count * least_draws(count) >= 64 for count in range(1, 200))
