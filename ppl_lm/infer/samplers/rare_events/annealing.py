"""Annealed sequential Monte Carlo: whole texts along a path of temperatures, from the prior to the posterior."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ppl_lm.infer.binding import read_once
from ppl_lm.infer.counts import require_count
from ppl_lm.infer.draws import Draws, NoSupportError
from ppl_lm.infer.samplers.importance_sampling import draw, require_prompts
from ppl_lm.infer.samplers.in_pieces import Progress
from ppl_lm.infer.samplers.kernels import Kernel, Propose, ends_and_tokens, require_blind
from ppl_lm.infer.samplers.markov_chains import step
from ppl_lm.infer.samplers.resampling import systematic
from ppl_lm.infer.samplers.sequential import require_own_law, require_text_alone
from ppl_lm.infer.traces.structure import nesting_of
from ppl_lm.lm import meter


@torch.no_grad()
def annealed_smc(
    model: Callable[..., Any],
    prompts: Any,
    *,
    path: Sequence[float],
    num_samples: int = 64,
    num_runs: int = 16,
    moves: int = 1,
    kernel: Kernel = ends_and_tokens,
    max_plate_nesting: int | None = None,
    on_progress: Progress | None = None,
) -> Draws:
    """Weighted texts that came along p0 · likelihood^u, 0 = u_0 < ... < u_K = 1 (Neal 2001; Del Moral et al. 2006).

    At each stage a text is weighted by exp((u_k - u_{k-1}) log-likelihood), the population resampled, and each text moved by a
    kernel that leaves p0 · likelihood^{u_k}, the *new* law, invariant. The product of the mean weights of a run is an unbiased
    estimate of Z, for any path that was fixed beforehand; a path found by the same texts would bias it.

    `stats` holds the path, `power`, (C, 1, B, K + 1), and the log-likelihood of the texts that were there after the moves of
    each stage, `path_log_likelihood`, nats, (C, S, B, K + 1): `path_constants` makes log Z and tail probabilities of all of
    them.

    :param path: u_1 to u_K, rising, of which the last is 1.
    :param num_samples: texts of a run; `num_runs`: independent runs, the chains of the draws.
    :param moves: of each text at each stage, by `kernel`: `ends_and_tokens`, `suffix` or `independence`, whose proposals are
        the prior's.
    Texts of likelihood 0 get the weight 0 at the first stage, whatever the power: where they are many, use `splitting`.

    :raises ValueError: on a path that does not rise from above 0 to 1.
    :raises NoSupportError: if all texts of a prompt are impossible in all runs.
    """
    require_count("num_samples", num_samples, 2)
    require_count("num_runs", num_runs)
    require_count("moves", moves)
    powers = [0.0, *map(float, path)]
    if not all(a < b for a, b in zip(powers, powers[1:], strict=False)) or powers[-1] != 1.0:
        raise ValueError(f"path={list(path)}; give powers that rise from above 0 to 1, such as [0.25, 0.5, 1.0]")
    require_blind(kernel)
    prompts = read_once(prompts, model)
    require_prompts(prompts)
    nesting = nesting_of(max_plate_nesting, model, None, prompts)
    propose = kernel(model, None, prompts, nesting)
    with meter.measure() as cost:
        state = draw(model, None, prompts, num_samples * num_runs, nesting)
        require_text_alone(state)
        require_own_law(state)
        log_z = torch.zeros(
            num_runs, state.log_likelihood.shape[-1], dtype=torch.float64, device=state.log_likelihood.device
        )
        stages = [state.log_likelihood[0].unflatten(0, (num_runs, num_samples))]
        for k, (before, power) in enumerate(zip(powers, powers[1:], strict=False)):
            log_w = (power - before) * stages[-1]  # (C, N, B)
            log_z = log_z + log_w.logsumexp(1) - math.log(num_samples)
            state = resampled(state, log_w)
            for _ in range(moves):
                state = _moved(state, propose, power)
            stages.append(state.log_likelihood[0].unflatten(0, (num_runs, num_samples)))
            if on_progress is not None:
                on_progress((k + 1) / (len(powers) - 1), f"stage {k + 1} of {len(powers) - 1}")
    runs = state.map(lambda v: v[0].unflatten(0, (num_runs, num_samples)))
    log_joint = runs.log_prior + runs.log_likelihood
    power = torch.tensor(powers, dtype=torch.float64, device=log_z.device).expand(num_runs, 1, log_z.shape[1], -1)
    stats = {"power": power, "path_log_likelihood": torch.stack(stages, -1)}
    lost = (log_z == -math.inf).unsqueeze(1)
    if bool(lost.all(0).any()):
        raise NoSupportError(
            f"prompt {int(lost.all(0)[0].nonzero()[0])}: all texts of the prior are impossible under the posterior; give more "
            "num_samples or num_runs, or use splitting for a rare event"
        )
    log_guide = torch.where(lost, torch.inf, log_joint - log_z.unsqueeze(1))
    return replace(runs, log_guide=log_guide, kind="runs", cost=cost, stats=stats)


def resampled(state: Draws, log_w: Float64[Tensor, "C N B"]) -> Draws:
    """Each run by itself, each prompt by itself: (1, C·N, B) as before."""
    runs, count, batch = log_w.shape
    columns = log_w.transpose(0, 1).reshape(count, runs * batch)
    index = systematic(columns, count).index.reshape(count, runs, batch).transpose(0, 1)  # (C, N, B), within the run
    rows = (index + count * torch.arange(runs, device=index.device).reshape(-1, 1, 1)).reshape(runs * count, batch)
    prompt = torch.arange(batch, device=index.device)
    return state.map(lambda v: v[:, rows, prompt])


def _moved(state: Draws, propose: Propose, power: float) -> Draws:
    """One Metropolis-Hastings step that leaves p0 · likelihood^power invariant."""

    def scaled(draws: Draws, by: float) -> Draws:
        return replace(draws, log_likelihood=by * draws.log_likelihood)

    def tempered(at: Draws) -> tuple[Draws, Tensor]:
        proposal, correction = propose(at)
        return scaled(proposal, power), correction

    moved, _ = step(scaled(state, power), tempered)
    return scaled(moved, 1 / power)
