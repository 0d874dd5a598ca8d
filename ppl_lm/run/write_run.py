"""What is written into run folders: by a fit as it goes, by a measurement, by a sampler."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from ppl_lm.criticism.inference_data.arviz_groups import to_arviz
from ppl_lm.lm.checking.folders import fingerprint
from ppl_lm.run.config import Config
from ppl_lm.run.files import finite, write_draws, write_json
from ppl_lm.run.fitting.loop import Fit
from ppl_lm.run.fitting.step_metrics import StepMetrics
from ppl_lm.run.measuring import Measurement
from ppl_lm.run.programs import Programs
from ppl_lm.run.run_folder import MARK, claim
from ppl_lm.run.run_record import FailedFit
from ppl_lm.run.sampling import Sample
from ppl_lm.run.saved_guide import require_savable, save_guide


def write_config(folder: Path, programs: Programs, command: str, overwrite: bool) -> None:
    """Makes the run folder, with what was asked; an earlier run in it is replaced if that is allowed."""
    claim(folder, overwrite)
    write_json(folder / MARK, Config.of(programs, command).as_json())


class FitWriter:
    """The run folder of a fit: made at the first step, a line of `metrics.jsonl` each step, the guide at the end.

    :param command: as it was typed, for the record.
    :param overwrite: whether an earlier run in that folder may be replaced."""

    def __init__(self, folder: Path, programs: Programs, command: str, overwrite: bool):
        self.folder, self.programs, self.command, self.overwrite = folder, programs, command, overwrite
        self.metrics: IO[str] | None = None

    def __enter__(self) -> "FitWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.metrics is not None:
            self.metrics.close()

    @property
    def started(self) -> bool:
        """Whether there is a folder: nothing is written before the first step has succeeded."""
        return self.metrics is not None

    def step(self, row: StepMetrics) -> None:
        if self.metrics is None:
            require_savable(self.programs.model, self.programs.guide)
            write_config(self.folder, self.programs, self.command, self.overwrite)
            self.metrics = (self.folder / "metrics.jsonl").open("w", encoding="utf-8")
        self.metrics.write(json.dumps(finite(dict(row))) + "\n")
        self.metrics.flush()

    def fit(self, fit: Fit | FailedFit) -> None:
        """The guide as it is, and how the fit ended."""
        save_guide(self.folder / "guide", self.programs.guide, self.programs.prompts, self.programs.prior)
        write_json(self.folder / "fit.json", {k: v for k, v in asdict(fit).items() if k != "metrics"})


def write_measurement(folder: Path, measurement: Measurement, programs: Programs, suffix: str = "") -> None:
    """`diagnosis.json`, `draws.nc` and `samples.json`.

    :param suffix: of the files' names."""
    data = to_arviz(
        measurement.guide,
        prior=measurement.prior,
        constant_data=_constants(programs),
        attributes={"seed": measurement.diagnosis.seed},
    )
    write_draws(folder / f"draws{suffix}.nc", data)
    write_json(folder / f"samples{suffix}.json", measurement.texts)
    write_json(folder / f"diagnosis{suffix}.json", measurement.diagnosis.as_json())


def write_sample(folder: Path, sample: Sample, programs: Programs, suffix: str = "") -> Path:
    """`draws.nc` and `diagnosis.json`; returns where the latter is."""
    attributes = {"seed": sample.diagnosis.seed, "sampler": sample.diagnosis.sampler}
    data = to_arviz(sample.draws, constant_data=_constants(programs), attributes=attributes)
    write_draws(folder / f"draws{suffix}.nc", data)
    write_json(folder / f"diagnosis{suffix}.json", sample.diagnosis.as_json())
    return folder / f"diagnosis{suffix}.json"


def _constants(programs: Programs) -> dict[str, Any]:
    """What the posterior was made of."""
    settings = programs.settings
    return {
        "model": settings.model,
        "reward": settings.reward_in_words,
        "beta": settings.beta,
        "prior_sha256": fingerprint(programs.prior),
        "vocabulary_sha256": programs.prior.vocabulary.fingerprint,
    }
