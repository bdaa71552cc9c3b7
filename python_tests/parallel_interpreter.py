"""Triton's interpreter with the programs of a launch running at once, each in a process of its own.

The interpreter proper runs one program after the other, so that a program that waits for another one waits forever.
Here every program is a fork of this process, and the launch's tensors lie in memory that all of them share. The
interpreter's atomics are those of C++ on the addresses themselves, hence they hold between processes too. Each program
falls asleep now and then, so that programs drift apart as far as the waiting between them allows, and one of them,
which the seed names, rests before every store, so that whoever does not wait for it is far ahead.

What this cannot show: orders of memory accesses that the processor at hand does not have.
"""

from __future__ import annotations

import inspect
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import interpreter

from reft_kernels.backends import triton as launcher


class Deadlock(AssertionError):
    """Some programs have not ended in time."""


class ParallelKernel:
    """An interpreted kernel, ``kernel[grid](...)``, whose programs run at once.

    Args:
        kernel: the interpreted function.
        timeout: seconds that a launch may take.
        seed: of the programs' sleeps; program ``seed`` modulo their number is the slow one.
    """

    def __init__(self, kernel: Any, *, timeout: float, seed: int) -> None:
        self.kernel = kernel
        self.timeout = timeout
        self.seed = seed

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*positional: Any, **named: Any) -> None:
            fn = self.kernel.rewrite()
            known = inspect.getfullargspec(fn).args
            named = {name: value for name, value in named.items() if name in known}
            arguments = inspect.getcallargs(fn, *positional, **named)
            for value in arguments.values():
                if isinstance(value, Tensor):
                    value.share_memory_()
            constants = interpreter.GridExecutor(fn, self.kernel.arg_names, grid).constexprs
            scope = interpreter._patch_lang(fn)
            try:
                converted = {
                    name: value if name in constants else interpreter._implicit_cvt(value)
                    for name, value in arguments.items()
                }
                self.run(fn, converted, grid[0])
            finally:
                scope.restore()

        return launch

    def run(self, fn: Callable[..., None], arguments: dict[str, Any], programs: int) -> None:
        """Forks the programs and waits for them; those that have not ended in time are killed."""
        running = {}
        for number in range(programs):
            process = os.fork()
            if process == 0:
                status = 1
                try:
                    interpreter.interpreter_builder.set_grid_dim(programs, 1, 1)
                    interpreter.interpreter_builder.set_grid_idx(number, 0, 0)
                    with sleepy(random.Random(f"{self.seed} {number}"), slow=number == self.seed % programs):
                        fn(**arguments)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                os._exit(status)
            running[process] = number
        failed = []
        deadline = time.monotonic() + self.timeout
        try:
            while running and time.monotonic() < deadline:
                for process in list(running):
                    ended, status = os.waitpid(process, os.WNOHANG)
                    if ended:
                        number = running.pop(process)
                        if status:
                            failed.append(number)
                time.sleep(0.001)
            late = sorted(running.values())
        finally:
            for process in running:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
        if late:
            raise Deadlock(f"programs {late} of {programs} have not ended within {self.timeout} s")
        if failed:
            raise AssertionError(f"programs {sorted(failed)} of {programs} failed")


@contextmanager
def sleepy(rng: random.Random, slow: bool) -> Iterator[None]:
    """Within the context a program rests: at its start, before a tenth of its stores (a slow one before all), and while
    it waits."""
    builder = type(interpreter.interpreter_builder)
    store, atomic = builder.create_masked_store, builder.create_atomic_rmw

    def create_masked_store(self: Any, *arguments: Any) -> Any:
        if slow or rng.random() < 0.1:
            time.sleep(0.01 if slow else rng.random() * 0.01)
        return store(self, *arguments)

    def create_atomic_rmw(self: Any, operation: Any, pointer: Any, value: Any, *others: Any) -> Any:
        time.sleep(rng.random() * (0.002 if value.data.any() else 0.001))
        return atomic(self, operation, pointer, value, *others)

    with mock.patch.multiple(builder, create_masked_store=create_masked_store, create_atomic_rmw=create_atomic_rmw):
        time.sleep(rng.choice((0, 0, 0.05)))
        yield


@contextmanager
def parallel_backward(word: Tensor, *, timeout: float = 60.0, seed: int = 0) -> Iterator[None]:
    """Within the context the launcher's backward is the one launch of a GPU, its programs running at once.

    Args:
        word: int32 [1], the word of the grid barrier.
        timeout: seconds that a launch may take.
        seed: of the programs' sleeps.
    """
    kernels = launcher._kernels()
    parallel = SimpleNamespace(
        forward=kernels.forward,
        backward=ParallelKernel(kernels.backward, timeout=timeout, seed=seed),
        accumulators=kernels.accumulators,
    )
    with mock.patch.multiple(
        launcher,
        _kernels=lambda: parallel,
        barrier_word=lambda device: word,
        interpreted=lambda: False,
    ):
        yield


def shared_word() -> Tensor:
    """A barrier's word before the first launch."""
    return torch.zeros(1, dtype=torch.int32).share_memory_()
