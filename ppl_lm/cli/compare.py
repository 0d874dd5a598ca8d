"""`ppl-lm compare`: runs side by side."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ppl_lm.cli.console import Traceback, errors, out


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that `ppl-lm fit` or `sample` wrote.")],
    output: Annotated[Path, typer.Option("--output", help="The file.")] = Path("leaderboard.html"),
    traceback: Traceback = False,
) -> None:
    """Rank runs by how close each came, those of one posterior in one table, on the terminal and as one HTML page."""
    from ppl_lm.report import terminal as show
    from ppl_lm.report.leaderboard_page import boards, drawn_rows, leaderboard, rows
    from ppl_lm.run.folder import write_text
    from ppl_lm.run.reading import read

    with errors(traceback):
        found = [read(run) for run in runs]
        names = [run.name for run in found]
        found = [replace(run, name=run.path) if names.count(run.name) > 1 else run for run in found]
        for board in boards(found):
            asked = board.settings
            title = ", ".join(f"{k} {asked[k]}" for k in ("model", "reward", "beta") if asked[k] is not None)
            title += f", {len(asked['prompts'])} prompt(s), {asked['max_new_tokens']} tokens"
            if board.fits:
                out.print(show.board(rows(board), show.FITS, title))
            if board.draws:
                out.print(show.board(drawn_rows(board), show.DRAWS, title))
        write_text(output, leaderboard(found))
        out.print(f"written: {output}", markup=False)
