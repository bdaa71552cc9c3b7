"""The edit on CPUs by compiled, vectorised kernels in torch's own thread pool."""

from __future__ import annotations

import ctypes

from reft_kernels.backends import native
from reft_kernels.problem import EditProblem
from reft_kernels.transforms import transformed

name = "cpu"


def unavailable() -> str | None:
    """Why the CPU kernels cannot run on this machine; None if they can."""
    return native.load()


def unsupported(problem: EditProblem) -> str | None:
    """Why this edit is not for these kernels; None if it is."""
    device = problem.h.device
    return transformed(problem) if device.type == "cpu" else f"needs h on the CPU, got {device}"


def instruction_set() -> str:
    """The instructions that the kernels use here: avx512, avx2, neon or baseline. REFT_KERNELS_CPU_ISA lowers them.

    Raises:
        RuntimeError: the native library is not there; the message says why.
    """
    why_not = unavailable()
    if why_not is not None:
        raise RuntimeError(why_not)
    function = ctypes.CDLL(str(native.LIBRARY)).reft_kernels_instruction_set
    function.restype = ctypes.c_char_p
    return str(function().decode())


edit_forward = native.OPS.edit_forward
edit_backward = native.OPS.edit_backward
