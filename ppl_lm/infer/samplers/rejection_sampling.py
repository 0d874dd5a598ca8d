"""Rejection sampling: exact posterior draws, where the weights have a known bound."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from ppl_lm.infer.binding import read_once
from ppl_lm.infer.counts import require_count
from ppl_lm.infer.draws import TOLERANCE, Draws, NoSupportError, concatenate
from ppl_lm.infer.samplers.importance_sampling import importance, require_prompts, require_support
from ppl_lm.infer.samplers.in_pieces import Progress, texts_a_piece
from ppl_lm.infer.traces.observations import likelihood_bound
from ppl_lm.infer.traces.structure import nesting_of

MIN_PROPOSALS = 64  # proposals at a time


@torch.no_grad()
def rejection(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    prompts: Any,
    *,
    num_samples: int = 1000,
    log_bound: float | None = None,
    max_proposals: int = 1_000_000,
    max_plate_nesting: int | None = None,
    on_progress: Progress | None = None,
) -> Draws:
    """`num_samples` exact, independent posterior draws for each prompt: a draw of the guide with log weight w is kept
    with probability exp(w - log_bound).

    :param guide: None proposes from the model's own prior.
    :param log_bound: nats; no weight p(z, evidence) / q(z) may exceed it. By default that of the model's likelihood
        sites (for `tilted`, r_max/β), which is valid for the prior as guide.
    :param max_proposals: proposals for each prompt.
    :param on_progress: as of `importance`; the words tell the acceptance rate.
    :raises ValueError: if there is no bound, or a draw exceeds it: an error, not a clamp; or if the guide is truncated.
    :raises NoSupportError: if a prompt has too few draws after `max_proposals`.
    """
    require_count("num_samples", num_samples)
    require_count("max_proposals", max_proposals)
    prompts = read_once(prompts, model, guide)
    require_prompts(prompts)
    nesting, from_prior = nesting_of(max_plate_nesting, model, guide, prompts), log_bound is None
    if log_bound is None:
        log_bound = likelihood_bound(model, prompts)
        if log_bound is None:
            raise ValueError(
                "rejection needs a bound of the weights: declare the reward's r_max, or pass log_bound= (nats), "
                "or use importance(), which needs none"
            )
    nats: float | None = None

    def keep(part: Draws) -> tuple[Bool[Tensor, "S B"], float]:
        nonlocal nats
        require_support(not part.lacks_support, "rejection gives exact posterior draws")
        if from_prior and not part.from_prior:
            raise ValueError(
                "without log_bound= the proposals must come from the prior: this guide is another law, or a scale or mask "
                "makes another one of the model's prior"
            )
        if nats is None:
            nats = likelihood_bound(model, prompts, joint=True) if from_prior and not part.is_local else log_bound
        assert nats is not None
        return accept(part, nats), nats

    def propose(n: int) -> Draws:
        return importance(model, guide, prompts, num_samples=n, max_plate_nesting=nesting)

    size = max(1, texts_a_piece(prompts, model, guide) // max(1, len(prompts)))
    kept, mask, proposals = propose_until(propose, keep, num_samples, max_proposals, size, on_progress)
    return replace(select(kept, mask, num_samples), cost=proposals.cost, proposals=proposals)


def propose_until(
    propose: Callable[[int], Draws],
    keep: Callable[[Draws], tuple[Tensor, Any]],
    num_samples: int,
    max_proposals: int,
    size: int,
    on_progress: Progress | None = None,
) -> tuple[Draws, Bool[Tensor, "S B"], Draws]:
    """Proposes `size` draws at a time until each prompt has kept `num_samples`.

    :param keep: which draws each prompt keeps, (S, B) bool, and the bound in nats by which it does.
    :returns: the draws that some prompt keeps, which of them each does, and all proposals without their values.
    :raises NoSupportError: if a prompt has too few after `max_proposals`."""
    proposals: list[Draws] = []
    kept: list[Draws] = []  # of the proposals, those that some prompt accepts: the values of the others need no memory
    masks: list[Tensor] = []
    done, accepted = 0, torch.zeros(1, dtype=torch.long)
    while True:
        wanted = num_samples if not done else 1.1 * done * ((num_samples + 1) / (float(accepted.min()) + 1) - 1)
        n = max(1, min(max(MIN_PROPOSALS, round(wanted)), size, max_proposals - done))
        part = propose(n)
        mask, bound = keep(part)  # (n, B)
        rows = mask.any(1)
        proposals.append(replace(part, latents={}))
        kept.append(part.map(lambda v, rows=rows: v[:, rows]))
        masks.append(mask[rows])
        done, accepted = done + n, accepted + mask.cpu().sum(0)
        if on_progress is not None:
            least = int(accepted.min())
            words = f"{float(accepted.sum()) / (done * len(accepted)):.2%} of {done} proposals of each prompt accepted"
            on_progress(max(min(1.0, least / num_samples), done / max_proposals), words)
        if int(accepted.min()) >= num_samples:
            return concatenate(kept), torch.cat(masks), concatenate(proposals)
        if done >= max_proposals:
            worst = int(accepted.argmin())
            best = max(float(part.log_weight[..., worst].max()) for part in proposals)
            bound = torch.as_tensor(bound).expand(len(accepted))[worst]
            raise NoSupportError(
                f"prompt {worst}: {int(accepted[worst])} of {done} proposals were accepted, {num_samples} are needed "
                f"(the best log weight seen is {best:.2f} nats, the bound {float(bound):.2f}); raise max_proposals, or use "
                "a guide closer to the posterior"
            )


def accept(draws: Draws, log_bound: float) -> Bool[Tensor, "S B"]:
    """Which draws rejection keeps, (C·S, B) bool.

    :raises ValueError: if a weight exceeds the bound: what would be kept is not the posterior."""
    log_w = draws.log_weight.flatten(0, 1)
    if float(log_w.max()) > log_bound + TOLERANCE:
        raise ValueError(
            f"log_bound={log_bound:.2f} nats, but a draw reached {float(log_w.max()):.2f}; raise the bound, or use "
            "importance(), which needs none"
        )
    return torch.rand_like(log_w).log() < log_w - log_bound


def select(draws: Draws, mask: Bool[Tensor, "S B"], num_samples: int) -> Draws:
    """The first `num_samples` kept draws of each prompt, as exact ones; every prompt must have so many."""
    index = mask.to(torch.uint8).sort(dim=0, descending=True, stable=True).indices[:num_samples]  # (S, B)

    def pick(v: Tensor) -> Tensor:
        flat = v.flatten(0, 1)
        if flat.shape[1] == 1 and index.shape[1] == 1:
            return flat[index[:, 0]].unsqueeze(0)
        return flat[index, torch.arange(flat.shape[1], device=flat.device)].unsqueeze(0)

    return replace(draws.map(pick), kind="exact", proposals=replace(draws, latents={}))
