"""Model comparison: log evidence with error bars, differences, and posterior probabilities of models."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ppl_lm.criticism.evidence import Evidence
from ppl_lm.criticism.weights import khat_threshold, psis_khat
from ppl_lm.infer.draws import TOLERANCE, Draws, NoSupportError
from ppl_lm.infer.log_weights import log_mean

REPEATS = 20_000  # of the normal errors of log Z, by which intervals are found


@dataclass(frozen=True)
class ComparedModel:
    """One model of several, best first.

    :param log_z: log evidence of all prompts together, nats, the likelihoods' bounds taken off, with standard error `se`.
    :param difference: log_z less the best model's, nats, at most 0, with standard error `difference_se`; both 0 of the best.
    :param probability: of the model under equal prior odds, with `low` and `high`, its 95% interval: Monte Carlo error alone,
        with log Z normal.
    :param reliable: False where k-hat of a prompt's weights is above its threshold, so that the errors are too small; None of
        an `Evidence`, or where k-hat does not apply.
    """

    name: str
    log_z: float
    se: float
    difference: float
    difference_se: float
    probability: float
    low: float
    high: float
    reliable: bool | None

    def __str__(self) -> str:
        doubt = " (k-hat too high: the error is larger)" if self.reliable is False else ""
        return (
            f"{self.name}: log Z {self.log_z:.3f} ± {self.se:.3f}, {self.difference:.3f} ± {self.difference_se:.3f} nats "
            f"from the best, probability {self.probability:.3f} [{self.low:.3f}, {self.high:.3f}]{doubt}"
        )


def compare_models(
    models: Mapping[str, Draws | Evidence],
    log_bounds: Mapping[str, float | None] | None = None,
    *,
    same_likelihood: bool = False,
    seed: int = 0,
) -> list[ComparedModel]:
    """Models by their evidence: p(model | evidence) ∝ Z under equal prior odds (Kass & Raftery 1995).

    `log_z` of draws and of `Evidence` refers to the factor exp(r/β), which is no probability: add a constant to the reward,
    and log Z moves with it. So factors of different rewards or temperatures must be made probabilities first. With a declared
    r_max, p(O=1 | x) = exp((r - r_max)/β) is a Bernoulli likelihood and log Z - r_max/β its log evidence, for each prompt. Its
    claim is strong: only a text of reward r_max is certain to be called optimal, so that a loose r_max counts against a model.

    Where all models have the same likelihood (two priors, or two prompts, under one reward and β) the constant cancels, and
    `same_likelihood=True` does without bounds.

    Standard errors take the models' draws as independent: do not compare weights of the same draws. Of several prompts, the log
    evidences add up.

    :param models: name -> a guide's draws (`importance`, `smc`), exact draws with their proposals (`rejection`), or `Evidence`.
    :param log_bounds: name -> upper bound of the log-likelihood of each prompt, r_max/β, in nats: `likelihood_bound(model,
        prompts)`. 0 for likelihoods that are probabilities already, such as `constrained`'s.
    :param same_likelihood: whether exp(r/β) is the same function of the text in all models.
    :param seed: of the intervals; torch's random state is neither used nor changed.
    :returns: best first.
    :raises ValueError: if neither bounds nor `same_likelihood` is given, a bound is missing, not finite or below a likelihood
        that was drawn, the models have different numbers of prompts, or draws have no evidence (Markov chains, or a single
        draw).
    :raises NoSupportError: if all weights of a prompt are zero.
    """
    if len(models) < 2:
        raise ValueError(f"{len(models)} model(s); give at least 2")
    bounds = _bounds(models, log_bounds, same_likelihood)
    evidence = {name: _evidence(name, model, bounds[name]) for name, model in models.items()}
    counts = {name: len(log_z) for name, (log_z, _, _) in evidence.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"numbers of prompts differ: {counts}; the evidence of more prompts is another quantity")
    names = list(evidence)
    log_z = torch.stack([evidence[name][0].sum() for name in names])
    se = torch.stack([evidence[name][1].square().sum().sqrt() for name in names])
    probability = log_z.softmax(0)
    noise = torch.randn(REPEATS, len(names), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ranges = (log_z + se * noise).softmax(-1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0)
    rows = []
    best = int(log_z.argmax())
    for i in log_z.argsort(descending=True, stable=True).tolist():
        rows.append(
            ComparedModel(
                name=names[i],
                log_z=float(log_z[i]),
                se=float(se[i]),
                difference=float(log_z[i] - log_z[best]),
                difference_se=0.0 if i == best else math.hypot(se[i], se[best]),
                probability=float(probability[i]),
                low=float(ranges[0, i]),
                high=float(ranges[1, i]),
                reliable=evidence[names[i]][2],
            )
        )
    return rows


def _bounds(
    models: Mapping[str, Draws | Evidence], log_bounds: Mapping[str, float | None] | None, same_likelihood: bool
) -> dict[str, float]:
    if log_bounds is None:
        if not same_likelihood:
            raise ValueError(
                "log Z refers to exp(r/β), which is no probability: models with different rewards or β cannot be compared by "
                "it. Declare r_max and pass log_bounds={name: likelihood_bound(model, prompts)}, or pass same_likelihood=True "
                "if all have the same reward and β"
            )
        return dict.fromkeys(models, 0.0)
    if same_likelihood:
        raise ValueError("log_bounds= and same_likelihood=True are both given; give one")
    if log_bounds.keys() != models.keys():
        raise ValueError(f"log_bounds= has {sorted(log_bounds)}, the models are {sorted(models)}; give one for each")
    checked: dict[str, float] = {}
    for name, bound in log_bounds.items():
        if bound is None or not math.isfinite(bound):
            raise ValueError(f"log_bounds[{name!r}]={bound}; declare the reward's r_max, or pass its r_max/β in nats")
        model = models[name]
        if isinstance(model, Draws):
            places = 1 if model.is_local else len(model.prompts)  # a joint weight holds all prompts' factors
            reached = float(model.log_likelihood.max())
            if reached > bound * places + TOLERANCE:
                raise ValueError(
                    f"log_bounds[{name!r}]={bound:.2f} nats, but a draw reached {reached:.2f}; raise r_max"
                )
        checked[name] = float(bound)
    return checked


def _evidence(name: str, model: Draws | Evidence, bound: float) -> tuple[torch.Tensor, torch.Tensor, bool | None]:
    """log Z less the bound and its standard error, (B,), and whether k-hat trusts them."""
    if isinstance(model, Evidence):
        log_z, se, reliable, places = model.log_z, model.log_z_se, None, 1
    else:
        source = {"runs": model.by_run, "exact": lambda: model.proposals}.get(model.kind, lambda: model)()
        if model.kind == "chains" or source is None:
            raise ValueError(f"model {name!r}: Markov chains, or exact draws without their proposals, have no evidence")
        if model.kind == "conditional_runs":
            raise ValueError(f"model {name!r}: conditional_smc's runs bound log Z from above; give smc's")
        log_w = source.log_weight.flatten(0, 1)  # (S, B)
        if bool(log_w.isnan().any()):
            raise ValueError(f"model {name!r}: a weight is NaN; give draws as a sampler made them")
        if len(log_w) < 2:
            raise ValueError(f"model {name!r}: one draw, or one run, has no standard error; give at least 2")
        if bool((log_w == -torch.inf).all(0).any()):
            raise NoSupportError(
                f"model {name!r}: all weights of a prompt are zero, so that log Z is not known; draw more"
            )
        log_z, se = log_mean(log_w)
        hats = [hat for hat in map(psis_khat, log_w.unbind(-1)) if hat is not None]
        reliable = max(hats) < khat_threshold(len(log_w)) if hats else None
        places = 1 if model.is_local else len(model.prompts)
    log_z, se = log_z.detach().double().cpu() - bound * places, se.detach().double().cpu()
    if not bool((log_z.isfinite() & (se >= 0)).all()):
        raise ValueError(f"model {name!r}: log Z = {log_z.tolist()} ± {se.tolist()} is not known")
    return log_z, se, reliable
