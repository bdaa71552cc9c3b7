"""Runs and times one edit on a CUDA device, for :mod:`reft_kernels.tuning`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels.backends import triton as launcher
from reft_kernels.backends.barrier_words import shared_by_captures
from reft_kernels.problem import EditProblem, Needs
from reft_kernels.triton.config_tables import Config, Key
from reft_kernels.triton.heuristics import backward_config, forward_config
from reft_kernels.triton.launch_configs import use_config
from reft_kernels.tuning import MAX_NAMED_ROWS, Variant, default_variant

MAX_SETS = 256
MIN_REPLAYS, MAX_REPLAYS, ENOUGH_MS = 5, 50, 60.0


class Operands(NamedTuple):
    """One edit; what its backward needs beside it is None for a forward."""

    problem: EditProblem
    rebuild: bool
    grad: Tensor | None
    delta: Tensor | None
    s: Tensor | None


def heuristic(key: Key, device: torch.device) -> Config:
    """What the launcher takes for ``key`` without a table."""
    problem = _problem(key, lambda *shape: torch.empty(shape, device="meta"))
    if key.op == "edit_forward":
        return forward_config(problem, key.N, launcher.warpgroups(device))
    return backward_config(problem, key.N, launcher.resident_programs(device), launcher.warpgroups(device))


class DeviceBench:
    """Edits in place, of operands that together exceed the L2 cache, so that each run finds none of its own there."""

    def __init__(self, key: Key, device: torch.device) -> None:
        self.key, self.device = key, device
        self._sets: list[Operands] = []

    def results(self, config: Config, variant: Variant) -> Mapping[str, Tensor]:
        """What a forward writes, or the gradients of a backward; memory that was not written shows as NaN."""
        operands = draw(self.key, self.device, 0, variant)
        with use_config(self.key.op, config), _poisoned():
            return run(self.key, operands)

    def time(self, config: Config) -> float:
        """Median of replays of a CUDA graph, or of launches where there is no capturing them; in microseconds."""
        if not self._sets:
            variant = default_variant(self.key)
            first = draw(self.key, self.device, 1, variant)
            size = sum(t.nbytes for t in (*first.problem, *first[1:]) if isinstance(t, Tensor))
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            count = min(MAX_SETS, 1 + math.ceil(2 * cache / size))
            self._sets = [first, *(draw(self.key, self.device, seed, variant) for seed in range(2, count + 1))]

        def runs() -> None:
            for operands in self._sets:
                run(self.key, operands)

        with use_config(self.key.op, config), torch.cuda.device(self.device):
            runs()
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            try:
                device = self._sets[0].problem.h.device
                with shared_by_captures(device), torch.cuda.graph(graph):
                    runs()
                replay: Callable[[], None] = graph.replay
            except RuntimeError:  # a driver that captures no cooperative launches
                self.check()
                replay = runs
            return 1e3 * _median_ms(replay) / len(self._sets)

    def check(self) -> None:
        """Raises if the device is unusable after an error."""
        torch.cuda.synchronize(self.device)


def draw(key: Key, device: torch.device, seed: int, variant: Variant) -> Operands:
    """Operands of one edit, the same for the same seed.

    R has orthonormal rows and W rows of length about one, so that edits of one tensor in place, over and over, stay
    bounded.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    problem = _problem(key, normal)
    problem = problem._replace(R=torch.linalg.qr(normal(key.d, key.r)).Q.mT[None].to(problem.R.dtype).contiguous())
    if key.N <= MAX_NAMED_ROWS:
        problem = problem._replace(positions=torch.randperm(key.N, generator=generator, device=device)[None])
    if variant.scale:
        scale = 0.5 + torch.rand(1, key.N, generator=generator, device=device)
        problem = problem._replace(scale=scale, W=None if problem.W is None else problem.W.float())
    if key.op == "edit_forward":
        return Operands(problem, variant.rebuild, None, None, None)
    _, delta, s, _ = launcher.edit_forward(problem, inplace=variant.rebuild, save_rows=False)
    return Operands(problem, variant.rebuild, normal(1, key.N, key.d).to(problem.h.dtype), delta, s)


def _problem(key: Key, normal: Callable[..., Tensor]) -> EditProblem:
    """An edit of every token; ``normal`` draws a float32 tensor of a shape."""
    h, parameters = getattr(torch, key.h), getattr(torch, key.parameters)
    return EditProblem(
        h=normal(1, key.N, key.d).to(h),
        R=normal(1, key.r, key.d).to(parameters),
        W=(normal(1, key.r, key.d) * key.d**-0.5).to(parameters),
        b=normal(1, key.r).to(parameters),
        c=None,
        positions=None,
        group=None,
        scale=None,
        seed=None,
        subtract=True,
        activation="linear" if key.linear else "gelu",
        dropout=0.0,
    )


def run(key: Key, operands: Operands) -> dict[str, Tensor]:
    """One edit in place, or its backward; the tensors that it wrote, by name."""
    problem, rebuild, grad, delta, s = operands
    if grad is None or delta is None or s is None:
        y, delta, s, before = launcher.edit_forward(problem, inplace=True, save_rows=not rebuild)
        written = {"y": y, "delta": delta, "s": s, "before": before}
        return {name: tensor for name, tensor in written.items() if tensor.numel()}
    needs = Needs(h=True, R=True, W=True, b=True, c=False)
    dh, dR, dW, db, _ = launcher.edit_backward(grad, problem, delta, s, needs, inplace=True, rebuild=rebuild)
    found = {"dh": dh, "dR": dR, "dW": dW, "db": db}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@contextmanager
def _poisoned() -> Iterator[None]:
    """New tensors hold NaN, so that memory which an earlier run filled cannot pass for a result."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _median_ms(replay: Callable[[], None]) -> float:
    for _ in range(2):
        replay()
    times: list[float] = []
    while len(times) < MIN_REPLAYS or (sum(times) < ENOUGH_MS and len(times) < MAX_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
