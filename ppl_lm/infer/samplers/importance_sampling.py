"""Importance sampling: a guide's draws, weighted."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ppl_lm.infer.binding import read_once
from ppl_lm.infer.counts import require_count
from ppl_lm.infer.draws import Draws, as_draws, concatenate
from ppl_lm.infer.samplers.in_pieces import Progress, pieces, texts_a_piece
from ppl_lm.infer.traces.particles import run
from ppl_lm.infer.traces.structure import nesting_of
from ppl_lm.lm import meter


@torch.no_grad()
def importance(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    prompts: Any,
    *,
    num_samples: int = 1000,
    max_plate_nesting: int | None = None,
    on_progress: Progress | None = None,
) -> Draws:
    """`num_samples` draws of the guide for each prompt, with what is needed to weight them: importance sampling.

    The mean of `exp(draws.log_weight)` is an unbiased estimate of Z for each prompt; of a truncated guide
    (`draws.lacks_support`) of the share of Z that its support has.

    :param guide: None draws from the model's own prior.
    :param max_plate_nesting: how many plates lie within each other, the prompts' among them; None: found by a run that draws
        no text and asks no reward. Likewise in all that follows.
    :param on_progress: called after each piece of a few seconds with the share that is done, 0 to 1, and words. Likewise.
    :raises ValueError: if `num_samples` is not positive, or a plate subsamples the prompts.
    """
    require_count("num_samples", num_samples)
    prompts = read_once(prompts, model, guide)
    require_prompts(prompts)
    nesting = nesting_of(max_plate_nesting, model, guide, prompts)
    size = max(2, texts_a_piece(prompts, model, guide) // max(1, len(prompts)))
    parts = []
    for n in pieces(num_samples, size, on_progress=on_progress):
        part = draw(model, guide, prompts, max(2, n), nesting)  # a single particle would have no plate
        parts.append(part if n > 1 else part.map(lambda v: v[:, :1]))
    return concatenate(parts)


def draw(model: Any, guide: Any, prompts: Any, n: int, nesting: int) -> Draws:
    """n draws of the guide with their weights, in one run of guide and model; n is at least 2."""
    prompts = read_once(prompts, model, guide)
    require_prompts(prompts)
    with meter.measure() as cost:
        p = run(model, guide, (prompts,), {}, n, nesting)
    return replace(as_draws(p), cost=cost)


def require_prompts(prompts: Any) -> None:
    if not len(prompts):
        raise ValueError("no prompt is given; give at least one, which may be empty: ['']")


def require_support(whole: bool, what: str) -> None:
    """:raises ValueError: unless the proposals can be all texts of the posterior, without which `what` claims too much."""
    if not whole:
        raise ValueError(
            f"{what}, and this guide's law is truncated (top-p, min-p or top-k): it cannot draw all texts of the posterior. "
            "Give the guide without the truncation, or beside the prior (ppl_lm.lm.mixture); or give the model the same "
            "truncated language model as its prior; or use importance(), which says what its draws stand for"
        )


def only_text(state: Draws) -> tuple[str, ...]:
    sites = {name: tuple(value.shape[3:]) for name, value in state.latents.items()}
    if len(state.texts) != 1 or len(sites) != 1 or state[state.texts[0]].dim() != 4:
        raise ValueError(
            f"this kernel moves one text a prompt; the program has the latent sites {sorted(sites)}, of each prompt with the "
            f"shapes {sites}: use kernel=independence, which moves them all"
        )
    return state.texts
