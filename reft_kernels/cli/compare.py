"""Train and evaluate several methods under one budget, and write one table and one picture of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reft_kernels.cli.common import add_model_arguments, at_least
from reft_kernels.cli.train_options import add_settings, given_settings
from reft_kernels.jobs.errors import UserError, user_errors
from reft_kernels.recipes import JobSettings, find_recipe, read_assignment
from reft_kernels.recipes.settings import ALL_METHODS

HELP = "run methods under one budget: LoReFT, DiReFT, LoRA, the frozen model, ..."
USAGE = "--model FOLDER|NAME --output FOLDER --recipe NAME [--methods NAME ...] [--seeds N ...] [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `compare`."""
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--methods",
        nargs="+",
        choices=ALL_METHODS,
        default=["loreft", "nodireft", "lora", "frozen"],
        metavar="NAME",
        help=f"of {', '.join(ALL_METHODS)}",
    )
    group.add_argument(
        "--seeds", nargs="+", type=at_least(0), metavar="N", help="one run of each method for each (default: --seed)"
    )
    group.add_argument("--recipe", metavar="NAME", help="the settings of all (see `recipes`)")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="[METHOD:]KEY=VALUE",
        help="change a setting of the recipe, for one method alone if it is named, as in lora:lr=3e-4",
    )
    add_model_arguments(parser, needs_model=True)
    add_settings(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", required=True, metavar="FOLDER", help="for the runs, comparison.json, comparison.md and its picture"
    )
    output.add_argument("--verbose", action="store_true", help="show the progress of each run")


def run(arguments: argparse.Namespace) -> None:
    """Runs what is not finished, and prints the table."""
    folder = Path(arguments.output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: exists and is no folder")
    settings, changes = _settings(arguments)
    if not settings.eval_data and settings.held_out in ("none", "glue"):  # "glue" takes them from evaluation data
        raise UserError("--eval-data: no data is named and --held-out keeps no rows: nothing to compare the methods by")
    if settings.task == "language" and settings.evaluation == "none":
        raise UserError("--evaluation none: leaves nothing to compare the methods by")

    from reft_kernels.jobs.compare import cells, compare, table
    from reft_kernels.jobs.comparison_plot import draw

    plan = cells(settings, arguments.methods, arguments.seeds or [settings.seed], changes, folder)
    options = ["--dtype", arguments.dtype, "--device", arguments.device, "--save-steps", "0", "--no-report"]
    if not arguments.verbose:
        options.append("--no-progress")
    results = compare(
        plan, arguments.model, options, folder, show=arguments.verbose, say=lambda line: print(line, flush=True)
    )
    print(f"\n{table(results)}")
    with user_errors(f"--output {folder}"):
        print(f"table and picture in {folder}" if draw(results, folder / "comparison.png") else f"table in {folder}")


def _settings(arguments: argparse.Namespace) -> tuple[JobSettings, dict[str, dict[str, Any]]]:
    values: dict[str, Any] = {}
    changes: dict[str, dict[str, Any]] = {}
    if arguments.recipe is not None:
        with user_errors("--recipe"):
            values = dict(find_recipe(arguments.recipe).values)
    for text in arguments.assignments:
        method, colon, rest = text.partition(":")
        named = bool(colon) and "=" not in method
        with user_errors(f"--set {text}"):
            if named and method not in ALL_METHODS:
                raise ValueError(f"unknown method {method!r}")
            name, value = read_assignment(rest if named else text)
        (changes.setdefault(method, {}) if named else values)[name] = value
    with user_errors("settings"):
        return JobSettings.of({**values, **given_settings(arguments)}), changes
