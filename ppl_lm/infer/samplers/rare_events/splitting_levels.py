"""Multilevel splitting: rare texts by way of less rare ones."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ppl_lm.infer.binding import Bound, read_once
from ppl_lm.infer.counts import require_count
from ppl_lm.infer.draws import Draws, NoSupportError, concatenate
from ppl_lm.infer.samplers.constraints.bound_checkers import prompts_of
from ppl_lm.infer.samplers.importance_sampling import draw, require_prompts
from ppl_lm.infer.samplers.in_pieces import Progress
from ppl_lm.infer.samplers.kernels import Kernel, Propose, ends_and_tokens, require_blind
from ppl_lm.infer.samplers.markov_chains import step
from ppl_lm.infer.samplers.rare_events.annealing import resampled
from ppl_lm.infer.samplers.sequential import require_own_law, require_text_alone
from ppl_lm.infer.traces.structure import nesting_of
from ppl_lm.infer.traces.text_site import text_law
from ppl_lm.lm import meter

STILL = 16  # times that a pilot's texts are moved without one of a higher reward, before it gives up

MOST = 1000  # levels


@torch.no_grad()
def splitting(
    model: Callable[..., Any],
    prompts: Any,
    *,
    level: float | None = None,
    levels: Sequence[float] | None = None,
    record: str = "reward",
    num_samples: int = 64,
    num_runs: int = 16,
    kept: float = 0.25,
    moves: int = 4,
    kernel: Kernel = ends_and_tokens,
    max_plate_nesting: int | None = None,
    on_progress: Progress | None = None,
) -> Draws:
    """Weighted texts of the rare event r ≥ level, whose mean weight in a run is an unbiased estimate of P(r ≥ level), with
    ties or without (Cérou et al. 2012, with levels that are fixed).

    Of N texts of the prior, copies of those of r ≥ z_1 take the places of the others, and *all* are moved by a kernel that
    leaves the prior among the texts of r ≥ z_1 invariant; so on with z_2 to z_K = level, which gives those below the weight 0.
    The estimate is the product of the shares that came through, 0 of a run in which none did.

    The levels are fixed before the runs begin. Levels that a run's own texts choose, and moves that only the copies make, each
    bias the estimate, unless moves forget where they came from: the levels are those of a pilot of N other texts, of which
    about a share `kept` comes through each. Its cost is counted.

    `stats["levels"]`, (C, 1, B, K), holds them; prompts that need fewer than others have -inf before their own.

    :param model: with the event as its evidence, such as `at_least`; its prior proposes.
    :param level: of the recorded reward; None: the argument `level` that the model is bound to.
    :param levels: rising, of which the last is `level`; None: those of a pilot for each prompt.
    :param record: what the model records by `pyro.deterministic` as its reward, one number a text.
    :param num_samples: N, of a run; `num_runs`: independent runs, the chains of the draws.
    :param moves: of each text at each level.
    :raises NoSupportError: if the pilot or all of the runs did not come there: P(r ≥ level) is known to be small, and no more.
    :raises ValueError: if the model's evidence is another than the event, or levels do not rise to it.
    """
    require_count("num_samples", num_samples, 2)
    require_count("num_runs", num_runs)
    require_count("moves", moves)
    if not 0 < kept < 1:
        raise ValueError(f"kept={kept}; give the share of texts that come through a level, between 0 and 1")
    if level is None:
        level = model.arguments.get("level") if isinstance(model, Bound) else None
        if level is None:
            raise ValueError(
                "the model is bound to no level; give one in the reward's unit, level=0.9 (--set level=0.9)"
            )
    given = None if levels is None else [float(z) for z in levels]
    if given is not None and not (given and given == sorted(set(given)) and given[-1] == level):
        raise ValueError(f"levels={given}; give levels that rise to {level:g}")
    require_blind(kernel)
    prompts = read_once(prompts, model)
    require_prompts(prompts)
    prompts = prompts_of(prompts, text_law(model, prompts))
    nesting = nesting_of(max_plate_nesting, model, None, prompts)
    parts = []
    with meter.measure() as cost:
        for b in range(len(prompts)):
            propose = kernel(model, None, prompts[b : b + 1], nesting)
            climb = _Climb(model, prompts[b : b + 1], propose, nesting, level, record, moves)
            parts.append(climb.runs(given or climb.pilot(num_samples, kept), num_samples, num_runs))
            if on_progress is not None:
                on_progress((b + 1) / len(prompts), f"{b + 1} of {len(prompts)} prompts")
    most = max(part.stats["levels"].shape[-1] for part in parts)
    parts = [replace(part, stats={"levels": _padded(part.stats["levels"], most)}) for part in parts]
    observed = {name: torch.cat([part.observed[name] for part in parts]) for name in parts[0].observed}
    draws = replace(concatenate(parts, dim=2), prompts=prompts, observed=observed, cost=cost)
    lost = (draws.log_weight == -math.inf).all(1).all(0)
    if bool(lost.any()):
        raise NoSupportError(
            f"prompt {int(lost.nonzero()[0])}: none of {num_runs} runs came to {record} ≥ {level:g}; how improbable it is "
            "is not known. Give more num_samples, or more moves"
        )
    return draws


class _Climb:
    """From level to level, for one prompt: texts are (1, C·N, 1)."""

    def __init__(self, model: Any, prompts: Any, propose: Propose, nesting: int, level: float, record: str, moves: int):
        self.model, self.prompts, self.propose, self.nesting = model, prompts, propose, nesting
        self.level, self.record, self.moves = level, record, moves

    def start(self, count: int) -> Draws:
        """Texts of the prior.

        :raises ValueError: unless the model's evidence is the event."""
        state, record = draw(self.model, None, self.prompts, count, self.nesting), self.record
        if record not in state.records:
            raise ValueError(f"record={record!r}, but the model records {sorted(state.records) or 'nothing'}")
        require_text_alone(state)
        require_own_law(state)
        if bool(state.records[record].isnan().any()):
            raise ValueError(f"the recorded {record} of a text is NaN")
        event = torch.where(state.records[record] >= self.level, 0.0, -math.inf)
        if state.records[record].shape != state.log_likelihood.shape or not torch.equal(event, state.log_likelihood):
            raise ValueError(
                f"the model's evidence is not the event {record} ≥ {self.level:g}: bind at_least, with this level"
            )
        return state

    def rewards(self, state: Draws) -> Float64[Tensor, "N"]:
        return state.records[self.record].flatten().double()

    def pilot(self, count: int, kept: float) -> list[float]:
        """Levels that about a share of the texts comes through, each; no text of it is used again."""
        state, found = self.start(count), [-math.inf]
        for _ in range(MOST):
            rewards = self.rewards(state)
            above = rewards[rewards > found[-1]]
            best = float(rewards.topk(math.ceil(kept * count)).values[-1])
            if best <= found[-1]:  # more than that share is at the level itself
                best = float(above.min()) if len(above) else found[-1]
            tries = 0
            while best == found[-1] and tries < STILL:
                state, tries = self.moved(state, found[-1]), tries + 1
                best = float(self.rewards(state).max())
            if best == found[-1]:
                raise NoSupportError(
                    f"a pilot came to {self.record} ≥ {best:g}, and not to {self.level:g}; how improbable it is is not known. "
                    "Give more num_samples, or more moves"
                )
            found.append(min(best, self.level))
            if found[-1] == self.level:
                return found[1:]
            state = self.climbed(state, found[-1], 1)
        raise NoSupportError(
            f"a pilot came in {MOST} levels to {self.record} ≥ {found[-1]:g}, and not to {self.level:g}: lower kept"
        )

    def runs(self, levels: list[float], count: int, runs: int) -> Draws:
        """Independent runs along levels that are fixed, (C, N, 1)."""
        state = self.start(count * runs)
        log_p = torch.zeros(runs, dtype=torch.float64, device=state.log_prior.device)
        for z in levels[:-1]:
            log_p = log_p + (self.rewards(state).reshape(runs, count) >= z).double().mean(1).log()
            state = self.climbed(state, z, runs)
        draws = state.map(lambda v: v[0].unflatten(0, (runs, count)))
        log_guide = torch.where(log_p == -math.inf, torch.inf, -log_p).reshape(-1, 1, 1) + draws.log_prior
        path = torch.tensor(levels, dtype=torch.float64, device=log_p.device).expand(runs, 1, 1, -1)
        return replace(draws, log_guide=log_guide, kind="runs", stats={"levels": path})

    def climbed(self, state: Draws, z: float, runs: int) -> Draws:
        """Copies of the texts of r ≥ z in the places of the others, each run by itself, all of them moved. A run without any
        is lost and stays as it is."""
        log_w = torch.where(self.rewards(state) >= z, 0.0, -math.inf).double().reshape(runs, -1, 1)
        return self.moved(resampled(state, log_w), z)

    def moved(self, state: Draws, z: float) -> Draws:
        """Each text by Metropolis-Hastings steps that leave the prior among texts of r ≥ z invariant."""

        def within(draws: Draws, z: float) -> Draws:
            event = torch.where(draws.records[self.record] >= z, 0.0, -math.inf).double()
            return replace(draws, log_likelihood=event.reshape(draws.log_likelihood.shape))

        def restricted(at: Draws) -> tuple[Draws, Tensor]:
            proposal, correction = self.propose(at)
            return within(proposal, z), correction

        at = within(state, z)
        for _ in range(self.moves):
            at, _ = step(at, restricted)
        return within(replace(at, stats={}), self.level)


def _padded(levels: Float64[Tensor, "C one B K"], most: int) -> Float64[Tensor, "C one B most"]:
    return torch.nn.functional.pad(levels, (most - levels.shape[-1], 0), value=-math.inf)
