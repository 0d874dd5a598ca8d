"""`fit`: one visible loop."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ppl_lm.infer.binding import Bound
from ppl_lm.infer.counts import require_count
from ppl_lm.infer.draws import Draws
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.traces.parameters import trainable_parameters
from ppl_lm.lm.checking.precision import require_true_gradient
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.meter import measure
from ppl_lm.lm.network import DivergedError
from ppl_lm.lm.prompts import shuffled
from ppl_lm.lm.trainable_weights import adapter_weights
from ppl_lm.run.fitting.best_guide import WINDOW, BestGuide, keep_best
from ppl_lm.run.fitting.gain import Gain
from ppl_lm.run.fitting.learning_rate import ADAPTER, SCALE, Rate
from ppl_lm.run.fitting.step_metrics import StepMetrics, guide_metrics

BEFORE, AFTER = 0.1, 0.1  # shares of a fit's time: for the prior's draws, and for those by which the guide is chosen


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
    metrics: list[StepMetrics] = field(default_factory=list, repr=False)


def fit(
    model: Bound,
    guide: Bound,
    prompts: Any,
    loss: SequenceELBO | None = None,
    *,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    warmup: int = 15,
    clip: float = 3.0,
    max_steps: int | None = None,
    time_limit: float | None = None,
    seed: int | None = None,
    on_step: Callable[[StepMetrics], None] | None = None,
    on_fault: Callable[[str], None] | None = None,
    on_prior: Callable[[Draws], None] | None = None,
) -> Fit:
    """Fits a guide by SVI with one Adam over all its weights; keeps the best guide seen.

    Watches the gain, ELBO(q) - ELBO(prior): it needs no log Z, and unlike the reward it rises only as q nears the posterior.
    Where the objective asks for cover (`forward_kl`, `chi2`), or a hard constraint makes every ELBO -inf, the gain is
    KL(p ‖ prior) - KL(p ‖ q) instead.

    :param loss: what is minimised and how it is estimated, as for Pyro's `SVI`; None: `SequenceELBO(num_particles=128)`. One
        with an objective, estimate or source that remembers steps is for one fit. Standard RL and GRPO are fitted too, but
        kept only if they come closer to the posterior.
    :param batch_size: prompts a step; None: 16, or all of them where a latent site lies outside the prompt plate, whose
        posterior is that of all prompts together. All of them come in their order, fewer in a new one each epoch: a guide with
        a `pyro.param` for each prompt needs all.
    :param learning_rate: peak; linear warm-up over `warmup` steps, then a cosine to zero over the run. None: found in
        the warm-up by how far a step moves the guide; see `ppl_lm.run.fitting.learning_rate`.
    :param clip: largest norm of the gradient, in multiples of its median over the last `WINDOW` steps. A limit near the
        usual norm would clip just the steps that unlearn a rare bad text, and bias where the fit ends.
    :param max_steps: steps; `time_limit`: seconds of all of this, a tenth of them for the prior's draws before the first step
        and a tenth for those by which the guide is chosen. At least one of them; whichever comes first. There is always a step.
    :param on_step: called with each step's metrics.
    :param on_fault: called when a step after the first fails (a reward, say), before the error is raised again, with
        which guide's weights were restored: `best` or `start`.
    :param on_prior: called before the first step with draws of the prior, of some of the prompts where time is short.
    :raises ValueError: on bad arguments, before anything is drawn; in half precision also if that turns the gradient too far.
    """
    check_arguments(loss, batch_size, learning_rate, max_steps, time_limit, clip)
    require_count("warmup", warmup)
    elbo = SequenceELBO(num_particles=128) if loss is None else loss
    reader = model.lm or guide.lm
    if reader is None:
        raise ValueError("neither model nor guide holds a language model; fit such programs with Pyro's SVI")
    batch = reader.prompts(prompts)
    size = min(16 if batch_size is None else batch_size, len(batch))
    began = time.monotonic()
    if seed is not None:
        torch.manual_seed(seed)
    nesting = elbo.nesting(model, guide, batch)
    weights = weights_to_fit(model, guide, batch[:size], nesting)
    for network in guide.networks.values():
        if isinstance(network, LanguageModel):
            require_true_gradient(network)
    limit = math.inf if time_limit is None else time_limit
    gain = Gain(model, guide, batch, elbo.objective, nesting, BEFORE * limit, seed or 0)
    if on_prior is not None:
        on_prior(gain.prior)
    choosing = max(AFTER * limit, gain.least_seconds)
    if gain.is_joint and size < len(batch):
        if batch_size is not None:
            raise ValueError(
                f"batch_size={batch_size}; a latent site lies outside the prompt plate, and its posterior is that of all "
                f"{len(batch)} prompts together: each step needs them all, batch_size={len(batch)}"
            )
        size = len(batch)
    optimiser = torch.optim.Adam(weights, betas=(0.9, 0.99))
    adapted = any(adapter_weights(network) for network in guide.networks.values())
    schedule = Rate(learning_rate, warmup, ADAPTER if adapted else SCALE)
    guides = BestGuide(weights)
    metrics: list[StepMetrics] = []
    tokens = 0
    outcome = "finished"
    updates = 1 if elbo.source is None else elbo.source.updates
    started = began_step = time.monotonic()
    aside = 0.0  # seconds that the caller took for a step's metrics
    until = math.inf if time_limit is None else limit - choosing - (started - began)
    try:
        for step, rows in enumerate(_repeated(_batches(len(batch), size, seed or 0), updates)):
            at = time.monotonic()
            done = _progress(step, at - started, max_steps, until)
            if step > 0 and (
                done >= 1 or at - started + (at - began_step - aside) > until
            ):  # the next would end too late
                break
            began_step = at
            rate = schedule(step, done)
            for group in optimiser.param_groups:
                group["lr"] = rate
            with measure() as cost:
                particles = elbo.particles(model, guide, batch.take(rows))
                optimiser.zero_grad()
                elbo.accumulate(particles)
            norm = float(nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None]))
            if len(metrics) >= WINDOW:
                usual = statistics.median(m["grad_norm"] for m in metrics[-WINDOW:])
                if usual > 0:
                    nn.utils.clip_grads_with_norm_(weights, clip * usual, torch.tensor(norm))
            seconds, tokens = time.monotonic() - began, tokens + cost.lm_tokens
            row: StepMetrics = {
                **guide_metrics(particles, gain, rows),
                "step": step,
                "seconds": seconds,
                "learning_rate": rate,
                "grad_norm": norm,
                "lm_tokens": cost.lm_tokens,
                "done": done,
                "tokens_per_second": tokens / max(seconds, 1e-9),
            }
            metrics.append(row)
            guides.consider(metrics)  # before the step: these particles are of the weights as they are
            at = time.monotonic()
            if on_step is not None:
                on_step(row)
            aside = time.monotonic() - at
            if not math.isfinite(norm):
                outcome = "diverged"
                break
            if guides.is_lost(metrics):
                break
            with schedule.watch(step, particles):
                optimiser.step()
    except KeyboardInterrupt:
        outcome = "interrupted"
    except DivergedError:
        outcome = "diverged"
    except Exception as error:
        guides.load(guides.best)
        if metrics and on_fault is not None:
            try:
                on_fault("start" if guides.step < 0 else "best")
            except Exception as fault:  # must not hide what went wrong first
                error.add_note(f"the best guide could not be saved: {fault}")
        raise
    kept, last, interrupted = keep_best(gain, guides, metrics, choosing)
    if interrupted:
        outcome = "interrupted"
    if last.gain < -3 * last.se:
        outcome = "worse_than_prior"
    return Fit(
        outcome=outcome,
        kept=kept.name,
        kept_step=kept.step,
        steps=len(metrics),
        seconds=time.monotonic() - began,
        gain=kept.gain,
        gain_se=kept.se,
        last_gain=last.gain,
        last_gain_se=last.se,
        covers=gain.covers,
        metrics=metrics,
    )


def _batches(total: int, size: int, seed: int) -> Iterator[Tensor]:
    """Row numbers: of all prompts always in their order, which what a program holds for each of them goes by."""
    return shuffled(total, size, seed) if size < total else itertools.repeat(torch.arange(total))


def _repeated(batches: Iterator[Tensor], times: int) -> Iterator[Tensor]:
    """Each batch so many times in a row, for a source that reuses its texts."""
    return (rows for rows in batches for _ in range(times))


def _progress(step: int, seconds: float, max_steps: int | None, until: float) -> float:
    """Share of the steps that is done: the further of their number and time. There is always a first step."""
    if step == 0:
        return 0.0
    return max(step / max_steps if max_steps else 0.0, seconds / until if until > 0 else 1.0)


def weights_to_fit(model: Bound, guide: Bound, prompts: Any, nesting: int) -> list[Tensor]:
    """:raises ValueError: if there are none."""
    weights = trainable_parameters(model, guide, prompts, nesting)
    if not weights:
        raise ValueError(
            "the guide has nothing to train; choose another, or draw from it as it is with importance(), on the command "
            "line with ppl-lm sample MODEL --guide GUIDE"
        )
    return weights


def check_arguments(
    loss: SequenceELBO | None,
    batch_size: int | None,
    learning_rate: float | None,
    max_steps: int | None,
    time_limit: float | None,
    clip: float = 3.0,
) -> None:
    """:raises ValueError: if one of them makes no sense."""
    if loss is not None and not isinstance(loss, SequenceELBO):
        raise ValueError(f"loss={loss!r}; give a SequenceELBO, such as ppl_lm.SequenceELBO(num_particles=128)")
    if batch_size is not None:
        require_count("batch_size", batch_size)
    if learning_rate is not None and not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate={learning_rate}; give a number above 0")
    if not clip > 0:
        raise ValueError(f"clip={clip}; give a multiple of the usual norm, above 0")
    if max_steps is None and time_limit is None:
        raise ValueError("give max_steps= or time_limit= (seconds), or both")
    if max_steps is not None:
        require_count("max_steps", max_steps)
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit={time_limit} seconds; give a number above 0")
