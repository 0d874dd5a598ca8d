"""Adam's learning rate, found by how far a step of it moves the guide."""

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ppl_lm.infer.traces.particles import Particles
from ppl_lm.infer.traces.sites import TextSite
from ppl_lm.lm.token_sequence import TokenSequence

PROBE = 2e-5  # learning rate of the steps that are measured
SCALE = 0.01
ADAPTER = 1e-3  # at most, where an adapter is trained
MOST_MOVED = 0.05  # nats of KL: what a step at the peak may move the guide
SOONEST = 0.1  # share of a run, after which its warm-up is over however few its steps are
TEXTS = 64  # on which a move is measured


class Rate:
    """The learning rate at each step: a warm-up to a peak, linear or at `PROBE` while the peak is sought, then a cosine to
    zero over the run.

    Networks differ by orders of magnitude in how far one step of Adam moves their distribution: KL(before ‖ after) =
    c · rate² nats a text, with c near 1 for a table of logits, 10⁴ to 10⁶ for small language models. If no peak is
    given, c is measured in the warm-up, and the peak is SCALE / c^⅓: between one rate for all networks (which ruins large
    ones) and one KL for all (with which a step that could go further does not); never more than `MOST_MOVED` nats. An adapter,
    which begins at zero and moves little at first, gets `ADAPTER` at most (the LM that ships, rank 16, 400 steps: the guide
    was left at 0.32 nats by 2.6e-3, 0.24 by 1e-3). The warm-up is then a tenth of the run, if that is less.

    :param most: what the peak may be, if it is sought.
    """

    def __init__(self, peak: float | None, warmup: int, most: float = SCALE):
        self.peak, self.warmup, self.most = peak, max(1, warmup), most
        self.soonest = math.inf if peak is not None else SOONEST
        self.now = PROBE
        self.measured: list[float] = []  # c, at each step so far

    def __call__(self, step: int, done: float) -> float:
        """:param done: share of the run that is over, 0 to 1."""
        if self.peak is None and self.measured and (step >= self.warmup or done >= SOONEST):
            later = self.measured[len(self.measured) // 2 :]  # Adam's first steps are longer
            self.peak = min(self.most, peak(statistics.fmean(later)))
        top = PROBE if self.peak is None else self.peak * min(1.0, max((step + 1) / self.warmup, done / self.soonest))
        self.now = top * 0.5 * (1 + math.cos(math.pi * done))
        return self.now

    @contextmanager
    def watch(self, step: int, particles: Particles) -> Iterator[None]:
        """Measures how far the step of the optimiser inside the block moves the guide, as long as a peak is missing."""
        if self.peak is not None or step < 2:
            yield
            return
        fresh = [_draw(text) for text in particles.texts().values()]
        before = [_next_tokens(*texts) for texts in fresh]
        yield
        moved = sum(_kl(old, _next_tokens(*texts)) for texts, old in zip(fresh, before, strict=True))
        self.measured.append(moved / self.now**2)


def peak(c: float) -> float:
    """The learning rate for a network that a step moves by c · rate² nats of KL; SCALE, as for a table, where it moves
    less, or is not what is fitted."""
    c = max(c, 1.0)
    return min(SCALE / c ** (1 / 3), math.sqrt(MOST_MOVED / c))


@torch.no_grad()
def _draw(text: TextSite) -> tuple[TokenSequence, Tensor]:
    """Texts of the guide, (N, T), and their distribution. New ones: a step moves the distribution after rare tokens in the
    very texts that it is made of by orders of magnitude more."""
    fn, shape = text.law, text.value.shape[:-1]
    fits = fn.lm.rows_per_pass(fn.prompts.ids.shape[-1], text.value.shape[-1]) // 6  # see the copies in `_kl`
    size = max(1, min(TEXTS, shape.numel(), fits))
    few = fn.expand(torch.broadcast_shapes(shape, fn.batch_shape)).slice(torch.arange(size, device=fn.lm.device))
    return few, few.sample()


@torch.no_grad()
def _next_tokens(fn: TokenSequence, x: Tensor) -> Tensor:
    """Log-probabilities of every next token at every position, (N, steps, V), nats, float64; 0 after the end."""
    log_probs = fn.lm.next_token_log_probs(fn.prompts, x).double()
    return log_probs.masked_fill(~fn.lm.vocabulary.alive(x)[:, : log_probs.shape[1], None], 0.0)


def _kl(old: Tensor, new: Tensor) -> float:
    """Σ_t KL(old ‖ new), mean over texts, to second order: half the variance of the log-ratio, which rounding in the
    normalisation does not reach."""
    mass = old.exp()
    ratio = torch.where((mass > 0) & (new > -torch.inf), new - old, 0.0)  # a truncated law may lose a token
    variance = (mass * ratio.square()).sum(-1) - (mass * ratio).sum(-1).square()
    return float(variance.sum(-1).mean()) / 2
