"""`Decoder`: the one stepping interface. Sampling, Markov chains and SMC are loops over it."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from ppl_lm.lm.decoding.cache import place
from ppl_lm.lm.decoding.recorded_steps import RecordedSteps, may_record
from ppl_lm.lm.network import DivergedError, Network
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.scoring.shared_body import next_logits
from ppl_lm.lm.scoring.shortcuts import OtherHeadError, plain_head
from ppl_lm.lm.scoring.teacher_forcing import normalise, positions

EVERY = (
    8  # tokens between the host's looks at what a device has drawn, for each of which it waits, and at a network's head
)


class Decoder:
    """Extends N rows of text one token at a time, with a key-value cache.

    Each prompt is forwarded once (`prefill`); `reorder` then copies its cache to its particles, moves rows to their
    ancestors after a resampling, or drops rows that have finished. Nothing here records gradients. On a GPU the steps
    can be recorded as CUDA graphs, see `recorded_steps`.

    :param prompts: of any batch shape; afterwards there are as many rows, in row-major order.
    :param reading: heads of networks around the same body, which then need no pass of their own: `shared_body.head_on`.
    :raises OtherHeadError: with `reading`, if the network's answers are not those of its head.
    """

    def __init__(self, lm: Network, prompts: Prompts, reading: Sequence[nn.Linear] = ()):
        self.lm, prompts, self.reading = lm, prompts.flatten(), tuple(reading)
        self.slot = torch.arange(
            len(prompts), device=prompts.ids.device
        )  # of each row: where it stands in what follows
        self.mask = prompts.mask  # (N, tokens so far)
        self.padded = not bool(self.mask.all())
        self.steps, self.own = 0, plain_head(lm) if reading else None
        if reading and self.own is None:
            raise OtherHeadError
        self.cache: Any = None
        try:
            self._pass(prompts.ids, positions(self.mask))
        except OtherHeadError:
            if self.reading:
                raise
            self._pass(prompts.ids, positions(self.mask))

    @classmethod
    def of(cls, lm: Network, prompts: Prompts, rows: Int[Tensor, "N"], reading: Sequence[nn.Linear] = ()) -> "Decoder":
        """A row for each entry of `rows`, of prompt `rows[i]`; each prompt that occurs is forwarded once."""
        needed, copies = rows.unique(return_inverse=True)
        decoder = cls(lm, prompts.take(needed), reading)
        decoder.reorder(copies)
        return decoder

    def logits(self) -> Float[Tensor, "N V"]:
        """What the network answers for each row's next token, float32 or wider: log-probabilities up to a constant of
        each row where it is a language model's, and as they are where it is a twist's."""
        return self._answers[0][self.slot]

    def read(self, head: nn.Linear) -> Float[Tensor, "N V"]:
        """The same of one of the heads that read this network's last hidden state."""
        return self._answers[1 + self.reading.index(head)][self.slot]

    def log_probs(self) -> Float[Tensor, "N V"]:
        """Log-probabilities of each row's next token, float32 or wider, nats."""
        return normalise(self.logits())

    def advance(self, tokens: Int[Tensor, "N"]) -> None:
        """Appends one token to every row.

        :raises OtherHeadError: if the network has been changed since, see `Network.logits_next`."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        ids = torch.empty_like(tokens).scatter(0, self.slot, tokens)
        self.steps += 1
        if self.steps == 1 and not self.reading and may_record(self.lm, self.cache, self.mask.shape[-1] - 1):
            self.cache = RecordedSteps(self.lm, self.cache, self.mask.shape[-1] - 1 + self.lm.max_new_tokens)
        self._pass(ids.unsqueeze(-1), self.mask.sum(-1, keepdim=True) - 1)

    def _pass(self, ids: Int[Tensor, "N L"], at: Int[Tensor, "N L"]) -> None:
        """One forward pass, on the cache where there is one; at the first, and every few steps, the head is looked at."""
        if isinstance(self.cache, RecordedSteps):
            self._answers = [self.cache.step(ids, self.mask, at)]
            return
        cache: Any = self.lm.new_cache() if self.cache is None else self.cache
        given = {"ids": ids, "mask": self.mask if self.padded else None, "positions": at, "cache": cache}
        compared = self.steps % EVERY == 0
        if self.own is not None:
            self._answers, self.cache = next_logits(self.lm, self.own, self.reading, compared, **given)
        else:
            logits, self.cache = self.lm.logits_next(compared=compared, **given)
            self._answers = [logits]

    def reorder(self, rows: Int[Tensor, "M"]) -> None:
        """Row i becomes a copy of what was row `rows[i]`."""
        content, self.slot = place(self.slot, rows)
        self.cache.batch_select_indices(content)
        self.mask = self.mask[content]
        self._answers = [logits[content] for logits in self._answers]


def invert(log_probs: Float[Tensor, "N V"], u: Float64[Tensor, "N"]) -> Int[Tensor, "N"]:
    """One token a row, at the quantile `u` in [0, 1), float64: a categorical draw where `u` is uniform (the exponential
    a token of `torch.multinomial` costs more than the model on a small LM). Never a token of probability zero.

    :raises DivergedError: if a row is not a distribution, for example because a weight is NaN."""
    tokens, is_law = _quantiles(log_probs, u)
    if not bool(is_law.all()):
        raise DivergedError
    return tokens


def _quantiles(log_probs: Float[Tensor, "N V"], u: Float64[Tensor, "N"]) -> tuple[Int[Tensor, "N"], Bool[Tensor, "N"]]:
    """`invert`, and whether each row is a distribution: some token else."""
    mass = log_probs.exp().cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    found = torch.searchsorted(mass, u.clamp_max(1 - 1e-15).unsqueeze(-1) * total, right=True).squeeze(-1)
    return found.clamp_max(mass.shape[-1] - 1), total.squeeze(-1) > 0  # also False of NaN


@torch.no_grad()
def sample(
    lm: Network,
    prompts: Prompts,
    rows: Int[Tensor, "N"],
    u: Float64[Tensor, "N T"],
    begun: Int[Tensor, "N T"] | None = None,
    start: Int[Tensor, "N"] | None = None,
) -> tuple[Int[Tensor, "N T"], Float64[Tensor, "N T"]]:
    """One completion for each entry of `rows`, of prompt `rows[i]`, with the log-probability of each drawn token.

    :param u: independent uniforms in [0, 1), float64, one for each token. The draw is a function of its own row alone,
        so how rows are batched and when finished ones are dropped changes nothing.
    :param begun: texts whose tokens before `start` are taken over, end tokens not among them; forced one by one, so that
        a prompt is still forwarded once, and no row is longer than another."""
    if not len(rows):
        return torch.full(u.shape, lm.vocabulary.pad_id, dtype=torch.int64, device=rows.device), torch.zeros_like(u)
    with lm.precision():
        try:
            return _sample(Decoder.of(lm, prompts, rows), u, begun, start)
        except OtherHeadError:  # the same uniforms give the same texts
            return _sample(Decoder.of(lm, prompts, rows), u, begun, start)


def _sample(decoder: Decoder, u: Tensor, begun: Tensor | None, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `sample` returns: texts, and the log-probabilities of their tokens."""
    vocabulary, steps = decoder.lm.vocabulary, u.shape[-1]
    x = torch.full(u.shape, vocabulary.pad_id, dtype=torch.int64, device=u.device)
    log_q = torch.zeros_like(u)
    live = torch.arange(len(x), device=x.device)  # output row of each decoder row
    open_ = torch.ones_like(live, dtype=torch.bool)  # whether its text has not ended
    sound = torch.ones_like(open_[:1])
    every = 1 if x.device.type == "cpu" else EVERY
    for t in range(steps):
        log_probs = decoder.log_probs()
        tokens, is_law = _quantiles(log_probs, u[live, t])  # (decoder rows,)
        sound = sound & (is_law | ~open_).all()
        if begun is not None and start is not None:
            tokens = torch.where(t < start[live], begun[live, t], tokens)
        log_chosen = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        x[live, t] = torch.where(open_, tokens, vocabulary.pad_id)
        log_q[live, t] = torch.where(open_, log_chosen.double(), 0.0)
        open_ = open_ & ~vocabulary.is_end(tokens)
        last = t == steps - 1
        if last or (t + 1) % every == 0:
            if not bool(sound):
                raise DivergedError
            on = open_.nonzero()[:, 0]
            if last or not len(on):
                break
            if len(on) < len(live):
                decoder.reorder(on)
                live, tokens, open_ = live[on], tokens[on], open_[on]
        decoder.advance(tokens)
    return x, log_q
