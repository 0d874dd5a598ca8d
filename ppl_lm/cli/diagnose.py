"""`ppl-lm diagnose`: measure a run's guide on fresh draws."""

import json
from dataclasses import replace
from typing import Annotated

import typer

from ppl_lm.cli.console import OtherPrompts, RunFolder, Traceback, as_typed, err, errors, out, with_prompts


def command(
    context: typer.Context,
    run: RunFolder,
    num_samples: Annotated[
        int | None, typer.Option(help="Draws for each prompt.", show_default="4096, fewer with many prompts")
    ] = None,
    prompts: OtherPrompts = None,
    seed: Annotated[int, typer.Option()] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print diagnosis.json instead of tables.")] = False,
    traceback: Traceback = False,
) -> None:
    """Measure how close a run's guide is to its posterior, on fresh draws; write diagnosis.json and draws.nc.

    With --prompts FILE the files are diagnosis_FILE.json and draws_FILE.nc."""
    from ppl_lm.report.progress import ProgressBar
    from ppl_lm.report.terminal import measured
    from ppl_lm.run.files import finite
    from ppl_lm.run.measuring import measure
    from ppl_lm.run.programs import build
    from ppl_lm.run.read_run import read_fit
    from ppl_lm.run.run_folder import fitted_guide, read_config
    from ppl_lm.run.write_run import write_measurement

    with errors(traceback):
        settings = with_prompts(read_config(run).settings, prompts)
        with ProgressBar(f"diagnosing {run}", err) as progress:
            programs = build(settings, fitted_guide(run))
            measurement = measure(programs, num_samples, seed, on_progress=progress)
        if (fit := read_fit(run)) is not None:
            measurement = measurement.after(fit)
        measurement = replace(measurement, diagnosis=replace(measurement.diagnosis, command=as_typed(context)))
        write_measurement(run, measurement, programs, "" if prompts is None else f"_{prompts.stem}")
        if as_json:
            print(json.dumps(finite(measurement.diagnosis.as_json()), indent=1))
        else:
            for part in measured(measurement):
                out.print(part)
