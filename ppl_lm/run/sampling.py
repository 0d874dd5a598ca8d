"""`sample`: draws by a sampler of the table, and what they are worth; and what a command asks to be drawn."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ppl_lm.criticism.diagnoses.draws_diagnosis import diagnose_draws
from ppl_lm.criticism.diagnoses.figures import DrawsFigures, PromptDrawsFigures
from ppl_lm.criticism.diagnoses.verdicts import Verdict
from ppl_lm.infer.draws import Draws, NoSupportError
from ppl_lm.infer.samplers.in_pieces import Progress
from ppl_lm.lm import meter
from ppl_lm.run.named_samplers import SAMPLERS
from ppl_lm.run.names import is_file, shipped
from ppl_lm.run.programs import Programs, guide_arguments
from ppl_lm.run.run_folder import MARK, fitted_guide, read_config
from ppl_lm.run.settings import Settings
from ppl_lm.run.typed_diagnosis import DrawsDiagnosis


@dataclass(frozen=True)
class Sample:
    """Draws of a sampler, Markov chains whole, and what they are worth."""

    draws: Draws
    diagnosis: DrawsDiagnosis


def sample(programs: Programs, sampler: str, num_samples: int, on_progress: Progress | None = None) -> Sample:
    """Seeds torch with the settings' seed and draws.

    :param sampler: a name of `SAMPLERS`.
    :param num_samples: draws for each prompt; Markov chains and SMC make what their errors need.
    :param on_progress: called now and then with the share that is done, 0 to 1, and words.
    :raises NoSupportError: if no draw is possible under the posterior."""
    settings = programs.settings
    guide = None if settings.guide == "prior" else programs.guide
    torch.manual_seed(settings.seed)
    with meter.measure() as cost:  # pilots and questions among it
        draws, how = SAMPLERS[sampler](
            programs.model, guide, programs.prompts, num_samples=num_samples, on_progress=on_progress
        )
    draws = replace(draws, cost=cost)
    record = diagnose_draws(draws)
    if record["verdict"] == "impossible":
        raise NoSupportError(record["sentence"])
    diagnosis = DrawsDiagnosis(
        average=DrawsFigures.from_json(record),
        verdict=Verdict(record["verdict"], record["sentence"]),
        prompts=[PromptDrawsFigures.from_json(figures) for figures in record["prompts"]],
        sampler=sampler,
        seed=settings.seed,
        how=how,
    )
    return Sample(draws, diagnosis)


def require_sampler(name: str) -> None:
    """:raises ValueError: if there is no sampler of that name."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler={name!r} is unknown; give one of {', '.join(SAMPLERS)}")


def settings_of(source: str, sampler: str, given: dict[str, Any]) -> tuple[Settings, Path | None]:
    """What to draw from, and where its guide's fitted network lies, None where there is none.

    :param source: a run folder; or a MODEL, with `given`: the settings that the user gave. Its guide may be a run folder
        too: then the LM, the prompts and their length are that run's unless given.
    :raises ValueError: if the two do not fit together."""
    guide = given.get("guide")
    if sampler == "rejection" and guide is not None:
        raise ValueError(f"guide={guide!r}: rejection proposes from the prior; give --sampler importance")
    if not _is_program(source, "models"):
        settings = replace(read_config(Path(source)).settings, eval_prompts=None, eval_columns={})
        if given:
            name = next(iter(given))
            name = "set" if name == "arguments" else name
            raise ValueError(f"{name}: the run has its own; give it together with a MODEL")
        if sampler == "rejection":
            return replace(settings, guide="prior"), None
        return settings, fitted_guide(Path(source))
    if guide is None or _is_program(guide, "guides") or not Path(guide).is_dir():
        return Settings(**{"model": source, "guide": "prior", **given}), None
    fitted = read_config(Path(guide)).settings
    length = given.get("max_new_tokens", fitted.max_new_tokens)
    if length != fitted.max_new_tokens:
        raise ValueError(
            f"max_new_tokens={length}, but guide={guide!r} was fitted to {fitted.max_new_tokens}: leave it out"
        )
    own = {name: getattr(fitted, name) for name in ("lm", "prompts", "columns", "chat", "system", "max_new_tokens")}
    arguments = guide_arguments(fitted) | given.get("arguments", {})
    made = Settings(**{"model": source, **own, **given, "guide": fitted.guide, "arguments": arguments})
    return made, fitted_guide(Path(guide))


def _is_program(spec: str, package: str) -> bool:
    return (is_file(spec) or spec in shipped(package)) and not (Path(spec) / MARK).is_file()
