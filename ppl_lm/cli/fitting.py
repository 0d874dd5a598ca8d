"""What `ppl-lm fit` and `ppl-lm diagnose` do, step by step."""

import json
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ppl_lm.criticism.arviz_groups import to_arviz
from ppl_lm.criticism.diagnoses.diagnosis import diagnose, require_enough
from ppl_lm.criticism.diagnoses.side_by_side import samples, variety
from ppl_lm.criticism.diagnoses.verdicts import doubt
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.objectives.catalogue import objective as objective_named
from ppl_lm.report import terminal as show
from ppl_lm.run import folder
from ppl_lm.run.fitting import Fit
from ppl_lm.run.fitting import fit as fit_guide
from ppl_lm.run.step_metrics import StepMetrics

LOWER = "Lower --learning-rate, or raise --particles."


def fit_and_measure(
    settings: folder.Settings,
    path: Path,
    num_samples: int | None,
    out: Console,
    overwrite: bool = False,
    command: str = "",
) -> str:
    """Fits, writes the run folder, measures, prints. Returns the fit's outcome.

    :param command: how it was called, for the record.

    Nothing is written before the first step has succeeded."""
    folder.require_free(path, overwrite)
    lm = Path(settings.lm or "")
    if settings.lm and lm.is_dir() and lm.resolve().is_relative_to(path.resolve()):
        raise ValueError(f"lm={settings.lm!r} lies in output-dir={str(path)!r}, which would be emptied; give another")
    if num_samples is not None:
        require_enough(num_samples)
    objective = objective_named(settings.objective, settings.beta)
    programs = folder.build(settings)
    with _Log(path, settings, programs, out, overwrite, command) as log:
        fitted = fit_guide(
            programs.model,
            programs.guide,
            programs.prompts,
            SequenceELBO(num_particles=settings.particles, objective=objective),
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            max_steps=settings.max_steps,
            time_limit=settings.time_limit,
            seed=settings.seed,
            on_step=log.step,
            on_fault=lambda kept: _save_fault(path, programs, kept) if log.file is not None else None,
        )
    if log.file is None:  # before the first step: there is nothing to write
        if fitted.outcome == "diverged":
            raise ValueError("the first step's gradient is not finite; is the reward, or beta, of a sensible size?")
        raise KeyboardInterrupt
    folder.save_guide(path, programs.guide, programs.prompts)
    record = {k: v for k, v in asdict(fitted).items() if k != "metrics"}
    folder.write_json(path / "fit.json", record)
    out.print(told(fitted), markup=False)
    if fitted.outcome != "interrupted":
        out.print("measuring", markup=False)
        measure(programs, path, num_samples, out, settings.seed)
    out.print(f"written: {path}; `{shlex.join(['ppl-lm', 'report', str(path)])}` makes a page of it", markup=False)
    return fitted.outcome


def measure(
    programs: folder.Programs,
    path: Path,
    num_samples: int | None,
    out: Console,
    seed: int,
    suffix: str = "",
    command: str = "",
) -> dict[str, Any]:
    """Diagnoses the run's guide; writes `diagnosis.json`, `draws.nc` and `samples.json`; returns what `diagnosis.json` holds.

    :param num_samples: draws for each prompt; None: 4096, fewer with many prompts.
    :param seed: that was set, for the record.
    :param suffix: of the files' names.
    :param command: by which it was asked for, where that was not the fit's."""
    if num_samples is None:
        num_samples = max(512, min(4096, 16384 // len(programs.prompts)))
    made = diagnose(programs.model, programs.guide, programs.prompts, num_samples)
    record = {**made.as_json(), "diversity": variety(made), "seed": seed, "command": command}
    sentence = None
    if (path / "fit.json").is_file():
        fitted = json.loads((path / "fit.json").read_text())
        record |= {"outcome": fitted["outcome"], "kept": fitted["kept"]}
        if fitted["outcome"] == "worse_than_prior":
            whole: Any = {k: math.nan if v is None else v for k, v in fitted.items()}
            sentence = told(Fit(**whole))
            what = sentence.removeprefix("worse_than_prior: ").removesuffix(LOWER).rstrip()
            kept = f"Of the guide that was kept: {record['verdict']}. {record['sentence']}"
            record |= {"kept_verdict": record["verdict"], "verdict": "worse_than_prior", "remedy": LOWER}
            record["sentence"] = f"{what[:1].upper()}{what[1:]} {kept}"
    settings = folder.read_settings(path)
    constants = folder.constant_data(settings, programs.prior)
    data = to_arviz(made.guide, prior=made.prior, constant_data=constants, attributes={"seed": seed})
    folder.save_draws(path / f"draws{suffix}.nc", data)
    folder.write_json(path / f"samples{suffix}.json", samples(made, programs.model, programs.guide))
    folder.write_json(path / f"diagnosis{suffix}.json", record)
    first = (made.prior.of_prompt(0), made.guide.of_prompt(0), made.exact[0])
    out.print(show.samples(*first, title=_after(programs.prompts.texts)))
    if len(made.figures) > 1:
        for figures in made.figures[:8]:
            name = show.clean(str(figures["prompt"]), 40).plain
            what, key, of = "KL(guide ‖ posterior)", "kl_q_p", "kl_prior_p"
            if math.isinf(figures[of]):  # a hard constraint
                what, key, of = "KL(posterior ‖ guide)", "kl_p_q", "kl_p_prior"
            out.print(
                f"{name!r:42} {what} {figures[key]:.3f} ± {figures[f'{key}_se']:.3f} of the prior's {figures[of]:.3f}; "
                f"bracket {figures['elbo']:.2f} to {figures['upper']:.2f}; {figures['verdict']}",
                markup=False,
            )
    out.print(show.figures(made.average, "average over prompts" if len(made.figures) > 1 else "how close"))
    if unsure := doubt(record):
        out.print(unsure, markup=False)
    out.print(sentence or show.verdict(made))
    return record


def _after(prompts: Sequence[Any]) -> str:
    """Whose texts are shown. A prompt may be a chat."""
    title = "samples" if prompts[0] == "" else f"samples after {show.clean(str(prompts[0]), 40).plain!r}"
    return title if len(prompts) == 1 else f"{title}, the first of {len(prompts)} prompts"


def told(fitted: Fit) -> str:
    """The outcome in words."""
    kept = {"last": "the last one", "best": f"that of step {fitted.kept_step}", "start": "the prior itself"}[
        fitted.kept
    ]
    took = f"after {fitted.steps} steps in {fitted.seconds:.0f} s"
    sign, what_fell = (-1, "KL(posterior ‖ guide)") if fitted.covers else (1, "ELBO")
    against = f"{what_fell} {sign * fitted.gain:+.2f} ± {fitted.gain_se:.2f} nats a prompt against the prior's"
    if fitted.outcome == "diverged":
        return f"diverged: {took} a gradient was not finite. Kept is the best guide seen, {kept}, {against}. {LOWER}"
    if fitted.outcome == "worse_than_prior":
        worse = f"{what_fell} {sign * fitted.last_gain:+.2f} nats against the prior's"
        lost = f"has {worse}" if math.isfinite(fitted.last_gain) else "is lost"
        return (
            f"worse_than_prior: {took} the last guide is further from the posterior than the prior: it {lost}. Kept is "
            f"the best guide seen, {kept}. {LOWER}"
        )
    what = "interrupted" if fitted.outcome == "interrupted" else "fitted"
    return f"{what} {took}; the guide kept is {kept}, {against}"


def _save_fault(path: Path, programs: folder.Programs, kept: str) -> None:
    folder.save_guide(path, programs.guide, programs.prompts)
    folder.write_json(path / "fit.json", {"outcome": "failed", "kept": kept})


class _Log:
    """Writes a line of `metrics.jsonl` and moves the bar, each step; makes the run folder at the first."""

    def __init__(
        self,
        path: Path,
        settings: folder.Settings,
        programs: folder.Programs,
        out: Console,
        overwrite: bool,
        command: str,
    ):
        self.path, self.settings, self.programs, self.out, self.overwrite = path, settings, programs, out, overwrite
        self.command = command
        self.file: Any = None
        self.told = time.monotonic()
        columns = (BarColumn(24), TextColumn("{task.description}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=out, transient=True, disable=not out.is_terminal)
        self.task = self.bar.add_task("", total=1.0)

    def __enter__(self) -> "_Log":
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()
        if self.file is not None:
            self.file.close()

    def step(self, row: StepMetrics) -> None:
        if self.file is None:
            folder.require_savable(self.programs.model, self.programs.guide)
            folder.claim(self.path, self.overwrite)
            folder.write_settings(self.path, self.settings, self.programs, self.command)
            of = f"posterior {self.settings.model}, guide {self.settings.guide}, {len(self.programs.prompts)} prompt(s)"
            self.out.print(f"{of}; fitting", markup=False)
            self.file = (self.path / "metrics.jsonl").open("w", encoding="utf-8")
        known = {k: v if math.isfinite(float(str(v))) else None for k, v in row.items()}
        self.file.write(json.dumps(known) + "\n")
        self.file.flush()
        reward = f"reward {row['reward']:.3f}, " if "reward" in row else ""
        line = (
            f"step {int(row['step']) + 1}, ELBO {row['elbo']:.2f} ± {row['elbo_se']:.2f}, {reward}KL to the prior "
            f"{row['kl_prior']:.2f}, {row['tokens_per_second']:,.0f} tokens/s"
        )
        self.bar.update(self.task, completed=row["done"], description=line)
        if not self.out.is_terminal and time.monotonic() - self.told > 10:
            self.out.print(line, markup=False)
            self.told = time.monotonic()
