"""What the commands share: the consoles, exit statuses, error messages, and options that several have."""

import shlex
import sys
import traceback as tracebacks
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ppl_lm.run.names import is_file, split, split_folder, user_files

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)

GOOD, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130  # exit statuses

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that `ppl-lm fit` wrote.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show Python's traceback of an error.")]
OtherPrompts = Annotated[
    Path | None, typer.Option("--prompts", help="Other prompts than the run's, held-out ones say.")
]


@contextmanager
def errors(traceback: bool) -> Iterator[None]:
    """One clear message and exit status 2 for whatever the user can mend."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):  # of `... | head`: typer ends quietly
        raise
    except Exception as error:  # whatever a user's program, reward or model raises
        if traceback:
            tracebacks.print_exc()
        printable = (c if c.isprintable() or c == "\n" else " " for c in _message(error))  # it may quote untrusted text
        err.print(f"ppl-lm: {''.join(printable)}", markup=False, style="red", soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        err.print("ppl-lm: interrupted")
        raise typer.Exit(INTERRUPTED) from None


def _message(error: BaseException) -> str:
    """What an error says, without the shapes of every site that Pyro adds below it; and where in the user's own file it
    arose, if it did."""
    message = str(error).partition("\nTrace Shapes:")[0].strip() or type(error).__name__
    message = "; ".join([message, *getattr(error, "__notes__", [])])
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for cause in reversed(chain):  # the innermost is where it arose
        for frame in reversed(tracebacks.extract_tb(cause.__traceback__)):
            if frame.filename in user_files:
                kind = "" if isinstance(error, ValueError) or type(error).__name__ in message else type(error).__name__
                return f"{kind}{kind and ': '}{message} ({frame.filename}, line {frame.lineno}, in {frame.name})"
    return message


def is_typed(context: typer.Context, name: str) -> bool:
    """Whether an argument or option stands on the command line; otherwise it has its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def as_typed(context: typer.Context) -> str:
    """The command as it was typed, quoted for a shell."""
    words = ["ppl-lm", str(context.info_name)]
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params.get(str(parameter.name))
        if not is_typed(context, name):
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if parameter.param_type_name == "option":
                words.append(parameter.opts[0])
            if one is not True:
                words.append(str(one))
    return shlex.join(words)


def absolute(spec: str) -> str:
    """`path/to/file.py:name` and `hf:FOLDER[:LABEL]` with their whole paths, so that the run is read from anywhere; names as
    they are."""
    if spec.startswith("hf:"):
        folder, label = split_folder(spec)
        return f"hf:{Path(folder).resolve()}{'' if label is None else f':{label}'}" if Path(folder).is_dir() else spec
    path, name = split(spec)
    return f"{Path(path).resolve()}:{name}" if is_file(spec) and Path(path).is_file() else spec


def whole_path(lm: str | None) -> str | None:
    return str(Path(lm).resolve()) if lm is not None and Path(lm).is_dir() else lm


def with_prompts(settings: Any, path: Path | None) -> Any:
    """Settings with the prompts of a file, as chats where that is asked for.

    :param path: None: their own prompts."""
    from ppl_lm.run.chat_prompts import as_chats
    from ppl_lm.run.prompts_file import read_prompts

    if path is not None:
        texts, columns = read_prompts(path)
        settings = replace(settings, prompts=texts, columns=columns, eval_prompts=None, eval_columns={})
    return as_chats(settings)


def ask_whether_twice(lm: str | None) -> None:
    """Where the prior is a run's fitted guide: says that it would be tilted once more, and in a terminal asks whether that is
    meant."""
    from ppl_lm.run.run_folder import is_run

    if lm is None or Path(lm).name != "guide" or not is_run(Path(lm).parent):
        return
    run = shlex.quote(str(Path(lm).parent))
    err.print(
        f"lm={lm!r} is the fitted guide of a run: as the prior it is tilted once more, by the reward on top of what it was "
        f"fitted to. To go on with that fit: ppl-lm fit MODEL --init-from {run}; to draw from it: ppl-lm sample {run}",
        markup=False,
    )
    if sys.stdin.isatty() and err.is_terminal:
        typer.confirm("Is that meant?", abort=True, err=True)
