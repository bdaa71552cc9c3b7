"""Search for the fastest launch configuration of an edit: which to try, and which of them to believe.

Nothing here needs a GPU: what runs and times an edit is a :class:`Bench`, and :mod:`reft_kernels.tuning_bench` holds
the one for CUDA devices.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from reft_kernels.triton.config_tables import BackwardConfig, Config, ForwardConfig, Key, choices, misfit
from reft_kernels.triton.heuristics import power_of_two

# A candidate has to be this much faster than the heuristic's choice: less is noise.
MIN_GAIN = 1.02
# Of the largest element of the heuristic's result, by how much another's may differ for its order of summation; where
# results are rounded to 16 bits, they may besides differ in their last bit.
SUM_TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 1e-4
# Elements of a tile, or of a weight set, that a thread holds in registers.
MIN_ELEMENTS, MAX_ELEMENTS = 4, 128
MAX_TRIED_ROWS_RANK = 16  # beyond the heuristic's limit, in case it lies too low
MANY_ROWS = 256  # from here on it may pay to hold the weights in registers
# Above this many rows every token is edited, below it named positions are.
MAX_NAMED_ROWS = 16384


class Variant(NamedTuple):
    """What a table's key leaves out although it makes a kernel of its own, with other registers and shared memory."""

    rebuild: bool  # the backward rebuilds the rows before the edit; the forward, then, keeps no copy of them
    scale: bool  # rows have strengths; W is float32 besides, the widest that it can be beside any R

    def __str__(self) -> str:
        return f"rebuild={self.rebuild} scale={self.scale}"


class CaseError(Exception):
    """A case cannot be measured, for instance because its operands do not fit into memory."""


class Bench(Protocol):
    """What runs one edit under a configuration."""

    def results(self, config: Config, variant: Variant) -> Mapping[str, Tensor]:
        """The outputs of one run, by name; for one variant of the same operands at every call."""

    def time(self, config: Config) -> float:
        """Microseconds that one run of :func:`default_variant` takes."""

    def check(self) -> None:
        """Raises if the device is unusable after an error."""


class Outcome(NamedTuple):
    """What was found for one key."""

    key: Key
    heuristic: Config
    heuristic_us: float
    config: Config
    us: float
    tried: int  # configurations that were run, the heuristic's included
    candidates: int
    dropped: dict[Config, str]  # why a configuration was not believed

    @property
    def gain(self) -> float:
        """How many times faster than the heuristic's choice."""
        return self.heuristic_us / self.us


def candidates(key: Key, heuristic: Config) -> list[Config]:
    """The configurations worth trying for ``key``: ``heuristic`` first, then by how little they differ from it."""
    grid = _forward_grid(key) if isinstance(heuristic, ForwardConfig) else _backward_grid(key, heuristic)
    allowed = choices(key.op).values()
    fitting = {
        config
        for config in grid
        if misfit(config, key.d) is None and all(value in values for value, values in zip(config, allowed, strict=True))
    } - {heuristic}
    return [heuristic, *sorted(fitting, key=lambda config: (_distance(config, heuristic), config))]


def default_variant(key: Key) -> Variant:
    """The variant that is timed: what an edit of so many rows is if it is told nothing else."""
    # A forward leaves a copy of its rows only for an edit in place with rebuild=False; inference never does.
    return Variant(rebuild=key.op == "edit_forward" or key.N > MAX_NAMED_ROWS, scale=False)


def tune(
    key: Key, heuristic: Config, bench: Bench, seconds: float, clock: Callable[[], float] = time.monotonic
) -> Outcome:
    """Times the candidates of ``key`` for ``seconds``, in their order, and returns the fastest that computes the edit.

    A candidate that does not compile, and one whose results differ from those of ``heuristic``, is dropped; one that is
    faster than all before it has to pass in every variant of the edit. The fastest is timed once more, in turns with
    ``heuristic``, and has to win again.

    Raises:
        CaseError: ``heuristic`` itself does not run or its results are not finite, or the fastest fails when it is
            timed again.
    """
    start = clock()
    default = default_variant(key)
    others = [Variant(*flags) for flags in itertools.product((True, False), repeat=2) if flags != default]
    with _ending_the_case(bench, "the heuristic's configuration"):
        expected = {variant: _finite(bench.results(heuristic, variant), variant) for variant in (default, *others)}
        times = {heuristic: bench.time(heuristic)}

    def difference(config: Config, variant: Variant) -> str | None:
        rebuilt = getattr(torch, key.h) if variant.rebuild else None
        return mismatch(expected[variant], bench.results(config, variant), rebuilt)

    todo = candidates(key, heuristic)
    dropped: dict[Config, str] = {}
    for config in todo[1:]:
        if clock() - start >= seconds:
            break
        variant, us = default, math.inf
        try:
            reason = difference(config, default)
            if reason is None:
                us = bench.time(config)
                # Each variant is a compilation, and only what may be chosen is worth them.
                for variant in others if us < min(times.values()) else ():
                    reason = difference(config, variant)
                    if reason is not None:
                        break
        except Exception as error:  # Triton, its passes and ptxas have no class of errors in common
            bench.check()
            reason = _first_line(error)
        if reason is None:
            times[config] = us
        else:
            dropped[config] = f"{variant}: {reason}"
    best = min(times, key=lambda config: times[config])
    heuristic_us = times[heuristic]
    if best != heuristic:
        with _ending_the_case(bench, "timing the fastest again"):
            pairs = [(bench.time(heuristic), bench.time(best)) for _ in range(3)]
        heuristic_us, best_us = (statistics.median(column) for column in zip(*pairs, strict=True))
        if heuristic_us < best_us * MIN_GAIN:
            best = heuristic
        else:
            times[best] = best_us
    us = heuristic_us if best == heuristic else times[best]
    return Outcome(key, heuristic, heuristic_us, best, us, len(times) + len(dropped), len(todo), dropped)


@contextmanager
def _ending_the_case(bench: Bench, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        bench.check()
        raise CaseError(f"{what}: {_first_line(error)}") from error


def _finite(results: Mapping[str, Tensor], variant: Variant) -> Mapping[str, Tensor]:
    strange = [name for name, tensor in results.items() if not tensor.isfinite().all()]
    if strange:
        raise ArithmeticError(f"{variant}: {', '.join(strange)} not finite")
    return results


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def mismatch(
    expected: Mapping[str, Tensor], got: Mapping[str, Tensor], rebuilt: torch.dtype | None = None
) -> str | None:
    """How one run's results differ from another's by more than rounding; None if they do not.

    With ``rebuilt``, the dtype of h, dR and dW are of rows that were rebuilt. Another order of summation may round an
    element of those to its neighbour, and of a few rows the sums then differ by as much.
    """
    for name, tensor in expected.items():
        if tensor.numel() == 0:
            continue
        rounded = tensor.dtype in (torch.float16, torch.bfloat16)
        want = tensor.float()
        scale = want.abs().max().item()
        last_bit = torch.finfo(tensor.dtype).eps * want.abs() if rounded else 0.0
        beyond = (got[name].float() - want).abs() - last_bit
        worst = beyond.max().item()
        tolerance = ROUNDED_TOLERANCE if rounded else SUM_TOLERANCE
        if rebuilt is not None and name in ("dR", "dW"):
            tolerance = max(tolerance, torch.finfo(rebuilt).eps)
        if not worst <= tolerance * scale:  # NaN is no small difference
            return f"{name} is off by {worst:.3g} beyond its rounding, its largest element is {scale:.3g}"
    return None


def _forward_grid(key: Key) -> Iterator[Config]:
    for (method, rows, columns), stages, warps in itertools.product(_tiles(key), (1, 2, 4), (2, 4, 8, 16)):
        held = rows * columns * (power_of_two(key.r) if method == "weights" else 1)
        if MIN_ELEMENTS <= held / (32 * warps) <= MAX_ELEMENTS:
            yield ForwardConfig(method, rows, columns, stages, warps)


def _backward_grid(key: Key, heuristic: BackwardConfig) -> Iterator[Config]:
    """Of the two phases, which share the warps, one at a time is other than the heuristic's."""
    own = heuristic._asdict()
    changes: list[dict[str, Any]] = [
        {"METHOD": method, "ROWS_N": rows, "BLOCK_D": columns, "STAGES": stages}
        for (method, rows, columns), stages in itertools.product(_tiles(key), (1, 2, 3))
        if method != "weights"
    ]
    changes += [
        {"BLOCK_N": rows, "SLAB_D": columns, "SLAB_STAGES": stages}
        for rows, columns, stages in itertools.product((16, 32, 64, 128), (32, 64, 128), (1, 2, 3))
    ]
    for change, warps in itertools.product(changes, (4, 8, 16)):
        config = BackwardConfig(**{**own, **change, "num_warps": warps})
        if MIN_ELEMENTS <= config.ROWS_N * config.BLOCK_D / (32 * warps) <= MAX_ELEMENTS:
            yield config


def _tiles(key: Key) -> Iterator[tuple[str, int, int]]:
    """Method, rows and columns of a tile of h; no taller than N asks for, nor wider than d."""
    wide = max(4, power_of_two(key.d))
    if key.r <= MAX_TRIED_ROWS_RANK:
        yield from (("rows", rows, wide) for rows in (1, 2, 4, 8) if rows <= key.N)
    if key.N >= MANY_ROWS:
        yield "weights", 1, wide
    for rows, columns in itertools.product((16, 32, 64), (32, 64, 128)):
        if (rows == 16 or rows < 2 * key.N) and columns <= max(32, wide):
            yield "tiles", rows, columns


def _distance(config: Config, other: Config) -> float:
    """In factors of two, over all fields; another method is as far as two of them."""
    sizes = zip(config[1:], other[1:], strict=True)
    return sum(abs(math.log2(int(a) / int(b))) for a, b in sizes) + 2 * (config.METHOD != other.METHOD)
