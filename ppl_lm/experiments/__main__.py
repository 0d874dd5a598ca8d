"""`python -m ppl_lm.experiments NAME ...`."""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Annotated

import typer
from rich.console import Console

import ppl_lm.experiments
from ppl_lm.cli.single_options import Command

REAL = ("calibration", "decoding", "divergences")  # on real language models; the others enumerate
LONG = (*REAL, "verdicts")  # ten minutes each
NAMES = sorted(m.name for m in iter_modules(ppl_lm.experiments.__path__) if m.name not in ("lab", "__main__"))
SHORT = [name for name in NAMES if name not in LONG]


def main(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help=", ".join(NAMES),
                                                      show_default=f"all but {', '.join(LONG)}")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    lm: Annotated[str | None, typer.Option(help=f"Of {', '.join(REAL)}: a Hugging Face folder or hub name.",
                                           show_default="the LM that ships")] = None,
    time_limit: Annotated[float | None, typer.Option(help=f"Of {', '.join(REAL)}: seconds for each fit.",
                                                     show_default="60")] = None,
    output_dir: Annotated[Path, typer.Option(help="Where NAME.json and NAME.png are written.")] = Path("runs/experiments"),
) -> None:  # fmt: skip
    """Try the paper's claims: each prints a table and whether its claims hold, and writes a figure.

    Exit status 1 if one does not hold."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = max(out.width, 120)  # a file has room for a table
    asked = names or SHORT
    if unknown := [name for name in asked if name not in NAMES]:
        raise typer.BadParameter(f"{unknown[0]!r} is unknown; give one of {', '.join(NAMES)}")
    if not set(REAL) & set(asked) and (lm is not None or time_limit is not None):
        raise typer.BadParameter(
            f"--lm and --time-limit are for {' and '.join(REAL)} alone; the others enumerate the texts of a tiny one"
        )
    if time_limit is not None and not time_limit > 0:
        raise typer.BadParameter(f"--time-limit {time_limit}: give a number of seconds above 0")
    all_hold = True
    for name in asked:
        options = {"lm": lm, "time_limit": 60.0 if time_limit is None else time_limit} if name in REAL else {}
        result = import_module(f"ppl_lm.experiments.{name}").run(seed, **options)
        result.save(output_dir, name)
        out.print(result.table())
        for claim, holds in result.claims.items():
            out.print("holds:        " if holds else "DOES NOT HOLD:", claim)
        out.print(f"written: {output_dir / name}.json and .png\n")
        all_hold = all_hold and all(result.claims.values())
    raise typer.Exit(0 if all_hold else 1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(cls=Command)(main)
    app()
