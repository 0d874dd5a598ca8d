"""The verdict on many prompts with few draws of each: on all of them together, with the error of a mean over prompts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ppl_lm.criticism.diagnoses.verdicts import Verdict, good_limit, judge

ALONE = 100  # draws of a prompt, below which it gets no verdict of its own
POOLED = 8  # prompts, below which their spread gives no error
FROM_LOG_Z = ("log_z", "kl_q_p", "kl_prior_p")  # figures that rise with log Z
OF_POSTERIOR = ("upper", "kl_p_q", "kl_p_prior", "missing", "entropy_posterior", "reward_posterior")  # ratios of means


def pooled_verdict(figures: Sequence[Mapping[str, Any]], average: Mapping[str, Any]) -> tuple[dict[str, Any], Verdict]:
    """The average of the prompts' figures with errors of their own, and the verdict on it.

    The units are the prompts: the standard error of a mean over B of them is their spread over √B, in which the noise of each
    prompt's draws is contained (the variance between clusters, Cochran 1977, section 9.2); widened as Student's t with B - 1
    degrees of freedom is wider than a normal law, since it is doubled where an interval is meant.

    With few draws an estimate leans to one side for every prompt, which no averaging over prompts mends. E[log Ẑ] is below
    log Z by half the variance of log Ẑ, to first order: that is added to log Z and to the distances that rise with it, and its
    size to their errors. A ratio of means leans by less than its own error times that of its denominator (Cochran 1977,
    section 6.8): that, averaged, is added to the errors of posterior means.

    :param figures: of each prompt, as in `diagnosis.json`.
    :param average: their averages, of `over_prompts`."""
    count, each = len(figures), int(average["num_samples"])
    pooled = {**average, "khat": None, "khat_se": None, "seen": sum(one["seen"] for one in figures)}

    def column(name: str) -> torch.Tensor:
        return torch.tensor([one[name] for one in figures], dtype=torch.float64)

    for name in (key.removesuffix("_se") for key in average if key.endswith("_se")):
        if average.get(name) is not None and name not in ("khat", "ess"):
            spread = float(column(name).std()) / math.sqrt(count)
            pooled[f"{name}_se"] = spread * _wider(count) if math.isfinite(spread) else math.inf
    z_se = column("log_z_se")
    lean = float(z_se.square().mean()) / 2
    for name in FROM_LOG_Z:
        pooled[name] = pooled[name] + lean
        pooled[f"{name}_se"] = math.hypot(pooled[f"{name}_se"], lean)
    for name in OF_POSTERIOR:
        if pooled.get(f"{name}_se") is not None and f"{name}_se" in figures[0]:
            ratio = float((column(f"{name}_se") * z_se).mean())
            extra = ratio + (0.0 if name in ("upper", "missing", "reward_posterior") else lean)
            pooled[f"{name}_se"] = math.hypot(pooled[f"{name}_se"], extra) if math.isfinite(extra) else math.inf
    return pooled, _verdict(pooled, count, each)


def _verdict(pooled: Mapping[str, Any], count: int, each: int) -> Verdict:
    verdict = judge(**{**pooled, "num_samples": count * each})
    near, se = pooled["kl_q_p"], pooled["kl_q_p_se"]
    untold = not math.isfinite(near) or near - 2 * se <= good_limit(pooled["kl_prior_p"])
    code, remedy = verdict.code, verdict.remedy
    sentence = f"Of {count} prompts together, with {each} draws of each and none judged by itself: {verdict.sentence}"
    if code == "poor" and untold:  # nor is it shown to be far
        code = "unknown"
        sentence = f"{sentence.removesuffix(' Still some way off.')} Too few draws to tell whether that is near."
    if code == "unknown":
        remedy = f"Give {4 * each} draws of each prompt or more (--num-samples)."
    return Verdict(code, sentence, remedy)


def _wider(count: int) -> float:
    """How much wider than a normal law's a 95% interval by Student's t is, whose error comes from so many values."""
    from scipy.stats import norm, t

    return float(t.ppf(0.975, count - 1) / norm.ppf(0.975))
