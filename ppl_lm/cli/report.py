"""`ppl-lm report`: a run as one page."""

from pathlib import Path
from typing import Annotated

import typer

from ppl_lm.cli.console import Traceback, errors, out


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `ppl-lm fit` or `ppl-lm sample` wrote.")],
    output: Annotated[Path | None, typer.Option("--output", help="The file.", show_default="RUN/report.html")] = None,
    traceback: Traceback = False,
) -> None:
    """Write a run as one page: verdict, texts side by side, plots, figures, and how to repeat it. One HTML file, which asks the
    network for nothing."""
    from ppl_lm.report.run_page import report
    from ppl_lm.run.files import write_text
    from ppl_lm.run.read_run import read

    with errors(traceback):
        path = run / "report.html" if output is None else output
        write_text(path, report(read(run)))
        out.print(f"written: {path}", markup=False)
