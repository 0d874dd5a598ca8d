"""A population of texts that grows token by token and is resampled: the steps of SMC."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppl_lm.infer.log_weights import kong_ess
from ppl_lm.infer.samplers.next_tokens import Laws
from ppl_lm.infer.samplers.population_state import History, Population, StepInfo
from ppl_lm.infer.samplers.rejuvenation import rejuvenate
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.lm.token_sequence import TokenSequence


def grow(
    prior: TokenSequence,
    proposal: TokenSequence | None,
    settings: SMCSettings,
    count: int,
    runs: int,
    planted: Int[Tensor, "P T"] | None = None,
) -> tuple[Population, History]:
    """Grows `count` texts in each population, P = runs · B, prompts fastest.

    :param planted: a text for each population that one particle has to become (conditional SMC); -1 where it may be any."""
    vocabulary, length = prior.lm.vocabulary, prior.event_shape[0]
    populations, device = runs * len(prior.prompts), prior.prompts.ids.device
    prompt = torch.arange(len(prior.prompts), device=device).repeat(runs).expand(count, populations)
    zeros = torch.zeros(count, populations, dtype=torch.float64, device=device)
    state = Population(
        x=torch.full((count, populations, length), vocabulary.pad_id, device=device),
        live=torch.ones(count, populations, dtype=torch.bool, device=device),
        log_w=zeros,
        log_target=zeros,
        token_log_p=zeros.unsqueeze(-1).repeat(1, 1, length),
        slot=None if planted is None else _anywhere(count, populations, device),
    )
    laws = Laws(prior, proposal, settings, prompt.flatten())
    steps: list[StepInfo] = []
    for t in range(length):
        if bool(state.live.any()):
            state, info = _step(state, laws, settings, planted, t)
        else:  # all have ended, and some may be opened again by a move to come
            info = _still(state)
        row = info.row
        steps.append(info)
        if settings.moves and settings.after(t + 1):
            state = rejuvenate(state, prior, settings, t + 1)
            row = torch.arange(int(state.live.sum()), device=prompt.device)
            if len(row):  # forwarded anew: which texts changed is as it falls
                laws = Laws(prior, proposal, settings, prompt[state.live])
                for before in range(t):
                    laws.advance(row, state.x[..., before][state.live])
        open_ = bool(state.live.any())
        if t == length - 1 or not (open_ or settings.moves_later(t + 2)):
            break
        if open_:
            laws.advance(row, state.x[..., t][state.live])
    return state, _history(steps, state, length)


def _still(state: Population) -> StepInfo:
    """Of a step in which no text is open."""
    log_w = state.log_w
    zeros = torch.zeros_like(log_w[0])
    return StepInfo(kong_ess(log_w), zeros > 0, zeros, torch.zeros(0, dtype=torch.int64, device=log_w.device))


def _history(steps: list[StepInfo], state: Population, length: int) -> History:
    steps = steps + [_still(state)] * (length - len(steps))
    columns = zip(*((info.ess, info.resampled, info.log_z_increment) for info in steps), strict=True)
    return History(*(torch.stack(column, -1) for column in columns))


def _step(
    state: Population, laws: Laws, settings: SMCSettings, planted: Int[Tensor, "P T"] | None, t: int
) -> tuple[Population, StepInfo]:
    """One more token for every open text, then resampling."""
    count, populations = state.live.shape
    live, many = state.live, settings.expand
    population = torch.arange(populations, device=live.device).expand(count, populations)[live]
    forced, place = None, None
    if planted is not None and state.slot is not None:
        here = torch.zeros_like(live).scatter(0, state.slot.unsqueeze(0), True)
        # `place` of the planted text among its continuations; what has ended is its only one
        place = torch.zeros_like(state.slot)
        if many > 1:
            place = torch.where((here & live).any(0), _anywhere(many, populations, live.device), place)
        forced = torch.full((len(population), many), -1, device=live.device)
        row, of = here[live].nonzero()[:, 0], population[here[live]]
        forced[row, place[of]] = planted[of, t]
    log_p0 = state.token_log_p[live].sum(-1)
    new = laws.propose(state.x[live], t, state.log_target[live], log_p0, population, many, forced)

    def children(value: Tensor, fill: Any, continuations: Tensor) -> Tensor:
        """(K · expand, P): of an open text all continuations, of an ended one itself and blanks."""
        every = value.new_full((count, many, populations), fill)
        every[:, 0] = value
        every.transpose(1, 2)[live] = continuations
        return every.flatten(0, 1)

    log_target = children(state.log_target, -torch.inf, new.log_target)
    log_w = state.log_w[live].unsqueeze(-1) + new.log_increment - math.log(many)
    log_w = children(state.log_w, -torch.inf, log_w)
    if bool(log_w.isnan().any()):
        raise ValueError(f"a weight is NaN at token {t}; check the twist and the guide")
    tokens = children(torch.zeros_like(live, dtype=torch.int64), 0, new.tokens)
    open_ = live.repeat_interleave(many, 0) & ~laws.vocabulary.is_end(tokens) & (t < state.x.shape[-1] - 1)
    ess = kong_ess(log_w)
    index, log_w, slot, resampled = _select(log_w, open_, state, settings, t, place)
    parent = index // many
    pick = lambda v: v.gather(0, parent if v.dim() == 2 else parent.unsqueeze(-1).expand(-1, -1, v.shape[-1]))  # noqa: E731
    grew = pick(live)
    token = tokens.gather(0, index)
    log_p = children(torch.zeros_like(log_target[:count]), 0.0, new.log_p).gather(0, index)
    x, token_log_p = pick(state.x), pick(state.token_log_p)
    x[..., t] = torch.where(grew, token, x[..., t])
    token_log_p[..., t] = torch.where(grew, log_p, 0.0)
    live = open_.gather(0, index)
    row = torch.full_like(parent, -1).masked_scatter(state.live, torch.arange(len(population), device=live.device))
    info = StepInfo(ess, resampled, log_z_increment(state.log_w, log_w), pick(row)[live])
    return Population(x, live, log_w, log_target.gather(0, index), token_log_p, slot), info


def _select(
    log_w: Float[Tensor, "N P"],
    open_: Bool[Tensor, "N P"],
    state: Population,
    settings: SMCSettings,
    t: int,
    place: Int[Tensor, "P"] | None = None,
) -> tuple[Int[Tensor, "K P"], Float[Tensor, "K P"], Int[Tensor, "P"] | None, Bool[Tensor, "P"]]:
    """Which of the continuations go on, their weights, where the planted text is, and which populations were resampled: those
    whose weights are even stay as they are.

    :param place: which of its continuations the planted text is."""
    count, many = len(state.live), settings.expand
    still = torch.arange(count, device=log_w.device).unsqueeze(-1).expand(count, log_w.shape[1]) * many
    index, kept, slot = still.clone(), log_w.gather(0, still), state.slot
    needed = _needed(log_w, open_, state.live, settings) if settings.after(t + 1) else torch.zeros_like(open_[0])
    if not bool(needed.any()):
        return index, kept, slot, needed
    through = None if slot is None or place is None else (slot * many + place)[needed]
    resampled = settings.resample(log_w[:, needed], count, through=through)
    index[:, needed], kept[:, needed] = resampled.index, resampled.log_w
    if slot is not None and resampled.slot is not None:
        slot = slot.masked_scatter(needed, resampled.slot)
    return index, kept, slot, needed


def _needed(
    log_w: Float[Tensor, "N P"], open_: Bool[Tensor, "N P"], live: Bool[Tensor, "K P"], settings: SMCSettings
) -> Bool[Tensor, "P"]:
    """Which populations are resampled: those that have grown too many; those of uneven weights, as long as a text is open
    (later, the weights themselves say all), and not those without any weight."""
    if settings.expand > 1:
        return live.any(0) & (log_w > -torch.inf).any(0)
    ess = kong_ess(log_w)
    return (ess > 0) & (ess < settings.threshold * len(live)) & open_.any(0)


def log_z_increment(before: Float[Tensor, "K P"], after: Float[Tensor, "K P"]) -> Float[Tensor, "P"]:
    """What a step adds to the log of the mean weight, nats: -inf where it takes all weight, 0 where there was none."""
    earlier, later = before.logsumexp(0), after.logsumexp(0)
    return torch.where(earlier == -torch.inf, 0.0, later - earlier)


def _anywhere(count: int, populations: int, device: torch.device) -> Int[Tensor, "P"]:
    """A place among `count` for each population, uniform."""
    return torch.randint(count, (populations,), device=device)
