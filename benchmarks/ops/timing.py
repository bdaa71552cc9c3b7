"""Timers: replays of CUDA graphs, CUDA events, and the host's clock; percentiles in microseconds a call."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

# A graph holds about this much work, so that the start of a replay does not count, or so many calls.
GRAPH_MICROSECONDS = 1000.0
GRAPH_CALLS = 500
WARM_UP_SECONDS = (0.03, 0.4)  # at least, at most
SAMPLE_SECONDS = 0.05
STEADY = 0.02  # two batches of replays whose medians differ by less than this are the steady state


@dataclass(frozen=True)
class Timing:
    """Microseconds a call at the 20th, 50th and 80th percentile of ``samples`` samples, and how they were taken."""

    p20: float
    p50: float
    p80: float
    samples: int
    method: str
    note: str = ""


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds for each program, and how many samples at least and at most.

    A program that takes long has its ``least`` samples in five times its seconds, or three. ``cpu_time``: on the CPU
    count what this thread has computed and not what passed, for a busy machine; only with one thread.
    """

    seconds: float = 0.3
    least: int = 7
    most: int = 60
    cpu_time: bool = False


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-quantile, 0 <= q <= 1, between neighbours by their distance.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("samples: expected at least one")
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(samples: Sequence[float], method: str, note: str = "") -> Timing:
    """The percentiles of samples in microseconds."""
    return Timing(*(percentile(samples, q) for q in (0.2, 0.5, 0.8)), len(samples), method, note)


def time_cpu(programs: Mapping[str, Sequence[Call]], effort: Effort) -> dict[str, Timing]:
    """Times programs by turns with the host's clock: one sample of each in every round, the order turning.

    A program is a list of calls, which are gone through in order; a sample is as many of them as take about a
    millisecond. Programs leave the rounds once they have had their seconds and the least number of samples.
    """
    clock = time.thread_time if effort.cpu_time else time.perf_counter
    cycles = {name: itertools.cycle(calls) for name, calls in programs.items()}
    inner: dict[str, int] = {}
    for name, cycle in cycles.items():
        next(cycle)()  # the first call makes, compiles and allocates
        once = _seconds(cycle, 1, clock)
        inner[name] = max(1, min(1000, int(1e-3 / max(once, 1e-7))))
        if inner[name] > 1:
            _seconds(cycle, inner[name], clock)
    samples: dict[str, list[float]] = {name: [] for name in programs}
    spent = dict.fromkeys(programs, 0.0)
    waiting = list(programs)
    while waiting:
        for name in waiting:
            seconds = _seconds(cycles[name], inner[name], clock)
            spent[name] += seconds
            samples[name].append(1e6 * seconds / inner[name])
        waiting = [*waiting[1:], waiting[0]]
        waiting = [name for name in waiting if not _enough(len(samples[name]), spent[name], effort)]
    return {name: summary(found, clock.__name__) for name, found in samples.items()}


def _enough(samples: int, spent: float, effort: Effort) -> bool:
    if samples >= effort.least:
        return samples >= effort.most or spent >= effort.seconds
    return samples >= 3 and spent >= 5 * effort.seconds


def _seconds(cycle: itertools.cycle[Call], count: int, clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    for _ in range(count):
        next(cycle)()
    return clock() - start


def time_cuda(calls: Sequence[Call], effort: Effort, no_graph: str = "") -> Timing:
    """Times calls on the current CUDA stream, which must not be the default one.

    All calls, in order and as often as make about a millisecond, are captured in one graph; a sample is the time of a
    replay over the number of calls in it. Where that cannot be, a sample is a pass over the calls between two events,
    which contains the host's time where the GPU waits for it; the note says why. ``no_graph`` is a reason known before.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    if no_graph:
        return _time_events(calls, effort, f"no graph: {no_graph}")
    try:
        graph = _capture(calls)
        once = percentile(_events([graph.replay], 5), 0.5)
        passes = min(math.ceil(GRAPH_MICROSECONDS / max(once, 1.0)), max(1, GRAPH_CALLS // len(calls)))
        if passes > 1:
            graph.reset()
            graph = _capture([*calls] * passes)
    except RuntimeError as error:
        torch.cuda.synchronize()
        return _time_events(calls, effort, f"no graph: {(str(error).strip().splitlines() or ['?'])[0][:120]}")
    per_replay = passes * len(calls)
    samples = _steady([graph.replay], effort)
    graph.reset()
    return summary([sample / per_replay for sample in samples], "graph", f"{per_replay} calls a replay")


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """The calls on the current stream as a graph."""
    graph = torch.cuda.CUDAGraph()
    collects = gc.isenabled()
    gc.disable()  # what a collection frees could be what a capture must not touch
    try:
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    finally:
        if collects:
            gc.enable()
    return graph


def _time_events(calls: Sequence[Call], effort: Effort, note: str) -> Timing:
    samples = _steady(calls, effort)
    return summary([sample / len(calls) for sample in samples], "events", note)


def _steady(calls: Sequence[Call], effort: Effort) -> list[float]:
    """Microseconds of passes over the calls, once clocks and temperatures have settled."""
    start = time.perf_counter()
    last = percentile(_events(calls, 3), 0.5)
    while True:
        batch = max(3, min(50, int(1e4 / max(last, 1.0))))
        now = percentile(_events(calls, batch), 0.5)
        spent = time.perf_counter() - start
        if spent > WARM_UP_SECONDS[1] or (spent > WARM_UP_SECONDS[0] and abs(now - last) <= STEADY * last):
            break
        last = now
    count = max(effort.least, min(effort.most, int(1e6 * min(effort.seconds, SAMPLE_SECONDS) / max(now, 1.0))))
    return _events(calls, count)


def _events(calls: Sequence[Call], count: int) -> list[float]:
    """Microseconds of each of ``count`` passes over the calls, by events recorded around it."""
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
    for before, after in pairs:
        before.record()
        for call in calls:
            call()
        after.record()
    torch.cuda.synchronize()
    return [1e3 * before.elapsed_time(after) for before, after in pairs]


def host_microseconds(calls: Sequence[Call], rounds: int = 9) -> float:
    """Median microseconds that the host takes to issue one call to the GPU, which is left to work behind it."""
    samples = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        cycle = itertools.cycle(calls)
        samples.append(1e6 * _seconds(cycle, 20) / 20)
    torch.cuda.synchronize()
    return percentile(samples, 0.5)
