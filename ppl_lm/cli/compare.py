"""`ppl-lm compare`: runs side by side."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ppl_lm.cli.console import Traceback, errors, out


def command(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that `ppl-lm fit` or `sample` wrote.")],
    output: Annotated[Path, typer.Option("--output", help="The file.")] = Path("leaderboard.html"),
    traceback: Traceback = False,
) -> None:  # fmt: skip
    """Rank runs by how close each came, those of one posterior in one table, on the terminal and as one HTML page."""
    from ppl_lm.report.leaderboard_page import boards, fit_rows, leaderboard, sample_rows
    from ppl_lm.report.terminal_board import FIT_COLUMNS, SAMPLE_COLUMNS, board_title, table
    from ppl_lm.run.files import write_text
    from ppl_lm.run.read_run import read

    with errors(traceback):
        runs = [read(folder) for folder in folders]
        names = [run.name for run in runs]
        runs = [replace(run, name=run.path) if names.count(run.name) > 1 else run for run in runs]
        for board in boards(runs):
            if board.fits:
                out.print(table(fit_rows(board), FIT_COLUMNS, board_title(board)))
            if board.samples:
                out.print(table(sample_rows(board), SAMPLE_COLUMNS, board_title(board)))
        write_text(output, leaderboard(runs))
        out.print(f"written: {output}", markup=False)
