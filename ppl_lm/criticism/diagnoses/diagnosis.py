"""`diagnose`: how close a guide is to its posterior, prompt by prompt, as figures with errors and a verdict."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ppl_lm.criticism.averages import over_prompts
from ppl_lm.criticism.diagnoses.figures import GuideFigures, PromptFigures
from ppl_lm.criticism.diagnoses.pool import Pool
from ppl_lm.criticism.diagnoses.pooling import ALONE, POOLED, pooled_verdict
from ppl_lm.criticism.diagnoses.verdicts import Verdict, judge, of_prompts
from ppl_lm.criticism.evidence import Evidence, log_evidence
from ppl_lm.criticism.weights import ess_se, khat_se, max_weight, psis_khat
from ppl_lm.infer.binding import Bound, read_once
from ppl_lm.infer.draws import Draws, NoSupportError, concatenate
from ppl_lm.infer.log_weights import kong_ess, mean
from ppl_lm.infer.samplers.importance_sampling import importance
from ppl_lm.infer.samplers.in_pieces import pieces, texts_a_piece
from ppl_lm.infer.samplers.rejection_sampling import accept, select
from ppl_lm.infer.tables import as_html
from ppl_lm.infer.traces.observations import likelihood_bound
from ppl_lm.infer.twists.bellman import bellman_residuals
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompt_names import readable

SHOWN = ["verdict", "log_z", "log_z_se", "kl_q_p", "kl_q_p_se", "kl_p_q", "kl_p_q_se", "ess", "khat"]  # in a notebook
STEERED = 0.1  # nats, by which a text's residuals may miss its log weight, of which they are the parts
RESIDUALS = 512  # draws of each prompt in which a twist's residuals are looked at
MIN_EXACT = 20  # exact draws for a prompt, below which the reverse IWAE is the approximate one


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """Figures of each prompt and their average (the keys of `diagnosis.json`), the verdict, and the draws behind them.

    :param prior: the prior's draws. Their `stats` hold `log_q`, what log density the guide gives them, nats, and where the
        likelihood has a bound `accepted`, 1 for those that rejection keeps as exact posterior draws.
    :param guide: as many of the guide."""

    prompts: list[PromptFigures]
    average: GuideFigures
    verdict: Verdict
    prior: Draws
    guide: Draws

    @cached_property
    def exact(self) -> list[Draws | None]:
        """Each prompt's exact posterior draws with `log_guide` under the guide, None where there were too few."""
        return [exact_among(self.prior.of_prompt(b)) for b in range(self.prior.log_guide.shape[-1])]

    def __repr__(self) -> str:
        return f"Diagnosis({self.verdict})"

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame` with a row for each prompt by name, a column for each figure, and the verdict's code."""
        import pandas as pd

        local = len(self.prompts) == len(self.guide.prompts)
        names = self.guide.prompts.names if local else ["all prompts"]
        rows = [one.as_json() for one in self.prompts]
        for row in rows:
            row |= {f"{k}_{of}": v for k, means in row.pop("recorded").items() for of, v in means.items()}
        return pd.DataFrame(rows, index=pd.Index(names, name="prompt")).drop(columns="prompt")

    def _repr_html_(self) -> str:
        return as_html(self.to_dataframe()[SHOWN], str(self.verdict))

    def as_json(self) -> dict[str, Any]:
        """What `diagnosis.json` holds of it."""
        verdict, by_prompt = self.verdict, [one.as_json() for one in self.prompts]
        words = {"verdict": verdict.code, "sentence": verdict.sentence, "remedy": verdict.remedy}
        return {**self.average.as_json(), **words, "prompts": by_prompt}


def exact_among(prior: Draws) -> Draws | None:
    """The exact posterior draws among the prior's of one prompt, as `Diagnosis.prior` has them; None if they are too few."""
    if "accepted" not in prior.stats:
        return None
    keep = prior.stats["accepted"].flatten(0, 1) > 0  # (S, 1)
    if int(keep.sum()) < MIN_EXACT:
        return None
    proposals = replace(prior, latents={})  # with their weights as proposals
    return replace(select(_scored(prior), keep, int(keep.sum())), proposals=proposals)


def _scored(prior: Draws) -> Draws:
    """The same draws with `log_guide` under the guide, as `prior.under(guide)` has them."""
    return replace(prior, log_guide=prior.stats["log_q"])


def diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    prompts: Any,
    num_samples: int = 4096,
    max_plate_nesting: int | None = None,
    *,
    sizes: Iterable[int] | None = None,
) -> Diagnosis:
    """Draws from the guide and from the prior, weights both to the posterior's (`Pool`), finds exact posterior draws among the
    prior's where the likelihood has a bound, and says how far the guide is from the posterior.

    Of fewer than 100 draws of each of 8 prompts or more the verdict is on all prompts together (`pooled`), and none is given on
    single ones.

    :param num_samples: draws of each for every prompt, at least `least_draws` of their number.
    :param sizes: how many of them to make at a time; it may end early, as `pieces` does where the time is up.
    """
    prompts = read_once(prompts, model, guide)
    require_enough(num_samples, len(prompts))
    if sizes is None:
        sizes = pieces(num_samples, max(2, texts_a_piece(prompts, model, guide) // max(1, len(prompts))))
    both = [_draw(model, guide, prompts, n, max_plate_nesting) for n in sizes]
    from_prior, from_guide = (concatenate(parts) for parts in zip(*both, strict=True))
    num_samples, columns = from_guide.num_samples, from_guide.log_guide.shape[-1]
    require_enough(num_samples, columns)
    bound = likelihood_bound(model, prompts, joint=not from_guide.is_local)
    keep = None if bound is None or not from_prior.from_prior else accept(from_prior, bound)  # (S, B)
    seen = [d.log_weight.flatten(0, 1) > -torch.inf for d in (from_prior, from_guide)]
    if not bool((seen[0].any(0) | seen[1].any(0)).all()):
        worst = int((~(seen[0].any(0) | seen[1].any(0))).nonzero()[0])
        raise NoSupportError(
            f"prompt {worst}: none of {num_samples} draws of the prior and of the guide is possible under the posterior, so "
            "nothing is known of it; draw more (--num-samples), or loosen the constraint"
        )
    if keep is not None:
        accepted = keep.reshape(from_prior.log_weight.shape).double()
        from_prior = replace(from_prior, stats=from_prior.stats | {"accepted": accepted})
    residuals = _residuals(model, guide, from_guide)
    together = num_samples < ALONE and columns >= POOLED
    figures, verdicts = [], []
    for b in range(columns):
        p, q = from_prior.of_prompt(b), from_guide.of_prompt(b)
        exact = exact_among(p)
        figures_of_prompt, verdict = _figures(_scored(p), q, exact, log_evidence(q, exact), bound, 1 / columns)
        figures_of_prompt |= residuals[b]
        code = "pooled" if together else verdict.code
        figures.append({"prompt": q.prompts.texts[0], **figures_of_prompt, "verdict": code})
        verdicts.append(verdict)
    average = over_prompts(
        figures,
        largest=("khat", "max_weight"),
        smallest=("seen",),
        total=("exact_draws",),
        shared=("num_samples",),
        without=("prompt", "verdict"),
    )
    cost = from_prior.cost + from_guide.cost
    average |= {"lm_tokens": cost.lm_tokens, "reward_calls": cost.reward_calls}
    names = [readable(f["prompt"]) for f in figures]
    if together:
        average, verdict = pooled_verdict(figures, average)
    else:
        verdict = verdicts[0] if len(verdicts) == 1 else of_prompts(judge(**average), verdicts, names)
    by_prompt = [PromptFigures.from_json(one) for one in figures]
    return Diagnosis(by_prompt, GuideFigures.from_json(average), verdict, from_prior, from_guide)


def _draw(model: Any, guide: Any, prompts: Any, n: int, nesting: int | None) -> tuple[Draws, Draws]:
    """n draws of the prior, with their log density under the guide among their stats, and n of the guide."""
    settings: Any = {"num_samples": n, "max_plate_nesting": nesting}
    from_prior, from_guide = (importance(model, law, prompts, **settings) for law in (None, guide))
    under_guide = from_prior.under(guide, nesting)
    stats = from_prior.stats | {"log_q": under_guide.log_guide}
    return replace(from_prior, stats=stats, cost=under_guide.cost), from_guide


def least_draws(prompts: int) -> int:
    """Draws of each prompt, below which no verdict would be honest: 100 for one of its own; with 8 prompts or more 64 in all,
    at least 4 of each, for one that is pooled."""
    return ALONE if prompts < POOLED else max(4, math.ceil(64 / prompts))


def require_enough(num_samples: int, prompts: int = 1) -> None:
    """:raises ValueError: if there are too few draws for standard errors to mean anything."""
    if num_samples < (least := least_draws(prompts)):
        raise ValueError(f"num_samples={num_samples}; give at least {least} draws for each prompt")


def _figures(
    prior: Draws, guide: Draws, exact: Draws | None, evidence: Evidence, bound: float | None, share: float
) -> tuple[dict[str, Any], Verdict]:
    """:param prior: the prior's draws, with `log_guide` under the guide."""
    figures: dict[str, Any] = {}
    pool = Pool.of(prior, guide)

    def put(name: str, estimate: tuple[Any, Any]) -> None:
        figures[name], figures[f"{name}_se"] = map(float, estimate)

    for name in ("elbo", "iwae", "iwae_upper"):
        put(name, (getattr(evidence, name), getattr(evidence, f"{name}_se")))
    put("upper", pool.eubo())
    figures["iwae_upper_exact"] = evidence.upper_exact
    put("log_z", pool.evidence())
    put("kl_q_p", pool.kl_guide())
    put("kl_p_q", pool.kl_posterior())
    put("kl_prior_p", pool.kl_prior())
    put("kl_p_prior", pool.kl_posterior_prior())
    put("kl_q_prior", mean((guide.log_guide - guide.log_prior).flatten(0, 1)))
    base, base_se = map(float, mean(pool.log_likelihood[0]))
    figures["elbo_gain"] = figures["elbo_gain_se"] = None  # where both are -inf
    if base > -math.inf:
        put("elbo_gain", (figures["elbo"] - base, math.hypot(figures["elbo_se"], base_se)))
    put("missing", pool.missing())
    put("entropy", pool.entropy_guide())
    put("entropy_posterior", pool.entropy())
    rows = [row[row > -torch.inf] for row in pool.log_likelihood]
    few = [len(row) < 2 for row in rows]
    figures["log_likelihood_prior"] = -math.inf if few[0] else float(rows[0].mean())
    put("log_likelihood", (-math.inf, 0.0) if few[1] else mean(rows[1]))
    figures["log_likelihood_posterior"] = pool.posterior(pool.log_likelihood)[0]
    figures["seen"], figures["bounded"] = pool.seen(bound), bound is not None
    figures["possible"] = float((guide.log_weight > -torch.inf).double().mean())
    by_record = {name: _means([prior.records[name], guide.records[name]], pool) for name in guide.records}
    if (rewards := by_record.pop("reward", None)) is not None:
        laws = {"": "guide", "_prior": "prior", "_posterior": "posterior"}
        figures |= {f"reward{name}{se}": rewards[f"{law}{se}"] for name, law in laws.items() for se in ("", "_se")}
    figures["recorded"] = by_record
    log_w = guide.log_weight.flatten()
    put("ess", (kong_ess(log_w), ess_se(log_w)))
    figures["khat"], figures["khat_se"] = psis_khat(log_w), khat_se(log_w)
    figures["max_weight"] = float(max_weight(log_w))
    figures["num_samples"] = guide.num_samples
    figures["exact_draws"] = 0 if exact is None else exact.num_samples
    cost = prior.cost + guide.cost  # of drawing for all prompts together
    figures["lm_tokens"], figures["reward_calls"] = round(cost.lm_tokens * share), round(cost.reward_calls * share)
    return figures, judge(**figures)


def _residuals(model: Any, guide: Any, draws: Draws) -> list[dict[str, Any]]:
    """Of each prompt, in some of the guide's draws, how far a network `twist` that the guide was bound with is from solving
    Bellman's equation; nothing of other guides."""
    twist = guide.networks["twist"] if isinstance(guide, Bound) and "twist" in guide.networks else None
    batch = draws.log_guide.shape[-1]
    if not isinstance(twist, LanguageModel) or len(draws.latents) != 1 or not draws.is_local:
        return [{} for _ in range(batch)]
    some = draws.map(lambda v: v[:, :RESIDUALS])
    whole = bellman_residuals(model, twist, some).flatten(0, 1)  # (S, B, T + 1)
    log_w = some.log_weight.flatten(0, 1)
    known = log_w > -torch.inf
    if bool(((whole.sum(-1) - log_w)[known].abs() > STEERED).any()):  # the guide is not steered by it as a proposal is
        return [{} for _ in range(batch)]
    delta = whole[..., 1:]  # the first is a constant of the prompt
    (x,) = some.latents.values()
    alive = some.prompts.vocabulary.alive(x.flatten(0, 1))  # (S, B, T)
    return [
        {
            "bellman_rms": float(delta[:, b][alive[:, b]].square().mean().sqrt()),
            "bellman_oscillation": float((delta[:, b].amax(0) - delta[:, b].amin(0)).sum()),
        }
        for b in range(batch)
    ]


def _means(of_laws: list[Tensor], pool: Pool) -> dict[str, float]:
    """Of a record by each law, with standard errors.

    :param of_laws: of the prior's draws and of the guide's, each (C, S, B, ...)."""
    values = torch.stack([_numbers(value) for value in of_laws])  # (2, N)
    prior, guide = (mean(row.unsqueeze(-1)) for row in values)
    means = {"prior": prior, "guide": guide, "posterior": pool.posterior(values)}
    return {f"{law}{se}": float(of[i]) for law, of in means.items() for i, se in enumerate(("", "_se"))}


def _numbers(record: Float[Tensor, "C S *B"]) -> Float64[Tensor, "N"]:
    """One of each draw; the mean over prompts where they have but a joint weight, and over inner plates."""
    return record.double().flatten(0, 1).flatten(1).mean(1)
