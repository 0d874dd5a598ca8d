"""A run folder, read back for its pages: no language model is loaded."""

import json
import math
from pathlib import Path
from typing import Any

from ppl_lm.diagnose import from_arviz
from ppl_lm.diagnose.report import Run
from ppl_lm.embedded import FOLDER
from ppl_lm.lm import Prompts
from ppl_lm.lm.vocabulary import Vocabulary
from ppl_lm.run import folder


def read(path: Path) -> Run:
    """What `ppl-lm fit` or `ppl-lm sample` wrote, measured.

    :raises ValueError: if the folder is not a run, or was not measured yet."""
    import arviz as az

    import ppl_lm.lm.table  # noqa: F401  so that a fitted table's configuration is known

    settings = folder.read_settings(path)
    asked = _json(path / folder.MARK)
    fitted = (path / "fit.json").is_file()
    needed = [path / name for name in ("diagnosis.json", "draws.nc", *(("samples.json",) if fitted else ()))]
    if missing := [file.name for file in needed if not file.is_file()]:
        raise ValueError(f"{str(path)!r} has no {missing[0]}; measure it first: ppl-lm diagnose {path}")
    if "sources" not in asked:
        raise ValueError(f"{str(path)!r} was written by an earlier version of ppl_lm; fit it again")
    network = path / "guide" if (path / "guide").is_dir() else settings.lm or FOLDER
    prompts = Prompts.make({"prompt": settings.prompts, **settings.columns}, Vocabulary.from_pretrained(network))
    data = az.from_netcdf(str(path / "draws.nc"))
    constants = data["constant_data"]
    others = {p.stem.removeprefix("diagnosis_"): _json(p) for p in sorted(path.glob("diagnosis_*.json"))}
    return Run(
        name=path.resolve().name,
        asked=asked,
        diagnosis=_restored(_json(path / "diagnosis.json")) if fitted else _json(path / "diagnosis.json"),
        draws=from_arviz(data, prompts),
        prior=from_arviz(data, prompts, "prior") if fitted else None,
        samples=_json(path / "samples.json") if fitted else [],
        fit=_json(path / "fit.json") if fitted else None,
        metrics=[json.loads(line) for line in _lines(path / "metrics.jsonl")],
        hashes={name: str(constants[name].values) for name in ("prior_sha256", "vocabulary_sha256")},
        others=others,
    )


def _restored(made: dict[str, Any]) -> dict[str, Any]:
    """A fit's diagnosis with the infinities that JSON has not: distances from a posterior that rules texts out, and bounds."""
    endless = {key: math.inf for key in made if key.startswith("kl_")} | {"elbo": -math.inf, "iwae": -math.inf}
    found = {key: endless[key] if value is None and key in endless else value for key, value in made.items()}
    return found | {"prompts": [_restored(one) for one in made["prompts"]]} if "prompts" in made else found


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
