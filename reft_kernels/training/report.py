"""A picture and a page of a training run: report.png and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reft_kernels.folders import replace_files
from reft_kernels.training.logs import step_of
from reft_kernels.training.report_page import Run, make_page
from reft_kernels.training.report_picture import draw

PICTURE_FILE = "report.png"
PAGE_FILE = "report.html"
_LOG_FILE = "train_log.json"
_STATE_FILE = "trainer_state.json"


def write_report(
    folder: str | Path,
    *,
    title: str | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Writes `report.html`, and where matplotlib is installed `report.png`, into the folder of a run.

    The picture has the loss, the metrics of evaluations, the error of R's orthonormality and the speed over the
    optimiser steps, as far as the history has them. The page has the picture and tables; it is one file that loads
    nothing.

    Args:
        folder: of the run, which is read for what is not given.
        title: the folder's name by default.
        history: `trainer.state.log_history`; by default that of the folder, see :func:`read_run`.
        settings: names and values; by default the settings of `train_log.json`.
        results: final metrics, by name; by default the last value of each in the history.
        facts: parameters, versions, device and the like; by default those of `train_log.json`.

    Returns the files written, the page first.

    Raises:
        FileNotFoundError: no such folder, or no history is given and none is in the folder.
        ValueError: a damaged log file, or a history without a step.
    """
    folder = Path(folder)
    found = read_run(folder) if history is None else None
    known = _read_json(folder / _LOG_FILE) or {}
    run = Run(
        title or folder.resolve().name,
        list(history) if history is not None else found or [],
        settings if settings is not None else _mapping(known.get("settings")),
        results if results is not None else {},
        facts if facts is not None else {k: v for k, v in known.items() if k not in ("settings", "history")},
    )
    picture = draw(run.history)
    page = make_page(run, picture)

    def write(fresh: Path) -> None:
        (fresh / PAGE_FILE).write_text(page, encoding="utf-8")
        if picture is not None:
            (fresh / PICTURE_FILE).write_bytes(picture)

    replace_files(folder, write)
    return [folder / name for name in (PAGE_FILE, PICTURE_FILE) if name == PAGE_FILE or picture is not None]


def read_run(folder: str | Path) -> list[Mapping[str, Any]]:
    """The log history that is in a run's folder: the longest of those in its `trainer_state.json`, in its checkpoints'
    and in its `train_log.json`.

    Raises FileNotFoundError where there is none, ValueError where a file is no JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    states = [folder / _STATE_FILE, *sorted(folder.glob(f"checkpoint-*/{_STATE_FILE}"))]
    histories = [(_read_json(path) or {}).get("log_history") for path in states]
    histories.append((_read_json(folder / _LOG_FILE) or {}).get("history"))
    held = [[entry for entry in entries if isinstance(entry, Mapping)] for entries in histories if entries]
    if not held:
        raise FileNotFoundError(f"{folder} holds no history of a run ({_STATE_FILE} or {_LOG_FILE})")
    return max(held, key=lambda entries: (max(step_of(entry) for entry in entries), len(entries)))


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    return content if isinstance(content, dict) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
