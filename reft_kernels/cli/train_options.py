"""The options of `train`: those of a job's settings, and those that say where it runs and what it leaves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from reft_kernels.cli.common import add_model_arguments, at_least, template_text
from reft_kernels.recipes.option import Option
from reft_kernels.recipes.settings import OPTIONS, default_of

SETTING_GROUPS = ("task", "data", "method", "training", "speed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `train`."""
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--recipe", metavar="NAME", help="settings of the paper (see `recipes`), or of an own file: my.json:NAME"
    )
    recipe.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="KEY=VALUE",
        help="change a setting of the recipe, as the option of that name does",
    )
    add_model_arguments(parser, needs_model=True)
    add_settings(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", required=True, metavar="FOLDER", help="for the adapter, train_log.json and checkpoints"
    )
    add_run_options(output)
    when_used = output.add_mutually_exclusive_group()
    when_used.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    when_used.add_argument("--overwrite", action="store_true", help="remove an earlier run from the output folder")


def add_settings(parser: argparse.ArgumentParser, groups: Sequence[str] = SETTING_GROUPS) -> None:
    """One option for each setting of a job; those that are not given are absent from what is parsed."""
    made = {name: parser.add_argument_group(name) for name in groups}
    for name, option in OPTIONS.items():
        if option.group in made:
            _add(made[option.group], name, option)


def add_run_options(group: Any) -> None:
    """What a run writes and shows."""
    add = group.add_argument
    add("--save-steps", type=at_least(0), default=500, metavar="N", help="write a checkpoint every N steps; 0 is never")
    add("--keep-checkpoints", type=at_least(1), default=2, metavar="N", help="delete older ones than the last N")
    add("--log-steps", type=at_least(1), default=10, metavar="N", help="log the loss every N steps")
    add(
        "--report-to",
        nargs="+",
        default=[],
        metavar="NAME",
        help="where else the log goes: tensorboard, wandb and others of the Trainer's, if they are installed",
    )
    add(
        "--cache-folder",
        metavar="FOLDER",
        help="keep token ids here, and what --cache-frozen disk keeps, for this and later runs (default: no token ids, "
        "and the rest in the output folder)",
    )
    add("--no-report", action="store_true", help="write no report.html, report.png and README.md")
    add("--no-progress", action="store_true", help="lines instead of a progress bar")


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as options, by name."""
    return {name: value for name, value in vars(arguments).items() if name in OPTIONS}


def _add(group: Any, name: str, option: Option) -> None:
    words: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(name, option)}
    if option.kind is bool:
        words["action"] = argparse.BooleanOptionalAction
    else:
        words["metavar"] = option.metavar or name.upper()
        if option.choices:
            words |= {"choices": option.choices, "metavar": None}
        if name == "template":
            words["type"] = template_text
        elif option.kind in (int, float):
            words["type"] = option.kind if option.minimum is None else at_least(option.minimum, option.kind)
        if option.many:
            words["nargs"] = "+"
    group.add_argument(f"--{name.replace('_', '-')}", **words)


def _help(name: str, option: Option) -> str:
    default = default_of(name)
    text = option.help.replace("%", "%%")
    if option.kind is bool:
        return f"{text} (default: {'yes' if default else 'no'})"
    return text if default in (None, ()) else f"{text} (default: {default})"
