"""The rows of a job: read, counted, and split into those to train on and those to choose by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from reft_kernels.jobs.errors import UserError, user_errors
from reft_kernels.training.sources import Row, SkippedRows, parse_rows

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
    found = []
    for source in sources:
        what = option if Path(source).expanduser().exists() else f"{option} {source}"
        with user_errors(what, (Exception,)):
            found.append(list(parse_rows(parse, source, split=split, max_examples=max_rows, skipped=skipped)))
    return found


def source_names(sources: Sequence[str]) -> list[str]:
    """A short name for each source: a file's or its folder's, a hub's data set or its configuration."""
    short = [_short_name(source) for source in sources]
    return [name if short.count(name) == 1 else source for name, source in zip(short, sources, strict=True)]


def _short_name(source: str) -> str:
    path = Path(source)
    if not path.expanduser().exists() and ":" in source:
        return source.rpartition(":")[2]
    for part in reversed(path.parts):
        stem = part.partition(".")[0]
        if stem and stem.lower() not in _SPLITS:
            return stem
    return source
