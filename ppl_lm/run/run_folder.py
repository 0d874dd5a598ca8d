"""Which folders are runs: a new one's name, one that may be written to, and what an earlier one was asked."""

import itertools
import json
import shutil
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from ppl_lm.run.config import FORMAT, Config
from ppl_lm.run.files import read_json
from ppl_lm.run.programs import guide_arguments
from ppl_lm.run.settings import Settings

MARK = "config.json"  # a folder with one that ppl-lm wrote is a run
WRITTEN = ("guide", "draws*.nc", "diagnosis*.json", "samples*.json", "metrics.jsonl", "fit.json", "report.html", MARK)


def new_folder(name: str) -> Path:
    """A folder below `runs` that does not exist, named by the time."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    numbered = (Path("runs") / f"{stem}{f'-{n}' if n > 1 else ''}" for n in itertools.count(1))
    return next(path for path in numbered if not path.exists())


def require_free(folder: Path, overwrite: bool = False, keep_fit: bool = False) -> None:
    """:raises ValueError: if the folder holds anything, save a run where that may be overwritten.

    :param keep_fit: a run that holds a fitted guide may not."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not is_run(folder):
        raise ValueError(f"output-dir={str(folder)!r} exists and is not a run of ppl-lm; give another, or remove it")
    if not overwrite:
        raise ValueError(f"output-dir={str(folder)!r} holds an earlier run; give another, or --overwrite it")
    if keep_fit and (folder / "guide").exists():
        raise ValueError(f"output-dir={str(folder)!r} holds a fitted guide, which draws do not replace; give another")


def require_outside(folder: Path, lm: str | None, name: str = "lm") -> None:
    """:raises ValueError: if the language model, or another folder that is to be read, lies in the folder, which is to be
    emptied."""
    if lm is not None and Path(lm).is_dir() and Path(lm).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name}={lm!r} lies in output-dir={str(folder)!r}, which would be emptied; give another")


def claim(folder: Path, overwrite: bool) -> None:
    """Makes a run folder, or empties an earlier run's if that may be overwritten."""
    require_free(folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    for path in [path for name in WRITTEN for path in folder.glob(name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def is_run(folder: Path) -> bool:
    """Whether ppl-lm wrote it, in whatever format."""
    try:
        return json.loads((folder / MARK).read_text(encoding="utf-8")).get("written_by") == "ppl_lm"
    except (OSError, ValueError, AttributeError):
        return False


def read_config(folder: Path) -> Config:
    """:raises ValueError: if the folder is not a run, or one of another format than `FORMAT`."""
    if not is_run(folder):
        raise ValueError(f"{str(folder)!r} is not a run folder: it has no {MARK} written by ppl-lm fit")
    record = read_json(folder / MARK)
    number = record.get("format", 1)
    if number != FORMAT:
        which = "a later" if isinstance(number, int) and number > FORMAT else "an earlier"
        raise ValueError(
            f"{str(folder)!r} was written by {which} version of ppl_lm (format {number} of run folders, this one reads "
            f"{FORMAT}); fit it again"
        )
    try:
        return Config.from_json(record)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(folder / MARK)!r} is damaged: {error}") from None


def going_on(settings: Settings, given: Collection[str]) -> Settings:
    """Settings of a fit that begins with an earlier run's guide, `init_from`: the run's own, but for those that are `given`.

    :raises ValueError: if `init_from` is no run or fitted another kind of guide than the one that is given, or a rank is."""
    if settings.init_from is None:
        return settings
    theirs = read_config(Path(settings.init_from)).settings
    if "guide" in given and theirs.guide != settings.guide:
        raise ValueError(
            f"init-from={settings.init_from!r} fitted the guide {theirs.guide!r}; give --guide {theirs.guide}"
        )
    if "rank" in given:
        raise ValueError(f"rank={settings.rank}; init-from={settings.init_from!r} goes on with the adapter as it is")
    kept = {
        name
        for name in ("guide", "rank", "lm", "dtype", "reward", "beta", "prompts", "max_new_tokens")
        if name not in given
    }
    kept |= {"columns"} if "prompts" in kept else set()
    kept |= {"reward_weights"} if not {"reward", "reward_weights"} & {*given} else set()
    kept |= {"chat", "system"} if not {"chat", "system"} & {*given} else set()
    own = theirs.arguments if theirs.model == settings.model else guide_arguments(theirs)
    return replace(settings, **{name: getattr(theirs, name) for name in kept}, arguments=own | settings.arguments)


def fitted_guide(folder: Path) -> Path:
    """Where a run's fitted guide lies.

    :raises ValueError: if the run holds none."""
    if not (folder / "guide").is_dir():
        raise ValueError(f"{str(folder)!r} holds no fitted guide (`ppl-lm fit` writes one); give a MODEL with --guide")
    return folder / "guide"
