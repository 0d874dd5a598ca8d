"""What `ppl-lm compare` prints: rows of a leaderboard as a table."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from ppl_lm.report.leaderboard_page import Board
from ppl_lm.report.terminal import COLOURS, clean

FIT_COLUMNS = {"name": "run", "verdict": "verdict", "kl_q_p": "KL(q ‖ p)", "behind": "behind", "kl_p_q": "KL(p ‖ q)"}
SAMPLE_COLUMNS = {
    "name": "run",
    "sampler": "sampler",
    "verdict": "verdict",
    "log_z": "log Z",
    "ess": "ESS",
    "each": "tokens a draw",
    "calls": "reward calls",
}


def board_title(board: Board) -> str:
    """The posterior that the runs of this table share."""
    posterior = board.posterior
    asked = {"model": posterior.model, "reward": posterior.reward, "beta": posterior.beta}
    asked |= posterior.arguments
    title = ", ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
    return f"{title}, {len(posterior.prompts)} prompt(s), {posterior.max_new_tokens} tokens"


def table(rows: Sequence[Mapping[str, str]], columns: Mapping[str, str], title: str) -> Table:
    """:param rows: `fit_rows` or `sample_rows` of a board; `columns`: `FIT_COLUMNS` or `SAMPLE_COLUMNS`, and the reward where
    there is one."""
    result = Table(title=clean(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    columns = {**columns, **({"reward": "E(reward)"} if any(row["reward"] != "–" for row in rows) else {})}
    for heading in columns.values():
        result.add_column(heading)
    for row in rows:
        cells = {key: clean(row[key]) for key in columns}
        cells["verdict"].stylize(f"bold {COLOURS[row['verdict']]}")
        result.add_row(*cells.values())
    return result
