"""The parser and the options that the commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from reft_kernels.jobs import processes
from reft_kernels.jobs.base_models import DTYPES


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except those that mean "not given"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, without the usage of every option in front."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n" if processes.says_errors() else None)


def at_least(minimum: float, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """An argparse type: a number no smaller than `minimum`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not minimum <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        return value

    return parse


def template_text(text: str) -> str:
    """An argparse type: a prompt template, in which the two characters `\\n` stand for a line break."""
    text = text.replace("\\n", "\n")
    if text.count("%s") != 1:
        raise argparse.ArgumentTypeError(f'must hold "%s" exactly once, got {text!r}')
    return text


def add_model_arguments(parser: argparse.ArgumentParser, *, needs_model: bool) -> None:
    """--model, --dtype and --device; the model may be left out where an adapter knows it."""
    group = parser.add_argument_group("model")
    where = "" if needs_model else "; by default the one the adapter was trained on"
    group.add_argument(
        "--model",
        metavar="FOLDER|NAME",
        required=needs_model,
        help=f"base model: a folder written by save_pretrained, or a name on the Hugging Face hub{where}",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the base model; auto is bfloat16 on a GPU, else float32",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes the first GPU if there is one (CUDA_VISIBLE_DEVICES chooses another)",
    )


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """--adapter."""
    parser.add_argument_group("adapter").add_argument(
        "--adapter",
        metavar="FOLDER",
        help="folder written by train, or one of its checkpoints; without it (or with 'none') the base model",
    )


def add_template_argument(group: Any) -> None:
    """--template."""
    group.add_argument(
        "--template",
        type=template_text,
        metavar="TEXT",
        help="the prompt, with %%s for the instruction (and, after a blank line, the input); \\n is a line "
        "break (default: %%s\\n, and for a trained adapter the template it was trained with)",
    )
