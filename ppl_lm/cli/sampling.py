"""What `ppl-lm sample` does: draws, says what the draws are worth, writes them, shows some."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ppl_lm.criticism.arviz_groups import to_arviz
from ppl_lm.criticism.diagnoses.draws_diagnosis import diagnose_draws
from ppl_lm.criticism.diagnoses.side_by_side import some
from ppl_lm.infer.draws import Draws, NoSupportError
from ppl_lm.lm import meter
from ppl_lm.report import terminal as show
from ppl_lm.run import folder
from ppl_lm.run.named_samplers import SAMPLERS
from ppl_lm.run.names import is_file, shipped


def asked(source: str, sampler: str, given: dict[str, Any]) -> tuple[folder.Settings, Path | None]:
    """What to draw from, and where its guide's fitted network lies, None where there is none.

    :param source: a run folder; or a MODEL, with `given`: the settings that the user gave. Its guide may be a run folder
        too: then the LM, the prompts and their length are that run's unless given.
    :raises ValueError: if the two do not fit together."""
    guide = given.get("guide")
    if sampler == "rejection" and guide is not None:
        raise ValueError(f"guide={guide!r}: rejection proposes from the prior; give --sampler importance")
    if not _is_program(source, "models"):
        settings = folder.read_settings(Path(source))
        if given:
            raise ValueError(f"{next(iter(given))}: the run has its own; give it together with a MODEL")
        if sampler == "rejection":
            return replace(settings, guide="prior"), None
        return settings, folder.fitted_guide(Path(source))
    if guide is None or _is_program(guide, "guides") or not Path(guide).is_dir():
        return folder.Settings(**{"model": source, "guide": "prior", **given}), None
    run = folder.read_settings(Path(guide))
    steps = given.get("max_new_tokens", run.max_new_tokens)
    if steps != run.max_new_tokens:
        raise ValueError(
            f"max_new_tokens={steps}, but guide={guide!r} was fitted to {run.max_new_tokens}: leave it out"
        )
    own = {name: getattr(run, name) for name in ("lm", "prompts", "columns", "max_new_tokens")}
    return folder.Settings(**{"model": source, **own, **given, "guide": run.guide}), folder.fitted_guide(Path(guide))


def _is_program(spec: str, package: str) -> bool:
    return (is_file(spec) or spec in shipped(package)) and not (Path(spec) / folder.MARK).is_file()


def sample_and_write(
    settings: folder.Settings,
    fitted: Path | None,
    sampler: str,
    num_samples: int,
    path: Path | None,
    out: Console | None,
    suffix: str = "",
    own: bool = False,
    overwrite: bool = False,
    command: str = "",
) -> None:
    """Draws, writes `draws.nc` and `diagnosis.json`, and prints. Nothing is written if drawing fails.

    :param fitted: as `asked` found it.
    :param num_samples: draws for each prompt; Markov chains write all that they made, and show so many.
    :param path: None writes to a new folder below `runs`.
    :param out: None prints one JSON object a draw instead.
    :param suffix: of the two files' names.
    :param own: whether `path` is the folder of the run that is drawn from; earlier draws of that name are replaced."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r} is unknown; give one of {', '.join(SAMPLERS)}")
    if path is not None and not own:
        folder.require_free(path, overwrite, keep_fit=True)
    programs = folder.build(settings, fitted)
    proposal = None if settings.guide == "prior" else programs.guide
    torch.manual_seed(settings.seed)
    with meter.measure() as cost:  # pilots and questions among it
        draws, how = SAMPLERS[sampler](programs.model, proposal, programs.prompts, num_samples=num_samples)
    draws = replace(draws, cost=cost)
    record = {"sampler": sampler, "seed": settings.seed, "how": how, **diagnose_draws(draws)}
    if record["verdict"] == "impossible":
        raise NoSupportError(record["sentence"])
    if path is None:
        path = folder.by_time(f"{settings.model.rpartition(':')[2]}-{sampler}")
    if not own:
        folder.claim(path, overwrite)
        folder.write_settings(path, settings, programs, command)
    constants, told = folder.constant_data(settings, programs.prior), {"seed": settings.seed, "sampler": sampler}
    data = to_arviz(draws, constant_data=constants, attributes=told)
    folder.save_draws(path / f"draws{suffix}.nc", data)
    folder.write_json(path / f"diagnosis{suffix}.json", record)
    if out is not None:
        out.print(how, markup=False)
    _show(draws, num_samples, out)
    if out is not None:
        out.print(_told(record), markup=False)
        out.print(show.verdict_on(record["verdict"], record["sentence"]))
        out.print(f"written: {path / f'diagnosis{suffix}.json'}", markup=False)


def _show(draws: Draws, num_samples: int, out: Console | None) -> None:
    """`num_samples` draws of each prompt."""
    draws = some(draws, num_samples)
    columns = {name: value[0] for name, value in draws.records.items()}  # (S, B)
    if draws.kind not in ("exact", "chains"):
        columns["log_weight"] = draws.log_weight[0].expand(-1, len(draws.prompts))
    if out is not None:
        out.print("  ".join([*columns, "prompt │ completion"]), markup=False, style="bold")
    for b, texts in enumerate(draws.text()):
        for s, text in enumerate(texts):
            prompt, figures = draws.prompts.texts[b], {k: float(v[s, b]) for k, v in columns.items()}
            if out is None:
                known = {k: round(v, 4) if math.isfinite(v) else None for k, v in figures.items()}  # JSON has no -inf
                print(json.dumps({"prompt": prompt, "completion": text, **known}))
            else:
                numbers = "  ".join(f"{v:+{len(k)}.2f}" for k, v in figures.items())
                out.print(numbers, show.clean(f"{prompt} │ {text}"), soft_wrap=True)


def _told(record: dict[str, Any]) -> str:
    """The figures in a line."""
    parts, mean = [], "mean " if len(record["prompts"]) > 1 else ""
    for key, name, unit in (("reward", "posterior E(reward)", ""), ("log_z", "log Z", " nats")):
        if record.get(key) is not None:
            se = record[f"{key}_se"]
            parts.append(f"{mean}{name} {record[key]:.3f}{'' if se is None else f' ± {se:.3f}'}{unit}")
    if record["ess"]:
        parts.append(f"{mean}ESS {record['ess']:.0f} of {record['num_samples']}")
    cost = f"{record['lm_tokens']:,} LM tokens"
    if record["lm_tokens_per_effective_draw"]:
        cost += f", {record['lm_tokens_per_effective_draw']:,.0f} for each effective draw"
    return "; ".join([*parts, cost])
