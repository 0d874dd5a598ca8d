"""`ppl-lm`: the commands together."""

import io
import sys
from typing import Annotated

import typer

from ppl_lm.cli import compare, diagnose, fit, report, sample
from ppl_lm.cli.single_options import Command

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
for name, module in {"fit": fit, "sample": sample, "diagnose": diagnose, "report": report, "compare": compare}.items():
    app.command(name, cls=Command)(module.command)


def _version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        print(version("ppl_lm"))
        raise typer.Exit
    return asked


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Say which text you want as a Pyro program; get it by inference; know how close you got."""


def main() -> None:
    for stream in (sys.stdout, sys.stderr):  # Windows' consoles and pipes may not know every character
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app(prog_name="ppl-lm")
