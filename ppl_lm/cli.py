"""`ppl-lm fit | sample | diagnose | report | compare`: the command line."""

import io
import json
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

from ppl_lm.named import OBJECTIVES, is_file, shipped, split, user_files

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)

MODELS, GUIDES = (", ".join(shipped(package)) for package in ("models", "guides"))
GOOD, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130  # exit statuses

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that `ppl-lm fit` wrote.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show Python's traceback of an error.")]
OtherPrompts = Annotated[
    Path | None, typer.Option("--prompts", help="Other prompts than the run's, held-out ones say.")
]


@contextmanager
def _errors(traceback: bool) -> Iterator[None]:
    """One clear message and exit status 2 for whatever the user can mend."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):  # of `... | head`: typer ends quietly
        raise
    except Exception as error:  # whatever a user's program, reward or model raises
        if traceback:
            tracebacks.print_exc()
        said = "".join(
            c if c.isprintable() or c == "\n" else " " for c in _message(error)
        )  # it may quote untrusted text
        err.print(f"ppl-lm: {said}", markup=False, style="red", soft_wrap=True)
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


def _version(asked: bool) -> None:
    if asked:
        from ppl_lm import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Say which text you want as a Pyro program; get it by inference; know how close you got."""


@app.command()
def fit(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"The posterior: {MODELS}, or FILE.py:NAME.")],
    guide: Annotated[str, typer.Option(help=f"The approximation: {GUIDES}, or FILE.py:NAME.")] = "finetuned",
    objective: Annotated[str, typer.Option(help=f"What is minimised: {', '.join(OBJECTIVES)}.")] = "reverse_kl",
    lm: Annotated[str | None, typer.Option(help="A Hugging Face folder or hub name.", show_default="the LM that ships")] = None,
    reward: Annotated[str, typer.Option(help="vader, length, contains:WORD, or FILE.py:NAME.")] = "vader",
    beta: Annotated[float, typer.Option(help="Temperature of the reward; lower asks for more of it.")] = 0.2,
    prompts: Annotated[Path | None, typer.Option(help="A text file, one prompt a line, or JSON lines with 'prompt'.",
                                                 show_default="the model's BOS")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion, in tokens.")] = 40,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Stop fitting after so many seconds.",
                                                     show_default="110, unless --max-steps is given")] = None,
    particles: Annotated[int | None, typer.Option(help="Texts drawn for each prompt and step.",
                                                  show_default="128 with one prompt, 8 with many")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts a step.")] = 16,
    learning_rate: Annotated[float | None, typer.Option(help="Adam's, at its peak.",
                                                        show_default="found by how far a step moves the guide")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Where the run folder is written.",
                                                    show_default="runs/, by model and time")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in that folder.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...", show_default="CUDA where there is one")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Draws for each prompt when measuring.",
                                                    show_default="4096, fewer with many prompts")] = None,
    traceback: Traceback = False,
) -> None:  # fmt: skip
    """Fit a guide to the posterior, measure how close it came, and write a run folder."""
    from ppl_lm.run import folder
    from ppl_lm.run.command import fit_and_measure
    from ppl_lm.run.prompts_file import read_prompts

    if max_steps is None and time_limit is None:
        time_limit = 110.0
    if output_dir is None:
        output_dir = folder.by_time(model.rpartition(":")[2])
    with _errors(traceback):
        texts, columns = read_prompts(prompts)
        if particles is not None and particles < 2:
            raise ValueError(f"particles={particles}; give at least 2")
        settings = folder.Settings(
            model=_absolute(model), guide=_absolute(guide), objective=objective, reward=_absolute(reward), beta=beta,
            lm=_folder(lm),
            prompts=texts, columns=columns,
            max_new_tokens=max_new_tokens, device=device, seed=seed, batch_size=batch_size,
            particles=max(8, 128 // max(1, min(batch_size, len(texts)))) if particles is None else particles,
            learning_rate=learning_rate, max_steps=max_steps, time_limit=time_limit,
        )  # fmt: skip
        outcome = fit_and_measure(settings, output_dir, num_samples, out, overwrite, _typed(context))
    raise typer.Exit({"finished": GOOD, "interrupted": INTERRUPTED}.get(outcome, FAILED))


@app.command()
def sample(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, or a posterior as for fit.")],
    sampler: Annotated[str, typer.Option(help="importance: the guide's draws, each with its log weight; rejection: exact "
                                         "posterior draws, from prior draws and the reward's bound; quasi_rejection, "
                                         "best_of_n; independence_mh, suffix_mh, particle_gibbs: Markov chains; smc: "
                                         "sequential Monte Carlo.")] = "importance",
    num_samples: Annotated[int, typer.Option(help="Draws for each prompt. Markov chains and smc make what their errors need "
                                             "(smc 1,024 or more), write all, and show so many.")] = 10,
    guide: Annotated[str | None, typer.Option(help="With MODEL: what proposes, as for fit or a RUN's fitted guide.",
                                              show_default="prior")] = None,
    lm: Annotated[str | None, typer.Option(help="With MODEL, as for fit; likewise the next three.")] = None,
    reward: Annotated[str | None, typer.Option()] = None,
    beta: Annotated[float | None, typer.Option()] = None,
    max_new_tokens: Annotated[int | None, typer.Option()] = None,
    prompts: OtherPrompts = None,
    output_dir: Annotated[Path | None, typer.Option(help="Where draws.nc and diagnosis.json are written.",
                                                    show_default="with RUN its folder, by SAMPLER; else runs/")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier draws in OUTPUT_DIR; a RUN's own "
                                            "always are.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    traceback: Traceback = False,
) -> None:  # fmt: skip
    """Draw texts by any sampler, from a run's fitted guide or a posterior as it is, and write what they are worth.

    The files are draws.nc and diagnosis.json; in a RUN's own folder draws_SAMPLER.nc and diagnosis_SAMPLER.json."""
    from ppl_lm.run import folder
    from ppl_lm.run.sampling import asked, sample_and_write

    given = {"guide": guide, "lm": _folder(lm), "reward": reward, "beta": beta, "max_new_tokens": max_new_tokens}
    given = {k: _absolute(v) if k in ("guide", "reward") else v for k, v in given.items() if v is not None}
    with _errors(traceback):
        settings, fitted = asked(_absolute(source), sampler, given)
        settings = replace(_with_prompts(settings, prompts), seed=seed)
        own = output_dir is None and (Path(source) / folder.MARK).is_file()  # a run's own folder takes its draws
        path = Path(source) if own else output_dir
        suffix = f"_{sampler}" + ("" if prompts is None else f"_{prompts.stem}") if own else ""
        shown = None if as_json else out
        sample_and_write(settings, fitted, sampler, num_samples, path, shown, suffix, own, overwrite, _typed(context))


@app.command()
def diagnose(
    context: typer.Context,
    run: RunFolder,
    num_samples: Annotated[
        int | None, typer.Option(help="Draws for each prompt.", show_default="4096, fewer with many prompts")
    ] = None,
    prompts: OtherPrompts = None,
    seed: Annotated[int, typer.Option()] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print diagnosis.json instead of tables.")] = False,
    traceback: Traceback = False,
) -> None:
    """Measure how close a run's guide is to its posterior, on fresh draws; write diagnosis.json and draws.nc.

    With --prompts FILE the files are diagnosis_FILE.json and draws_FILE.nc."""
    import torch

    from ppl_lm.run import folder
    from ppl_lm.run.command import measure

    with _errors(traceback):
        programs = folder.build(_with_prompts(folder.read_settings(run), prompts), folder.fitted_guide(run))
        torch.manual_seed(seed)
        suffix = "" if prompts is None else f"_{prompts.stem}"
        quiet = Console(quiet=True) if as_json else out
        made = measure(programs, run, num_samples, quiet, seed, suffix, _typed(context))
        if as_json:
            print(json.dumps(made, indent=1))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `ppl-lm fit` or `ppl-lm sample` wrote.")],
    output: Annotated[Path | None, typer.Option("--output", help="The file.", show_default="RUN/report.html")] = None,
    traceback: Traceback = False,
) -> None:
    """Write a run as one page: verdict, texts side by side, plots, figures, and how to repeat it. One HTML file, which asks the
    network for nothing."""
    from ppl_lm.diagnose.report import report as page
    from ppl_lm.run.folder import write_text
    from ppl_lm.run.reading import read

    with _errors(traceback):
        path = run / "report.html" if output is None else output
        write_text(path, page(read(run)))
        out.print(f"written: {path}", markup=False)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that `ppl-lm fit` or `sample` wrote.")],
    output: Annotated[Path, typer.Option("--output", help="The file.")] = Path("leaderboard.html"),
    traceback: Traceback = False,
) -> None:
    """Rank runs by how close each came, those of one posterior in one table, on the terminal and as one HTML page."""
    from ppl_lm.diagnose import show
    from ppl_lm.diagnose.leaderboard import boards, drawn_rows, leaderboard, rows
    from ppl_lm.run.folder import write_text
    from ppl_lm.run.reading import read

    with _errors(traceback):
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


def _typed(context: typer.Context) -> str:
    """The command as it was typed, quoted for a shell."""
    words = ["ppl-lm", str(context.info_name)]
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params.get(str(parameter.name))
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        if parameter.param_type_name == "option":
            words.append(parameter.opts[0])
        if value is not True:
            words.append(str(value))
    return shlex.join(words)


def _absolute(spec: str) -> str:
    """`path/to/file.py:name` with its whole path, so that the run is read from anywhere; names as they are."""
    path, name = split(spec)
    return f"{Path(path).resolve()}:{name}" if is_file(spec) and Path(path).is_file() else spec


def _folder(lm: str | None) -> str | None:
    return str(Path(lm).resolve()) if lm is not None and Path(lm).is_dir() else lm


def _with_prompts(settings: Any, path: Path | None) -> Any:
    if path is None:
        return settings
    from ppl_lm.run.prompts_file import read_prompts

    texts, columns = read_prompts(path)
    return replace(settings, prompts=texts, columns=columns)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):  # Windows' consoles and pipes may not know every character
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app(prog_name="ppl-lm")


if __name__ == "__main__":
    main()
