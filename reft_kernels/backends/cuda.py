"""The edit on NVIDIA GPUs by kernels in CUDA C++, compiled ahead of time."""

from __future__ import annotations

import ctypes
import functools

import torch

from reft_kernels.backends import native
from reft_kernels.problem import EditProblem
from reft_kernels.transforms import transformed

name = "cuda"

MAX_RANK = 64
MIN_CAPABILITY = (8, 0)


@functools.cache
def unavailable() -> str | None:
    """Why the CUDA kernels cannot run on this machine; None if they can. Never initialises CUDA."""
    why_not = native.load()
    if why_not is not None:
        return why_not
    if not native.has_kernels_for("CUDA"):
        why = native.build_info().get("cuda_reason")
        return "the native library was built without CUDA" + (f": {why}" if why else "")
    if torch.version.cuda is None:
        return f"this torch, {torch.__version__}, has no CUDA"
    if not torch.cuda.is_available():
        return "no GPU (torch.cuda.is_available() is False)"
    return None


def unsupported(problem: EditProblem) -> str | None:
    """Why this edit is not for these kernels; None if it is."""
    return unsupported_device(problem.h.device, "h") or unsupported_operands(problem) or transformed(problem)


def unsupported_device(device: torch.device, what: str) -> str | None:
    """Why no kernel of the library runs where ``what`` is; None if they do."""
    if device.type != "cuda":
        return f"needs {what} on a CUDA device, got {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < MIN_CAPABILITY:
        return f"needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or newer, got {major}.{minor}"
    return cannot_launch(device.index)


@functools.cache
def cannot_launch(index: int) -> str | None:
    """Why a GPU does not take the library's code (none was compiled for it, its driver is too old); None if it does."""
    function = ctypes.CDLL(str(native.LIBRARY)).reft_kernels_cannot_launch
    function.restype = ctypes.c_char_p
    return function(index).decode() or None


def unsupported_operands(p: EditProblem) -> str | None:
    """Why no kernel was compiled for these types and ranks; None if one was."""
    if p.R.shape[1] > MAX_RANK:
        return f"takes ranks up to {MAX_RANK}, got r={p.R.shape[1]}"
    h, R = p.h.dtype, p.R.dtype
    W = R if p.W is None else p.W.dtype
    wide = torch.float32
    if h == torch.float64 or (R, W) not in ((wide, wide), (h, h), (wide, h)):
        return f"no kernel was compiled for h of {_name(h)}, R of {_name(R)} and W of {_name(W)}"
    for letter, t in (("b", p.b), ("c", p.c), ("scale", p.scale)):
        if t is not None and t.dtype == torch.float64:
            return f"float64 is not taken, got {letter} of float64"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


edit_forward = native.OPS.edit_forward
edit_backward = native.OPS.edit_backward
