"""Sequential Monte Carlo over text: K texts grow token by token, and the promising ones multiply."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppl_lm.infer.draws import Draws, NoSupportError, concatenate
from ppl_lm.infer.grow import Laws
from ppl_lm.infer.importance import ROWS, as_draws, require_prompts
from ppl_lm.infer.particles import run
from ppl_lm.infer.resampling import Rule, systematic
from ppl_lm.infer.text_site import TextIs, text_law
from ppl_lm.infer.twist import Twist
from ppl_lm.lm import TokenSequence, meter


@dataclass(frozen=True)
class Settings:
    """How texts grow; see `smc`."""

    twist: Twist | None = None
    candidates: int | None = None
    expand: int = 1
    resample: Rule = systematic
    threshold: float = 0.5


@dataclass(frozen=True)
class Population:
    """K texts in each of C columns, a column being one run for one prompt.

    :param log_w: γ_t(x_≤t) / q, with the particles of a column averaged an unbiased estimate of Σ γ_t.
    :param log_target: log γ_t(x_≤t), γ_t = p0(x_≤t) ψ_t(x_≤t) the intermediate target that the weight is for, nats.
    :param token_log_p: log p0 of each token.
    :param slot: where a planted text is, (C,); None where there is none.
    """

    x: Int[Tensor, "K C T"]
    live: Bool[Tensor, "K C"]
    log_w: Float[Tensor, "K C"]
    log_target: Float[Tensor, "K C"]
    token_log_p: Float[Tensor, "K C T"]
    slot: Int[Tensor, "C"] | None = None


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
        `prefix_likelihood(model)`; see `ppl_lm.infer.twist`.
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


def grow(
    prior: TokenSequence,
    proposal: TokenSequence | None,
    settings: Settings,
    count: int,
    runs: int,
    planted: Int[Tensor, "C T"] | None = None,
) -> Population:
    """Grows `count` texts in each column, C = runs · B, prompts fastest.

    :param planted: a text for each column that one particle has to become (conditional SMC)."""
    vocabulary, steps = prior.lm.vocabulary, prior.event_shape[0]
    columns, device = runs * len(prior.prompts), prior.prompts.ids.device
    prompt = torch.arange(len(prior.prompts), device=device).repeat(runs).expand(count, columns)
    zeros = torch.zeros(count, columns, dtype=torch.float64, device=device)
    now = Population(
        x=torch.full((count, columns, steps), vocabulary.pad_id, device=device),
        live=torch.ones(count, columns, dtype=torch.bool, device=device),
        log_w=zeros,
        log_target=zeros,
        token_log_p=zeros.unsqueeze(-1).repeat(1, 1, steps),
        slot=None if planted is None else _anywhere(count, columns, device),
    )
    moving = Laws(prior, proposal, settings.twist, settings.candidates, prompt.flatten())
    for t in range(steps):
        now, ancestors = _step(now, moving, settings, planted, t)
        if t == steps - 1 or not bool(now.live.any()):
            break
        moving.advance(ancestors, now.x[..., t][now.live])
    return now


def _step(
    now: Population, laws: Laws, settings: Settings, planted: Tensor | None, t: int
) -> tuple[Population, Int[Tensor, "n"]]:
    """One more token for every open text, then resampling. Also which row of the laws each open text goes on from."""
    count, columns = now.live.shape
    live, many = now.live, settings.expand
    column = torch.arange(columns, device=live.device).expand(count, columns)[live]
    forced, place = None, None
    if planted is not None and now.slot is not None:
        here = torch.zeros_like(live).scatter(0, now.slot.unsqueeze(0), True)
        place = torch.zeros_like(
            now.slot
        )  # of the planted text among its continuations; what has ended is its only one
        if many > 1:
            place = torch.where((here & live).any(0), _anywhere(many, columns, live.device), place)
        forced = torch.full((len(column), many), -1, device=live.device)
        row, of = here[live].nonzero()[:, 0], column[here[live]]
        forced[row, place[of]] = planted[of, t]
    new = laws.propose(now.x[live], t, now.log_target[live], now.token_log_p[live].sum(-1), column, many, forced)

    def children(value: Tensor, fill: Any, grown: Tensor) -> Tensor:
        """(K · expand, C): of an open text all continuations, of an ended one itself and blanks."""
        made = value.new_full((count, many, columns), fill)
        made[:, 0] = value
        made.transpose(1, 2)[live] = grown
        return made.flatten(0, 1)

    log_target = children(now.log_target, -torch.inf, new.log_target)
    log_w = now.log_w[live].unsqueeze(-1) + new.log_increment - math.log(many)
    log_w = children(now.log_w, -torch.inf, log_w)
    if bool(log_w.isnan().any()):
        raise ValueError(f"a weight is NaN at token {t}; check the twist and the guide")
    tokens = children(torch.zeros_like(live, dtype=torch.int64), 0, new.tokens)
    open_ = live.repeat_interleave(many, 0) & ~laws.vocabulary.is_end(tokens) & (t < now.x.shape[-1] - 1)
    index, log_w, slot = _select(log_w, open_, now, settings, place)
    parent = index // many
    pick = lambda v: v.gather(0, parent if v.dim() == 2 else parent.unsqueeze(-1).expand(-1, -1, v.shape[-1]))  # noqa: E731
    grew = pick(live)
    token = tokens.gather(0, index)
    log_p = children(torch.zeros_like(log_target[:count]), 0.0, new.log_p).gather(0, index)
    x, token_log_p = pick(now.x), pick(now.token_log_p)
    x[..., t] = torch.where(grew, token, x[..., t])
    token_log_p[..., t] = torch.where(grew, log_p, 0.0)
    live = open_.gather(0, index)
    row = torch.full_like(parent, -1).masked_scatter(now.live, torch.arange(len(column), device=live.device))
    return Population(x, live, log_w, log_target.gather(0, index), token_log_p, slot), pick(row)[live]


def _select(
    log_w: Float[Tensor, "N C"],
    open_: Bool[Tensor, "N C"],
    now: Population,
    settings: Settings,
    place: Int[Tensor, "C"] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(K, C): which of the continuations go on, and their weights; the population as it is where they are even.

    :param place: which of its continuations the planted text is."""
    count, many = len(now.live), settings.expand
    still = torch.arange(count, device=log_w.device).unsqueeze(-1).expand(count, log_w.shape[1]) * many
    index, kept, slot = still.clone(), log_w.gather(0, still), now.slot
    needed = _needed(log_w, open_, now.live, settings)
    if not bool(needed.any()):
        return index, kept, slot
    through = None if slot is None or place is None else (slot * many + place)[needed]
    found = settings.resample(log_w[:, needed], count, through=through)
    index[:, needed], kept[:, needed] = found.index, found.log_w
    if slot is not None and found.slot is not None:
        slot = slot.masked_scatter(needed, found.slot)
    return index, kept, slot


def _needed(log_w: Tensor, open_: Tensor, live: Tensor, settings: Settings) -> Bool[Tensor, "C"]:
    """Which populations are resampled: those that have grown too many; those of uneven weights, as long as a text is open
    (later, the weights themselves say all), and not those without any weight."""
    if settings.expand > 1:
        return live.any(0) & (log_w > -torch.inf).any(0)
    ess = (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()
    return (ess.nan_to_num(torch.inf) < settings.threshold * len(live)) & open_.any(0)


def _anywhere(count: int, columns: int, device: torch.device) -> Int[Tensor, "C"]:
    """A place among `count` for each column, uniform."""
    return torch.randint(count, (columns,), device=device)


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
    made = replace(
        made, log_guide=log_guide, interacting=True, stats={"log_weight_before_evidence": begun.unsqueeze(0)}
    )
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
