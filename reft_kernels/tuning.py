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
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from reft_kernels.triton.config_tables import BackwardConfig, Config, ForwardConfig, Key, choices, misfit

# A candidate has to be this much faster than the heuristic's choice: less is noise.
MIN_GAIN = 1.02
# Of the largest element of the heuristic's result, by how much another's may differ for its order of summation; where
# results are rounded to 16 bits, they may besides differ in their last bit.
SUM_TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 1e-4
# Elements of a tile, or of a weight set, that a thread holds in registers.
MIN_ELEMENTS, MAX_ELEMENTS = 4, 128
MAX_ROWS_RANK = 16
MANY_ROWS = 256  # from here on it may pay to hold the weights in registers


class Bench(Protocol):
    """What runs one edit under a configuration."""

    def results(self, config: Config) -> Mapping[str, Tensor]:
        """The outputs of one run, by name; of the same operands at every call."""

    def time(self, config: Config) -> float:
        """Microseconds that one run takes."""

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


def tune(
    key: Key, heuristic: Config, bench: Bench, seconds: float, clock: Callable[[], float] = time.monotonic
) -> Outcome:
    """Times the candidates of ``key`` for ``seconds``, in their order, and returns the fastest that computes the edit.

    A candidate whose results differ from those of ``heuristic``, and one that does not compile, is dropped. The
    fastest is timed once more, in turns with ``heuristic``, and has to win again.
    """
    start = clock()
    expected = bench.results(heuristic)
    strange = [name for name, tensor in expected.items() if not tensor.isfinite().all()]
    if strange:
        raise ArithmeticError(f"{key}: {', '.join(strange)} of the heuristic's configuration not finite")
    times = {heuristic: bench.time(heuristic)}
    todo = candidates(key, heuristic)
    dropped: dict[Config, str] = {}
    for config in todo[1:]:
        if clock() - start >= seconds:
            break
        try:
            difference = mismatch(expected, bench.results(config))
            if difference is None:
                times[config] = bench.time(config)
            else:
                dropped[config] = difference
        except Exception as error:  # Triton, its passes and ptxas have no class of errors in common
            bench.check()
            lines = str(error).strip().splitlines()
            dropped[config] = f"{type(error).__name__}: {lines[0] if lines else ''}"
    best = min(times, key=lambda config: times[config])
    heuristic_us = times[heuristic]
    if best != heuristic:
        pairs = [(bench.time(heuristic), bench.time(best)) for _ in range(3)]
        heuristic_us, best_us = (statistics.median(column) for column in zip(*pairs, strict=True))
        if heuristic_us < best_us * MIN_GAIN:
            best = heuristic
        else:
            times[best] = best_us
    us = heuristic_us if best == heuristic else times[best]
    return Outcome(key, heuristic, heuristic_us, best, us, len(times) + len(dropped), len(todo), dropped)


def mismatch(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str | None:
    """How one run's results differ from another's by more than rounding; None if they do not."""
    for name, tensor in expected.items():
        if tensor.numel() == 0:
            continue
        rounded = tensor.dtype in (torch.float16, torch.bfloat16)
        want = tensor.float()
        scale = want.abs().max().item()
        last_bit = torch.finfo(tensor.dtype).eps * want.abs() if rounded else 0.0
        beyond = (got[name].float() - want).abs() - last_bit
        worst = beyond.max().item()
        if not worst <= (ROUNDED_TOLERANCE if rounded else SUM_TOLERANCE) * scale:  # NaN is no small difference
            return f"{name} is off by {worst:.3g} beyond its rounding, its largest element is {scale:.3g}"
    return None


def _forward_grid(key: Key) -> Iterator[Config]:
    for (method, rows, columns), stages, warps in itertools.product(_tiles(key), (1, 2, 4), (2, 4, 8, 16)):
        held = rows * columns * (_power_of_two(key.r) if method == "weights" else 1)
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
    wide = max(4, _power_of_two(key.d))
    if key.r <= MAX_ROWS_RANK:
        yield from (("rows", rows, wide) for rows in (1, 2, 4, 8) if rows <= key.N)
    if key.N >= MANY_ROWS:
        yield "weights", 1, wide
    for rows, columns in itertools.product((16, 32, 64), (32, 64, 128)):
        if (rows == 16 or rows < 2 * key.N) and columns <= max(32, wide):
            yield "tiles", rows, columns


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _distance(config: Config, other: Config) -> float:
    """In factors of two, over all fields; another method is as far as two of them."""
    sizes = zip(config[1:], other[1:], strict=True)
    return sum(abs(math.log2(int(a) / int(b))) for a, b in sizes) + 2 * (config.METHOD != other.METHOD)
