"""How far something is: a bar that moves on a terminal or in a notebook, and a line now and then in a pipe."""

import html
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ppl_lm.run.fitting.advice import peak_memory
from ppl_lm.run.fitting.step_metrics import StepMetrics

EVERY, OFTEN = 10.0, 0.5  # seconds between the lines in a pipe, and between changes in a notebook


class ProgressBar:
    """Shows how far something is while a `with` block lasts. It is a function that samplers take as `on_progress`, and its
    `step` is one that `fit` takes as `on_step`:

    >>> with ProgressBar("drawing") as progress:                                        # doctest: +SKIP
    ...     draws = ppl_lm.rejection(target, None, prompts, on_progress=progress)

    :param title: what is done, printed at once.
    :param console: where; None: the terminal or the notebook."""

    def __init__(self, title: str, console: Console | None = None):
        self.title, self.console = title, console or Console(highlight=False)
        self.began = self.printed = time.monotonic()
        self.in_notebook, self.handle = self.console.is_jupyter, None
        self.is_live = self.console.is_terminal and not self.in_notebook
        columns = (BarColumn(24), TextColumn("{task.description}", markup=False), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.is_live)
        self.task = self.bar.add_task("", total=1.0)

    def __enter__(self) -> "ProgressBar":
        self.say(self.title)
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, markup=False, soft_wrap=True)

    def __call__(self, done: float, words: str) -> None:
        """:param done: share, 0 to 1; `words`: what else there is to say."""
        memory = peak_memory()
        line = words if memory is None else f"{words}, {memory / 2**30:.1f} GiB"
        self.bar.update(self.task, completed=done, description=line)
        now = time.monotonic()
        if done <= 0:  # what came before is no measure of what is left
            self.began = now
        if self.in_notebook and (self.handle is None or now - self.printed > OFTEN or done >= 1):
            self._change(f'<progress value="{done:.3f}" max="1"></progress> {html.escape(line)}{self._left(done)}')
            self.printed = now
        elif not self.is_live and not self.in_notebook and now - self.printed > EVERY:
            self.say(f"{line}{self._left(done)}")
            self.printed = now

    def _left(self, done: float) -> str:
        left = (time.monotonic() - self.began) * (1 - done) / done if 0 < done < 1 else 0.0
        return f", {left:,.0f} s left" if left else ""

    def _change(self, content: str) -> None:
        from IPython.display import HTML, display

        if self.handle is None:
            self.handle = display(HTML(content), display_id=True)
        else:
            self.handle.update(HTML(content))

    def step(self, row: StepMetrics) -> None:
        """A step of a fit."""
        reward = f"reward {row['reward']:.3f}, " if "reward" in row else ""
        words = (
            f"step {row['step'] + 1}, ELBO {row['elbo']:.2f} ± {row['elbo_se']:.2f}, {reward}KL to the prior "
            f"{row['kl_prior']:.2f}, {row['tokens_per_second']:,.0f} tokens/s"
        )
        self(row["done"], words)
