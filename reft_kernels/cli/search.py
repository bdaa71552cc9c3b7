"""Choose rank, layers, positions, learning rate, or any other setting, on held-out rows by successive halving."""

from __future__ import annotations

import argparse
from pathlib import Path

from reft_kernels.cli.common import add_model_arguments, at_least
from reft_kernels.cli.train import read_settings
from reft_kernels.cli.train_options import add_settings
from reft_kernels.jobs.errors import user_errors

HELP = "choose settings by successive halving"
USAGE = "--model FOLDER|NAME --output FOLDER --recipe NAME [--over NAME=VALUES ...] [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `search`."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--over",
        nargs="+",
        default=[],
        metavar="NAME=VALUES",
        help="settings to choose and from what: rank=1,4,8 or lr=1e-4..3e-3 (default: rank, layers, positions and lr, "
        "as wide as the paper searched)",
    )
    group.add_argument("--trials", type=at_least(1), default=30, metavar="N", help="begin so many")
    group.add_argument("--hours", type=at_least(0.0, float), metavar="X", help="begin none after so long")
    group.add_argument("--recipe", metavar="NAME", help="the settings of all (see `recipes`)")
    group.add_argument(
        "--set", action="append", default=[], dest="assignments", metavar="KEY=VALUE", help="change one of them"
    )
    add_model_arguments(parser, needs_model=True)
    add_settings(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", required=True, metavar="FOLDER", help="for search.json, search.md, its picture, and best.json"
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs what is missing of the trials, and prints the frontier."""
    settings = read_settings(arguments)
    folder = Path(arguments.output).expanduser()

    from reft_kernels.jobs.base_models import count_layers
    from reft_kernels.jobs.search import search, table
    from reft_kernels.jobs.search_plot import draw
    from reft_kernels.jobs.search_space import read_space
    from reft_kernels.jobs.trainer_arguments import RunOptions

    with user_errors("--over"):
        space = read_space(arguments.over, count_layers(arguments.model))
    options = RunOptions(arguments.model, folder, dtype=arguments.dtype, device=arguments.device)
    results = search(
        settings,
        space,
        options,
        trials=arguments.trials,
        seconds=None if arguments.hours is None else 3600 * arguments.hours,
        say=lambda line: print(line, flush=True),
    )
    print(f"\n{table(results)}")
    with user_errors(f"--output {folder}"):
        draw(results, folder / "search.png")
    print(f"the best settings are a recipe: train --recipe {folder / 'best.json'}")
