"""What `ppl-lm` prints: figures as a table, texts side by side. Text from models and rewards is untrusted: it is shown
without markup and without control characters."""

import math
from typing import Any

from rich.table import Table
from rich.text import Text

from ppl_lm.criticism.diagnoses.diagnosis import Diagnosis
from ppl_lm.criticism.weights import khat_threshold
from ppl_lm.infer.draws import Draws
from ppl_lm.plot.untrusted import one_line

COLOURS = {"good": "green", "poor": "yellow", "unknown": "yellow", "worse_than_prior": "red"}
COLOURS |= {"collapsed": "red", "misses_mass": "red"}
COLOURS |= {"exact": "green", "unreliable": "yellow", "not_converged": "red", "impossible": "red"}  # of draws


def clean(text: str, width: int = 0) -> Text:
    """`one_line`, for rich."""
    return Text(one_line(text, width))


def figures(made: dict[str, Any], title: str) -> Table:
    """One prompt's figures, or the average."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))

    def pm(key: str) -> str:
        if not math.isfinite(made[key]):
            return str(made[key])
        return f"{round(made[key], 3) + 0.0:.3f} ± {made[key + '_se']:.3f}"  # + 0.0: no minus before a zero

    upper = "" if made["upper_exact"] else "  (approximate: from the guide's own draws)"
    table.add_row("evidence bracket", f"ELBO {pm('elbo')}  ≤  log Z {pm('log_z')}  ≤  EUBO {pm('upper')} nats{upper}")
    table.add_row("KL(guide ‖ posterior)", f"{pm('kl_q_p')} nats; the prior's: {pm('kl_prior_p')}")
    table.add_row("KL(posterior ‖ guide)", f"{pm('kl_p_q')} nats; the prior's: {pm('kl_p_prior')}")
    if made["possible"] < 1:
        table.add_row("possible draws", f"{made['possible']:.1%} of the guide's meet the constraint")
    table.add_row("KL(guide ‖ prior)", f"{pm('kl_q_prior')} nats")
    if "reward" in made:
        table.add_row(
            "E(reward)", f"prior {pm('reward_prior')}, guide {pm('reward')}, posterior {pm('reward_posterior')}"
        )
    table.add_row("posterior mass missed", f"{made['missing']:.1%} ± {made['missing_se']:.1%}")
    table.add_row("entropy", f"guide {pm('entropy')}, posterior {pm('entropy_posterior')} nats")
    n = made["num_samples"]
    khat = "not applicable (tied or few weights)"
    if made["khat"] is not None:
        khat = f"{round(made['khat'], 2) + 0.0:.2f} ± {made['khat_se']:.2f}, fine below {khat_threshold(n):.2f}"
    worth = f"ESS {made['ess']:.0f} ± {made['ess_se']:.0f} of {n}; largest weight {made['max_weight']:.1%} of all"
    table.add_row("importance weights", worth)
    table.add_row("tail of the weights", f"k-hat {khat}")
    table.add_row("cost of measuring", f"{made['lm_tokens']:,} LM tokens, {made['reward_calls']:,} reward calls")
    return table


FITS = {"name": "run", "verdict": "verdict", "kl_q_p": "KL(q ‖ p)", "behind": "behind", "kl_p_q": "KL(p ‖ q)"}
DRAWS = {
    "name": "run",
    "sampler": "sampler",
    "verdict": "verdict",
    "log_z": "log Z",
    "ess": "ESS",
    "each": "tokens a draw",
    "calls": "reward calls",
}


def board(found: list[dict[str, str]], columns: dict[str, str], title: str) -> Table:
    """Rows of a `leaderboard`, with the columns `FITS` or `DRAWS`."""
    table = Table(title=clean(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    columns = columns | ({"reward": "E(reward)"} if any(row["reward"] != "–" for row in found) else {})
    for heading in columns.values():
        table.add_column(heading)
    for row in found:
        cells = {key: clean(row[key]) for key in columns}
        cells["verdict"].stylize(f"bold {COLOURS[row['verdict']]}")
        table.add_row(*cells.values())
    return table


def samples(
    prior: Draws, guide: Draws, exact: Draws | None, count: int = 5, width: int = 60, title: str = "samples"
) -> Table:
    """Prior draws, the guide's and the posterior's side by side, each with its reward."""
    table = Table(title=Text(title), title_justify="left", show_lines=True, expand=False)
    columns = {"prior": prior, "guide": guide} | (
        {"posterior (exact: the prior's that rejection keeps)": exact} if exact is not None else {}
    )
    cells = []
    for name, draws in columns.items():
        table.add_column(name, max_width=width, overflow="fold")
        texts = draws.text()[0][:count]
        rewards = draws.records.get("reward")
        values = [None] * len(texts) if rewards is None else rewards.flatten().tolist()
        cells.append([_cell(t, r) for t, r in zip(texts, values, strict=False)])
    for row in zip(*cells, strict=False):
        table.add_row(*row)
    return table


def verdict(diagnosis: Diagnosis) -> Text:
    found = diagnosis.verdict
    return verdict_on(found.code, f"{found.sentence} {found.remedy}".rstrip())


def verdict_on(code: str, sentence: str) -> Text:
    return Text.assemble((code, f"bold {COLOURS[code]}"), ": ", sentence)


def _cell(text: str, reward: float | None) -> Text:
    return clean(text) if reward is None else Text.assemble((f"{reward:+.2f} ", "bold"), clean(text))
