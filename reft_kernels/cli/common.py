"""What the commands share: options, errors in one sentence, and the loading of models and data.

torch and transformers are imported inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reft_kernels.training.data import Example

USER_ERRORS = (ValueError, TypeError, KeyError, ImportError, OSError)
DTYPES = ("auto", "float32", "bfloat16", "float16")


class UserError(Exception):
    """Something the user gave is wrong; the message is one sentence that names it."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except those that mean "not given"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, without the usage of every option in front."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


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


@contextmanager
def user_errors(what: str, kinds: tuple[type[Exception], ...] = USER_ERRORS) -> Iterator[None]:
    """Turns errors about what the user gave into a UserError that starts with `what`."""
    try:
        yield
    except kinds as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{what}: {lines[0] if lines else type(error).__name__}") from error


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


def add_data_arguments(parser: argparse.ArgumentParser, *, split: str) -> Any:
    """--data, --split and --max-examples; returns their group."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="FILE|FOLDER|NAME",
        required=True,
        help="rows with the fields instruction, input, output, answer (input and answer may be left out; eval needs "
        "answer or output): a .jsonl, .json or .parquet file (.gz too), a folder of them, or the name of a data set "
        "on the Hugging Face hub, NAME or NAME:CONFIGURATION",
    )
    group.add_argument(
        "--split", default=split, metavar="NAME", help="split of a data set from the hub, or of a folder's files"
    )
    group.add_argument("--max-examples", type=at_least(1), metavar="N", help="use the first N rows")
    return group


def add_template_argument(group: Any) -> None:
    """--template, into the group of the data."""
    group.add_argument(
        "--template",
        type=template_text,
        metavar="TEXT",
        help="the prompt, with %%s for the instruction (and, after a blank line, the input); \\n is a line "
        "break (default: %%s\\n, and for a trained adapter the template it was trained with)",
    )


def choose_device(name: str) -> str:
    """The device that --device names. Raises UserError where there is none."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    return name


def choose_dtype(name: str, device: str) -> torch.dtype:
    """The dtype that --dtype names: bfloat16 on a GPU and float32 elsewhere for auto."""
    import torch

    if name == "auto":
        name = "bfloat16" if device == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_base(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, in eval mode on `device`, and its tokenizer. For a folder the hub is not asked."""
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local and not (folder / "config.json").is_file():
        raise UserError(f"--model {name}: the folder holds no config.json, so it is no model folder")
    if not local and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or folder.exists()):
        raise UserError(f"--model {name}: no such folder")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()  # of the loading of weights
    source = str(folder) if local else name
    what = f"--model {name}" if local else f"--model {name}: no folder here, and not to be had from the hub"
    with user_errors(what, (Exception,)):  # safetensors, tokenizers and the hub have error classes of their own
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(source, local_files_only=local, dtype=choose_dtype(dtype, device))
    return model.to(device).eval(), tokenizer


def load_examples(data: str, split: str, max_examples: int | None, *, needs_output: bool) -> list[Example]:
    """The rows of a file or a folder of files, or of a data set on the hub if there is no such file."""
    from reft_kernels.training.data import read_examples
    from reft_kernels.training.sources import is_hub_name

    path = Path(data).expanduser()
    if not path.exists() and not is_hub_name(data):
        raise UserError(f"--data {data}: no such file")
    with user_errors("--data"):
        return read_examples(data, split=split, max_examples=max_examples, needs_output=needs_output)
