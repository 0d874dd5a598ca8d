"""`ppl-lm fit`: fit a guide, measure it, write a run folder."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ppl_lm.cli.console import (
    FAILED,
    GOOD,
    INTERRUPTED,
    Traceback,
    absolute,
    as_typed,
    ask_whether_twice,
    errors,
    is_typed,
    out,
    whole_path,
)
from ppl_lm.cli.posterior_options import Arguments, Chat, Rewards, System, Weights, asked
from ppl_lm.run.names import OBJECTIVES, shipped

MODELS, GUIDES = (", ".join(shipped(package)) for package in ("models", "guides"))


def command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"The posterior: {MODELS}, or FILE.py:NAME.")],
    guide: Annotated[str, typer.Option(help=f"The approximation: {GUIDES}, or FILE.py:NAME.")] = "finetuned",
    init_from: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with an earlier fit's guide, and with its lm, "
                                                   "rewards, beta, --set, prompts and max-new-tokens where none are given.",
                                                   show_default="an untrained guide")] = None,
    rank: Annotated[int, typer.Option(help="Of the adapter that the guide lora fits.")] = 16,
    objective: Annotated[str, typer.Option(help=f"What is minimised: {', '.join(OBJECTIVES)}.")] = "reverse_kl",
    lm: Annotated[str | None, typer.Option(help="A Hugging Face folder or hub name.", show_default="the LM that ships")] = None,
    reward: Rewards = None,
    reward_weights: Weights = None,
    beta: Annotated[float, typer.Option(help="Temperature of the reward; lower asks for more of it.")] = 0.2,
    arguments: Arguments = None,
    prompts: Annotated[Path | None, typer.Option(help="A .txt, one a line; or .csv, .json, .jsonl, .parquet with 'prompt'.",
                                                 show_default="the model's BOS")] = None,
    chat: Chat = False,
    system: System = None,
    eval_prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="Held-out prompts, of which the verdict is then.",
                                                      show_default="those of --prompts")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion, in tokens.")] = 40,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds for all but loading.",
                                                     show_default="150, unless --max-steps is given")] = None,
    particles: Annotated[int | None, typer.Option(help="Texts drawn for each prompt and step.",
                                                  show_default="128 with one prompt, 8 with many; fewer of a slow LM")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts a step.", show_default="16, fewer of a slow LM")] = 16,
    learning_rate: Annotated[float | None, typer.Option(help="Adam's, at its peak.",
                                                        show_default="found by how far a step moves the guide")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Where the run folder is written.",
                                                    show_default="runs/, by model and time")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in that folder.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...", show_default="CUDA where there is one")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the LM's weights: float32, bfloat16 or float16; what is trained stays "
                                              "float32.", show_default="as it was saved by ppl_lm, else float32")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Draws for each prompt when measuring, at most.",
                                                    show_default="4096, fewer with many prompts")] = None,
    traceback: Traceback = False,
) -> None:  # fmt: skip
    """Fit a guide to the posterior, measure how close it came, and write a run folder."""
    from ppl_lm.criticism.diagnoses.diagnosis import require_enough
    from ppl_lm.infer.draws import Draws
    from ppl_lm.infer.elbo import SequenceELBO
    from ppl_lm.infer.objectives.catalogue import objective as objective_named
    from ppl_lm.report.progress import ProgressBar
    from ppl_lm.report.terminal import measured
    from ppl_lm.run.chat_prompts import as_chats
    from ppl_lm.run.fitting.advice import no_fit_needed
    from ppl_lm.run.fitting.loop import StepMetrics, check_arguments, fit
    from ppl_lm.run.fitting.schedule import Schedule
    from ppl_lm.run.measuring import on_held_out
    from ppl_lm.run.outcome import in_words
    from ppl_lm.run.programs import build, require_adapter, uncertainty
    from ppl_lm.run.prompts_file import read_prompts
    from ppl_lm.run.run_folder import fitted_guide, going_on, new_folder, require_free, require_outside
    from ppl_lm.run.run_record import FailedFit
    from ppl_lm.run.settings import Settings
    from ppl_lm.run.write_run import FitWriter, write_measurement

    if max_steps is None and time_limit is None:
        time_limit = 150.0
    with errors(traceback):
        if particles is not None and particles < 2:
            raise ValueError(f"particles={particles}; give at least 2")
        texts, columns = read_prompts(prompts)
        held_out, held_out_columns = (None, {}) if eval_prompts is None else read_prompts(eval_prompts)
        settings = Settings(
            model=absolute(model), guide=absolute(guide), rank=rank, objective=objective, beta=beta,
            lm=whole_path(lm), prompts=texts, columns=columns, max_new_tokens=max_new_tokens, device=device, dtype=dtype,
            seed=seed, batch_size=batch_size, particles=particles or 128, learning_rate=learning_rate, max_steps=max_steps,
            time_limit=time_limit, init_from=None if init_from is None else str(init_from.resolve()),
            eval_prompts=held_out, eval_columns=held_out_columns, **asked(reward, reward_weights, arguments, chat, system),
        )  # fmt: skip
        settings = going_on(settings, typed := {name for name in context.params if is_typed(context, name)})
        settings = as_chats(settings)
        if "rank" in typed:
            require_adapter(settings)
        if particles is None:
            particles = max(8, 128 // max(1, min(batch_size, len(settings.prompts))))
            settings = replace(settings, particles=particles)
        start = None if settings.init_from is None else fitted_guide(Path(settings.init_from))
        path = new_folder(model.rpartition(":")[2]) if output_dir is None else output_dir
        require_free(path, overwrite)
        require_outside(path, settings.lm)
        require_outside(path, settings.init_from, "init-from")
        if num_samples is not None:
            require_enough(num_samples, len(settings.measured[0]))

        def loss(count: int) -> SequenceELBO:
            return SequenceELBO(num_particles=count, objective=objective_named(objective, settings.beta))

        ask_whether_twice(settings.lm)
        check_arguments(loss(particles), batch_size, learning_rate, max_steps, time_limit)
        title = f"posterior {settings.model}, guide {settings.guide}, {len(settings.prompts)} prompt(s); fitting"
        with ProgressBar(title, out) as progress:
            programs = build(settings, start, trainable=True)
            for line in uncertainty(programs):
                progress.say(line)
            on_held_out(programs)  # refuses prompts that do not fit
            free = ("particles" not in typed, "batch_size" not in typed)
            schedule = Schedule.of(programs, loss, num_samples, free, progress.say)
            programs, settings = schedule.programs, schedule.programs.settings
            with FitWriter(path, programs, as_typed(context), overwrite) as writer:

                def on_step(row: StepMetrics) -> None:
                    writer.step(row)
                    progress.step(row)

                def on_fault(kept: str) -> None:
                    if writer.started:
                        writer.fit(FailedFit(kept))

                def on_prior(draws: Draws) -> None:
                    if advice := no_fit_needed(draws, settings, prompts):
                        progress.say(advice)

                fitted = fit(
                    programs.model, programs.guide, programs.prompts, loss(settings.particles),
                    batch_size=settings.batch_size, learning_rate=learning_rate, max_steps=max_steps,
                    time_limit=schedule.for_fit, seed=seed, on_step=on_step, on_fault=on_fault, on_prior=on_prior,
                )  # fmt: skip
        if not writer.started:  # before the first step: there is nothing to write
            if fitted.outcome == "diverged":
                raise ValueError("the first step's gradient is not finite; is the reward, or beta, of a sensible size?")
            raise KeyboardInterrupt
        writer.fit(fitted)
        out.print(in_words(fitted), markup=False)
        ending = ""
        if fitted.outcome != "interrupted":
            with ProgressBar("measuring", out) as progress:
                measurement = schedule.measure(num_samples, progress)
            if measurement is None:
                asked_for = shlex.join(["ppl-lm", "diagnose", str(path), "--num-samples", str(schedule.least)])
                out.print(f"not measured for lack of time; `{asked_for}` does that", markup=False)
            else:
                measurement = measurement.after(fitted)
                write_measurement(path, measurement, programs)
                for part in measured(measurement):
                    out.print(part)
                ending = f"; `{shlex.join(['ppl-lm', 'report', str(path)])}` makes a page of it"
        out.print(f"written: {path}{ending}", markup=False)
    raise typer.Exit({"finished": GOOD, "interrupted": INTERRUPTED}.get(fitted.outcome, FAILED))
