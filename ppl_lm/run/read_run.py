"""A run folder, read back as one `Run`: no language model is loaded."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ppl_lm.criticism.inference_data.arviz_reading import from_arviz
from ppl_lm.embedded import FOLDER
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.vocabulary import Vocabulary
from ppl_lm.run.files import read_json
from ppl_lm.run.fitting.loop import Fit
from ppl_lm.run.run_folder import fitted_guide, read_config
from ppl_lm.run.run_record import FailedFit, FittedRun, SampledRun
from ppl_lm.run.typed_diagnosis import DrawsDiagnosis, GuideDiagnosis, diagnosis_from_json

T = TypeVar("T")
SAMPLED = ("draws.nc", "diagnosis.json")  # files of draws
FITTED = ("draws.nc", "samples.json", "fit.json", "diagnosis.json")  # of a fit that was measured


def read(folder: Path) -> FittedRun | SampledRun:
    """What `ppl-lm fit` or `ppl-lm sample` wrote, measured.

    :raises ValueError: if the folder is not a run, is one of another format, was not measured yet, or does not go with its
        language model any more."""
    import arviz as az

    config = read_config(folder)
    fitted = (folder / "metrics.jsonl").is_file()
    if fitted:
        fitted_guide(folder)  # a run that was killed has none
    if missing := [name for name in (FITTED if fitted else SAMPLED) if not (folder / name).is_file()]:
        raise ValueError(f"{str(folder)!r} has no {missing[0]}; measure it first: ppl-lm diagnose {folder}")
    whole = (folder / "guide" / "config.json").is_file()  # else an adapter of the prior, or none
    network = folder / "guide" if whole else config.settings.lm or FOLDER
    vocabulary = _vocabulary(network)
    data = az.from_netcdf(str(folder / "draws.nc"))
    hashes = {name: str(data["constant_data"][name].values) for name in ("prior_sha256", "vocabulary_sha256")}
    if hashes["vocabulary_sha256"] != vocabulary.fingerprint:
        raise ValueError(
            f"the tokenizer in {str(network)!r} is not that of the draws any more: their texts cannot be read"
        )
    texts, columns = config.settings.measured
    prompts = Prompts.make({"prompt": texts, **columns}, vocabulary)
    shared: dict[str, Any] = {
        "name": folder.resolve().name,
        "path": str(folder),
        "config": config,
        "draws": from_arviz(data, prompts),
        "hashes": hashes,
        "others": _others(folder),
    }
    if not fitted:
        return SampledRun(**shared, diagnosis=_record(folder / "diagnosis.json", DrawsDiagnosis.from_json))
    return FittedRun(
        **shared,
        diagnosis=_record(folder / "diagnosis.json", GuideDiagnosis.from_json),
        prior=from_arviz(data, prompts, "prior"),
        texts=read_json(folder / "samples.json"),
        fit=_record(folder / "fit.json", _fit),
        metrics=read_json(folder / "metrics.jsonl"),
    )


def read_fit(folder: Path) -> Fit | FailedFit | None:
    """How a run's fit ended; None of one that was killed before it ended."""
    return _record(folder / "fit.json", _fit) if (folder / "fit.json").is_file() else None


def _fit(record: dict[str, Any]) -> Fit | FailedFit:
    if record["outcome"] == "failed":
        return FailedFit(**record)
    known: dict[str, Any] = {key: math.nan if value is None else value for key, value in record.items()}
    return Fit(**known)


def _others(folder: Path) -> dict[str, GuideDiagnosis | DrawsDiagnosis]:
    """Further diagnoses by name; a file of the user's own beside them is none."""
    diagnoses = {
        path.stem.removeprefix("diagnosis_"): _record(path, _other) for path in sorted(folder.glob("diagnosis_*.json"))
    }
    return {name: diagnosis for name, diagnosis in diagnoses.items() if diagnosis is not None}


def _other(record: Any) -> GuideDiagnosis | DrawsDiagnosis | None:
    return diagnosis_from_json(record) if isinstance(record, dict) and "sentence" in record else None


def _record(path: Path, from_json: Callable[[Any], T]) -> T:
    """:raises ValueError: if the file is not JSON, or lacks what it should hold, by its name."""
    record = read_json(path)
    try:
        return from_json(record)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {type(error).__name__}: {error}") from None


def _vocabulary(network: Path | str) -> Vocabulary:
    import ppl_lm.lm.table  # noqa: F401  so that a fitted table's configuration is known

    if isinstance(network, str) and Path(network).is_absolute() and not Path(network).is_dir():
        raise ValueError(f"the run's language model was in {network!r}, which is gone: its tokenizer is needed")
    try:
        return Vocabulary.from_pretrained(network)
    except Exception as error:  # transformers, tokenizers and the hub have dozens
        raise ValueError(f"the tokenizer of {str(network)!r} could not be read: {error}") from error
