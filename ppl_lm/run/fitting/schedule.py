"""A fit's time, shared out after a pilot: `Schedule`."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ppl_lm.criticism.diagnoses.diagnosis import least_draws
from ppl_lm.criticism.weights import psis_khat
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.samplers.in_pieces import Progress
from ppl_lm.run.fitting.advice import forecast, warnings
from ppl_lm.run.fitting.forecast import Plan, pilot, plan
from ppl_lm.run.fitting.loop import weights_to_fit
from ppl_lm.run.measuring import Measurement, default_draws, measure
from ppl_lm.run.programs import Programs


@dataclass(frozen=True)
class Schedule:
    """When what has to end.

    :param programs: with the settings that the time allows: particles, batch size, prompts to be measured on.
    :param plan: how the limit is shared out; None without one.
    :param began: on the monotonic clock."""

    programs: Programs
    plan: Plan | None
    began: float

    @classmethod
    def of(
        cls,
        programs: Programs,
        loss: Callable[[int], SequenceELBO],
        num_samples: int | None,
        may_shrink: tuple[bool, bool],
        say: Callable[[str], None],
    ) -> "Schedule":
        """Times a few texts, shares the limit out, and says what it allows.

        :param loss: of a number of particles, new at each call.
        :param num_samples: draws of each prompt for the verdict; None: as many as is usual.
        :param may_shrink: whether particles, and the batch size, may be fewer than the settings say.
        :raises ValueError: if not one step fits, or nothing is to be fitted."""
        settings, prompts = programs.settings, programs.prompts
        if settings.time_limit is None:
            return cls(programs, None, 0.0)
        psis_khat(torch.arange(100.0))  # loads ArviZ, which is no part of the time
        began = time.monotonic()
        size, held = min(settings.batch_size, len(prompts)), len(settings.measured[0])
        parameters = (*programs.model.parameters(), *programs.guide.parameters())
        trained = sum(weight.numel() for weight in parameters if weight.requires_grad)
        if not trained:
            nesting = loss(2).nesting(programs.model, programs.guide, prompts[:1])
            weights_to_fit(programs.model, programs.guide, prompts[:1], nesting)
        speed = pilot(programs.model, programs.guide, prompts, loss, settings.particles, size)
        shared = plan(
            speed,
            settings.time_limit,
            settings.particles,
            size,
            held,
            num_samples or default_draws(held),
            may_shrink,
        )
        say(forecast(shared, settings.time_limit, trained))
        for line in warnings(shared, settings.time_limit, held):
            say(line)
        settings = replace(settings, particles=shared.particles, batch_size=shared.batch_size)
        if shared.measured < held:
            rows = torch.randperm(held, generator=torch.Generator().manual_seed(settings.seed))[: shared.measured]
            settings = settings.measured_on(rows.sort().values.tolist())
        return cls(replace(programs, settings=settings), shared, began)

    @property
    def for_fit(self) -> float | None:
        """Seconds that are left for the fit; None without a limit."""
        if self.plan is None:
            return None
        return max(1e-3, self.plan.fitting - (time.monotonic() - self.began))

    @property
    def left(self) -> float:
        """Seconds that are left of all."""
        limit = self.programs.settings.time_limit
        return math.inf if limit is None else max(0.0, limit - (time.monotonic() - self.began))

    @property
    def least(self) -> int:
        """Draws of each prompt that a verdict needs."""
        return least_draws(len(self.programs.settings.measured[0]))

    def measure(self, num_samples: int | None, on_progress: Progress) -> Measurement | None:
        """In what is left of the time; None where too few draws for a verdict would fit."""
        if self.plan is None:
            return measure(self.programs, num_samples, on_progress=on_progress)
        if self.plan.num_samples is None:
            return None
        return measure(
            self.programs, self.plan.num_samples, seconds=self.left, least=self.plan.least, on_progress=on_progress
        )
