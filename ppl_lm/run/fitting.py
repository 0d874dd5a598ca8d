"""`fit`: one visible loop."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ppl_lm.infer.binding import Bound
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.objectives.baselines import Baseline, BaselineFunction, LogZ, LogZFunction, leave_one_out
from ppl_lm.infer.objectives.divergences import reverse_kl
from ppl_lm.infer.objectives.protocol import Objective, ObjectiveFunction
from ppl_lm.infer.traces.parameters import trainable_parameters
from ppl_lm.infer.traces.particles import Particles
from ppl_lm.infer.traces.sources import Source
from ppl_lm.lm.meter import measure
from ppl_lm.lm.network import DivergedError
from ppl_lm.lm.prompts import Prompts, shuffled
from ppl_lm.run.gain import Gain
from ppl_lm.run.learning_rate import Rate

WINDOW = 25  # steps over which the ELBO is averaged before a guide counts as better or worse


@dataclass
class Fit:
    """What `fit` did. The guide's weights are those of the best guide seen.

    :param outcome: `finished`, `worse_than_prior` (the last guide is further from the posterior than the prior was),
        `diverged` (a gradient was not finite), or `interrupted`.
    :param kept: which guide was kept: `last`, `best` (an earlier one) or `start` (the one that fitting began with,
        a copy of the prior for `finetuned`).
    :param gain: ELBO(kept guide) - ELBO(prior) in nats per prompt, on fresh draws; `last_gain` that of the last guide.
    :param covers: whether instead both are KL(posterior ‖ prior) - KL(posterior ‖ guide), see `fit`.
    :param metrics: one dictionary a step, as in `metrics.jsonl`.
    """

    outcome: str
    kept: str
    kept_step: int
    steps: int
    seconds: float
    gain: float
    gain_se: float
    last_gain: float
    last_gain_se: float
    covers: bool = False
    metrics: list[dict[str, float]] = field(default_factory=list, repr=False)


def fit(
    model: Bound,
    guide: Bound,
    prompts: Any,
    *,
    objective: Objective | ObjectiveFunction = reverse_kl,
    baseline: Baseline | BaselineFunction = leave_one_out,
    log_z: LogZ | LogZFunction | None = None,
    source: Source | None = None,
    max_ratio: float = math.inf,
    clip_ratio: float | None = None,
    num_particles: int = 128,
    batch_size: int = 16,
    learning_rate: float | None = None,
    warmup: int = 15,
    clip: float = 3.0,
    max_steps: int | None = None,
    time_limit: float | None = None,
    seed: int | None = None,
    max_plate_nesting: int = 1,
    micro_batch: int | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
    on_fault: Callable[[str], None] | None = None,
) -> Fit:
    """Fits a guide by SVI with `SequenceELBO` and one Adam over all its weights; keeps the best guide seen.

    Watches the gain, ELBO(q) - ELBO(prior): it needs no log Z, and unlike the reward it rises only as q nears the posterior.
    Where the objective asks for cover (`forward_kl`, `chi2`), or a hard constraint makes every ELBO -inf, the gain is
    KL(p ‖ prior) - KL(p ‖ q) instead.

    :param objective: what is minimised; `baseline`, `log_z`, `source`, `max_ratio` and `clip_ratio` likewise as for
        `SequenceELBO`. Standard RL and GRPO are fitted too, but kept only if they come closer to the posterior.
    :param num_particles: texts drawn for each prompt and step.
    :param batch_size: prompts a step.
    :param learning_rate: peak; linear warm-up over `warmup` steps, then a cosine to zero over the run. None: found in
        the warm-up by how far a step moves the guide; see `ppl_lm.run.learning_rate`.
    :param clip: largest norm of the gradient, in multiples of its median over the last `WINDOW` steps. A limit near the
        usual norm would clip just the steps that unlearn a rare bad text, and bias where the fit ends.
    :param max_steps: steps; `time_limit`: seconds. At least one of them; whichever comes first.
    :param on_step: called with each step's metrics.
    :param on_fault: called when a step after the first fails (a reward, say), before the error is raised again, with
        which guide's weights were restored: `best` or `start`.
    :raises ValueError: on bad arguments, before anything is drawn.
    """
    _check(learning_rate, max_steps, time_limit, clip)
    reader = model.lm or guide.lm
    if reader is None:
        raise ValueError("neither model nor guide holds a language model; fit such programs with Pyro's SVI")
    batch = reader.prompts(prompts)
    batch_size = min(batch_size, len(batch))
    began = time.monotonic()
    if seed is not None:
        torch.manual_seed(seed)
    ratios: Any = {"source": source, "max_ratio": max_ratio, "clip_ratio": clip_ratio}
    elbo = SequenceELBO(num_particles, max_plate_nesting, micro_batch, objective, baseline, log_z, **ratios)
    weights = _weights(model, guide, batch[:1], max_plate_nesting)
    gain = Gain(model, guide, batch, elbo.objective, max_plate_nesting)
    optimiser = torch.optim.Adam(weights, betas=(0.9, 0.99))
    schedule = Rate(learning_rate, warmup)
    best = _Best(weights)
    metrics: list[dict[str, float]] = []
    tokens, updates = 0, 1 if source is None else source.updates
    outcome = "finished"
    try:
        for step, rows in enumerate(_again(shuffled(len(batch), batch_size, seed or 0), updates)):
            done = _progress(step, time.monotonic() - began, max_steps, time_limit)
            if step > 0 and done >= 1:
                break
            rate = schedule(step, done)
            for group in optimiser.param_groups:
                group["lr"] = rate
            with measure() as cost:
                particles = elbo.particles(model, guide, batch.take(rows))
                optimiser.zero_grad()
                elbo.differentiate(particles).backward()
            norm = float(nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None]))
            if len(metrics) >= WINDOW:
                usual = statistics.median(m["grad_norm"] for m in metrics[-WINDOW:])
                if usual > 0:
                    nn.utils.clip_grads_with_norm_(weights, clip * usual, torch.tensor(norm))
            row = _metrics(particles, gain, rows)
            row |= {"step": step, "seconds": time.monotonic() - began, "learning_rate": rate, "grad_norm": norm}
            tokens += cost.lm_tokens
            row |= {"lm_tokens": cost.lm_tokens, "done": done, "tokens_per_second": tokens / max(row["seconds"], 1e-9)}
            metrics.append(row)
            best.consider(metrics)  # before the step: these particles are of the weights as they are
            if on_step is not None:
                on_step(row)
            if not math.isfinite(norm):
                outcome = "diverged"
                break
            if best.is_lost(metrics):
                break
            with schedule.watch(step, particles):
                optimiser.step()
    except KeyboardInterrupt:
        outcome = "interrupted"
    except DivergedError:
        outcome = "diverged"
    except Exception as error:
        best.load(best.kept)
        if metrics and on_fault is not None:
            try:
                on_fault("start" if best.step < 0 else "best")
            except Exception as fault:  # must not hide what went wrong first
                error.add_note(f"the best guide could not be saved: {fault}")
        raise
    return _keep_best(gain, best, metrics, outcome, began)


class _Best:
    """The weights at the best running mean of the gain so far, and the weights at the start."""

    def __init__(self, weights: list[Tensor]):
        self.weights = weights
        self.start = self.copy()
        self.kept, self.step, self.gain = self.start, -1, 0.0

    def copy(self) -> list[Tensor]:
        return [w.detach().clone() for w in self.weights]

    def load(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for w, value in zip(self.weights, values, strict=True):
                w.copy_(value)

    def consider(self, metrics: list[dict[str, float]]) -> None:
        if len(metrics) % WINDOW:
            return
        gain = sum(m["gain"] for m in metrics[-WINDOW:]) / WINDOW
        if gain > self.gain:
            self.kept, self.step, self.gain = self.copy(), len(metrics) - 1, gain

    def is_lost(self, metrics: list[dict[str, float]]) -> bool:
        """Whether a window's mean gain lies more than a nat, and five standard errors, below the prior's ELBO."""
        gains = torch.tensor([m["gain"] for m in metrics[-WINDOW:]])
        if len(gains) < WINDOW:
            return False
        return float(gains.mean() + 5 * gains.std() / WINDOW**0.5) < -1.0


def _keep_best(gain: Gain, best: _Best, metrics: Any, outcome: str, began: float) -> Fit:
    """Measures the last guide and the best earlier one on fresh draws, and leaves the best of both and the start.
    Interrupted in this, it leaves the last guide, or the best earlier one if that was the better in training."""

    def of(weights: list[Tensor]) -> tuple[float, float]:
        best.load(weights)
        try:
            return gain.measure()
        except DivergedError:
            return -math.inf, 0.0

    last = best.copy()
    recent = [m["gain"] for m in metrics[-WINDOW:]] or [0.0]
    last_gain, last_se = sum(recent) / len(recent), math.nan
    try:
        for _ in range(2):
            covers = gain.covers
            last_gain, last_se = of(last)
            candidates = [("last", len(metrics), last_gain, last_se, last)]
            if 0 <= best.step < len(metrics) - 1:
                candidates.append(("best", best.step + 1, *of(best.kept), best.kept))
            first, first_se = of(best.start)
            if gain.covers == covers:  # else an impossible text made another measure of all: once more
                break
        if all(first - c[2] > 2 * math.hypot(first_se, c[3]) for c in candidates):  # noise must not discard the fit
            candidates = [("start", 0, first, first_se, best.start)]
        elif len(candidates) > 1:  # the better of two on the same draws looks better than it is
            name, step, _, _, weights = max(candidates, key=lambda c: c[2])
            candidates = [(name, step, *of(weights), weights)]
    except KeyboardInterrupt:
        outcome = "interrupted"
        earlier = ("start", 0, 0.0) if best.step < 0 else ("best", best.step + 1, best.gain)
        candidates = [("last", len(metrics), last_gain, last_se, last), (*earlier, math.nan, best.kept)]
    kept, kept_step, kept_gain, kept_se, weights = max(candidates, key=lambda c: c[2])
    best.load(weights)
    if last_gain < -3 * last_se:
        outcome = "worse_than_prior"
    return Fit(
        outcome=outcome,
        kept=kept,
        kept_step=kept_step,
        steps=len(metrics),
        seconds=time.monotonic() - began,
        gain=kept_gain,
        gain_se=kept_se,
        last_gain=last_gain,
        last_gain_se=last_se,
        covers=gain.covers,
        metrics=metrics,
    )


def _weights(model: Bound, guide: Bound, batch: Prompts, max_plate_nesting: int) -> list[Tensor]:
    """Every trainable parameter, found without the objective, which may remember what it sees."""
    weights = trainable_parameters(model, guide, batch, max_plate_nesting)
    if not weights:
        raise ValueError(
            "the guide has nothing to train; choose another, or draw from it as it is with importance(), on the command "
            "line with ppl-lm sample MODEL --guide GUIDE"
        )
    return weights


def _metrics(particles: Particles, gain: Gain, rows: Tensor) -> dict[str, float]:
    """Means under the guide over particles and prompts, nats for each prompt; by importance ratios where something else drew
    the texts."""
    log_w = particles.log_prior() + particles.log_likelihood() - particles.log_guide()  # (K, B)
    moved, share = particles.log_guide() - particles.log_prior(), particles.share()
    row = {
        "elbo": _mean(log_w, share),
        "elbo_se": float((log_w.var(0).mean().sqrt() / math.sqrt(log_w.numel())).nan_to_num(math.inf)),
        "gain": gain.of_step(log_w, moved, rows, share),
        "kl_prior": _mean(moved, share),
    }
    if "reward" in particles.records:
        reward = particles.records["reward"]
        row["reward"] = _mean(reward.reshape(log_w.shape), share) if particles.proposal_log_q else float(reward.mean())
    return row


def _mean(values: Tensor, share: Tensor) -> float:
    return float(torch.where(share > 0, share * values, 0.0).sum(0).mean())


def _again(batches: Iterator[Tensor], times: int) -> Iterator[Tensor]:
    """Each batch so many times in a row, for a source that reuses its texts."""
    return (rows for rows in batches for _ in range(times))


def _progress(step: int, seconds: float, max_steps: int | None, time_limit: float | None) -> float:
    """Share of the run that is done: the further of steps and time. There is always a first step."""
    if step == 0:
        return 0.0
    return max(step / max_steps if max_steps else 0.0, seconds / time_limit if time_limit else 0.0)


def _check(learning_rate: float | None, max_steps: int | None, time_limit: float | None, clip: float) -> None:
    if learning_rate is not None and not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate={learning_rate}; give a number above 0")
    if not clip > 0:
        raise ValueError(f"clip={clip}; give a multiple of the usual norm, above 0")
    if max_steps is None and time_limit is None:
        raise ValueError("give max_steps= or time_limit= (seconds), or both")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps={max_steps}; give at least 1")
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit={time_limit} seconds; give a number above 0")
