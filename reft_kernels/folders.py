"""Folders on disk that are written whole or not at all."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)


def replace_folder(
    folder: str | os.PathLike[str], write: Callable[[Path], None], check: Callable[[Path], None]
) -> None:
    """Make a folder anew: all of it or nothing.

    The files are written to a temporary folder beside it, flushed to the disk and moved into its place. What is there
    already is replaced as a whole.

    Args:
        folder: new, empty, or one that ``check`` lets be replaced; parents are made and links followed.
        write: puts the files into the (empty) folder that it is given.
        check: raises where the files of a folder must not be replaced.

    Raises:
        FileExistsError: ``folder`` is a file, or ``check`` says so.
    """
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"cannot save to {target}: it exists and is not a folder")
    if target.is_dir() and any(target.iterdir()):
        check(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not mkdtemp, which keeps everybody else out: an adapter is as readable as any new folder.
    fresh = target.parent / f".{target.name}.{secrets.token_hex(8)}.saving"
    fresh.mkdir()
    try:
        write(fresh)
        for path in (*fresh.iterdir(), fresh):
            _flush(path)
        _replace(fresh, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def replace_files(folder: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Put files into a folder that may hold others: each of them whole, and none before all are on the disk.

    Args:
        folder: made where it is missing.
        write: puts the files into the (empty) folder that it is given.

    Raises FileExistsError where ``folder`` is a file.
    """
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"cannot save to {target}: it exists and is not a folder")
    target.mkdir(parents=True, exist_ok=True)
    fresh = target / f".{secrets.token_hex(8)}.saving"
    fresh.mkdir()
    try:
        write(fresh)
        paths = sorted(fresh.iterdir())
        for path in paths:
            _flush(path)
        for path in paths:
            os.replace(path, target / path.name)
        _flush(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(fresh: Path, target: Path) -> None:
    """Put the fresh folder in the target's place, leaving what was there in the fresh one's.

    One step where the system can swap folders. Elsewhere two renames, undone if the second fails; a process killed
    between them leaves both folders beside the target under names of their own.
    """
    if not target.exists() or not any(target.iterdir()):
        os.replace(fresh, target)
        return
    if _exchange(fresh, target):
        return
    old = fresh.with_name(fresh.name + ".old")
    os.replace(target, old)
    try:
        os.replace(fresh, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, where the system can."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here = -100  # AT_FDCWD
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), _EXCHANGE) == 0)
