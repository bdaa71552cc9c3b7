"""The Triton kernels of matrices with orthonormal rows, as :mod:`benchmarks.aot` compiles them: what is launched."""

from __future__ import annotations

from collections.abc import Sequence
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


def reported_ranks(quick: bool) -> tuple[int, ...]:
    """Those that are reported: the largest of a call."""
    return (4, 8, 64) if quick else (1, 2, 4, 8, 16, 32, 64)


def recorded(d: int, ranks: Sequence[int]) -> Launches:
    """Name, kernel and arguments of a forward's launches, a backward's, and those of a step with all there is to do."""
    columns, rows = ([bare(d, r) for r in ranks], [bare(r, d) for r in ranks])
    n, numbers = len(ranks), [bare() for _ in ranks]
    launches: Launches = []
    with recording(launches):
        problem = OrthonormalProblem(tuple(columns), tuple(columns), tuple(bare(r) for r in ranks))
        _, factors = launcher.orthonormalize_forward(problem)
        launcher.orthonormalize_backward(rows, problem, factors)
        launcher.stiefel_adamw_step(
            StiefelProblem(
                *(tuple(rows) for _ in range(4)), tuple(numbers), (True,) * n, (0.0,) * n,
                lr=bare(), beta1=0.9, beta2=0.999, eps=1e-8, max_norm=1.0, riemannian=True, maximize=False,
                grad_scale=bare(), found_inf=bare(),
            )
        )  # fmt: skip
    return launches


def phases(arguments: dict[str, Any]) -> str:
    """Which phases of its kernel a launch goes through."""
    return f"{arguments.get('FIRST_PHASE', 1)}-{arguments.get('LAST_PHASE', 3)}"


def bare(*shape: int) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, device="meta")


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
