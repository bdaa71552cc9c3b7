"""Tables of launch configurations on disk: one JSON file for each GPU, data and never code.

A file is named after its device (``nvidia_h100_80gb_hbm3.json``) and looks like this, one entry a line, sorted::

    {
     "format": 1,
     "device": "NVIDIA H100 80GB HBM3",
     "capability": "9.0",
     "torch": "2.13.0",
     "triton": "3.9.0",
     "reft_kernels": "0.1.0",
     "date": "2025-11-22",
     "entries": [
      {"op": "edit_forward", "h": "bfloat16", "parameters": "float32", "linear": true, "d": 4096, "r": 4, "N": 448,
       "us": 4.9, "config": {"METHOD": "rows", "BLOCK_N": 4, "BLOCK_D": 4096, "STAGES": 2, "num_warps": 8}}
     ]
    }

(an entry is broken here only to fit the page). ``h`` and ``parameters`` are the dtypes of h and of R, ``linear`` says
whether the activation is linear, ``N`` counts rows, and ``us`` is the time measured, in microseconds; the header says
by what, and when the file was last written.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

FORMAT = 1
HEADER = ("device", "capability", "torch", "triton", "reft_kernels", "date")
DTYPES = ("float32", "float16", "bfloat16")
MIN_DOT = 16  # tl.dot takes no dimension smaller than this


def _powers(first: int, last: int) -> tuple[int, ...]:
    """The powers of two from first to last."""
    return tuple(1 << n for n in range(first.bit_length() - 1, last.bit_length()))


class ForwardConfig(NamedTuple):
    """How the forward kernel is launched. A field's annotation holds the values that it may have."""

    METHOD: Annotated[str, ("rows", "weights", "tiles")]
    BLOCK_N: Annotated[int, _powers(1, 128)]  # rows a program and step; 1 with "weights"
    BLOCK_D: Annotated[int, _powers(4, 16384)]  # columns a step; at least d but with "tiles"
    STAGES: Annotated[int, tuple(range(1, 9))]  # loads in flight
    num_warps: Annotated[int, _powers(1, 16)]


class BackwardConfig(NamedTuple):
    """How the backward kernel is launched. A field's annotation holds the values that it may have."""

    METHOD: Annotated[str, ("rows", "tiles")]  # of phase 1
    ROWS_N: Annotated[int, _powers(1, 128)]  # rows a program and step, phase 1
    BLOCK_D: Annotated[int, _powers(4, 16384)]  # columns a step, phase 1; at least d but with "tiles"
    BLOCK_N: Annotated[int, _powers(16, 128)]  # rows a step, phase 2
    SLAB_D: Annotated[int, _powers(16, 512)]  # columns a program, phase 2
    SLAB_STAGES: Annotated[int, tuple(range(1, 9))]  # loads in flight, phase 2
    STAGES: Annotated[int, tuple(range(1, 9))]  # loads in flight, phase 1
    num_warps: Annotated[int, _powers(1, 16)]


Config = ForwardConfig | BackwardConfig
CONFIGS: dict[str, type[ForwardConfig] | type[BackwardConfig]] = {
    "edit_forward": ForwardConfig,
    "edit_backward": BackwardConfig,
}


class Key(NamedTuple):
    """What an entry was measured for."""

    op: str
    h: str  # dtype
    parameters: str  # dtype
    linear: bool
    d: int
    r: int
    N: int

    def __str__(self) -> str:
        return f"{self.op} {self.h} {self.parameters} linear={self.linear} d={self.d} r={self.r} N={self.N}"


class Entry(NamedTuple):
    """The configuration to use, and the microseconds that it took."""

    config: Config
    us: float


class Table(NamedTuple):
    """One file: where it lies, its header (the names of ``HEADER``) and its entries."""

    path: Path
    header: dict[str, str]
    entries: dict[Key, Entry]


class TableError(ValueError):
    """A file is no table; the message names the file, the entry, what was expected and what came."""


def slug(device_name: str) -> str:
    """The stem of a device's file: ``"NVIDIA H100 80GB HBM3"`` becomes ``"nvidia_h100_80gb_hbm3"``."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


@functools.cache
def choices(op: str) -> dict[str, tuple[int | str, ...]]:
    """For each field of an op's configuration, the values that it may have."""
    hints = get_type_hints(CONFIGS[op], include_extras=True)
    return {name: get_args(hints[name])[1] for name in CONFIGS[op]._fields}


def make_config(op: str, values: Mapping[str, Any]) -> Config:
    """A configuration from its fields' values.

    Raises:
        ValueError: a field is unknown, missing or out of its range.
    """
    kind = CONFIGS[op]
    allowed = choices(op)
    _fields("config", values, required=set(kind._fields) - set(kind._field_defaults), known=kind._fields)
    for name, value in values.items():
        if type(value) is not type(allowed[name][0]) or value not in allowed[name]:
            raise ValueError(f"{name}: expected one of {', '.join(map(str, allowed[name]))}, got {value!r}")
    return kind(**values)


def misfit(config: Config, d: int) -> str | None:
    """Why a kernel could not edit rows of d columns with this configuration; None if it could."""
    rows = "ROWS_N" if isinstance(config, BackwardConfig) else "BLOCK_N"
    if config.METHOD == "tiles":
        small = [name for name in (rows, "BLOCK_D") if getattr(config, name) < MIN_DOT]
        if small:
            return f'{small[0]}: expected at least {MIN_DOT} with "tiles", got {getattr(config, small[0])}'
    elif d > config.BLOCK_D:
        return f'BLOCK_D: expected at least d = {d} with "{config.METHOD}", got {config.BLOCK_D}'
    if config.METHOD == "weights" and getattr(config, rows) != 1:
        return f'{rows}: expected 1 with "weights", got {getattr(config, rows)}'
    return None


def read_table(path: Path) -> Table:
    """Reads and checks one file.

    Raises:
        TableError: it is no table of this format.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise TableError(f"{path}: expected JSON, got {error}") from None
    try:
        _expect("the file", isinstance(data, dict), "an object", type(data).__name__)
        _expect("format", type(data.get("format")) is int and data["format"] == FORMAT, FORMAT, data.get("format"))
        names = ("format", *HEADER, "entries")
        _fields("the file", data, required=set(names), known=names)
        for name in HEADER:
            _expect(name, isinstance(data[name], str), "a string", data[name])
        _expect("entries", isinstance(data["entries"], list), "a list", data["entries"])
    except ValueError as error:
        raise TableError(f"{path}: {error}") from None
    entries: dict[Key, Entry] = {}
    for number, values in enumerate(data["entries"], start=1):
        where = f"{path}: entry {number}"
        try:
            key, entry = _read_entry(values)
            where += f" ({key})"
            _expect("its key", key not in entries, "a new one", "that of an earlier entry")
        except ValueError as error:
            raise TableError(f"{where}: {error}") from None
        entries[key] = entry
    return Table(path, {name: data[name] for name in HEADER}, entries)


def format_table(header: Mapping[str, str], entries: Mapping[Key, Entry]) -> str:
    """The text of a file; the same for the same content, whatever the order of ``entries``."""
    lines = [f' "format": {FORMAT},', *(f' "{name}": {json.dumps(header[name])},' for name in HEADER)]
    rows = [
        f"  {json.dumps({**key._asdict(), 'us': round(entries[key].us, 2), 'config': entries[key].config._asdict()})}"
        for key in sorted(entries)
    ]
    return "\n".join(["{", *lines, ' "entries": [', ",\n".join(rows), " ]", "}"]) + "\n"


def _read_entry(values: Any) -> tuple[Key, Entry]:
    _expect("it", isinstance(values, dict), "an object", values)
    names = (*Key._fields, "us", "config")
    _fields("it", values, required=set(names), known=names)
    _expect("op", values["op"] in tuple(CONFIGS), f"one of {', '.join(CONFIGS)}", values["op"])
    for name in ("h", "parameters"):
        _expect(name, values[name] in DTYPES, f"one of {', '.join(DTYPES)}", values[name])
    _expect("linear", isinstance(values["linear"], bool), "true or false", values["linear"])
    for name in ("d", "r", "N"):
        positive = type(values[name]) is int and values[name] > 0
        _expect(name, positive, "a positive integer", values[name])
    us = values["us"]
    _expect("us", type(us) in (int, float) and 0 < us < float("inf"), "a positive number", us)
    _expect("config", isinstance(values["config"], dict), "an object", values["config"])
    key = Key(*(values[name] for name in Key._fields))
    config = make_config(key.op, values["config"])
    unfit = misfit(config, key.d)
    if unfit is not None:
        raise ValueError(unfit)
    return key, Entry(config, us)


def _expect(what: str, holds: bool, expected: object, got: object) -> None:
    if not holds:
        raise ValueError(f"{what}: expected {expected}, got {got!r}")


def _fields(what: str, values: Mapping[str, Any], required: set[str], known: Iterable[str]) -> None:
    known = tuple(known)
    for name in values:
        _expect(what, name in known, f"no fields but {', '.join(known)}", name)
    missing = [name for name in known if name in required and name not in values]
    if missing:
        raise ValueError(f"{what}: missing {', '.join(missing)}")
