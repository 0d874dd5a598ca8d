"""Quasi-rejection sampling: rejection with a bound that some weights exceed, and what that costs in truth."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from ppl_lm.infer.binding import read_once
from ppl_lm.infer.counts import require_count
from ppl_lm.infer.draws import Draws, NoSupportError
from ppl_lm.infer.samplers.importance_sampling import importance, require_prompts
from ppl_lm.infer.samplers.in_pieces import Progress, texts_a_piece
from ppl_lm.infer.samplers.rejection_sampling import propose_until, select
from ppl_lm.infer.traces.structure import nesting_of


@dataclass(frozen=True)
class Quality:
    """How often quasi-rejection accepts, and how far what it accepts is from the posterior, for each of B prompts.

    With P = p(z, evidence), w = P/q and b = exp(log_bound), what is accepted has the law p_b = min(P, b q) / Z_b
    (Eikema et al. 2022). All are estimates by importance sampling from the same draws of q.

    :param log_z_b: log Z_b = log E_q[min(w, b)], nats.
    :param acceptance_rate: Z_b / b.
    :param total_variation: ½ Σ |p - p_b| = ½ E_q|w/Z - min(w, b)/Z_b|.
    :param total_variation_bound: 1 - p(w ≤ b), which is never less.
    :param kl: KL(p ‖ p_b) = log(Z_b/Z) + E_p[(log w - log b)₊], nats.
    """

    log_z_b: Float[Tensor, "B"]
    acceptance_rate: Float[Tensor, "B"]
    total_variation: Float[Tensor, "B"]
    total_variation_bound: Float[Tensor, "B"]
    kl: Float[Tensor, "B"]


def quality(draws: Draws, log_bound: float | Float[Tensor, ""] | Float[Tensor, "B"]) -> Quality:
    """What `quasi_rejection` with this bound would give, from a guide's draws: to choose the bound by.

    :param log_bound: nats, one for all prompts or one for each.
    :raises NoSupportError: if no draw is possible under the posterior."""
    log_w = draws.log_weight.flatten(0, 1)  # (S, B)
    if bool((log_w == -torch.inf).all(0).any()):
        raise NoSupportError("all weights are zero: no draw of the guide is possible under the posterior")
    b = torch.as_tensor(log_bound, dtype=log_w.dtype, device=log_w.device).expand(log_w.shape[1])
    capped, count = torch.minimum(log_w, b), log_w.new_tensor(len(log_w)).log()
    log_z, log_z_b = log_w.logsumexp(0) - count, capped.logsumexp(0) - count
    p, p_b = (log_w - log_z).exp() / len(log_w), (capped - log_z_b).exp() / len(log_w)  # of each draw
    return Quality(
        log_z_b,
        (log_z_b - b).exp(),
        0.5 * (p - p_b).abs().sum(0),
        (p * (log_w > b)).sum(0),
        log_z_b - log_z + (p * (log_w - b).clamp_min(0.0)).sum(0),
    )


@torch.no_grad()
def quasi_rejection(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    prompts: Any,
    *,
    num_samples: int = 1000,
    log_bound: float | Float[Tensor, ""] | Float[Tensor, "B"] | None = None,
    max_proposals: int = 1_000_000,
    max_plate_nesting: int | None = None,
    on_progress: Progress | None = None,
) -> Draws:
    """Independent draws of p_b ∝ min(p(z, evidence), b q(z)): a draw of the guide with log weight w is kept with
    probability min(1, exp(w - log_bound)). Not the posterior: `log_guide` is log p_b, with Z_b estimated from the
    proposals, so the draws' own weights correct them, and `log_evidence` says how far they are. b → 0 gives the guide,
    a bound that no weight exceeds `rejection` (Eikema et al. 2022).

    :param guide: None proposes from the model's own prior.
    :param log_bound: nats, one for all prompts or one for each; `quality` says what it costs. By default the largest log
        weight of `num_samples` draws, which are made for that alone.
    :param max_proposals: for each prompt.
    :raises NoSupportError: if a prompt has too few draws after `max_proposals`.
    """
    require_count("num_samples", num_samples)
    require_count("max_proposals", max_proposals)
    prompts = read_once(prompts, model, guide)
    require_prompts(prompts)
    nesting, pilot = nesting_of(max_plate_nesting, model, guide, prompts), None
    if log_bound is None:
        pilot = importance(model, guide, prompts, num_samples=num_samples, max_plate_nesting=nesting)
        log_bound = pilot.log_weight.flatten(0, 1).amax(0)
    bound = torch.as_tensor(log_bound, dtype=torch.float64)
    if bool((bound == -torch.inf).any()):
        raise NoSupportError("the bound is -inf nats: all weights of the guide's draws are zero under the posterior")

    def keep(part: Draws) -> tuple[Bool[Tensor, "S B"], Float64[Tensor, "*B"]]:
        return accept(part, bound), bound

    def propose(n: int) -> Draws:
        return importance(model, guide, prompts, num_samples=n, max_plate_nesting=nesting)

    size = max(1, texts_a_piece(prompts, model, guide) // max(1, len(prompts)))
    kept, mask, proposals = propose_until(propose, keep, num_samples, max_proposals, size, on_progress)
    accepted = select(kept, mask, num_samples)
    log_p_b = accepted.log_guide + torch.minimum(accepted.log_weight, bound.to(accepted.log_guide.device))
    log_p_b = log_p_b - quality(proposals, bound).log_z_b
    cost = proposals.cost if pilot is None else pilot.cost + proposals.cost
    return replace(accepted, log_guide=log_p_b, kind="weighted", proposals=proposals, cost=cost)


def accept(draws: Draws, log_bound: Float64[Tensor, "*B"]) -> Bool[Tensor, "S B"]:
    """Which of the C·S draws are kept: unlike `rejection.accept` also where weights exceed the bound."""
    log_w = draws.log_weight.flatten(0, 1)
    return torch.rand_like(log_w).log() < log_w - log_bound.to(log_w.device)
