"""Measure launch configurations of the Triton kernels on this machine's GPU, and keep the fastest.

The table is written to the folder where every later run looks for it; no run ever tunes by itself. One table holds all
shapes of one GPU: what was measured before and is not measured now stays in it. Each case may take an equal part of
--seconds. With --dry-run nothing is run, and the candidates are listed; that works on any machine.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from reft_kernels.cli.common import at_least
from reft_kernels.jobs.errors import UserError, user_errors
from reft_kernels.triton.config_tables import (
    CONFIGS,
    DTYPES,
    Config,
    Entry,
    Key,
    TableError,
    format_table,
    read_table,
    slug,
)

if TYPE_CHECKING:
    import torch

    from reft_kernels.tuning import Bench, Outcome

HELP = "measure launch configurations on this GPU"
USAGE = "[--d N ...] [--r N ...] [--n N ...] [--out FOLDER] [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tune`."""
    shapes = parser.add_argument_group("what to tune for: every combination of these")
    positive = at_least(1)
    shapes.add_argument("--d", type=positive, nargs="+", default=[4096], metavar="N", help="widths of h")
    shapes.add_argument("--r", type=positive, nargs="+", default=[4, 8], metavar="N", help="ranks")
    shapes.add_argument(
        "--n", type=positive, nargs="+", default=[32, 448, 4096, 65536], metavar="N", help="numbers of edited rows"
    )
    shapes.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of h")
    shapes.add_argument("--params", choices=DTYPES, default="float32", help="dtype of R")
    shapes.add_argument(
        "--activation", choices=("linear", "other"), nargs="+", default=["linear"],
        help="the linear one, or others (one stands for all)",
    )  # fmt: skip
    shapes.add_argument("--op", choices=tuple(CONFIGS), nargs="+", default=list(CONFIGS), help="kernels")
    group = parser.add_argument_group("run")
    group.add_argument(
        "--out",
        metavar="FOLDER",
        help="where to write the table (default: reft_kernels/configs in $XDG_CACHE_HOME or ~/.cache, where every "
        "run looks; of another folder a run is told with REFT_KERNELS_CONFIG_DIR)",
    )
    group.add_argument("--seconds", type=at_least(1, float), default=900.0, metavar="S", help="time for all of it")
    group.add_argument("--dry-run", action="store_true", help="list the candidates and run nothing")


def run(
    arguments: argparse.Namespace,
    device: torch.device | None = None,
    make_bench: Callable[[Key, torch.device], Bench] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Tunes, prints what it gained and writes the table. Tests give a device, a bench and a clock of their own."""
    import torch

    from reft_kernels.triton import launch_configs
    from reft_kernels.tuning_bench import DeviceBench, heuristic

    keys = _keys(arguments)
    if arguments.dry_run:
        cuda = torch.cuda.is_available()
        _list_candidates(keys, lambda key: heuristic(key, torch.device("cuda", 0) if cuda else torch.device("cpu")))
        return
    device = device or _cuda_device()
    folder = Path(arguments.out).expanduser() if arguments.out else launch_configs.user_folder()
    name = launch_configs.device_name(device)
    path = folder / f"{slug(name)}.json"
    _check_writable(path)
    print(f"{name}: {len(keys)} cases, {arguments.seconds:g} s; table {path}", flush=True)
    outcomes, failed = _tune_all(
        keys,
        lambda key: heuristic(key, device),
        lambda key: (make_bench or DeviceBench)(key, device),
        arguments.seconds,
        clock,
        lambda outcome: _merge(path, _header(name, device), outcome),
    )
    launch_configs.reload()
    if failed == len(keys):
        raise UserError("none of the cases could be measured, the reasons stand above")
    print()
    print(format_outcomes(outcomes))
    print(f"{len(outcomes)} entries written to {path}")
    if failed:
        print(f"{failed} cases could not be measured, the reasons stand above")
    left = len(keys) - len(outcomes) - failed
    if left:
        print(f"{left} cases not measured: --seconds {arguments.seconds:g} were over")


def format_outcomes(outcomes: list[Outcome]) -> str:
    """The table of what was gained, one line a case."""
    columns = ("op", "N", "d", "r", "h", "R", "linear", "heuristic us", "best us", "gain", "configuration")
    rows = [columns]
    for outcome in outcomes:
        key = outcome.key
        rows.append((
            key.op, str(key.N), str(key.d), str(key.r), key.h, key.parameters, "yes" if key.linear else "no",
            f"{outcome.heuristic_us:.2f}", f"{outcome.us:.2f}", f"{outcome.gain:.2f}x",
            "the heuristic's" if outcome.config == outcome.heuristic else _words(outcome.config),
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 1 <= i <= 3 or 7 <= i <= 9 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _keys(arguments: argparse.Namespace) -> list[Key]:
    from reft_kernels.backends.triton import MAX_RANK

    for r, d in itertools.product(arguments.r, arguments.d):
        if r > min(d, MAX_RANK):
            raise UserError(f"--r {r}: expected at most {min(d, MAX_RANK)} for --d {d}")
    linear = [name == "linear" for name in arguments.activation]
    shapes = itertools.product(arguments.op, linear, arguments.d, arguments.r, arguments.n)
    keys = [Key(op, arguments.dtype, arguments.params, flag, d, r, n) for op, flag, d, r, n in shapes]
    return sorted(set(keys))


def _cuda_device() -> torch.device:
    import torch

    from reft_kernels.backends import triton as launcher
    from reft_kernels.triton.interpreter import interpreted

    if not torch.cuda.is_available():
        raise UserError(f"needs a CUDA device, torch {torch.__version__} sees none here (--dry-run works without)")
    if interpreted():
        raise UserError("needs compiled kernels, got TRITON_INTERPRET=1")
    reason = launcher.unavailable()
    if reason is not None:
        raise UserError(f"the Triton kernels cannot run here: {reason}")
    return torch.device("cuda", torch.cuda.current_device())


def _tune_all(
    keys: list[Key],
    heuristic: Callable[[Key], Config],
    make_bench: Callable[[Key], Bench],
    seconds: float,
    clock: Callable[[], float],
    keep: Callable[[Outcome], None],
) -> tuple[list[Outcome], int]:
    """Tunes for one key after another, each with an equal part of the time that is left.

    Returns what was found, and how many keys could not be measured.
    """
    from reft_kernels.tuning import CaseError, tune

    outcomes: list[Outcome] = []
    failed = 0
    start = clock()
    for number, key in enumerate(keys, start=1):
        left = seconds - (clock() - start)
        if left <= 0:
            break
        began = clock()
        try:
            outcome = tune(key, heuristic(key), make_bench(key), left / (len(keys) + 1 - number), clock)
        except CaseError as error:
            failed += 1
            print(f"[{number}/{len(keys)}] {key}: not measured: {error}", file=sys.stderr, flush=True)
            continue
        keep(outcome)
        outcomes.append(outcome)
        print(
            f"[{number}/{len(keys)}] {key}: {outcome.heuristic_us:.2f} -> {outcome.us:.2f} us ({outcome.gain:.2f}x), "
            f"{outcome.tried} of {outcome.candidates} candidates in {clock() - began:.0f} s",
            flush=True,
        )
        for config, reason in outcome.dropped.items():
            print(f"  dropped {_words(config)}: {reason}", file=sys.stderr)
    return outcomes, failed


def _list_candidates(keys: list[Key], heuristic: Callable[[Key], Config]) -> None:
    from reft_kernels.tuning import candidates

    total = 0
    for key in keys:
        todo = candidates(key, heuristic(key))
        total += len(todo)
        print(f"{key}: {len(todo)} candidates")
        for index, config in enumerate(todo):
            print(f"  {_words(config)}{'  (heuristic)' if index == 0 else ''}")
    print(f"{len(keys)} cases, {total} candidates")


def _words(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config._asdict().items())


def _check_writable(path: Path) -> None:
    """Finds out before the work whether its result could be kept."""
    from reft_kernels.jobs.run_folder import write_atomically

    _read(path)
    probe = path.with_name(f".{path.name}.probe")
    with user_errors(f"--out {path.parent}"):
        write_atomically(probe, "")
        probe.unlink()


def _read(path: Path) -> dict[Key, Entry]:
    if not path.exists():
        return {}
    with user_errors("the table that is to be added to", (TableError, OSError)):
        return read_table(path).entries


def _merge(path: Path, header: dict[str, str], outcome: Outcome) -> None:
    """Adds one entry to the table, or replaces the one of its key; the file holds the old table or the new."""
    from reft_kernels.jobs.run_folder import write_atomically

    entries = _read(path) | {outcome.key: Entry(outcome.config, outcome.us)}
    with user_errors(f"--out {path.parent}"):
        write_atomically(path, format_table(header, entries))


def _header(name: str, device: torch.device) -> dict[str, str]:
    import torch

    import reft_kernels

    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return {
        "device": name,
        "capability": f"{major}.{minor}",
        "torch": torch.__version__,
        "triton": str(importlib.import_module("triton").__version__),
        "reft_kernels": reft_kernels.__version__,
        "date": datetime.date.today().isoformat(),
    }
