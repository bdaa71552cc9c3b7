"""Which launch configuration a kernel gets: looked up in tables of measured ones, never tuned at run time.

The tables of a device are its files in ``$REFT_KERNELS_CONFIG_DIR``, in the user's cache (``$XDG_CACHE_HOME`` or
``~/.cache``, then ``reft_kernels/configs``; ``python -m reft_kernels tune`` writes there) and in the package's own
folder ``configs``, read once in a process. An entry of an earlier folder stands before the same entry of a later one.
A device without tables, and a shape far from all that were measured, have no entry: the launcher then takes its
heuristic.

Every configuration that a lookup returns is one of a table's, and N decides between them at run time only: however
many N there are, no more kernels are compiled than the table has configurations.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from reft_kernels.triton.config_tables import CONFIGS, Config, Entry, Key, Table, TableError, misfit, read_table, slug

# How far, as a ratio, N may be from what was measured.
MAX_N_RATIO = 32

SHIPPED_FOLDER = Path(__file__).parent / "configs"

# A dictionary and no context variable: autograd calls the backward from a thread of its own.
_forced: dict[str, Config] = {}


class _Row(NamedTuple):
    """The entries of one (op, dtypes, linear, d, r), by N."""

    sizes: tuple[int, ...]  # the N measured, ascending
    bounds: tuple[int, ...]  # bounds[i]: the last N that is nearer to sizes[i] than to sizes[i + 1]
    configs: tuple[Config, ...]


def lookup(
    op: str,
    device_name: str,
    *,
    N: int,
    d: int,
    r: int,
    h: torch.dtype,
    parameters: torch.dtype,
    linear: bool,
    grouped: bool = False,
    dropout: float = 0.0,
) -> Config | None:
    """The measured configuration for one launch, or None: the caller then takes its heuristic.

    The op, both dtypes and ``linear`` have to be the entry's. So have the powers of two that d and r are rounded up
    to: with them the kernel's tiles are the same, hence they cover the row, and take the same registers and shared
    memory. Of those entries the ones with the nearest d count (in log space; a tie goes to the smaller d), then the
    ones with the nearest r (a tie goes to the smaller r), then the one with the nearest N (in log space, no further
    than a factor of 32; a tie goes to the smaller N).

    An edit with groups or dropout has no entry. ``rebuild``, scale and the dtype of W make other kernels too, but no
    entries of their own: the tuner keeps only configurations that fit and agree for each of them.

    Args:
        op: ``"edit_forward"`` or ``"edit_backward"``.
        device_name: as :func:`device_name` gives it.
        N: number of rows, at least 1.
        d: number of columns.
        r: rank.
        h: dtype of h.
        parameters: dtype of R.
        linear: whether the activation is linear.
        grouped: whether rows choose among weight sets. Tables are measured without, and have nothing for it: not
            every method of the kernels can.
        dropout: probability of dropout. It takes registers; tables are measured without, and have nothing for it.

    Raises:
        TableError: a file in ``$REFT_KERNELS_CONFIG_DIR`` is broken, or the folder is missing.
        ValueError: the configuration of :func:`use_config` does not fit d or grouped.
    """
    if _forced and op in _forced:
        return _fitting(_forced[op], d, grouped)
    if grouped or dropout > 0:
        return None
    row = _row(op, device_name, h, parameters, linear, d, r)
    if row is None:
        return None
    index = bisect.bisect_left(row.bounds, N)
    nearest = row.sizes[index]
    if max(N, nearest) > MAX_N_RATIO * min(N, nearest):
        return None
    return row.configs[index]


@contextmanager
def use_config(op: str, config: Config) -> Iterator[None]:
    """Within the context every lookup of ``op``, in every thread, returns ``config``. For tuning and tests.

    Raises:
        ValueError: no such op.
        TypeError: ``config`` is another op's.
    """
    if op not in CONFIGS:
        raise ValueError(f"op: expected one of {', '.join(CONFIGS)}, got {op!r}")
    if not isinstance(config, CONFIGS[op]):
        raise TypeError(f"config: expected a {CONFIGS[op].__name__} for {op}, got {type(config).__name__}")
    before = _forced.get(op)
    _forced[op] = config
    try:
        yield
    finally:
        if before is None:
            del _forced[op]
        else:
            _forced[op] = before


@functools.cache
def device_name(device: torch.device) -> str:
    """The name under which a device's tables are kept; for what is no CUDA device, its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def user_folder() -> Path:
    """Where ``python -m reft_kernels tune`` writes: reft_kernels/configs under $XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "reft_kernels" / "configs"


@functools.cache
def tables(device_name: str) -> tuple[Table, ...]:
    """The tables in use for a device, the one that is asked first in front.

    A broken file of the user's cache is left out with one warning.

    Raises:
        TableError: a file in ``$REFT_KERNELS_CONFIG_DIR``, or one that came with the package, is broken.
    """
    file = f"{slug(device_name)}.json"
    found = []
    override = os.environ.get("REFT_KERNELS_CONFIG_DIR")
    if override:
        if not os.path.isdir(override):
            raise TableError(f"REFT_KERNELS_CONFIG_DIR: expected a folder, got {override!r}")
        found.append(_read_if_there(Path(override) / file))
    try:
        found.append(_read_if_there(user_folder() / file))
    except TableError as error:
        warnings.warn(f"ignoring a table of launch configurations: {error}", RuntimeWarning, stacklevel=2)
    found.append(_read_if_there(SHIPPED_FOLDER / file))
    return tuple(table for table in found if table is not None)


def describe(device_name: str) -> str:
    """One line for people: the tables in use for a device, or that the heuristic is.

    Raises:
        TableError: as :func:`tables`.
    """
    found = tables(device_name)
    if not found:
        return "heuristic (no table for this device)"
    return "; ".join(
        f"{table.path}, {len(table.entries)} entries of {table.header['date']}, Triton {table.header['triton']}"
        for table in found
    )


def reload() -> None:
    """Forgets what was read, so that the next lookup reads the tables anew. For tests, and after tuning."""
    tables.cache_clear()
    _entries.cache_clear()
    _row.cache_clear()


def _read_if_there(path: Path) -> Table | None:
    try:
        return read_table(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror}") from None


def _fitting(config: Config, d: int, grouped: bool) -> Config:
    unfit = misfit(config, d)
    if config.METHOD == "weights" and grouped:
        unfit = 'METHOD: expected "rows" or "tiles" where rows choose among weight sets, got "weights"'
    if unfit is not None:
        raise ValueError(f"use_config: {unfit}")
    return config


@functools.cache
def _entries(device_name: str) -> dict[Key, Entry]:
    """All entries of a device."""
    merged: dict[Key, Entry] = {}
    for table in reversed(tables(device_name)):
        merged |= table.entries
    return merged


@functools.cache
def _row(
    op: str, device_name: str, h: torch.dtype, parameters: torch.dtype, linear: bool, d: int, r: int
) -> _Row | None:
    """The entries that serve one (op, dtypes, linear, d, r); None if none does."""
    entries = _entries(device_name)
    wanted = (op, str(h).removeprefix("torch."), str(parameters).removeprefix("torch."), linear)
    near = [
        key
        for key in entries
        if key[:4] == wanted
        and (key.d - 1).bit_length() == (d - 1).bit_length()
        and (key.r - 1).bit_length() == (r - 1).bit_length()
    ]
    if not near:
        return None
    best = min(near, key=lambda key: (max(key.d, d) / min(key.d, d), key.d, abs(key.r - r), key.r))
    keys = sorted(key for key in near if (key.d, key.r) == (best.d, best.r))
    sizes = tuple(key.N for key in keys)
    return _Row(
        sizes=sizes,
        bounds=tuple(math.isqrt(low * high) for low, high in itertools.pairwise(sizes)),
        configs=tuple(entries[key].config for key in keys),
    )
