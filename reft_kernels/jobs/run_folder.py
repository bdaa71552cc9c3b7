"""The output folder of a training run: what may be written there, what an earlier run left, and the log."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reft_kernels.checkpoint import ADAPTER_FILE, BASE_FILE, CONFIG_FILE
from reft_kernels.jobs.errors import USER_ERRORS, UserError, user_errors

LOG_FILE = "train_log.json"
PREDICTIONS, CACHE = "predictions", "cache"
CHECKPOINT = "checkpoint-"


def check_output(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises UserError where `folder` holds something that the user has not asked to go on with or replace."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: exists and is no folder")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if resume and not held:
        raise UserError(f"--resume: no run to resume in {folder}")
    if held and overwrite and not _run_files(folder):
        raise UserError(f"--output {folder}: the folder holds no run to replace, but other files")
    if held and not resume and not overwrite:
        some = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
        raise UserError(
            f"--output {folder}: the folder is in use (it holds {some}); "
            "name another one, or give --resume to go on with its run or --overwrite to replace it"
        )


def _run_files(folder: Path) -> list[Path]:
    from reft_kernels.training.card import CARD_FILE, is_own_card
    from reft_kernels.training.report import PAGE_FILE, PICTURE_FILE

    names = {LOG_FILE, PREDICTIONS, CACHE, PAGE_FILE, PICTURE_FILE, CONFIG_FILE, ADAPTER_FILE, BASE_FILE}
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.name in names or p.name.startswith(CHECKPOINT) or _is_begun(p)]
    return [*found, folder / CARD_FILE] if is_own_card(folder / CARD_FILE) else found


def _is_begun(path: Path) -> bool:
    """Whether this is what a process leaves that is killed while it writes a file of a run."""
    return path.name.startswith((f".{LOG_FILE}.", ".adapter-")) or path.suffix == ".saving"


def remove_run(folder: Path) -> None:
    """Removes what an earlier run wrote to `folder`, and nothing else."""
    with user_errors(f"--output {folder}", (OSError,)):
        for path in _run_files(folder):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_unfinished(folder: Path) -> None:
    """Removes the checkpoints and files of a run whose writing was cut short."""
    from reft_kernels.training.checkpoints import is_complete

    for path in _run_files(folder):
        if path.name.startswith(CHECKPOINT) and not is_complete(path):
            shutil.rmtree(path, ignore_errors=True)
        elif _is_begun(path):
            _remove(path)


def adapter_bytes(folder: Path) -> int:
    """Size on disk of the adapter's files, those of a trained head or of LoRA among them."""
    files = [folder / name for name in (CONFIG_FILE, ADAPTER_FILE, BASE_FILE)]
    return sum(path.stat().st_size for path in files if path.exists())


def write_log(folder: Path, log: dict[str, Any]) -> None:
    """Writes train_log.json, whole or not at all. Raises UserError where the folder cannot be written."""
    with user_errors(f"--output {folder}"):
        write_atomically(folder / LOG_FILE, json.dumps(log, indent=1) + "\n")


def read_log(path: Path) -> dict[str, Any]:
    """What a train_log.json holds. Raises UserError naming the file where it is none."""
    with user_errors(str(path), (*USER_ERRORS, RecursionError)):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    return content


def model_source(name: str) -> str:
    """How a log names a model: the whole path of a folder, else the name on the hub."""
    where = Path(name).expanduser()
    return str(where.resolve()) if where.is_dir() else name


def training_settings(adapter: Path | None) -> dict[str, Any]:
    """The settings that `train` logged beside the adapter, or beside the checkpoint's folder; {} without a log."""
    for folder in () if adapter is None else (adapter, adapter.resolve().parent):
        path = folder / LOG_FILE
        if path.is_file():
            settings = read_log(path).get("settings")
            return settings if isinstance(settings, dict) else {}
    return {}


def write_predictions(folder: Path, name: str, predictions: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON object a row to `predictions/NAME.jsonl`, where NAME is `name` if that can be a file's name."""
    safe = re.sub(r"[^\w.-]+", "_", name)[:60]
    if safe != name:  # other names may become the same text
        safe = f"{safe}-{zlib.crc32(name.encode('utf-8', 'surrogatepass')):08x}"
    path = folder / PREDICTIONS / f"{safe}.jsonl"
    with user_errors(f"--output {folder}"):
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in predictions))


def write_atomically(path: Path, text: str) -> None:
    """Writes a temporary file, then renames it: `path` holds the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
