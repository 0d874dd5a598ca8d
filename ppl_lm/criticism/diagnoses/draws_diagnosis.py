"""`diagnose_draws`: what draws are worth, whatever sampler made them: figures with errors for each prompt, and a verdict."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_lm.criticism.averages import over_prompts
from ppl_lm.criticism.chains import columns, jackknife, worst
from ppl_lm.criticism.diagnoses.draws_verdicts import CODES_OF_DRAWS, judge_draws
from ppl_lm.criticism.effective_size import effective
from ppl_lm.criticism.evidence import log_evidence
from ppl_lm.criticism.expectations import expectation
from ppl_lm.criticism.statistics import Statistic, numbers, recorded
from ppl_lm.criticism.weights import ess_se, khat_se, max_weight, pareto_smooth, psis_khat
from ppl_lm.infer.draws import Draws
from ppl_lm.infer.log_weights import log_mean
from ppl_lm.lm.prompt_names import readable

FIGURES = (  # keys that no statistic may have
    *("prompt", "prompts", "kind", "num_samples", "chains", "possible", "unique", "acceptance_rate"),
    *("ess", "ess_se", "max_weight", "khat", "khat_se", "log_z", "log_z_se", "kl_q_p", "kl_q_p_se"),
    *("ess_bulk", "ess_bulk_se", "ess_tail", "ess_tail_se", "r_hat", "r_hat_se"),
    *("lm_tokens", "reward_calls", "lm_tokens_per_effective_draw", "verdict", "sentence"),
)
WORST = ("khat", "r_hat", "max_weight")  # of several prompts it is the largest that counts


def diagnose_draws(draws: Draws, statistics: Mapping[str, Statistic] | None = None) -> dict[str, Any]:
    """Figures averaged over prompts, verdict and sentence, and under `prompts` the same of each `prompt`. None where a figure
    does not apply. Keys that end in `_se` are Monte Carlo standard errors, in the unit of what they belong to.

    Of all draws:

    - `kind`: of `Draws`; of `runs` (SMC's) and `conditional_runs` only the runs are independent, and `chains` counts them.
    - `num_samples`, of all `chains`; `possible`: the share of them that the posterior allows; `unique`: that are different
      texts; the mean `acceptance_rate` of Markov chains.
    - `ess`, `ess_se`: how many independent posterior draws they are worth. Kong's of weights; all, without error, of exact
      draws; `ess_bulk` of chains; of runs what the errors of their means amount to, the smallest of their
      numbers', without `ess_se`.
    - `reward`, `length` (tokens), `log_prior` (nats), whatever else the model recorded (as NAME_recorded where that is the name
      of a figure), and the `statistics`: posterior means, by Pareto-smoothed weights where there are any, each with `_se`.
    - `lm_tokens`, `reward_calls`: the cost; `lm_tokens_per_effective_draw`.
    - `verdict`: `exact`, `good`, `unknown`, `unreliable`, `not_converged` or `impossible`; `sentence`: why. Of several prompts
      the worst.

    Of weighted draws: `log_z` and `kl_q_p` = KL(their own law ‖ posterior), nats, with `_se`; `khat` with `khat_se`;
    `max_weight`, the largest weight's share of their sum. Of runs `log_z`, as `kl_q_p` the bound
    log Z - E log Ẑ of a text picked from a run by its weight, and `khat` and `max_weight` of the weights of all runs together:
    where nothing was resampled they are those of importance sampling. Where the guide's support is truncated `log_z` and
    `kl_q_p` are of the posterior there: lower bounds. Of exact ones with their proposals `log_z`.

    Of Markov chains: `r_hat`, the largest of any number; `ess_bulk` and `ess_tail`, draws, the fewest of any number; all three
    ArviZ's rank-normalised ones of split chains (Vehtari et al. 2021), `_se` by the jackknife over chains, or 16 groups of them
    where there are more, None of fewer than 4.

    Over prompts `khat`, `r_hat` and `max_weight` are the largest, with the errors of that prompt; other figures are means.

    :param statistics: name -> function from texts to one finite number each, in any unit; of the text `x`, or the first. They
        are further numbers of the draws, in all that is said of these.
    :raises ValueError: if a statistic is not one finite number a text, or has the name of a figure.
    """
    taken = sorted({*(statistics or {})} & {*FIGURES})
    if taken:
        raise ValueError(f"statistics {taken} have the names of figures; give them other ones")
    draws = recorded(draws, statistics)
    batch = draws.log_guide.shape[-1]
    by_prompt = [_figures(draws.of_prompt(b), 1 / batch) for b in range(batch)]
    worst = max(by_prompt, key=lambda figures: CODES_OF_DRAWS.index(figures["verdict"]))
    average = over_prompts(by_prompt, largest=WORST, shared=("num_samples", "chains"), without=("prompt",))
    average |= {"lm_tokens": draws.cost.lm_tokens, "reward_calls": draws.cost.reward_calls}
    total = sum(figures["ess"] or 0.0 for figures in by_prompt)
    average["lm_tokens_per_effective_draw"] = draws.cost.lm_tokens / total if total else None
    average |= {"verdict": worst["verdict"], "sentence": worst["sentence"]}
    if batch > 1:
        count = sum(figures["verdict"] == worst["verdict"] for figures in by_prompt)
        average["sentence"] = f"{count} of {batch} prompts, first {readable(worst['prompt'])!r}: {worst['sentence']}"
    return {**average, "prompts": by_prompt}


def _figures(draws: Draws, share: float) -> dict[str, Any]:
    """Of one prompt, or of all where only their joint weight exists."""
    kind = draws.kind
    figures: dict[str, Any] = dict.fromkeys(key for key in FIGURES if key != "prompts")
    figures |= {"prompt": draws.prompts.texts[0], "kind": kind, "num_samples": draws.num_samples}
    log_w = draws.log_weight.flatten(0, 1)  # (S, 1)
    possible = figures["possible"] = float((log_w > -torch.inf).double().mean())
    figures |= {"chains": len(draws.log_guide), "ess": effective(draws), "ess_se": 0.0 if kind == "exact" else None}
    behind = {"weighted": draws, "runs": draws.by_run(), "exact": draws.proposals}.get(kind)
    if behind is not None and possible and behind.num_samples > 1:  # draws or runs that are independent
        if kind == "exact":
            log_z = log_mean(behind.log_weight.flatten(0, 1))
            figures["log_z"], figures["log_z_se"] = map(float, log_z)
        else:
            evidence = log_evidence(draws)
            for name in ("log_z", "log_z_se", "kl_q_p", "kl_q_p_se"):
                figures[name] = float(getattr(evidence, name))
    if kind in ("weighted", "runs") and possible:
        figures["khat"], figures["max_weight"] = psis_khat(log_w[:, 0]), float(max_weight(log_w))
    if kind == "weighted" and possible:
        figures["khat_se"] = khat_se(log_w[:, 0])
        figures["ess_se"] = float(ess_se(log_w)) if len(log_w) > 1 else None
    if kind == "chains":
        each = columns(draws)
        for key, statistic in (
            ("r_hat", ("rhat", "rank")),
            ("ess_bulk", ("ess", "bulk")),
            ("ess_tail", ("ess", "tail")),
        ):
            figures[key], figures[f"{key}_se"] = worst(each, *statistic), jackknife(each, *statistic)
        figures["ess_se"] = figures["ess_bulk_se"]
        if "acceptance_rate" in draws.stats:
            figures["acceptance_rate"] = float(draws.stats["acceptance_rate"].mean())
    for name, value in numbers(draws).items():
        name = f"{name}_recorded" if name in FIGURES else name  # a record must not pass for a figure
        figures[name], figures[f"{name}_se"] = _mean(value, draws) if possible else (None, None)
    sites = draws.texts or tuple(draws.latents)
    x = torch.cat(
        [draws[name].flatten(0, 1).flatten(1) for name in sites], -1
    )  # (S, tokens), or numbers where no text is drawn
    figures["unique"] = len(x.unique(dim=0)) / len(x)
    cost = draws.cost  # of drawing for all prompts together
    figures["lm_tokens"], figures["reward_calls"] = round(cost.lm_tokens * share), round(cost.reward_calls * share)
    figures["lm_tokens_per_effective_draw"] = cost.lm_tokens * share / figures["ess"] if figures["ess"] else None
    known = ("kind", "num_samples", "chains", "possible", "ess", "khat", "r_hat", "kl_q_p")
    verdict = judge_draws(**{k: figures[k] for k in known}, lacks_support=draws.lacks_support)
    return figures | {"verdict": verdict.code, "sentence": verdict.sentence}


def _mean(value: Tensor, draws: Draws) -> tuple[float, float | None]:
    """Of a number, (C, S, 1), under the posterior, and its Monte Carlo standard error; None where there is none."""
    mean, se = expectation(pareto_smooth(draws), value).item()
    return mean, se if math.isfinite(se) else None
