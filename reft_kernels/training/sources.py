"""Where rows come from: files of JSON or parquet, folders of them, and data sets of the Hugging Face hub.

Every row comes with the place it was read from ("train.jsonl, line 3", "train.parquet, row 3"; both count from 1), so
that an error can name it.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
"""The kinds of files that a folder is searched for."""

# The words that say in a file's name which split it is of.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_PARQUET_ROWS = 1024
_ENCODING = "utf-8-sig"  # editors on Windows put a mark in front

Parsed = TypeVar("Parsed")


class Row(NamedTuple):
    """A row's fields and the place it was read from."""

    where: str
    fields: Mapping[str, Any]


@dataclass
class SkippedRows:
    """Rows that were passed over because something is wrong with them: how many, and the first reasons."""

    count: int = 0
    reasons: list[str] = field(default_factory=list)
    kept: int = 5

    def add(self, error: ValueError) -> None:
        """Count a row whose error this is."""
        self.count += 1
        if len(self.reasons) < self.kept:
            self.reasons.append(str(error))

    def __str__(self) -> str:
        more = f"; and {self.count - len(self.reasons)} more" if self.count > len(self.reasons) else ""
        return f"{self.count} rows skipped" + (f": {'; '.join(self.reasons)}{more}" if self.reasons else "")


def read_rows(
    source: str | Path,
    *,
    split: str | None = None,
    max_examples: int | None = None,
    fields: Mapping[str, str] | None = None,
    skipped: SkippedRows | None = None,
    streaming: bool = False,
) -> Iterator[Row]:
    """The rows of a source, one after the other. Files are opened when the first row is asked for.

    Args:
        source: a file, told by its name: `.jsonl` (one JSON object a line, blank lines skipped; so is any name that
            is not known), `.json` (one array of objects, or lines), both also as `.gz`, and `.parquet`; a folder of
            such files, in the order of their names; or the name of a data set on the hub, `"owner/name"` or
            `"owner/name:configuration"`. Text is UTF-8.
        split: of a data set on the hub (None: "train"). In a folder, where a word of a file's name or of the folder
            below it is a split's (train; validation, valid, val or dev; test or eval), only the files of this one are
            read; where no name says a split all are.
        max_examples: stop after this many rows.
        fields: renames, from the source's names to those wanted, as `{"question": "instruction"}`. A renamed field
            takes the place of one that has the name already.
        skipped: count rows that cannot be read here, and go on, instead of raising ValueError.
        streaming: read a data set of the hub as it comes, without downloading it first.

    Raises:
        FileNotFoundError: no such file, and `source` cannot be a name on the hub; a folder without files to read.
        ImportError: the package that reads the source (pyarrow, datasets) is missing.
        ValueError: a broken row (no JSON, no object, not UTF-8, a renamed field missing), no rows at all, damaged gzip
            or parquet data, a split that is not there, or a name that the hub does not give.
    """
    return parse_rows(
        lambda row: row, source, split=split, max_examples=max_examples, fields=fields, skipped=skipped,
        streaming=streaming,
    )  # fmt: skip


def parse_rows(
    parse: Callable[[Row], Parsed],
    source: str | Path,
    *,
    split: str | None = None,
    max_examples: int | None = None,
    fields: Mapping[str, str] | None = None,
    skipped: SkippedRows | None = None,
    streaming: bool = False,
) -> Iterator[Parsed]:
    """What `parse` makes of every row of a source; a row that it raises ValueError for is a broken row.

    Other arguments and errors are those of :func:`read_rows`.
    """
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be at least 1, got {max_examples}")
    found = 0
    for item in _items(source, split, streaming):
        try:
            parsed = parse(_row(item, fields or {}))
        except ValueError as error:
            if skipped is None:
                raise
            skipped.add(error)
            continue
        found += 1
        yield parsed
        if found == max_examples:
            return
    if not found:
        raise ValueError(
            f"{source} holds no rows" + (f" that can be used: {skipped}" if skipped and skipped.count else "")
        )


def is_hub_name(source: str | Path) -> bool:
    """Whether `source`, where no file and no folder of that name is, can be the name of a data set on the hub."""
    text, path = str(source), Path(source).expanduser()
    looks_like_path = path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1
    return not (looks_like_path or path.exists() or text.endswith((*SUFFIXES, ".gz")))


def check_text(text: str, what: str) -> str:
    """The text. Raises ValueError, which starts with `what`, where it holds half of a UTF-16 pair.

    No tokenizer takes it. JSON can hold one as an escape, where a text was cut within a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half a character ({text[error.start]!a} at {error.start})") from None
    return text


class _Bad(NamedTuple):
    """What stands in the place of a row that cannot be decoded."""

    error: ValueError


_Item = tuple[str, Any]  # the place, and what is there: any JSON value, or _Bad


def _row(item: _Item, fields: Mapping[str, str]) -> Row:
    where, value = item
    if isinstance(value, _Bad):
        raise value.error
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a JSON object with named fields, got {type(value).__name__}")
    if not fields:
        return Row(where, value)
    for name in fields:
        if name not in value:
            has = ", ".join(repr(str(key)) for key in value) or "none"
            raise ValueError(f"{where}: field {name!r} is missing (fields there: {has})")
    taken = {*fields, *fields.values()}
    kept = {name: content for name, content in value.items() if name not in taken}
    return Row(where, {**kept, **{new: value[old] for old, new in fields.items()}})


def _items(source: str | Path, split: str | None, streaming: bool) -> Iterator[_Item]:
    path = Path(source).expanduser()
    if path.is_dir():
        for file in find_files(path, split):
            yield from _items_of_file(file)
    elif path.is_file() or not is_hub_name(source):
        yield from _items_of_file(path)
    else:
        yield from _items_of_hub(str(source), split or "train", streaming)


def find_files(folder: str | Path, split: str | None = None) -> list[Path]:
    """The data files in a folder and the folders below it, of the split where names say one. See :func:`read_rows`.

    Raises FileNotFoundError where there is none.
    """
    folder = Path(folder)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name.endswith(SUFFIXES) and not path.name.startswith(".")
    )
    if not files:
        raise FileNotFoundError(f"{folder}: the folder holds no data files ({', '.join(SUFFIXES)})")
    wanted = _split_of_words({split}) or split if split else "train"
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    if not any(splits.values()):
        return files
    chosen = [path for path, name in splits.items() if name == wanted]
    if not chosen:
        there = ", ".join(sorted({name for name in splits.values() if name}))
        raise FileNotFoundError(f"{folder}: no files of the split {split or wanted!r}; there are {there}")
    return chosen


def _split_of(path: Path) -> str | None:
    """The split that the file's name, else the folders above it, name."""
    for part in reversed(path.parts):
        if name := _split_of_words(set(re.split(r"[^a-z]+", part.lower()))):
            return name
    return None


def _split_of_words(words: set[str]) -> str | None:
    return next((split for split, known in _SPLITS.items() if words.intersection(known)), None)


def _items_of_file(path: Path) -> Iterator[_Item]:
    if not path.is_file():
        raise FileNotFoundError(f"no such data file: {path}")
    if path.suffix == ".parquet":
        yield from _items_of_parquet(path)
        return
    with _open(path) as file:
        if path.name.endswith((".json", ".json.gz")) and _starts_an_array(path, file):
            yield from _items_of_array(path, file)
        else:
            yield from _items_of_lines(path, file)


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _starts_an_array(path: Path, file: IO[bytes]) -> bool:
    with _gzip_errors(path, "its start"):
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        while (first := file.read(1)).isspace():
            pass
        file.seek(0)
    return first == b"["


def _items_of_lines(path: Path, file: IO[bytes]) -> Iterator[_Item]:
    lines = enumerate(file, start=1)
    number = 0
    while True:
        with _gzip_errors(path, f"line {number}"):
            number, line = next(lines, (number, b""))
        if not line:
            return
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _decode(line, where)


def _decode(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode(_ENCODING))
    except UnicodeDecodeError as error:
        return _Bad(ValueError(f"{where}: not UTF-8 text (byte {error.start})"))
    except json.JSONDecodeError as error:
        return _Bad(ValueError(f"{where}: not valid JSON, {error.msg} (column {error.colno})"))
    except RecursionError:
        return _Bad(ValueError(f"{where}: brackets inside brackets, too deep to be read"))


def _items_of_array(path: Path, file: IO[bytes]) -> Iterator[_Item]:
    with _gzip_errors(path, "its start"):
        text = file.read()
    try:
        rows: list[Any] = json.loads(text.decode(_ENCODING))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON, {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{path}: brackets inside brackets, too deep to be read") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _items_of_parquet(path: Path) -> Iterator[_Item]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"{path}: parquet files need the package pyarrow, which is not installed") from error

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged parquet data after row {number} ({_first_line(error)})") from None


def _items_of_hub(source: str, split: str, streaming: bool) -> Iterator[_Item]:
    name, _, configuration = source.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"{source}: no file here, and data sets of the hub need the package datasets") from error
    try:
        rows: Iterable[Any] = load_dataset(name, configuration or None, split=split, streaming=streaming)
    except Exception as error:  # datasets, the hub and the network have error classes of their own
        what = f"{source}: no file here, and not to be had from the hub"
        raise ValueError(f"{what} ({_first_line(error)})") from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}, {split}, row {number}", row


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class _gzip_errors:
    """Turns what a damaged gzip file raises into a ValueError that says after what it is damaged."""

    def __init__(self, path: Path, after: str) -> None:
        self.path, self.after = path, after

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
            raise ValueError(f"{self.path}: damaged gzip data after {self.after} ({error})") from None
