"""Sequential Monte Carlo over text: K texts grow token by token, and the promising ones multiply."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppl_lm.infer.draws import Draws, NoSupportError, as_draws, concatenate
from ppl_lm.infer.samplers.importance_sampling import require_prompts
from ppl_lm.infer.samplers.population import Population, Settings, grow
from ppl_lm.infer.samplers.resampling import Rule, systematic
from ppl_lm.infer.samplers.twist import Twist
from ppl_lm.infer.traces.layout import ROWS
from ppl_lm.infer.traces.particles import run
from ppl_lm.infer.traces.text_site import TextIs, text_law
from ppl_lm.lm import meter
from ppl_lm.lm.token_sequence import TokenSequence


@torch.no_grad()
def smc(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    prompts: Any,
    *,
    num_samples: int = 256,
    num_runs: int = 1,
    twist: Twist | None = None,
    candidates: int | None = None,
    expand: int = 1,
    resample: Rule = systematic,
    threshold: float = 0.5,
    max_plate_nesting: int = 1,
) -> Draws:
    """`num_samples` weighted texts for each prompt that grew together: sequential Monte Carlo (Doucet et al. 2001; twisted:
    Zhao et al. 2024).

    At every token each text is weighted by p0 ψ_t / (q ψ_t-1) of its new token, and where the weights have become uneven the
    population is resampled. The mean of `exp(draws.log_weight)` over a run is an unbiased estimate of Z, whatever the twist,
    the proposal and the resampling. Each prompt is forwarded once a network, and one token a step for each text still open;
    a text that has ended keeps its weight and takes part in the resampling.

    :param guide: proposes; without a twist its own law is the intermediate target, so that weights arise at the end alone.
        None: the twist-induced proposal, q ∝ p0 ψ_t; the prior where there is no twist to ask.
    :param num_runs: independent runs, the chains of the draws; `log_evidence` takes its bounds from them.
    :param twist: a network from `twist_like` (its logits are log ψ_t), an automaton's mask, or a function such as
        `prefix_likelihood(model)`; see `ppl_lm.twists`.
    :param candidates: without a guide, of how many of the prior's likeliest tokens the proposal asks the twist; the others are
        proposed as the prior has them. None: all tokens of a network, none of a function.
    :param expand: how many next tokens each text is continued by before `num_samples` are chosen among them: SMC steering,
        with resample=without_replacement (Lew et al. 2023).
    :param resample: multinomial, stratified, systematic or without_replacement, from `ppl_lm.resampling`.
    :param threshold: resample where the effective sample size is below this share of `num_samples`: 0 never, above 1 always.
    :raises NoSupportError: if every text of a prompt is impossible under the posterior in all runs.
    :raises ValueError: if the model has another latent site than one text a prompt, or a weight is NaN.
    """
    settings = Settings(twist, candidates, expand, resample, threshold)
    check(settings, guide, num_samples, num_runs)
    with meter.measure() as cost:
        prior, proposal = laws(model, guide, prompts)
        batch, parts, done = len(prior.prompts), [], 0
        size = max(1, ROWS // (num_samples * expand * batch))  # runs at a time
        while done < num_runs:
            runs = min(size, num_runs - done)
            grown = grow(prior, proposal, settings, num_samples, runs)
            parts.append(finish(model, prompts, grown, batch, max_plate_nesting))
            done += runs
    made = replace(concatenate(parts, dim=0), cost=cost)
    require_support(made)
    return made


def check(settings: Settings, guide: Any, num_samples: int, num_runs: int) -> None:
    wanted = {"num_samples": num_samples, "num_runs": num_runs, "expand": settings.expand}
    for what, value in wanted.items():
        if value < (2 if what == "num_samples" else 1):
            raise ValueError(f"{what}={value}; give at least {2 if what == 'num_samples' else 1}")
    if not settings.threshold >= 0:
        raise ValueError(
            f"threshold={settings.threshold}; give a share of num_samples: 0 never resamples, above 1 always"
        )
    if settings.candidates is not None and (settings.candidates < 1 or settings.twist is None):
        raise ValueError(f"candidates={settings.candidates}; give at least 1, and a twist to ask")
    if settings.candidates is not None and guide is not None:
        raise ValueError(
            f"candidates={settings.candidates} is of the proposal that a twist makes; leave it out, or the guide"
        )


def laws(model: Any, guide: Any, prompts: Any) -> tuple[TokenSequence, TokenSequence | None]:
    """What the model and the guide draw their text from; None where there is no guide."""
    require_prompts(prompts)
    prior = text_law(model, prompts)
    proposal = None if guide is None else text_law(guide, prompts)
    if proposal is not None:
        proposal.lm.vocabulary.require_same(prior.lm.vocabulary, "guide and target")
        if proposal.event_shape != prior.event_shape:
            raise ValueError(
                f"the guide's texts have {proposal.event_shape[0]} tokens, the model's {prior.event_shape[0]}; give both the "
                "same max_new_tokens"
            )
    return prior, proposal


def finish(model: Any, prompts: Any, grown: Population, batch: int, nesting: int = 1) -> Draws:
    """Grown texts as draws, (runs, K, B): the model's own joint density takes the place of the last intermediate target."""
    count, columns, steps = grown.x.shape
    runs = columns // batch

    def by_particle(v: Tensor) -> Tensor:  # (K, runs · B, ...) -> (K · runs, B, ...)
        return v.reshape(count * runs, batch, *v.shape[2:])

    x, token_log_p = by_particle(grown.x), by_particle(grown.token_log_p)
    plates = (len(x), *[1] * (nesting - 1), *x.shape[1:])  # those of the program, between particles and prompts
    with TextIs(x.reshape(plates), token_log_p.reshape(plates)):
        found = run(model, None, (prompts,), {}, count * runs, nesting)
    made = as_draws(found, nesting)
    if len(made.latents) != 1 or not made.is_local or made.latents[made.texts[0]].dim() != 4:
        raise ValueError(
            f"SMC grows one text a prompt; this program has the latent sites {sorted(made.latents)}: use importance() or "
            "mcmc(kernel=independence), which move them all"
        )
    log_joint = made.log_prior[0] + made.log_likelihood[0]
    begun = by_particle(grown.log_w)
    log_w = begun + log_joint - by_particle(grown.log_target)
    log_w = torch.where((begun == -torch.inf) | (log_joint == -torch.inf), -torch.inf, log_w)
    if bool(log_w.isnan().any()):
        raise ValueError("a weight is NaN; check the program, its reward and the twist")
    log_guide = torch.where(log_w == -torch.inf, torch.inf, log_joint - log_w).unsqueeze(
        0
    )  # such that log_w is the weight
    made = replace(made, log_guide=log_guide, kind="runs", stats={"log_weight_before_evidence": begun.unsqueeze(0)})
    return made.map(lambda v: v[0].unflatten(0, (count, runs)).transpose(0, 1))


def require_support(draws: Draws) -> None:
    """:raises NoSupportError: if no text of a prompt is possible."""
    log_w = draws.log_weight.flatten(0, 1)
    if bool((log_w == -torch.inf).all(0).any()):
        worst = int((log_w == -torch.inf).all(0).nonzero()[0])
        raise NoSupportError(
            f"prompt {worst}: all {len(log_w)} texts are impossible under the posterior: their weights are zero (the best log "
            f"weight before the evidence was {float(draws.stats['log_weight_before_evidence'][..., worst].max()):.2f} nats); "
            "give more num_samples or num_runs, or a twist that knows what is impossible"
        )
