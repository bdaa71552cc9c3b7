"""The edit on CPUs by compiled, vectorised kernels in torch's own thread pool."""

from __future__ import annotations

from reft_kernels.backends import native
from reft_kernels.problem import EditProblem

name = "cpu"


def unavailable() -> str | None:
    """Why the CPU kernels cannot run on this machine; None if they can."""
    return native.load()


def unsupported(problem: EditProblem) -> str | None:
    """Why this edit is not for these kernels; None if it is."""
    device = problem.h.device
    return None if device.type == "cpu" else f"needs h on the CPU, got {device}"


edit_forward = native.OPS.edit_forward
edit_backward = native.OPS.edit_backward
