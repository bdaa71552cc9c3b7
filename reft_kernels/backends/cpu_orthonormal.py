"""Matrices with orthonormal rows on CPUs by compiled, vectorised kernels in torch's own thread pool."""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels.backends import native
from reft_kernels.backends.native_orthonormal import OPS
from reft_kernels.orthonormal_problem import OrthonormalProblem, StiefelProblem, device_and_dtype

name = "cpu"

_TYPES = (torch.float32, torch.float64)


def unavailable() -> str | None:
    """Why the CPU kernels cannot run on this machine; None if they can."""
    return native.load()


def unsupported_matrices(problem: OrthonormalProblem | StiefelProblem) -> str | None:
    """Why these matrices are not for these kernels; None if they are."""
    if not problem[0]:
        return None
    device, dtype = device_and_dtype(problem)
    if device.type != "cpu":
        return f"needs matrices on the CPU, got {device}"
    if dtype not in _TYPES:
        return f"needs float32 or float64, got {dtype}"
    if isinstance(problem, StiefelProblem) and isinstance(problem.lr, Tensor):
        if problem.lr.device != device:
            return f"needs lr on {device}, got {problem.lr.device}"
        if problem.lr.dtype not in _TYPES:
            return f"needs lr in float32 or float64, got {problem.lr.dtype}"
    return None


orthonormalize_forward = OPS.orthonormalize_forward
orthonormalize_backward = OPS.orthonormalize_backward
stiefel_adamw_step = OPS.stiefel_adamw_step
