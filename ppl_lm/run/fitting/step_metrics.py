"""What is written of each step of a fit."""

import math
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from ppl_lm.infer.traces.particles import Particles
from ppl_lm.run.fitting.gain import Gain


class GuideMetrics(TypedDict):
    """Means under the guide over a step's particles and prompts, nats for each prompt."""

    elbo: float
    elbo_se: float
    gain: float  # see `Gain`
    kl_prior: float  # KL(guide ‖ prior)
    reward: NotRequired[float]  # in the reward's own unit; of models that record one


class StepMetrics(GuideMetrics):
    """One line of `metrics.jsonl`."""

    step: int
    seconds: float  # since the fit began
    learning_rate: float
    grad_norm: float  # before it is clipped
    lm_tokens: int  # that the language models evaluated in this step
    done: float  # share of the run that was over when the step began, 0 to 1
    tokens_per_second: float  # of all steps so far


def guide_metrics(particles: Particles, gain: Gain, rows: Tensor) -> GuideMetrics:
    """By importance ratios where something else than the guide drew the texts.

    :param rows: which of the fit's prompts these particles are of, (B,)."""
    log_w = particles.log_prior() + particles.log_likelihood() - particles.log_guide()  # (K, B)
    moved, share = particles.log_guide() - particles.log_prior(), particles.share()
    metrics: GuideMetrics = {
        "elbo": gain.per_prompt * _mean(log_w, share),
        "elbo_se": gain.per_prompt
        * float((log_w.var(0).mean().sqrt() / math.sqrt(log_w.numel())).nan_to_num(math.inf, math.inf)),
        "gain": gain.of_step(log_w, moved, rows, share),
        "kl_prior": gain.per_prompt * _mean(moved, share),
    }
    if "reward" in particles.records:
        reward = particles.records["reward"]
        metrics["reward"] = (
            _mean(reward.reshape(log_w.shape), share) if particles.proposal_log_q else float(reward.mean())
        )
    return metrics


def _mean(values: Tensor, share: Tensor) -> float:
    return float(torch.where(share > 0, share * values, 0.0).sum(0).mean())
