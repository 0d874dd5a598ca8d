"""What the experiments share: fits whose distance from the truth is known at every step, and how their results are shown."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyro.infer import SVI
from rich.markup import escape
from rich.table import Table

from ppl_lm.infer.binding import Bound
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.infer.enumeration import enumerate_posterior, kl
from ppl_lm.lm.language_model import LanguageModel

Trace = list[dict[str, float]]


@dataclass(frozen=True)
class Result:
    """What an experiment found.

    :param rows: the table, one dictionary a line; a key that begins with "± " holds the error of the key that follows the sign.
    :param claims: what it is about, each with whether these figures bear it out.
    """

    title: str
    rows: list[dict[str, Any]]
    claims: dict[str, bool]
    figure: Figure

    def save(self, folder: Path, name: str) -> None:
        """`NAME.json`, `NAME.png`."""
        folder.mkdir(parents=True, exist_ok=True)
        record = {"title": self.title, "rows": self.rows, "claims": self.claims}
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.figure.savefig(folder / f"{name}.png", dpi=120)

    def table(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        keys = [key for key in self.rows[0] if not key.startswith("± ")]
        for key in keys:
            table.add_column(escape(key), justify="left" if isinstance(self.rows[0][key], str) else "right")
        for row in self.rows:
            table.add_row(*(_cell(row[key], row.get(f"± {key}")) for key in keys))
        return table


def _cell(value: Any, error: float | None) -> str:
    shown = _number(value) if isinstance(value, float) else escape(str(value))
    return shown if error is None else f"{shown} ± {error:.3f}"


def _number(value: float) -> str:
    """To three places behind the point, or about four figures of large ones."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def load(lm: str | None, max_new_tokens: int) -> LanguageModel:
    """The language model that ships, or another: a folder or a hub name."""
    if lm is None:
        return LanguageModel.from_pretrained(max_new_tokens=max_new_tokens)
    return LanguageModel.from_pretrained(lm, max_new_tokens=max_new_tokens)


def letters(completions: Sequence[str], **_: object) -> list[float]:
    """A reward: 1 for each a, -1/2 for each b."""
    return [text.count("a") - 0.5 * text.count("b") for text in completions]


def train(
    model: Bound, guide: Bound, prompts: Sequence[str], *, steps: int, rate: float, every: int = 25, **settings: Any
) -> Trace:
    """Stock `SVI` with Adam, its rate falling to zero; exact measures before, after, and `every` so many steps between.

    :param settings: of `SequenceELBO`.
    """
    elbo = SequenceELBO(**{"num_particles": 64, **settings})
    fall: Callable[[int], float] = lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))  # noqa: E731
    adam = {"lr": rate, "betas": (0.9, 0.99)}
    optimiser: Any = pyro.optim.LambdaLR({"optimizer": torch.optim.Adam, "optim_args": adam, "lr_lambda": fall})  # type: ignore[attr-defined]
    svi, rows = SVI(model, guide, optimiser, loss=elbo), []
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            rows.append({"step": step, **measure(model, guide, prompts)})
        if step < steps:
            svi.step(list(prompts))
            optimiser.step()
    return rows


@torch.no_grad()
def measure(model: Bound, guide: Bound, prompts: Sequence[str]) -> dict[str, float]:
    """By enumeration, mean over prompts: both KLs, the guide's entropy and its expected reward."""
    truth = enumerate_posterior(model, guide, list(prompts))
    assert truth.log_q is not None
    by_prompt = {
        "KL(q‖p)": truth.kl_q_p,
        "KL(p‖q)": truth.kl_p_q,
        "entropy": -kl(truth.log_q, torch.zeros_like(truth.log_q)),
    }
    if "reward" in truth.records:
        by_prompt["E[r]"] = (truth.log_q.exp() * truth.records["reward"]).sum(0)
    return {name: float(value.mean()) for name, value in by_prompt.items()}


@torch.no_grad()
def entropy(model: Bound, prompts: Sequence[str]) -> float:
    """Of the posterior, mean over prompts, nats."""
    log_p = enumerate_posterior(model, None, list(prompts)).log_posterior
    return float(-kl(log_p, torch.zeros_like(log_p)).mean())


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A row of plots, drawn without pyplot's global state."""
    figure = Figure(figsize=(4.8 * count, 3.6), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def curves(axes: Axes, traces: dict[str, Trace], key: str, log: bool = False) -> None:
    for label, trace in traces.items():
        axes.plot([row["step"] for row in trace], [row[key] for row in trace], label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(key if key == "E[r]" else f"{key} [nats]")
    if log:
        axes.set_yscale("log")
    axes.legend(fontsize="small")
