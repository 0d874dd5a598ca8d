"""Adaptive multilevel splitting: rare texts by way of less rare ones."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from ppl_lm.infer.binding import Bound, read_once
from ppl_lm.infer.counts import require_count
from ppl_lm.infer.draws import Draws, NoSupportError, concatenate
from ppl_lm.infer.samplers.constraints.bound_checkers import prompts_of
from ppl_lm.infer.samplers.importance_sampling import draw, require_prompts
from ppl_lm.infer.samplers.in_pieces import Progress
from ppl_lm.infer.samplers.kernels import Kernel, Propose, ends_and_tokens, require_blind
from ppl_lm.infer.samplers.markov_chains import step
from ppl_lm.infer.samplers.sequential import require_own_law, require_text_alone
from ppl_lm.infer.traces.structure import nesting_of
from ppl_lm.infer.traces.text_site import text_law
from ppl_lm.lm import meter


@torch.no_grad()
def splitting(
    model: Callable[..., Any],
    prompts: Any,
    *,
    level: float | None = None,
    record: str = "reward",
    num_samples: int = 64,
    num_runs: int = 16,
    killed: int | None = None,
    moves: int = 4,
    kernel: Kernel = ends_and_tokens,
    max_plate_nesting: int | None = None,
    on_progress: Progress | None = None,
) -> Draws:
    """Weighted texts of the rare event r ≥ level, whose mean weight in a run is an unbiased estimate of P(r ≥ level), with
    ties or without (Bréhier et al. 2016).

    Of N texts of the prior those at or below the k-th smallest reward r_(k) are killed, *all* that tie with it too; copies of
    the others take their places, each moved by a kernel that leaves the prior among the texts of r > r_(k) invariant. So it
    goes on until all rewards reach the level: the estimate is Π (1 - K_i / N), K_i being how many were killed, and 0 of a run
    in which all are.

    `stats["num_levels"]`, (C, 1, B), says in how many steps each run came there.

    :param model: with the event as its evidence, such as `at_least`; its prior proposes.
    :param level: of the recorded reward; None: the argument `level` that the model is bound to.
    :param record: what the model records by `pyro.deterministic` as its reward, one number a text.
    :param num_samples: N, of a run; `num_runs`: independent runs, the chains of the draws.
    :param killed: k, at each step; None: an eighth of N. The estimate is unbiased for any.
    :param moves: of each copy.
    :raises NoSupportError: if no run came there: P(r ≥ level) is known to be small, and no more than that.
    :raises ValueError: if the model's evidence is another than the event.
    """
    require_count("num_samples", num_samples, 2)
    require_count("num_runs", num_runs)
    require_count("moves", moves)
    k = max(1, num_samples // 8) if killed is None else killed
    require_count("killed", k)
    if k >= num_samples:
        raise ValueError(f"killed={k} of {num_samples} texts; some have to be left")
    if level is None:
        level = model.arguments.get("level") if isinstance(model, Bound) else None
        if level is None:
            raise ValueError(
                "the model is bound to no level; give one in the reward's unit, level=0.9 (--set level=0.9)"
            )
    require_blind(kernel)
    prompts = read_once(prompts, model)
    require_prompts(prompts)
    prompts = prompts_of(prompts, text_law(model, prompts))
    nesting = nesting_of(max_plate_nesting, model, None, prompts)
    parts = []
    with meter.measure() as cost:
        for b in range(len(prompts)):
            propose = kernel(model, None, prompts[b : b + 1], nesting)
            state = draw(model, None, prompts[b : b + 1], num_samples * num_runs, nesting)
            if record not in state.records:
                raise ValueError(f"record={record!r}, but the model records {sorted(state.records) or 'nothing'}")
            require_text_alone(state)
            require_own_law(state)
            event = torch.where(state.records[record] >= level, 0.0, -math.inf)
            if state.records[record].shape != state.log_likelihood.shape or not torch.equal(
                event, state.log_likelihood
            ):
                raise ValueError(
                    f"the model's evidence is not the event {record} ≥ {level:g}: bind at_least, with this level"
                )
            parts.append(_climbed(state, propose, level, record, num_runs, k, moves))
            if on_progress is not None:
                on_progress((b + 1) / len(prompts), f"{b + 1} of {len(prompts)} prompts")
    observed = {name: torch.cat([part.observed[name] for part in parts]) for name in parts[0].observed}
    draws = replace(concatenate(parts, dim=2), prompts=prompts, observed=observed, cost=cost)
    lost = (draws.log_weight == -math.inf).all(1).all(0)
    if bool(lost.any()):
        raise NoSupportError(
            f"prompt {int(lost.nonzero()[0])}: none of {num_runs} runs came to {record} ≥ {level:g}; how improbable it is "
            f"is not "
            "known. Give more num_samples, or more moves"
        )
    return draws


def _climbed(state: Draws, propose: Propose, level: float, record: str, runs: int, k: int, moves: int) -> Draws:
    """The runs of one prompt, (1, C·N, 1), as far as they come."""
    count = state.num_samples // runs
    log_p = torch.zeros(runs, dtype=torch.float64, device=state.log_prior.device)
    levels = torch.zeros_like(log_p)
    open_ = torch.ones_like(log_p, dtype=torch.bool)
    while True:
        score = state.records[record].reshape(runs, count).double()
        open_ = open_ & (score.min(1).values < level)
        if not bool(open_.any()):
            break
        here = score.kthvalue(k, 1).values  # all at or below it are killed
        here = torch.minimum(here, torch.full_like(here, math.nextafter(level, -math.inf)))
        dead = _killed(score, here) & open_.unsqueeze(1)
        number = dead.sum(1)
        log_p = log_p + torch.where(open_, torch.log1p(-number / count), 0.0)
        levels = levels + open_.double()
        open_ = open_ & (number < count)
        dead = dead & open_.unsqueeze(1)
        alive = (~dead).double()
        rows = dead.flatten().nonzero()[:, 0]
        if not len(rows):
            continue
        run = rows // count
        parent = torch.multinomial(alive[run], 1)[:, 0] + run * count
        moved = _moved(state.map(partial(_rows, rows=parent)), propose, here[run], record, moves)
        index = torch.arange(state.num_samples, device=rows.device)
        index[rows] = state.num_samples + torch.arange(len(rows), device=rows.device)
        state = concatenate([state, moved]).map(partial(_rows, rows=index))
    draws = state.map(lambda v: v[0].unflatten(0, (runs, count)))
    log_p = torch.where((draws.records[record].reshape(runs, count) >= level).all(1), log_p, -math.inf)
    log_guide = torch.where(log_p == -math.inf, torch.inf, -log_p).reshape(-1, 1, 1) + draws.log_prior
    return replace(draws, log_guide=log_guide, kind="runs", stats={"num_levels": levels.reshape(-1, 1, 1)})


def _rows(value: Tensor, rows: Tensor) -> Tensor:
    return value[:, rows]


def _killed(score: Float64[Tensor, "C N"], here: Float64[Tensor, "C"]) -> Bool[Tensor, "C N"]:
    """All at or below a run's level: those that tie with it are no better."""
    return score <= here.unsqueeze(1)


def _moved(state: Draws, propose: Propose, above: Tensor, record: str, moves: int) -> Draws:
    """Each text, (1, M, 1), by Metropolis-Hastings steps that leave the prior among texts of a reward above its own level
    invariant."""

    def within(draws: Draws) -> Draws:
        inside = draws.records[record].reshape(-1) > above
        return replace(draws, log_likelihood=torch.where(inside, 0.0, -math.inf).double().reshape(1, -1, 1))

    def restricted(at: Draws) -> tuple[Draws, Tensor]:
        proposal, correction = propose(at)
        return within(proposal), correction

    if state.num_samples == 1:  # programs are run with two texts at least
        twice = _moved(state.map(lambda v: v.repeat_interleave(2, 1)), propose, above.repeat(2), record, moves)
        return twice.map(lambda v: v[:, :1])
    at = within(state)
    for _ in range(moves):
        at, _ = step(at, restricted)
    at = replace(at, stats={})
    return replace(at, log_likelihood=torch.zeros_like(at.log_likelihood))
