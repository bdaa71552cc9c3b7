"""Which backend takes matrices with orthonormal rows, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from reft_kernels.backends import cpu_orthonormal, cuda_orthonormal, eager_orthonormal, triton_orthonormal
from reft_kernels.orthonormal_problem import OrthonormalProblem, StiefelProblem, device_and_dtype


class OrthonormalBackend(Protocol):
    """What a backend module provides; :mod:`reft_kernels.backends.eager_orthonormal` documents each call."""

    name: str

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine; None if it can."""

    def unsupported_matrices(self, problem: OrthonormalProblem | StiefelProblem) -> str | None:
        """Why this backend cannot take these matrices; None if it can. Reads no tensor's contents."""

    def orthonormalize_forward(self, problem: OrthonormalProblem) -> tuple[tuple[Tensor, ...], Tensor]:
        """R of each matrix, and factors float64 [problem.factor_count]."""

    def orthonormalize_backward(
        self, grads: Sequence[Tensor | None], problem: OrthonormalProblem, factors: Tensor
    ) -> tuple[Tensor | None, ...]:
        """dL/dX of each matrix, None where ``grads`` has None."""

    def stiefel_adamw_step(self, problem: StiefelProblem) -> Tensor | None:
        """Writes parameters, moments and steps; the norm of the gradients, float64 [], with ``max_norm``, else None."""


BACKENDS: dict[str, OrthonormalBackend] = {
    "triton": triton_orthonormal,
    "cuda": cuda_orthonormal,
    "cpu": cpu_orthonormal,
    "eager": eager_orthonormal,
}
NAMES = ("auto", *BACKENDS)


def order(device: torch.device) -> tuple[str, ...]:
    """The backends in the order in which ``auto`` tries them, as for edits."""
    preferred = ("triton", "cuda", "eager") if device.type == "cuda" else ("cpu", "eager")
    return tuple(name for name in preferred if name in BACKENDS)


def choose(name: str, problem: OrthonormalProblem | StiefelProblem) -> OrthonormalBackend:
    """The backend for these matrices: with ``auto`` the first of :func:`order` that can, else the one that is named.

    Raises:
        ValueError: no such backend, or the named one cannot take the matrices; the message says why.
    """
    if name == "auto":
        candidates = (BACKENDS[candidate] for candidate in order(device_and_dtype(problem)[0]))
        return next(candidate for candidate in candidates if refusal(candidate, problem) is None)
    backend = BACKENDS.get(name)
    if backend is None:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    why_not = refusal(backend, problem)
    if why_not is not None:
        raise ValueError(f"backend={name!r} cannot take these matrices: {why_not}")
    return backend


def refusal(backend: OrthonormalBackend, problem: OrthonormalProblem | StiefelProblem) -> str | None:
    """Why ``backend`` would not take ``problem``; None if it would."""
    return backend.unavailable() or backend.unsupported_matrices(problem)
