"""The Triton kernels of matrices with orthonormal rows, as :mod:`benchmarks.aot` compiles them: what is launched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.h100 import PROGRAMS
from reft_kernels.backends import triton as edits
from reft_kernels.backends import triton_orthonormal as launcher
from reft_kernels.orthonormal_problem import OrthonormalProblem, StiefelProblem

MATRICES = 32
Launches = list[tuple[str, Any, dict[str, Any]]]


def ranks(quick: bool) -> tuple[int, ...]:
    """Those that are reported: the largest of a call."""
    return (4, 8, 64) if quick else (1, 2, 4, 8, 16, 32, 64)


def recorded(d: int, r: int) -> Launches:
    """Name, kernel and arguments of a forward's launches, a backward's, and those of a step with all there is to do."""
    launches: Launches = []
    with recording(launches):
        problem = OrthonormalProblem(of(d, r), of(d, r), of(r))
        _, factors = launcher.orthonormalize_forward(problem)
        launcher.orthonormalize_backward(of(r, d), problem, factors)
        launcher.stiefel_adamw_step(
            StiefelProblem(
                of(r, d), of(r, d), of(r, d), of(r, d), of(), (True,) * MATRICES, (0.0,) * MATRICES, *of(count=1),
                0.9, 0.999, 1e-8, 1.0, True, False, *of(count=1), *of(count=1),
            )
        )  # fmt: skip
    return launches


def phases(arguments: dict[str, Any]) -> str:
    """Which phases of its kernel a launch goes through."""
    return f"{arguments.get('FIRST_PHASE', 1)}-{arguments.get('LAST_PHASE', 3)}"


def of(*shape: int, count: int = MATRICES) -> tuple[torch.Tensor, ...]:
    """Tensors without memory."""
    return tuple(torch.empty(shape, device="meta") for _ in range(count))


def recording(launches: Launches) -> Any:
    """A context in which the launcher's kernels are recorders, and what would ask a GPU is a constant."""
    kernels = launcher._kernels()

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*positional: Any, **named: Any) -> None:
                arguments = dict(zip(self.kernel.arg_names, positional, strict=False)) | named
                launches.append((self.kernel.fn.__name__.removesuffix("_kernel"), self.kernel, arguments))

            return launch

    recorders = SimpleNamespace(**vars(kernels))
    recorders.forward, recorders.backward, recorders.step = (
        Recorder(kernel) for kernel in (kernels.forward, kernels.backward, kernels.step)
    )
    return mock.patch.multiple(
        launcher,
        _kernels=lambda: recorders,
        interpreted=lambda: False,
        barrier_word=lambda device: torch.empty(1, dtype=torch.int32, device=device),
        device_table=lambda values, device: torch.empty(len(values), dtype=torch.int64, device=device),
        edits=SimpleNamespace(
            **{**vars(edits), "resident_programs": lambda device: PROGRAMS, "_on_amd": lambda: False}
        ),
    )
