"""`measure`: how close a guide is to its posterior, with the draws and texts that show it."""

import math
import time
from dataclasses import dataclass, replace

import torch

from ppl_lm.criticism.diagnoses.diagnosis import diagnose, least_draws
from ppl_lm.criticism.diagnoses.side_by_side import COUNT, MOST, ShownTexts, samples, variety
from ppl_lm.infer.draws import Draws
from ppl_lm.infer.samplers.in_pieces import Progress, pieces, texts_a_piece
from ppl_lm.lm.prompts import Prompts
from ppl_lm.run.fitting.loop import Fit
from ppl_lm.run.outcome import verdict_after
from ppl_lm.run.programs import Programs
from ppl_lm.run.run_record import FailedFit
from ppl_lm.run.typed_diagnosis import GuideDiagnosis

DRAWING = 0.75  # share of a measurement's time that draws get; the rest is for texts that are shown
MOST_SHOWN = COUNT * MOST


@dataclass(frozen=True)
class Measurement:
    """:param prior: draws of the prior, as `Diagnosis.prior` has them; `guide`: as many of the guide.
    :param texts: some of the prior, the guide and the posterior, side by side."""

    diagnosis: GuideDiagnosis
    prior: Draws
    guide: Draws
    texts: list[ShownTexts]

    def after(self, fit: Fit | FailedFit) -> "Measurement":
        """The same of a guide that this fit kept, with the verdict on the fit."""
        verdict, of_guide = verdict_after(fit, self.diagnosis.verdict), self.diagnosis.verdict
        record = replace(
            self.diagnosis,
            verdict=verdict,
            outcome=fit.outcome,
            kept=fit.kept,
            kept_verdict=None if verdict.sentence == of_guide.sentence else of_guide.code,
        )
        return replace(self, diagnosis=record)


def measure(
    programs: Programs,
    num_samples: int | None = None,
    seed: int | None = None,
    seconds: float = math.inf,
    least: int | None = None,
    on_progress: Progress | None = None,
) -> Measurement:
    """Diagnoses the guide on the prompts of the settings' `measured`.

    :param num_samples: draws for each prompt, at most; None: 4096, fewer with many prompts.
    :param seed: of torch; None goes on with its state, of which the record says by what seed it was set.
    :param seconds: what it may take; but there are at `least` so many draws of each prompt; None: as many as a verdict needs.
    :param on_progress: called now and then with the share that is done, 0 to 1, and words."""
    if seed is not None:
        torch.manual_seed(seed)
    seed = torch.initial_seed()
    began, prompts = time.monotonic(), on_held_out(programs)
    count = len(prompts)
    num_samples = default_draws(count) if num_samples is None else num_samples
    size = max(2, texts_a_piece(prompts, programs.model, programs.guide) // count)
    least = min(num_samples, least_draws(count) if least is None else least)
    sizes = pieces(num_samples, size, least, DRAWING * seconds, on_progress=on_progress)
    diagnosis = diagnose(programs.model, programs.guide, prompts, num_samples, sizes=sizes)
    spent = time.monotonic() - began
    of_prompts = programs.settings.measured_words
    verdict = diagnosis.verdict
    if of_prompts:
        verdict = replace(verdict, sentence=f"Measured on {of_prompts}. {verdict.sentence}")
    record = GuideDiagnosis(
        average=diagnosis.average,
        verdict=verdict,
        prompts=diagnosis.prompts,
        diversity=variety(diagnosis),
        seed=seed,
    )
    a_text = spent / (2 * diagnosis.guide.num_samples * count)  # drawn, and scored by both programs
    shown = MOST_SHOWN if seconds == math.inf else int((seconds - spent) / (3 * a_text)) if a_text > 0 else MOST_SHOWN
    each = min(COUNT, max(2, shown))
    texts = samples(diagnosis, programs.model, programs.guide, count=each, most=min(MOST, max(1, shown // each)))
    return Measurement(record, diagnosis.prior, diagnosis.guide, texts)


def default_draws(prompts: int) -> int:
    """Of each prompt, where nothing else is said."""
    return max(512, min(4096, 16384 // prompts))


def on_held_out(programs: Programs) -> Prompts:
    """The prompts that the guide is measured on.

    :raises ValueError: if they do not fit the context."""
    if programs.settings.eval_prompts is None:
        return programs.prompts
    texts, columns = programs.settings.measured
    prompts = programs.prior.prompts({"prompt": texts, **columns})
    programs.prior(prompts)
    return prompts
