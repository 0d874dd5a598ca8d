"""`drawn`: what draws are worth, whatever sampler made them: figures with errors for each prompt, and a verdict."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_lm.diagnose.verdict import DRAWN, judge_drawn
from ppl_lm.diagnose.weights import ess, log_mean, mean, psis_khat, smoothed, weighted_mean
from ppl_lm.infer import Draws


def drawn(draws: Draws) -> dict[str, Any]:
    """Figures averaged over prompts, verdict and sentence, and under `prompts` the same of each prompt.

    `kind`: `exact`, `markov`, `interacting` (SMC: `chains` are its runs, and only they are independent) or `weighted`.
    `num_samples`, of all `chains`. `ess`: how many independent posterior draws they are worth: Kong's of weights; of chains
    ArviZ's, and of interacting draws what the errors of their means amount to, the smallest of their numbers'. `reward`,
    `length`, `log_prior` (nats) and whatever else the model recorded: posterior means, by Pareto-smoothed weights where
    there are any, each with its Monte Carlo standard error (`_se`). `unique`: the share of draws that are different texts.
    `lm_tokens`, `reward_calls`: the cost; `lm_tokens_per_effective_draw`.

    Of weighted draws `log_z`, `kl_q_p` = KL(their own law ‖ posterior), both in nats with `_se`, and `khat`; of interacting
    ones `log_z`, and as `kl_q_p` the bound log Z - E log Ẑ of a text picked from a run by its weight; of exact ones
    with their proposals `log_z`; of chains the largest `r_hat` and the mean `acceptance_rate`; None where it does not
    apply. `verdict` is `exact`, `good`, `unknown`, `unreliable`, `not_converged` or `impossible`; of several prompts the
    worst.
    """
    batch = draws.log_guide.shape[-1]
    made = [_figures(draws.of_prompt(b), 1 / batch) for b in range(batch)]
    worst = max(made, key=lambda figures: DRAWN.index(figures["verdict"]))
    average = {key: _average(key, [figures[key] for figures in made]) for key in made[0] if key != "prompt"}
    average |= {"lm_tokens": draws.cost.lm_tokens, "reward_calls": draws.cost.reward_calls}
    total = sum(figures["ess"] or 0.0 for figures in made)
    average["lm_tokens_per_effective_draw"] = draws.cost.lm_tokens / total if total else None
    average |= {"verdict": worst["verdict"], "sentence": worst["sentence"]}
    if batch > 1:
        count = sum(figures["verdict"] == worst["verdict"] for figures in made)
        average["sentence"] = f"{count} of {batch} prompts, first {worst['prompt']!r}: {worst['sentence']}"
    return {**average, "prompts": made}


def r_hat(draws: Draws) -> float:
    """The largest split R-hat of the numbers that chains are summarised by: rewards, lengths, log p of the prior. NaN where
    none of them ever changes."""
    return max(_of_chains(draws, "rhat"), default=math.nan)


def numbers(draws: Draws) -> dict[str, Tensor]:
    """What draws are summarised by, float64, (C, S, B): the model's records, the lengths of texts, log p of the prior."""
    vocabulary, found = draws.prompts.vocabulary, dict(draws.records)
    for name in draws.texts:
        if draws[name].dim() == 4:  # one text a prompt
            found["length" if name == "x" else f"{name}_length"] = vocabulary.lengths(draws[name]).double()
    found["log_prior"] = draws.log_prior
    columns = draws.log_guide.shape[-1]
    return {k: v if v.shape[-1] == columns else v.mean(-1, keepdim=True) for k, v in found.items()}


def _figures(draws: Draws, share: float) -> dict[str, Any]:
    """Of one prompt, or of all where only their joint weight exists."""
    kind = "exact" if draws.exact else "markov" if draws.markov else "interacting" if draws.interacting else "weighted"
    made: dict[str, Any] = {"prompt": draws.prompts.texts[0], "kind": kind, "num_samples": draws.num_samples}
    log_w = draws.log_weight.flatten(0, 1)  # (S, 1)
    possible = made["possible"] = float((log_w > -torch.inf).double().mean())
    made |= {"chains": len(draws.log_guide), "ess": worth(draws), "khat": None, "r_hat": None, "acceptance_rate": None}
    made |= dict.fromkeys(("log_z", "log_z_se", "kl_q_p", "kl_q_p_se"))
    behind = {"weighted": draws, "interacting": draws.by_run(), "exact": draws.proposals}.get(kind)
    if behind is not None and possible and behind.num_samples > 1:
        made["log_z"], made["log_z_se"] = map(float, log_mean(behind.log_weight.flatten(0, 1)))
    if kind in ("weighted", "interacting") and behind is not None and made["log_z"] is not None:
        one = behind.log_weight.flatten(0, 1)  # of independent draws, or runs
        se = ((one - made["log_z"]).exp() - one).std(0) / len(one) ** 0.5  # one influence function: same draws
        made["kl_q_p"] = made["log_z"] - float(one.mean())
        made["kl_q_p_se"] = float(se.nan_to_num(math.inf))
        if draws.proposals is not None:  # quasi-rejection: its law is normalised by an estimate from the proposals
            made["log_z"], made["log_z_se"] = map(float, log_mean(draws.proposals.log_weight.flatten(0, 1)))
            made["kl_q_p"] = made["log_z"] - float(one.mean())
            made["kl_q_p_se"] = math.hypot(float(one.std(0)) / len(one) ** 0.5, made["log_z_se"])
    if kind == "weighted":
        made["khat"] = psis_khat(log_w[:, 0])
    if kind == "markov":
        made["r_hat"] = _known(r_hat(draws))
        if "acceptance_rate" in draws.stats:
            made["acceptance_rate"] = float(draws.stats["acceptance_rate"].mean())
    for name, value in numbers(draws).items():
        made[name], made[f"{name}_se"] = _mean(value, draws) if possible else (None, None)
    x = torch.cat([draws[name].flatten(0, 1).flatten(1) for name in draws.texts], -1)  # (S, tokens)
    made["unique"] = len(x.unique(dim=0)) / len(x)
    cost = draws.cost  # of drawing for all prompts together
    made["lm_tokens"], made["reward_calls"] = round(cost.lm_tokens * share), round(cost.reward_calls * share)
    made["lm_tokens_per_effective_draw"] = cost.lm_tokens * share / made["ess"] if made["ess"] else None
    known = ("kind", "num_samples", "chains", "possible", "ess", "khat", "r_hat", "kl_q_p")
    verdict = judge_drawn(**{k: made[k] for k in known})
    return made | {"verdict": verdict.code, "sentence": verdict.sentence}


def worth(draws: Draws) -> float | None:
    """How many independent posterior draws those of one prompt amount to: of weighted draws Kong's effective sample size; of
    chains ArviZ's, and of interacting draws what the errors of their means say, the fewest of any number. None where that
    cannot be told."""
    if draws.exact:
        return float(draws.num_samples)
    if draws.interacting:
        return _by_errors(draws)
    if not draws.markov:
        return float(ess(draws))
    return min(_of_chains(draws, "ess"), default=None)


def _by_errors(draws: Draws) -> float | None:
    """How many independent draws would have such standard errors of the means, the fewest of any number. None of one run."""
    if len(draws.log_guide) < 2:
        return None
    worth = []
    for value in numbers(draws).values():
        flat = value.flatten(0, 1)
        centre, se = weighted_mean(flat, draws)
        variance, _ = weighted_mean((flat - centre).square(), draws)
        if float(se) > 0:
            worth.append(float(variance / se.square()))
    return min(worth, default=None)


def _mean(value: Tensor, draws: Draws) -> tuple[float, float | None]:
    """Of a number, (C, S, 1), under the posterior, and its Monte Carlo standard error; None where there is none."""
    flat = value.flatten(0, 1)
    if len(flat) < 2:
        return float(flat), None
    if draws.markov:
        (error,) = _each_chain([value], "mcse") or [0.0]  # of what never changes
        return float(flat.mean()), _known(error)
    centre, se = mean(flat) if draws.exact else weighted_mean(flat, smoothed(draws))
    return float(centre), float(se)


def _of_chains(draws: Draws, statistic: str) -> list[float]:
    values = [v[..., b : b + 1] for v in numbers(draws).values() for b in range(v.shape[-1])]
    return [v for v in _each_chain(values, statistic) if not math.isnan(v)]


def _each_chain(values: list[Tensor], statistic: str) -> list[float]:
    """ArviZ's statistic of each number, (C, S, 1), that changes at all."""
    import arviz as az

    found: Callable[..., Any] = getattr(az, statistic)
    with np.errstate(invalid="ignore", divide="ignore"):  # chains that each stay where they are
        return [float(found(v[..., 0].cpu().numpy())) for v in values if float(v.max() - v.min()) > 0]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _average(key: str, column: list[Any]) -> Any:
    """Means over prompts; standard errors of means of independent figures; the worst k-hat and R-hat; the first of what
    prompts share."""
    if key in ("khat", "r_hat"):
        return max((v for v in column if v is not None), default=None)
    if None in column:
        return None
    if isinstance(column[0], str) or key in ("num_samples", "chains"):
        return column[0]
    if key.endswith("_se"):
        return math.hypot(*column) / len(column)
    return sum(column) / len(column)
