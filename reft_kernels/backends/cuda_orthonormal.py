"""Matrices with orthonormal rows on NVIDIA GPUs by kernels in CUDA C++, compiled ahead of time."""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels.backends import cuda
from reft_kernels.backends.native_orthonormal import OPS
from reft_kernels.orthonormal_problem import OrthonormalProblem, StiefelProblem, device_and_dtype

name = "cuda"

MAX_RANK = 64
# Entries of the table that a kernel is given as its parameter.
MAX_MATRICES = 511
MAX_TENSORS = 510

unavailable = cuda.unavailable


def unsupported_matrices(problem: OrthonormalProblem | StiefelProblem) -> str | None:
    """Why these matrices are not for these kernels; None if they are."""
    device, _ = device_and_dtype(problem)
    why_not = cuda.unsupported_device(device, "matrices") or unsupported_sizes(problem)
    if why_not is None and isinstance(problem, StiefelProblem) and isinstance(problem.lr, Tensor):
        return None if problem.lr.device == device else f"needs lr on {device}, got {problem.lr.device}"
    return why_not


def unsupported_sizes(problem: OrthonormalProblem | StiefelProblem) -> str | None:
    """Why no kernel was compiled for these types, these ranks or so many matrices; None if one was."""
    _, dtype = device_and_dtype(problem)
    if dtype != torch.float32:
        return f"takes float32, got {_name(dtype)}"
    if isinstance(problem, OrthonormalProblem):
        what, count, most = "matrices", len(problem.X), MAX_MATRICES
        ranks = [X.shape[1] for X in problem.X]
    else:
        what, count, most = "tensors", len(problem.parameters), MAX_TENSORS
        ranks = [p.shape[0] for p, own in zip(problem.parameters, problem.orthonormal, strict=True) if own]
        if isinstance(problem.lr, Tensor) and problem.lr.dtype not in (torch.float32, torch.float64):
            return f"takes lr in float32 or float64, got {_name(problem.lr.dtype)}"
    if count > most:
        return f"takes up to {most} {what} at once, got {count}"
    highest = max(ranks, default=1)
    return f"takes ranks up to {MAX_RANK}, got r={highest}" if highest > MAX_RANK else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


orthonormalize_forward = OPS.orthonormalize_forward
orthonormalize_backward = OPS.orthonormalize_backward
stiefel_adamw_step = OPS.stiefel_adamw_step
