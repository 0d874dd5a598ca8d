"""The reference task on a real pretrained LM: figures that independent code found from 49,152 prior draws."""

import math

import pytest
import torch

from ppl_lm.criticism.evidence import log_evidence
from ppl_lm.criticism.expectations import expectation
from ppl_lm.guides import prior as prior_guide
from ppl_lm.infer.binding import bind
from ppl_lm.infer.log_weights import mean
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.rejection_sampling import accept, select
from ppl_lm.infer.traces.observations import likelihood_bound
from ppl_lm.likelihood import rewards
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.models import tilted

N = 4096
REFERENCE = {  # value, its standard error
    "reward under the prior": (0.512, 0.002),
    "reward under the posterior": (0.834, 0.002),
    "log Z": (7.497, 0.006),
    "KL(prior ‖ posterior)": (2.38, 0.02),
    "KL(posterior ‖ prior)": (0.84, 0.02),
    "rate of acceptance": (0.082, 0.001),
}


def test_reference_figures(stories):
    """Prior, posterior, evidence, both KLs and the rate of acceptance within four combined standard errors."""
    found = figures(LanguageModel.from_pretrained(stories, max_new_tokens=48))
    for name, (value, se) in found.items():
        print(f"{name}: {value:.3f} ± {se:.3f}, reference {REFERENCE[name][0]} ± {REFERENCE[name][1]}")
    assert far(found) == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["temperature 0.95", "first token not drawn"])
def test_a_wrong_sampler_misses_the_reference(stories, fault):
    """The figures above do tell: a sharpened law, or a prompt of one more token, is many standard errors away."""
    prior = LanguageModel.from_pretrained(stories, max_new_tokens=48)
    plain = prior.logits_next

    def faulty(**inputs):
        log_probs, cache = plain(**inputs)
        if fault == "temperature 0.95":
            return (log_probs / 0.95).log_softmax(-1), cache
        first = inputs["positions"].max() == 0
        return log_probs.where(log_probs == log_probs.max(), -torch.inf) if first else log_probs, cache

    prior.logits_next = faulty
    assert far(figures(prior)) != []


def far(found):
    """Names of the figures that miss the reference."""
    return [
        n for n, (value, se) in found.items() if not abs(value - REFERENCE[n][0]) < 4 * math.hypot(se, REFERENCE[n][1])
    ]


def figures(prior):
    target = bind(tilted, prior, reward=rewards.vader, beta=0.1)
    start = bind(prior_guide, prior)
    torch.manual_seed(3)
    draws = importance(target, start, [""], num_samples=N)
    assert draws.prompts.ids.tolist() == [[1]]
    bound = likelihood_bound(target, [""])
    assert bound == 10.0
    mask = accept(draws, bound)
    rate = float(mask.double().mean())
    kept = select(draws, mask, int(mask.sum())).under(start)
    made, posterior = log_evidence(draws, kept), expectation(draws, draws["reward"])
    found = {
        "reward under the prior": mean(draws["reward"].flatten(0, 1)),
        "reward under the posterior": (posterior.mean, posterior.se),
        "log Z": (made.log_z, made.log_z_se),
        "KL(prior ‖ posterior)": (made.kl_q_p, made.kl_q_p_se),
        "KL(posterior ‖ prior)": (made.kl_p_q, made.kl_p_q_se),
        "rate of acceptance": (torch.tensor(rate), torch.tensor(math.sqrt(rate * (1 - rate) / N))),
    }
    return {name: (float(value), float(se)) for name, (value, se) in found.items()}
