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
    dtype: Annotated[str | None, typer.Option(help="Of the LM's weights: float32, bfloat16 or float16; what is trained stays "
                                              "float32.", show_default="as it was saved by ppl_lm, else float32")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Draws for each prompt when measuring.",
                                                    show_default="4096, fewer with many prompts")] = None,
    traceback: Traceback = False,
) -> None:  # fmt: skip
    """Fit a guide to the posterior, measure how close it came, and write a run folder."""
    from ppl_lm.criticism.diagnoses.diagnosis import require_enough
    from ppl_lm.infer.elbo import SequenceELBO
    from ppl_lm.infer.objectives.catalogue import objective as objective_named
    from ppl_lm.report.progress import FitProgress
    from ppl_lm.report.terminal import measured
    from ppl_lm.run.chat_prompts import as_chats
    from ppl_lm.run.fitting.loop import StepMetrics, fit
    from ppl_lm.run.measuring import measure
    from ppl_lm.run.outcome import in_words
    from ppl_lm.run.programs import build, uncertainty
    from ppl_lm.run.prompts_file import read_prompts
    from ppl_lm.run.run_folder import fitted_guide, going_on, new_folder, require_free, require_outside
    from ppl_lm.run.run_record import FailedFit
    from ppl_lm.run.settings import Settings
    from ppl_lm.run.write_run import FitWriter, write_measurement

    if max_steps is None and time_limit is None:
        time_limit = 110.0
    with errors(traceback):
        if particles is not None and particles < 2:
            raise ValueError(f"particles={particles}; give at least 2")
        texts, columns = read_prompts(prompts)
        settings = Settings(
            model=absolute(model), guide=absolute(guide), rank=rank, objective=objective, beta=beta,
            lm=whole_path(lm), prompts=texts, columns=columns, max_new_tokens=max_new_tokens, device=device, dtype=dtype,
            seed=seed, batch_size=batch_size, particles=particles or 128, learning_rate=learning_rate, max_steps=max_steps,
            time_limit=time_limit, init_from=None if init_from is None else str(init_from.resolve()),
            **asked(reward, reward_weights, arguments, chat, system),
        )  # fmt: skip
        settings = as_chats(going_on(settings, {name for name in context.params if is_typed(context, name)}))
        if particles is None:
            particles = max(8, 128 // max(1, min(batch_size, len(settings.prompts))))
            settings = replace(settings, particles=particles)
        start = None if settings.init_from is None else fitted_guide(Path(settings.init_from))
        path = new_folder(model.rpartition(":")[2]) if output_dir is None else output_dir
        require_free(path, overwrite)
        require_outside(path, settings.lm)
        require_outside(path, settings.init_from, "init-from")
        if num_samples is not None:
            require_enough(num_samples)
        loss = SequenceELBO(num_particles=particles, objective=objective_named(objective, settings.beta))
        programs = build(settings, start, trainable=True)
        for line in uncertainty(programs):
            out.print(line, markup=False)
        title = f"posterior {settings.model}, guide {settings.guide}, {len(settings.prompts)} prompt(s); fitting"
        with FitProgress(out, title) as progress, FitWriter(path, programs, as_typed(context), overwrite) as writer:

            def on_step(row: StepMetrics) -> None:
                writer.step(row)
                progress.step(row)

            def on_fault(kept: str) -> None:
                if writer.started:
                    writer.fit(FailedFit(kept))

            fitted = fit(
                programs.model, programs.guide, programs.prompts, loss, batch_size=batch_size, learning_rate=learning_rate,
                max_steps=max_steps, time_limit=time_limit, seed=seed, on_step=on_step, on_fault=on_fault,
            )  # fmt: skip
        if not writer.started:  # before the first step: there is nothing to write
            if fitted.outcome == "diverged":
                raise ValueError("the first step's gradient is not finite; is the reward, or beta, of a sensible size?")
            raise KeyboardInterrupt
        writer.fit(fitted)
        out.print(in_words(fitted), markup=False)
        if fitted.outcome != "interrupted":
            out.print("measuring", markup=False)
            measurement = measure(programs, num_samples).after(fitted)
            write_measurement(path, measurement, programs)
            for part in measured(measurement):
                out.print(part)
        out.print(f"written: {path}; `{shlex.join(['ppl-lm', 'report', str(path)])}` makes a page of it", markup=False)
    raise typer.Exit({"finished": GOOD, "interrupted": INTERRUPTED}.get(fitted.outcome, FAILED))
