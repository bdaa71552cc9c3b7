"""The adapter's files in the folders of transformers' Trainer."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from reft_kernels.checkpoint import ADAPTER_FILE, BASE_FILE, CONFIG_FILE
from reft_kernels.model import ReftModel

STATE_FILE = "trainer_state.json"
# The order in which they are put into a folder; without the last it is no adapter.
FILES = (ADAPTER_FILE, BASE_FILE, CONFIG_FILE)


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The `checkpoint-N` folder of the largest N in `folder` that was written to its end, or None.

    The Trainer writes `trainer_state.json` last, so a checkpoint whose writing was cut short lacks it (or
    holds half of it) and is passed over.
    """
    found: list[tuple[int, Path]] = []
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and path.is_dir():
            found.append((int(step), path))
    return next((path for _, path in sorted(found, reverse=True) if is_complete(path)), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def save_beside(model: ReftModel, folder: Path) -> None:
    """`model.save(folder)` for a folder that holds other files, such as the Trainer's and those that its other
    processes are writing meanwhile.

    A crash leaves the old adapter, the new one, or a folder that is no adapter; never a mixture of two.
    """
    include_model = any(parameter.requires_grad for parameter in model.model.parameters())
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".adapter-", dir=folder))
    try:
        model.save(staging, include_model=include_model)
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        for name in FILES:
            if (staging / name).exists():
                os.replace(staging / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not any(folder.iterdir()):
            folder.rmdir()
