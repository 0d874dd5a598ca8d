"""A fit as it goes: a bar that moves on a terminal, a line now and then in a pipe."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ppl_lm.run.fitting.step_metrics import StepMetrics

EVERY = 10.0  # seconds between the lines in a pipe


class FitProgress:
    """:param title: what is fitted, printed at the first step."""

    def __init__(self, console: Console, title: str):
        self.console, self.title = console, title
        self.printed = time.monotonic()
        columns = (BarColumn(24), TextColumn("{task.description}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=1.0)

    def __enter__(self) -> "FitProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def step(self, row: StepMetrics) -> None:
        if row["step"] == 0:
            self.console.print(self.title, markup=False)
        reward = f"reward {row['reward']:.3f}, " if "reward" in row else ""
        line = (
            f"step {row['step'] + 1}, ELBO {row['elbo']:.2f} ± {row['elbo_se']:.2f}, {reward}KL to the prior "
            f"{row['kl_prior']:.2f}, {row['tokens_per_second']:,.0f} tokens/s"
        )
        self.bar.update(self.task, completed=row["done"], description=line)
        if not self.console.is_terminal and time.monotonic() - self.printed > EVERY:
            self.console.print(line, markup=False)
            self.printed = time.monotonic()
