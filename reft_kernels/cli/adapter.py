"""Loading a trained adapter with the base model it was trained on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from reft_kernels.checkpoint import CONFIG_FILE
from reft_kernels.config import ReftConfig
from reft_kernels.jobs.adapters import load_adapter
from reft_kernels.jobs.base_models import choose_device, load_base
from reft_kernels.jobs.errors import UserError, user_errors
from reft_kernels.jobs.run_folder import LOG_FILE, training_settings
from reft_kernels.model import ReftModel, get_reft_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reft_kernels.jobs.run import Job


def load_edited(arguments: argparse.Namespace, job: Job | None = None) -> tuple[ReftModel, PreTrainedTokenizerBase]:
    """The ReftModel of `--adapter`, or the base model without edits, and the tokenizer.

    Args:
        job: says whether the model has a classifier's head, and what the adapter is; None for a language model.
    """
    adapter = find_adapter(arguments.adapter)
    settings = training_settings(adapter)
    name = arguments.model or settings.get("model")
    if not isinstance(name, str):
        raise UserError(
            "--model is needed: " + ("no adapter is given" if adapter is None else f"no {LOG_FILE} names it")
        )
    device = choose_device(arguments.device)
    base, tokenizer = load_base(
        name,
        arguments.dtype,
        device,
        labels=None if job is None else job.labels,
        regression=job is not None and job.regression,
    )
    if adapter is None:
        return get_reft_model(base, ReftConfig([])), tokenizer
    with user_errors(f"--adapter {arguments.adapter}"):
        model = load_adapter(adapter, base, settings)
    return model.to(device).eval(), tokenizer


def find_adapter(name: str | None) -> Path | None:
    """The adapter folder, of any format, that the option `--adapter` names, or None for the frozen base model."""
    if name is None or name == "none":
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(f"--adapter {name}: no such folder")
    if not (folder / CONFIG_FILE).is_file() and not _is_foreign(folder):
        checkpoints = sorted(path.name for path in folder.glob("checkpoint-*") if (path / CONFIG_FILE).is_file())
        hint = f"; it holds {', '.join(checkpoints)}, name one of them" if checkpoints else ""
        raise UserError(f"--adapter {name}: the folder holds no {CONFIG_FILE}, so it is no adapter{hint}")
    return folder


def _is_foreign(folder: Path) -> bool:
    """Whether the folder holds an adapter of pyreft or AdapterHub."""
    from reft_kernels.model_files import find_format

    try:
        return find_format(folder) in ("pyreft", "adapterhub")
    except (OSError, ValueError):
        return False
