"""The results on disk: one CSV for each device, rows replaced by key, files replaced whole."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

KEY = ("op", "workload", "peer", "mode", "heat")
COLUMNS = (
    *KEY, "status",
    "N", "B", "S", "d", "r", "G", "h_dtype", "param_dtype", "activation", "inplace", "grad_inplace",
    "p20_us", "p50_us", "p80_us", "samples", "bytes_min", "gb_per_s", "copy_gb_per_s", "share_of_copy",
    "launches", "aten_calls", "host_us", "peak_mib", "method", "sets", "note",
    "device", "threads", "load", "clocks_mhz", "python", "torch", "triton", "cuda", "commit", "date",
)  # fmt: skip

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a CSV; none if there is no file.

    Raises:
        ValueError: the file's columns are not those of this version.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}; move the file away to start anew")
        return list(reader)


def upsert(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows into a CSV: one of a known key replaces the old one in its place, others are added at the end.

    Raises:
        ValueError: a row has a column that the file does not know, or lacks a part of the key.
    """
    kept = {key_of(row): row for row in read(path)}
    for row in rows:
        unknown = set(row) - set(COLUMNS)
        if unknown or not all(row.get(part) for part in KEY):
            raise ValueError(f"row: unknown columns {sorted(unknown)} or an incomplete key {key_of(row)}")
        kept[key_of(row)] = {column: str(row.get(column, "")) for column in COLUMNS}

    def write(partial: Path) -> None:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept.values())

    replace_file(path, write)


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What makes a row one measurement."""
    return tuple(str(row.get(part, "")) for part in KEY)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON whole or not at all."""
    replace_file(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n"))


def replace_file(path: Path, write: Any) -> None:
    """``write(partial)`` fills a file beside ``path``, which then takes its place; a failure leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
