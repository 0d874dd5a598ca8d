"""`ppl-lm sample`: draw by any sampler, and say what the draws are worth."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ppl_lm.cli.console import (
    OtherPrompts,
    Traceback,
    absolute,
    as_typed,
    ask_whether_twice,
    err,
    errors,
    out,
    whole_path,
    with_prompts,
)
from ppl_lm.cli.posterior_options import Arguments, Chat, Rewards, System, Weights, asked


def command(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, or a posterior as for fit.")],
    sampler: Annotated[str, typer.Option(help="importance: the guide's draws, each with its log weight; rejection: exact "
                                         "posterior draws, from prior draws and the reward's bound; adaptive_rejection: the "
                                         "same under a Checker; quasi_rejection, best_of_n; independence_mh, suffix_mh, "
                                         "particle_gibbs: Markov chains; smc: sequential Monte Carlo; annealed_smc: along a "
                                         "path of temperatures; splitting: a rare event, for at_least.")] = "importance",
    num_samples: Annotated[int, typer.Option(help="Draws for each prompt. Markov chains and smc make what their errors need "
                                             "(smc 1,024 or more), write all, and show so many.")] = 10,
    guide: Annotated[str | None, typer.Option(help="With MODEL: what proposes, as for fit or a RUN's fitted guide.",
                                              show_default="prior")] = None,
    lm: Annotated[str | None, typer.Option(help="With MODEL, as for fit; likewise the next six.")] = None,
    reward: Rewards = None,
    reward_weights: Weights = None,
    beta: Annotated[float | None, typer.Option()] = None,
    max_new_tokens: Annotated[int | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    arguments: Arguments = None,
    prompts: OtherPrompts = None,
    chat: Chat = False,
    system: System = None,
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
    from ppl_lm.report.progress import ProgressBar
    from ppl_lm.report.terminal import verdict
    from ppl_lm.report.terminal_draws import draw_lines, json_rows, worth
    from ppl_lm.run.programs import build, uncertainty
    from ppl_lm.run.run_folder import is_run, new_folder, require_free
    from ppl_lm.run.sampling import require_sampler, settings_of
    from ppl_lm.run.sampling import sample as draw
    from ppl_lm.run.write_run import write_config, write_sample

    given = {"guide": guide, "lm": whole_path(lm), "beta": beta, "max_new_tokens": max_new_tokens, "dtype": dtype}
    given = {k: absolute(v) if k == "guide" else v for k, v in given.items() if v is not None}
    with errors(traceback):
        given |= asked(reward, reward_weights, arguments, chat, system)
        require_sampler(sampler)
        settings, fitted = settings_of(absolute(source), sampler, given)
        settings = replace(with_prompts(settings, prompts), seed=seed)
        own = output_dir is None and is_run(Path(source))  # a run's own folder takes its draws
        if output_dir is not None:
            require_free(output_dir, overwrite, keep_fit=True)
        if "lm" in given:
            ask_whether_twice(settings.lm)
        title = f"drawing by {sampler}: {num_samples} texts for each of {len(settings.prompts)} prompt(s)"
        with ProgressBar(title, err) as progress:
            programs = build(settings, fitted)
            for line in uncertainty(programs):
                progress.say(line)
            sample = draw(programs, sampler, num_samples, on_progress=progress)
        if own:
            path, suffix = Path(source), f"_{sampler}" + ("" if prompts is None else f"_{prompts.stem}")
        else:
            path, suffix = output_dir or new_folder(f"{settings.model.rpartition(':')[2]}-{sampler}"), ""
            write_config(path, programs, as_typed(context), overwrite)
        written = write_sample(path, sample, programs, suffix)
        if as_json:
            for row in json_rows(sample.draws, num_samples):
                print(json.dumps(row))
        else:
            out.print(sample.diagnosis.how, markup=False)
            for line in draw_lines(sample.draws, num_samples):
                out.print(line, soft_wrap=True)
            out.print(worth(sample.diagnosis, [*sample.draws.records]), markup=False)
            out.print(verdict(sample.diagnosis.verdict))
            out.print(f"written: {written}", markup=False)
