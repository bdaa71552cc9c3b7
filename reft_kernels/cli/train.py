"""Train a ReFT adapter on a base model, which stays frozen, and evaluate it."""

from __future__ import annotations

import argparse
from pathlib import Path

from reft_kernels.cli.train_options import add_arguments, given_settings
from reft_kernels.jobs.errors import user_errors
from reft_kernels.recipes import JobSettings, find_recipe, read_assignment

__all__ = ["HELP", "USAGE", "add_arguments", "run"]

HELP = "train an adapter, by a recipe of the paper or by options"
USAGE = "--model FOLDER|NAME --output FOLDER [--recipe NAME] [--data FILE|NAME ...] [options]"


def run(arguments: argparse.Namespace) -> None:
    """Trains, evaluates, and leaves adapter, checkpoints, predictions and train_log.json in the output folder."""
    settings = read_settings(arguments)

    from reft_kernels.jobs import processes
    from reft_kernels.jobs.run import run_job
    from reft_kernels.jobs.trainer_arguments import RunOptions

    options = RunOptions(
        model=arguments.model,
        output=Path(arguments.output).expanduser(),
        dtype=arguments.dtype,
        device=arguments.device,
        save_steps=arguments.save_steps,
        keep_checkpoints=arguments.keep_checkpoints,
        log_steps=arguments.log_steps,
        report_to=tuple(arguments.report_to),
        cache_folder=Path(arguments.cache_folder).expanduser() if arguments.cache_folder else None,
        report=not arguments.no_report,
        progress=not arguments.no_progress,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
    )
    run_job(settings, options, recipe=arguments.recipe, say=lambda line: print(line, flush=True))
    processes.finish()


def read_settings(arguments: argparse.Namespace) -> JobSettings:
    """The recipe's settings, changed by --set and then by the options given. Raises UserError naming the option."""
    values = {}
    if arguments.recipe is not None:
        with user_errors("--recipe"):
            values = dict(find_recipe(arguments.recipe).values)
    for text in arguments.assignments:
        with user_errors(f"--set {text}"):
            name, value = read_assignment(text)
            values[name] = value
    with user_errors("settings"):
        return JobSettings.of({**values, **given_settings(arguments)})
