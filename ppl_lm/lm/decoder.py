"""`Decoder`: the one stepping interface. Sampling, and later SMC and constrained decoding, are loops over it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_lm.lm.language_model import LanguageModel, positions
from ppl_lm.lm.prompts import Prompts


class Decoder:
    """Extends N rows of text one token at a time, with a key-value cache.

    Each prompt is forwarded once (`prefill`); `reorder` then copies its cache to its particles, moves rows to their
    ancestors after a resampling, or drops rows that have finished. Nothing here records gradients.

    :param prompts: batch shape (B,); afterwards there are N = B rows, row b holding prompt b.
    """

    def __init__(self, lm: LanguageModel, prompts: Prompts):
        from transformers import DynamicCache

        self.lm = lm
        self.mask = prompts.mask  # (N, tokens so far)
        self.padded = not bool(self.mask.all())
        self.log_probs, self.cache = lm.log_probs_next(
            ids=prompts.ids,
            mask=self.mask if self.padded else None,
            positions=positions(self.mask),
            cache=DynamicCache(config=lm.model.config),
        )

    def logits(self) -> Float[Tensor, "N V"]:
        """Log-probabilities of each row's next token, float32 or wider, nats."""
        return self.log_probs

    def advance(self, tokens: Int[Tensor, "N"]) -> None:
        """Appends one token to every row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        self.log_probs, self.cache = self.lm.log_probs_next(
            ids=tokens.unsqueeze(-1),
            mask=self.mask if self.padded else None,
            positions=self.mask.sum(-1, keepdim=True) - 1,
            cache=self.cache,
        )

    def reorder(self, rows: Int[Tensor, "M"]) -> None:
        """Row i becomes a copy of what was row `rows[i]`."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
        self.log_probs = self.log_probs[rows]


def draw(log_probs: Float[Tensor, "N V"]) -> Int[Tensor, "N"]:
    """One categorical draw a row, by inversion of the distribution function in float64 (an exponential a token, as in
    `torch.multinomial`, costs more than the model on a small LM). Never a token of probability zero."""
    mass = log_probs.double().exp().cumsum(-1)
    u = torch.rand(len(mass), 1, dtype=torch.float64, device=mass.device).clamp_max(1 - 1e-15)  # u * total < total
    return torch.searchsorted(mass, u * mass[:, -1:], right=True).squeeze(-1)


@torch.no_grad()
def sample(
    lm: LanguageModel, prompts: Prompts, rows: Int[Tensor, "N"], steps: int | None = None
) -> tuple[Int[Tensor, "N T"], Float[Tensor, "N T"]]:
    """One completion for each entry of `rows`, of prompt `rows[i]`, with the log-probability of each drawn token.

    :param steps: T, by default `lm.max_new_tokens`.

    Draws from torch's global generator, so that `pyro.set_rng_seed` alone makes a run repeatable."""
    vocabulary, steps = lm.vocabulary, steps or lm.max_new_tokens
    needed, copies = rows.unique(return_inverse=True)
    decoder = Decoder(lm, prompts.take(needed))
    decoder.reorder(copies)
    x = torch.full((len(rows), steps), vocabulary.pad_id, dtype=torch.int64, device=rows.device)
    log_q = torch.zeros(len(rows), steps, dtype=decoder.log_probs.dtype, device=rows.device)
    live = torch.arange(len(rows), device=rows.device)  # output row of each decoder row
    open_ = torch.ones(len(rows), dtype=torch.bool, device=rows.device)  # decoder rows that have not ended
    for t in range(steps):
        log_probs = decoder.logits()
        tokens = draw(log_probs)  # (decoder rows,)
        drawn = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        x[live[open_], t] = tokens[open_]
        log_q[live[open_], t] = drawn[open_]
        open_ = open_ & ~vocabulary.is_end(tokens)
        if t == steps - 1 or not bool(open_.any()):
            break
        decoder.advance(tokens)
        if int(open_.sum()) < 0.75 * len(open_):  # dropping rows copies the cache: not for every one that ends
            keep = open_.nonzero().squeeze(-1)
            decoder.reorder(keep)
            live, open_ = live[keep], open_[keep]
    return x, log_q
