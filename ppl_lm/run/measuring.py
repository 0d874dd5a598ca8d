"""`measure`: how close a guide is to its posterior, with the draws and texts that show it."""

from dataclasses import dataclass, replace

import torch

from ppl_lm.criticism.diagnoses.diagnosis import diagnose
from ppl_lm.criticism.diagnoses.side_by_side import ShownTexts, samples, variety
from ppl_lm.infer.draws import Draws
from ppl_lm.run.fitting.loop import Fit
from ppl_lm.run.outcome import verdict_after
from ppl_lm.run.programs import Programs
from ppl_lm.run.run_record import FailedFit
from ppl_lm.run.typed_diagnosis import GuideDiagnosis


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
            kept_verdict=None if verdict is of_guide else of_guide.code,
        )
        return replace(self, diagnosis=record)


def measure(programs: Programs, num_samples: int | None = None, seed: int | None = None) -> Measurement:
    """Diagnoses the guide.

    :param num_samples: draws for each prompt; None: 4096, fewer with many prompts.
    :param seed: of torch; None goes on with its state, of which the record says by what seed it was set."""
    if num_samples is None:
        num_samples = max(512, min(4096, 16384 // len(programs.prompts)))
    if seed is not None:
        torch.manual_seed(seed)
    seed = torch.initial_seed()
    diagnosis = diagnose(programs.model, programs.guide, programs.prompts, num_samples)
    record = GuideDiagnosis(
        average=diagnosis.average,
        verdict=diagnosis.verdict,
        prompts=diagnosis.prompts,
        diversity=variety(diagnosis),
        seed=seed,
    )
    texts = samples(diagnosis, programs.model, programs.guide)
    return Measurement(record, diagnosis.prior, diagnosis.guide, texts)
