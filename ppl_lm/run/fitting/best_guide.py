"""Which guide of a fit is kept: the last one, the best earlier one, or the one that fitting began with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_lm.lm.network import DivergedError
from ppl_lm.run.fitting.gain import Gain
from ppl_lm.run.fitting.step_metrics import StepMetrics

WINDOW = 25  # steps over which the gain is averaged before a guide counts as better or worse


class BestGuide:
    """The weights at the best running mean of the gain so far, and the weights at the start.

    :param step: at which they were those `best` weights, -1 at the start; `gain`: that running mean, nats a prompt."""

    def __init__(self, weights: list[Tensor]):
        self.weights = weights
        self.start = self.copy()
        self.best, self.step, self.gain = self.start, -1, 0.0

    def copy(self) -> list[Tensor]:
        """The weights as they are."""
        return [w.detach().clone() for w in self.weights]

    def load(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for weight, value in zip(self.weights, values, strict=True):
                weight.copy_(value)

    def consider(self, metrics: Sequence[StepMetrics]) -> None:
        """Remembers the weights as they are if the window that has just been filled is the best so far."""
        if len(metrics) % WINDOW:
            return
        gain = sum(row["gain"] for row in metrics[-WINDOW:]) / WINDOW
        if gain > self.gain:
            self.best, self.step, self.gain = self.copy(), len(metrics) - 1, gain

    def is_lost(self, metrics: Sequence[StepMetrics]) -> bool:
        """Whether a window's mean gain lies more than a nat, and five standard errors, below the prior's ELBO."""
        gains = torch.tensor([row["gain"] for row in metrics[-WINDOW:]])
        if len(gains) < WINDOW:
            return False
        return float(gains.mean() + 5 * gains.std() / WINDOW**0.5) < -1.0


@dataclass(frozen=True)
class Candidate:
    """A guide that may be kept.

    :param name: `last`, `best` or `start`; `step`: after how many steps it was the guide.
    :param gain: nats a prompt, with its standard error `se`."""

    name: str
    step: int
    gain: float
    se: float
    weights: list[Tensor]


def keep_best(
    gain: Gain, guides: BestGuide, metrics: Sequence[StepMetrics], seconds: float = math.inf
) -> tuple[Candidate, Candidate, bool]:
    """Measures the last guide and the best earlier one on fresh draws, and loads the best of both and the start.

    Interrupted in this, it loads the last guide, or the best earlier one if that was the better in training.

    :param seconds: what this may take.
    :returns: the guide that was kept, the last one, and whether this was interrupted."""

    def measured(name: str, step: int, weights: list[Tensor]) -> Candidate:
        guides.load(weights)
        try:
            return Candidate(name, step, *gain.measure(seconds / times), weights)
        except DivergedError:
            return Candidate(name, step, -math.inf, 0.0, weights)

    steps = len(metrics)
    times = 4 if 0 <= guides.step < steps - 1 else 2  # that a guide is measured
    recent = [row["gain"] for row in metrics[-WINDOW:]] or [0.0]
    last = Candidate("last", steps, sum(recent) / len(recent), math.nan, guides.copy())
    interrupted = False
    try:
        for _ in range(2):
            covers = gain.covers
            last = measured("last", steps, last.weights)
            candidates = [last]
            if 0 <= guides.step < steps - 1:
                candidates.append(measured("best", guides.step + 1, guides.best))
            start = measured("start", 0, guides.start)
            if gain.covers == covers:  # else an impossible text made another measure of all: once more
                break
        behind = [start.gain - c.gain > 2 * math.hypot(start.se, c.se) for c in candidates]
        if all(behind):  # by more than noise, which must not discard the fit
            candidates = [start]
        elif len(candidates) > 1:  # the better of two on the same draws looks better than it is
            better = max(candidates, key=lambda c: c.gain)
            candidates = [measured(better.name, better.step, better.weights)]
    except KeyboardInterrupt:
        interrupted = True
        name, step = ("start", 0) if guides.step < 0 else ("best", guides.step + 1)
        candidates = [last, Candidate(name, step, guides.gain, math.nan, guides.best)]
    kept = max(candidates, key=lambda c: c.gain)
    guides.load(kept.weights)
    return kept, last, interrupted
