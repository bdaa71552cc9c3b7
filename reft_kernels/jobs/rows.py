"""The rows of a job: read, counted, and split into those to train on and those to choose by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from reft_kernels.jobs.errors import UserError, user_errors
from reft_kernels.training.sources import Row, SkippedRows, is_hub_name, parse_rows
from reft_kernels.training.splits import hold_out, take

T = TypeVar("T")
# Words that say which part of a data set a file is, and not which data set.
_SPLITS = {"train", "training", "trainset", "test", "testset", "dev", "valid", "validation", "eval", "data"}


def read_all(
    sources: Sequence[str],
    parse: Callable[[Row], T],
    *,
    option: str,
    split: str | None = None,
    max_rows: int | None = None,
    skipped: SkippedRows | None = None,
) -> list[list[T]]:
    """What `parse` makes of the rows of each source. Raises UserError that starts with the option's name."""
    if not sources:
        raise UserError(f"{option}: no data is named")
    for source in sources:
        if not Path(source).expanduser().exists() and not is_hub_name(source):
            raise UserError(f"{option} {source}: no such file")
    found = []
    for source in sources:
        with user_errors(option):
            found.append(list(parse_rows(parse, source, split=split, max_examples=max_rows, skipped=skipped)))
    return found


def hold_out_rows(rows: Sequence[T], how: str, seed: int) -> tuple[list[T], list[T]]:
    """Rows to train on and rows to choose by.

    Args:
        how: "none"; "last:N", the last N; "count:N" or "share:X", drawn with `seed`. ("glue" takes none from here.)

    Raises ValueError for anything else, and where one of the two would be empty.
    """
    if how in ("none", "glue"):
        return list(rows), []
    kind, _, text = how.partition(":")
    if kind not in ("last", "count", "share"):
        raise ValueError(f'expected "none", "last:N", "count:N", "share:X" or "glue", got {how!r}')
    try:
        size: float = float(text) if kind == "share" else int(text)
    except ValueError:
        raise ValueError(f"expected a number after {kind}:, got {text!r}") from None
    count = math.floor(len(rows) * size) if kind == "share" and math.isfinite(size) else size
    if not 0 < count < len(rows):
        raise ValueError(f"{how} of {len(rows)} rows leaves none on one side")
    if kind == "last":
        return list(rows[: -int(size)]), list(rows[-int(size) :])
    split = hold_out(len(rows), size, seed)
    return take(rows, sorted(split.kept)), take(rows, split.held_out)


def source_names(sources: Sequence[str]) -> list[str]:
    """A short name for each source: a file's or its folder's, a hub's data set or its configuration. Those that would
    have one name together have as much of their path as tells them apart."""
    names = [_short_name(source) for source in sources]
    for depth in range(2, max(len(Path(source).parts) for source in sources) + 1):
        if len(set(names)) == len(names):
            break
        longer = [str(Path(*Path(source).parts[-depth:])) for source in sources]
        names = [name if names.count(name) == 1 else more for name, more in zip(names, longer, strict=True)]
    return names


def _short_name(source: str) -> str:
    path = Path(source)
    if not path.expanduser().exists() and ":" in source:
        return source.rpartition(":")[2]
    for part in reversed(path.parts):
        stem = part.partition(".")[0]
        if stem and stem.lower() not in _SPLITS:
            return stem
    return source
