"""`fit`: one visible loop."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_lm.infer import Bound, SequenceELBO, importance
from ppl_lm.infer.elbo import refuse_hard_constraints
from ppl_lm.infer.particles import Particles
from ppl_lm.lm import DivergedError, Prompts
from ppl_lm.lm.meter import measure
from ppl_lm.lm.prompts import shuffled
from ppl_lm.run.rate import Rate

WINDOW = 25  # steps over which the ELBO is averaged before a guide counts as better or worse


@dataclass
class Fit:
    """What `fit` did. The guide's weights are those of the best guide seen.

    :param outcome: `finished`, `worse_than_prior` (the last guide is further from the posterior than the prior was),
        `diverged` (a gradient was not finite), or `interrupted`.
    :param kept: which guide was kept: `last`, `best` (an earlier one) or `start` (the one that fitting began with,
        a copy of the prior for `finetuned`).
    :param gain: ELBO(kept guide) - ELBO(prior) in nats per prompt, on fresh draws; `last_gain` that of the last guide.
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
    metrics: list[dict[str, float]] = field(default_factory=list, repr=False)


def fit(
    model: Bound,
    guide: Bound,
    prompts: Any,
    *,
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

    Watches ELBO(q) - ELBO(prior): it needs no log Z, and unlike the reward it rises only as q nears the posterior.

    :param num_particles: texts drawn for each prompt and step.
    :param batch_size: prompts a step.
    :param learning_rate: peak; linear warm-up over `warmup` steps, then a cosine to zero over the run. None: found in
        the warm-up by how far a step moves the guide; see `ppl_lm.run.rate`.
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
    elbo = SequenceELBO(num_particles, max_plate_nesting, micro_batch)
    weights = _weights(elbo, model, guide, batch[:1])
    measured = {"num_samples": max(64, 1024 // len(batch)), "max_plate_nesting": max_plate_nesting}
    base = importance(model, None, batch, **measured)
    reference = base.log_weight.flatten(0, 1)  # (S, B), its mean is the ELBO of the prior
    if reference.shape[1] != len(batch):
        raise ValueError("fit needs every site in the prompt plate; use SequenceELBO with pyro.infer.SVI")
    if not bool(torch.isfinite(reference).all()):
        raise ValueError(
            "reverse KL cannot fit a hard constraint: some texts of the prior have probability 0 under the posterior. Draw "
            "from it with importance() or rejection(), or on the command line with ppl-lm sample MODEL --sampler rejection"
        )
    optimiser = torch.optim.Adam(weights, betas=(0.9, 0.99))
    schedule = Rate(learning_rate, warmup)
    best = _Best(weights)
    metrics: list[dict[str, float]] = []
    tokens = 0
    outcome = "finished"
    try:
        for step, rows in enumerate(shuffled(len(batch), batch_size, seed or 0)):
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
            row = _metrics(particles, reference.mean(0)[rows])
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
    return _keep_best(model, guide, batch, reference, best, metrics, outcome, began, measured)


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


def _keep_best(
    model: Any, guide: Any, batch: Prompts, reference: Tensor, best: _Best, metrics: Any, outcome: str, began: float,
    measured: dict[str, int],
) -> Fit:  # fmt: skip
    """Measures the last guide and the best earlier one on fresh draws, and leaves the best of both and the start.
    Interrupted in this, it leaves the last guide, or the best earlier one if that was the better in training."""
    base = reference.mean(0)
    base_se = float((reference - base).mean(1).std() / math.sqrt(len(reference)))

    def gain(weights: list[Tensor]) -> tuple[float, float]:
        best.load(weights)
        try:
            drawn = importance(model, guide, batch, **measured)
        except DivergedError:
            return -math.inf, 0.0
        value = (drawn.log_weight.flatten(0, 1) - base).mean(1)
        return float(value.mean()), math.hypot(float(value.std() / math.sqrt(len(value))), base_se)

    last = best.copy()
    recent = [m["gain"] for m in metrics[-WINDOW:]] or [0.0]
    last_gain, last_se = sum(recent) / len(recent), math.nan
    try:
        last_gain, last_se = gain(last)
        candidates = [("last", len(metrics), last_gain, last_se, last)]
        if 0 <= best.step < len(metrics) - 1:
            candidates.append(("best", best.step + 1, *gain(best.kept), best.kept))
        first, first_se = gain(best.start)
        if all(first - c[2] > 2 * math.hypot(first_se, c[3]) for c in candidates):  # noise must not discard the fit
            candidates = [("start", 0, first, first_se, best.start)]
        elif len(candidates) > 1:  # the better of two on the same draws looks better than it is
            name, step, _, _, weights = max(candidates, key=lambda c: c[2])
            candidates = [(name, step, *gain(weights), weights)]
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
        metrics=metrics,
    )


def _weights(elbo: SequenceELBO, model: Bound, guide: Bound, batch: Prompts) -> list[Tensor]:
    """Every trainable parameter: of the networks, and what the programs themselves make with `pyro.param`."""
    with poutine.trace(param_only=True) as capture:
        refuse_hard_constraints(elbo.particles(model, guide, batch))
    sites: Any = capture.trace.nodes.values()
    found = [site["value"].unconstrained() for site in sites if site["type"] == "param"]
    weights = list({id(p): p for p in found if p.requires_grad}.values())
    if not weights:
        raise ValueError(
            "the guide has nothing to train; choose another, or draw from it as it is with importance(), on the command "
            "line with ppl-lm sample MODEL --guide GUIDE"
        )
    return weights


def _metrics(particles: Particles, reference: Tensor) -> dict[str, float]:
    """Means over particles and prompts, nats for each prompt."""
    log_w = particles.log_prior() + particles.log_likelihood() - particles.log_guide()  # (K, B)
    n = log_w.numel()
    row = {
        "elbo": float(log_w.mean()),
        "elbo_se": float(log_w.var(0).mean().sqrt() / math.sqrt(n)),
        "gain": float((log_w - reference).mean()),
        "kl_prior": float((particles.log_guide() - particles.log_prior()).mean()),
    }
    if "reward" in particles.records:
        row["reward"] = float(particles.records["reward"].mean())
    return row


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
