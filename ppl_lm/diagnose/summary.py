"""`diagnose`: how close a guide is to its posterior, prompt by prompt, as figures with errors and a verdict."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ppl_lm.diagnose.evidence import Evidence, log_evidence
from ppl_lm.diagnose.verdict import Verdict, judge, judge_cover
from ppl_lm.diagnose.weights import ess, mean, psis_khat, weighted_mean
from ppl_lm.infer import Draws, NoSupportError, importance, score
from ppl_lm.infer.rejection import accept, likelihood_bound, select

MIN_EXACT = 20  # exact draws for a prompt, below which the upper bound is the approximate one


@dataclass(frozen=True)
class Diagnosis:
    """Figures of each prompt (the keys of `diagnosis.json`), their average, the verdict, and the draws behind them.

    `exact` holds each prompt's exact posterior draws, None where there were too few."""

    figures: list[dict[str, Any]]
    average: dict[str, Any]
    verdict: Verdict
    prior: Draws
    guide: Draws
    exact: list[Draws | None]

    def as_json(self) -> dict[str, Any]:
        return {**self.average, "sentence": self.verdict.sentence, "prompts": self.figures}


def diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    prompts: Any,
    num_samples: int = 4096,
    max_plate_nesting: int = 1,
) -> Diagnosis:
    """Draws from the guide and from the prior, finds exact posterior draws among the latter where the likelihood has a
    bound, and says how far the guide is from the posterior.

    :param num_samples: draws of each for every prompt.
    """
    require_enough(num_samples)
    from_prior = importance(model, None, prompts, num_samples=num_samples, max_plate_nesting=max_plate_nesting)
    from_guide = importance(model, guide, prompts, num_samples=num_samples, max_plate_nesting=max_plate_nesting)
    bound = likelihood_bound(model, prompts, joint=not from_guide.is_local)
    keep = None if bound is None or not from_prior.from_prior else accept(from_prior, bound)  # (S, B)
    seen = [d.log_weight.flatten(0, 1) > -torch.inf for d in (from_prior, from_guide)]
    if not bool((seen[0].any(0) | seen[1].any(0)).all()):
        worst = int((~(seen[0].any(0) | seen[1].any(0))).nonzero()[0])
        raise NoSupportError(
            f"prompt {worst}: none of {num_samples} draws of the prior and of the guide is possible under the posterior, so "
            "nothing is known of it; draw more (--num-samples), or loosen the constraint"
        )
    figures, verdicts, exacts = [], [], []
    for b in range(from_guide.log_guide.shape[-1]):
        p, q, exact = from_prior.of_prompt(b), from_guide.of_prompt(b), None
        if keep is not None and int(keep[:, b].sum()) >= MIN_EXACT:
            exact = score(guide, select(p, keep[:, b : b + 1], int(keep[:, b].sum())), max_plate_nesting)
        made, verdict = _figures(p, q, exact, log_evidence(q, exact), 1 / from_guide.log_guide.shape[-1])
        figures.append({"prompt": q.prompts.texts[0], **made, "verdict": verdict.code})
        verdicts.append(verdict)
        exacts.append(exact)
    average = _average(figures)
    cost = from_prior.cost + from_guide.cost
    average |= {"lm_tokens": cost.lm_tokens, "reward_calls": cost.reward_calls}
    verdict = verdicts[0] if len(verdicts) == 1 else _judged(average)
    average["verdict"] = verdict.code
    return Diagnosis(figures, average, verdict, from_prior, from_guide, exacts)


def require_enough(num_samples: int) -> None:
    """:raises ValueError: if there are too few draws for standard errors to mean anything."""
    if num_samples < 100:
        raise ValueError(f"num_samples={num_samples}; give at least 100 draws for each prompt")


def _figures(
    prior: Draws, guide: Draws, exact: Draws | None, evidence: Evidence, share: float
) -> tuple[dict[str, Any], Verdict]:
    made: dict[str, Any] = {}

    def put(name: str, value: torch.Tensor, se: torch.Tensor) -> None:
        made[name], made[f"{name}_se"] = float(value), float(se)

    for name in ("elbo", "iwae", "iwae_upper", "upper", "log_z", "kl_q_p", "kl_p_q"):
        put(name, getattr(evidence, name), getattr(evidence, f"{name}_se"))
    made["upper_exact"] = evidence.upper_exact
    log_w = guide.log_weight.flatten(0, 1)
    base, base_se = mean(prior.log_weight.flatten(0, 1))
    if exact is None:
        put("kl_prior_p", evidence.log_z - base, (evidence.log_z_se**2 + base_se**2).sqrt())
    else:  # log Z and base from the same draws: one influence function
        from_prior = prior.log_weight.flatten(0, 1)
        se = ((from_prior - evidence.log_z).exp() - from_prior).std(0) / from_prior.shape[0] ** 0.5
        se = se.nan_to_num(math.inf)  # of a distance that is infinite
        put("kl_prior_p", evidence.log_z - base, se)
    made["elbo_gain"] = made["elbo_gain_se"] = None  # where both are -inf
    if float(base) > -math.inf:
        put("elbo_gain", evidence.elbo - base, (evidence.elbo_se**2 + base_se**2).sqrt())
    source = exact if exact is not None else prior
    put("kl_p_prior", *_kl_from_prior(source, evidence))
    made["possible"] = float((log_w > -torch.inf).double().mean())
    put("kl_q_prior", *mean((guide.log_guide - guide.log_prior).flatten(0, 1)))
    if "reward" in guide.records:
        put("reward", *mean(guide["reward"].flatten(0, 1)))
        put("reward_prior", *mean(prior["reward"].flatten(0, 1)))
        source = exact if exact is not None else guide
        put("reward_posterior", *weighted_mean(source["reward"].flatten(0, 1), source))
    made["ess"] = float(ess(log_w))
    made["khat"] = psis_khat(log_w[:, 0])
    made["num_samples"] = guide.num_samples
    made["exact_draws"] = 0 if exact is None else exact.num_samples
    cost = prior.cost + guide.cost  # of drawing for all prompts together
    made["lm_tokens"], made["reward_calls"] = round(cost.lm_tokens * share), round(cost.reward_calls * share)
    return made, _judged(made)


def _kl_from_prior(draws: Draws, evidence: Evidence) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(posterior ‖ prior) = E_p[log likelihood] - log Z, (B,), from exact draws or weighted ones of the prior."""
    log_likelihood = draws.log_likelihood.flatten(0, 1)
    value, se = weighted_mean(torch.where(log_likelihood > -torch.inf, log_likelihood, 0.0), draws)
    return value - evidence.log_z, (se**2 + evidence.log_z_se**2).sqrt()


def _judged(made: dict[str, Any]) -> Verdict:
    if made["kl_prior_p"] == math.inf:
        return judge_cover(
            **{k: made[k] for k in ("kl_p_q", "kl_p_q_se", "kl_p_prior", "kl_p_prior_se", "possible", "upper_exact")}
        )
    return judge(
        kl_q_p=made["kl_q_p"],
        kl_q_p_se=made["kl_q_p_se"],
        kl_p_q=made["kl_p_q"],
        kl_prior_p=made["kl_prior_p"],
        gain=made["elbo_gain"],
        gain_se=made["elbo_gain_se"],
        upper_exact=made["upper_exact"],
        khat=made["khat"],
        num_samples=made["num_samples"],
    )


def _average(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over prompts; standard errors of means of independent figures; costs added up; the worst k-hat."""
    n, average = len(figures), {}
    for key, value in figures[0].items():
        column = [f[key] for f in figures]
        if key in ("prompt", "verdict"):
            continue
        if key.startswith("elbo_gain") and None in column:
            average[key] = None
            continue
        if key.endswith("_se"):
            average[key] = sum(v * v for v in column) ** 0.5 / n
        elif key == "khat":
            average[key] = max((v for v in column if v is not None), default=None)
        elif isinstance(value, bool):
            average[key] = all(column)
        elif key in ("lm_tokens", "reward_calls", "exact_draws"):
            average[key] = sum(column)
        elif key == "num_samples":
            average[key] = value
        else:
            average[key] = sum(column) / n
    return average
