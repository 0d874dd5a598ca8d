"""`TokenSequence`: whole completions of a language model as a Pyro distribution."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, prod
from typing import Any

import torch
from jaxtyping import Float64, Int
from pyro.distributions import TorchDistribution, constraints
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor

from ppl_lm.lm import pyro_sums  # noqa: F401  # for its effect: enumerated sites beside float64 ones
from ppl_lm.lm.checking.checks import require_fit
from ppl_lm.lm.decoding.decoder import sample
from ppl_lm.lm.network import DivergedError, Network
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.scoring.shortcuts import plain_head
from ppl_lm.lm.scoring.teacher_forcing import distinct, saves, shares

ENUMERABLE = 1_000_000  # tokens in the whole support; beyond it enumeration is refused


class TokenSequence(TorchDistribution):
    """p(x | prompt) over completions x, int64 token ids in canonical form: pad at every position after the end token.

    The outcomes are the *finished* completions (an end token is their last, and its probability counts) and the
    *truncated* ones (T tokens, no end token); together their mass is 1. A value that is not in canonical form has
    log-probability -inf.

    batch_shape is that of the prompts, (B,), or what `expand` makes of it; event_shape is (T,).
    """

    arg_constraints: dict[str, Any] = {}
    support: Any = constraints.independent(constraints.nonnegative_integer, 1)
    has_rsample = False

    def __init__(self, lm: Network, prompts: Prompts, batch_shape: torch.Size | None = None):
        self.lm = lm
        # Pyro's TraceGraph_ELBO follows values through a program by their provenance; text and networks would lose it.
        self._provenance = get_provenance(prompts.ids)
        self.prompts = replace(prompts, ids=detach_provenance(prompts.ids)) if self._provenance else prompts
        self._last_draw: list[tuple[Tensor, Tensor, list[int]]] = []  # one at most; shared with what `expand` makes
        require_fit(lm, self.prompts)
        shape = prompts.batch_shape if batch_shape is None else torch.Size(batch_shape)
        super().__init__(shape, torch.Size((lm.max_new_tokens,)), validate_args=False)

    @property
    def has_enumerate_support(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.lm.vocabulary.size ** self.event_shape[0] * self.event_shape[0] <= ENUMERABLE

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "TokenSequence":
        wider = TokenSequence(self.lm, self.prompts, torch.Size(batch_shape))
        wider._provenance, wider._last_draw = self._provenance, self._last_draw
        return wider

    def slice(self, rows: Int[Tensor, "N"]) -> "TokenSequence":
        """Rows `rows` of the flattened batch as a distribution of batch_shape (N,): a micro-batch of particles."""
        return TokenSequence(self.lm, self.prompts.take(self._prompt_rows(self.batch_shape)[rows]))

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Int[Tensor, "*S T"]:
        """Draws from torch's global generator, so that `pyro.set_rng_seed` alone makes a run repeatable."""
        return self._draw(torch.Size(sample_shape) + self.batch_shape)

    def resume(self, value: Int[Tensor, "*S T"], start: Int[Tensor, "*S"]) -> Int[Tensor, "*S T"]:
        """`value` with its tokens from position `start` on drawn anew, from p(· | prompt, x_<start).

        :param start: 0 (a new draw) to the text's length in tokens less 1: no end token stands before it."""
        return self._draw(value.shape[:-1], value.reshape(-1, *self.event_shape), start.reshape(-1))

    def _draw(self, shape: torch.Size, *begun: Tensor) -> Int[Tensor, "*S T"]:
        rows = self._prompt_rows(shape)
        size = self.lm.rows_per_pass(self.prompts.ids.shape[-1] + self.event_shape[0], 1, shared=inf)
        u = torch.rand(len(rows), *self.event_shape, dtype=torch.float64, device=rows.device)
        parts = zip(*(_chunks(v, size) for v in (rows, u, *begun)), strict=True)
        samples = [sample(self.lm, self.prompts, *part) for part in parts]
        x, log_q = (torch.cat(p).reshape(*shape, *self.event_shape) for p in zip(*samples, strict=True))
        x = track_provenance(x, self._provenance)
        self._last_draw[:] = [(x, log_q, self._state_of_weights())]
        return x

    def log_prob(self, value: Int[Tensor, "*#S T"]) -> Float64[Tensor, "*#S"]:
        """log p(value | prompt) in nats, float64, differentiable in the weights; -inf where impossible."""
        total = self.token_log_probs(value).sum(-1)
        impossible = ~self.lm.vocabulary.is_canonical(value)
        return total.masked_fill(impossible, -torch.inf) if bool(impossible.any()) else total

    def token_log_probs(self, value: Int[Tensor, "*#S T"]) -> Float64[Tensor, "*#S T"]:
        """log p(x_t | prompt, x_<t) in nats, float64, 0 after the end; `value` broadcasts against batch_shape.

        :raises ValueError: if `value` has another length or dtype than this distribution's outcomes.
        :raises DivergedError: if the model answers NaN."""
        return self._scored(value, lambda *given: (self.lm.score(*given),))[0]

    def token_and_end_log_probs(
        self, value: Int[Tensor, "*#S T"]
    ) -> tuple[Float64[Tensor, "*#S T"], Float64[Tensor, "*#S T"]]:
        """`token_log_probs`, and log p(the text ends here | prompt, x_<t), both (*S, T); see there. It ends with the
        first of the vocabulary's end tokens, or with its own where it does end."""
        token, end = self._scored(value, self.lm.score_with_ends)
        return token, end

    def _scored(
        self, value: Int[Tensor, "*#S T"], score: Callable[[Prompts, Tensor, Tensor], tuple[Tensor, ...]]
    ) -> list[Float64[Tensor, "*#S T"]]:
        if value.shape[-1:] != self.event_shape or value.dtype != torch.int64:
            raise ValueError(
                f"got a value of shape {tuple(value.shape)} and {value.dtype}; completions here are int64 of shape "
                f"(..., {self.event_shape[0]}): pad after the end token, or change max_new_tokens"
            )
        provenance = get_provenance(value) | self._provenance
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        x = detach_provenance(value).expand(*shape, *self.event_shape).reshape(-1, *self.event_shape)
        x = x.clamp(0, self.lm.vocabulary.size - 1)  # out-of-range ids are -inf in log_prob
        rows = self._prompt_rows(shape)
        size = self.rows_per_pass(len(x), torch.is_grad_enabled())
        order = self._together(rows, x)
        parts = [self._score_part(score, rows[part], x[part]) for part in _chunks(order, size)]
        scores = []
        for column in zip(*parts, strict=True):
            by_token = torch.cat(column).double()[order.argsort()].reshape(*shape, *self.event_shape)
            if bool(by_token.detach().isnan().any()):
                raise DivergedError
            scores.append(track_provenance(by_token, provenance))
        return scores

    def rows_per_pass(self, texts: int, gradient: bool) -> int:
        """How many of so many texts are scored at a time."""
        width, steps = self.prompts.ids.shape[-1], self.event_shape[0]
        prompts = len(distinct(self.prompts.flatten())[0])
        shared = saves(prompts, texts, width, steps) and shares(self.lm, gradient and steps > 1)
        logits = plain_head(self.lm) is None
        return self.lm.rows_per_pass(width, steps, gradient, logits, texts / prompts if shared else 0.0)

    def together(self, value: Int[Tensor, "*#S T"]) -> Int[Tensor, "N"]:
        """An order of the flattened batch in which texts of one prompt follow each other, long ones first: micro-batches of it
        pass a prompt once, are no longer than they need to be, and fit into the memory that those before them have left."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return self._together(self._prompt_rows(shape), value.expand(*shape, -1).reshape(-1, *self.event_shape))

    def _together(self, rows: Int[Tensor, "N"], x: Int[Tensor, "N T"]) -> Int[Tensor, "N"]:
        lengths = self.lm.vocabulary.lengths(x)
        return (rows * (self.event_shape[0] + 1) - lengths).argsort(stable=True)

    def _score_part(self, score: Callable[..., tuple[Tensor, ...]], rows: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        needed, copies = distinct(self.prompts.take(rows))
        return score(self.prompts.take(rows[needed]), x, copies)

    def recall(self, value: Int[Tensor, "*S T"], token_log_probs: Float64[Tensor, "*S T"]) -> None:
        """Takes over what a sampler has found already: `sampled_log_probs` of this very tensor."""
        self._last_draw[:] = [(value, token_log_probs, self._state_of_weights())]

    def sampled_log_probs(self, value: Int[Tensor, "*S T"]) -> Float64[Tensor, "*S T"] | None:
        """`token_log_probs` of the last draw as found while drawing it; None for any other value or after a change of
        weights. Saves a second pass; `self_check` proves both equal."""
        for x, log_q, weights in self._last_draw:
            if x is value and weights == self._state_of_weights():
                return log_q
        return None

    def enumerate_support(self, expand: bool = True) -> Int[Tensor, "N *S T"]:
        """Every outcome, (N, *batch_shape, T), or (N, 1, ..., 1, T) without `expand`; tiny vocabularies only.

        :raises NotImplementedError: if there are too many outcomes to list."""
        vocabulary, steps = self.lm.vocabulary, self.event_shape[0]
        if not self.has_enumerate_support:
            raise NotImplementedError(
                f"{vocabulary.size} tokens at {steps} positions are too many outcomes to enumerate; "
                "use importance() or a SequenceELBO"
            )
        open_ = torch.empty(1, 0, dtype=torch.int64, device=self.lm.device)
        finished = []
        for t in range(steps):
            token = torch.arange(vocabulary.size, device=open_.device)
            grown = torch.cat([open_.repeat_interleave(vocabulary.size, 0), token.repeat(len(open_))[:, None]], 1)
            ends = vocabulary.is_end(grown[:, -1])
            finished.append(torch.nn.functional.pad(grown[ends], (0, steps - t - 1), value=vocabulary.pad_id))
            open_ = grown[~ends]
        x = torch.cat([*finished, open_])
        x = x.reshape(len(x), *[1] * len(self.batch_shape), steps)
        return x.expand(len(x), *self.batch_shape, steps) if expand else x

    def _prompt_rows(self, shape: torch.Size) -> Int[Tensor, "N"]:
        """Row of the prompts for each entry of a batch of shape `shape`, flat."""
        grid = torch.arange(prod(self.prompts.batch_shape), device=self.prompts.ids.device)
        return grid.reshape(self.prompts.batch_shape).expand(shape).reshape(-1)

    def _state_of_weights(self) -> list[int]:
        """Changes with the weights. Versions alone miss what fused optimisers and `.data` write, sums of bits alone miss what
        keeps them."""
        weights = [p.detach() for p in self.lm.model.parameters()]
        if not weights:  # a mask has none
            return []
        sums = torch.stack([_sum_of_bits(w) for w in weights])
        return [*sums.tolist(), *(w._version for w in weights)]


def _sum_of_bits(weight: Tensor) -> Int[Tensor, ""]:
    """Of its bits in words as long as fit, modulo 2⁶⁴: any number that changes changes it, and it is as fast as memory."""
    flat = weight.contiguous().reshape(-1)
    size, start = flat.numel() * flat.itemsize, flat.storage_offset() * flat.itemsize
    word = next(
        word
        for word in (torch.int64, torch.int32, torch.int16, torch.int8)
        if size % word.itemsize == start % word.itemsize == 0
    )
    return flat.view(word).sum(dtype=torch.int64)


def _chunks(x: Tensor, size: int) -> tuple[Tensor, ...]:
    return x.split(size) if len(x) else (x,)
