"""`ppl-lm diagnose`: measure a run's guide on fresh draws."""

import json
from typing import Annotated

import typer
from rich.console import Console

from ppl_lm.cli.console import OtherPrompts, RunFolder, Traceback, as_typed, errors, out, with_prompts


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
    import torch

    from ppl_lm.cli.fitting import measure
    from ppl_lm.run import folder

    with errors(traceback):
        programs = folder.build(with_prompts(folder.read_settings(run), prompts), folder.fitted_guide(run))
        torch.manual_seed(seed)
        suffix = "" if prompts is None else f"_{prompts.stem}"
        quiet = Console(quiet=True) if as_json else out
        made = measure(programs, run, num_samples, quiet, seed, suffix, as_typed(context))
        if as_json:
            print(json.dumps(made, indent=1))
