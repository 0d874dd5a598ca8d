"""A population of texts that grows token by token and is resampled: the steps of SMC."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppl_lm.infer.samplers.next_tokens import Laws
from ppl_lm.infer.samplers.resampling import Rule, systematic
from ppl_lm.infer.samplers.twist import Twist
from ppl_lm.lm.token_sequence import TokenSequence


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
