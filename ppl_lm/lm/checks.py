"""The self-check: what is sampled is what is scored."""

from typing import Any

import torch

from ppl_lm.lm.decoder import sample
from ppl_lm.lm.network import Network
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.token_sequence import TokenSequence


def self_check(lm: Network, prompts: Any = None, tolerance: float = 2e-3) -> float:
    """See `LanguageModel.self_check`. Leaves the global random states alone."""
    vocabulary = lm.vocabulary
    room = lm.max_positions or 1024
    steps = min(lm.max_new_tokens, 6, room - 1)
    if prompts is None:
        start = [vocabulary.bos_id] if vocabulary.bos_id is not None else [vocabulary.end_ids[0]]
        middle = [i for i in range(vocabulary.size) if i not in vocabulary.end_ids][:: max(1, vocabulary.size // 5)]
        batch = Prompts.from_ids(
            [start, start + middle[: max(0, min(3, room - steps - 1))]], vocabulary, device=lm.device
        )
    else:
        batch = TokenSequence(lm, lm.prompts(prompts)).prompts  # refuses those that do not fit
    if not len(batch):
        raise ValueError("the self-check got no prompts; give at least one, or None for its own")
    with torch.no_grad():
        rows = torch.arange(len(batch), device=lm.device).repeat(2)
        u = torch.rand(len(rows), steps, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x, sampled = sample(lm, batch, rows, u.to(lm.device))
        together = lm.score(batch.take(rows), x)
        alone = torch.cat([lm.score(batch.take(r), c) for r, c in zip(rows.split(1), x.split(1), strict=True)])
    worst = max(float((sampled - together).abs().max()), float((alone - together).abs().max()))
    if not worst <= tolerance:  # also catches NaN
        raise ValueError(
            f"this model is sampled from one distribution and scored under another: the same token's log-probability "
            f"differs by {worst:.2g} nats (sampled against scored {float((sampled - together).abs().max()):.2g}, alone "
            f"against in a padded batch {float((alone - together).abs().max()):.2g}; tolerance {tolerance:.2g}). "
            "Inference with it would be wrong; try float32 weights, or report the model's architecture"
        )
    lm.is_checked = True
    return worst
