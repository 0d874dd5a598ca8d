"""A run folder, read back for its pages: no language model is loaded."""

import json
import math
from pathlib import Path
from typing import Any

from ppl_lm.criticism.arviz_reading import from_arviz
from ppl_lm.embedded import FOLDER
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.vocabulary import Vocabulary
from ppl_lm.run import folder
from ppl_lm.run.record import Run


def read(path: Path) -> Run:
    """What `ppl-lm fit` or `ppl-lm sample` wrote, measured.

    :raises ValueError: if the folder is not a run, was not measured yet, or does not go with its language model any more."""
    import arviz as az

    settings = folder.read_settings(path)
    asked = _json(path / folder.MARK)
    if "arguments" not in asked:
        raise ValueError(f"{str(path)!r} was written by an earlier version of ppl_lm; fit it again")
    fitted = (path / "metrics.jsonl").is_file()
    if fitted:
        folder.fitted_guide(path)  # a run that was killed has none
    needed = [path / name for name in ("draws.nc", *(("samples.json", "fit.json") if fitted else ()), "diagnosis.json")]
    if missing := [file.name for file in needed if not file.is_file()]:
        raise ValueError(f"{str(path)!r} has no {missing[0]}; measure it first: ppl-lm diagnose {path}")
    network = path / "guide" if (path / "guide").is_dir() else settings.lm or FOLDER
    vocabulary = _vocabulary(network)
    data = az.from_netcdf(str(path / "draws.nc"))
    hashes = {name: str(data["constant_data"][name].values) for name in ("prior_sha256", "vocabulary_sha256")}
    if hashes["vocabulary_sha256"] != vocabulary.fingerprint:
        raise ValueError(
            f"the tokenizer in {str(network)!r} is not that of the draws any more: their texts cannot be read"
        )
    prompts = Prompts.make({"prompt": settings.prompts, **settings.columns}, vocabulary)
    found = {p.stem.removeprefix("diagnosis_"): _json(p) for p in sorted(path.glob("diagnosis_*.json"))}
    return Run(
        name=path.resolve().name,
        path=str(path),
        asked=asked,
        diagnosis=_restored(_json(path / "diagnosis.json")) if fitted else _json(path / "diagnosis.json"),
        draws=from_arviz(data, prompts),
        prior=from_arviz(data, prompts, "prior") if fitted else None,
        samples=_json(path / "samples.json") if fitted else [],
        fit=_json(path / "fit.json") if fitted else None,
        metrics=_json(path / "metrics.jsonl") if fitted else [],
        hashes=hashes,
        others={name: made for name, made in found.items() if isinstance(made, dict) and "sentence" in made},
    )


def _vocabulary(network: Path | str) -> Vocabulary:
    import ppl_lm.lm.table  # noqa: F401  so that a fitted table's configuration is known

    if isinstance(network, str) and Path(network).is_absolute() and not Path(network).is_dir():
        raise ValueError(f"the run's language model was in {network!r}, which is gone: its tokenizer is needed")
    try:
        return Vocabulary.from_pretrained(network)
    except Exception as error:  # transformers, tokenizers and the hub have dozens
        raise ValueError(f"the tokenizer of {str(network)!r} could not be read: {error}") from error


def _restored(made: dict[str, Any]) -> dict[str, Any]:
    """A fit's diagnosis with the infinities that JSON has not: distances from a posterior that rules texts out, and bounds."""
    endless = {key: math.inf for key in made if key.startswith("kl_")} | {"elbo": -math.inf, "iwae": -math.inf}
    found = {key: endless[key] if value is None and key in endless else value for key, value in made.items()}
    return found | {"prompts": [_restored(one) for one in made["prompts"]]} if "prompts" in made else found


def _json(path: Path) -> Any:
    """Of JSON lines a list.

    :raises ValueError: of what is not JSON, by the file's name."""
    text = path.read_text(encoding="utf-8")
    try:
        return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from None
