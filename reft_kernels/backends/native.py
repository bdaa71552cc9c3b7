"""The compiled kernels of ``csrc``: their ops, the library that holds them, and the calls of both native backends.

The library ``libreft_kernels_ops.so`` registers implementations for the CPU and, where it was built with nvcc, for
CUDA. It knows nothing of Python, and by torch's stable ABI it loads under every supported torch.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from reft_kernels.backends.barrier_words import barrier_word_beside
from reft_kernels.backends.native_schemas import FINGERPRINT, SCHEMAS
from reft_kernels.backends.tensors import (
    NO_PLACES,
    forward_results,
    weight_gradients,
    weights,
    with_unit_stride,
    written_in_place,
)
from reft_kernels.philox import keep_threshold
from reft_kernels.problem import EditProblem, Needs
from reft_kernels.reference import ACTIVATIONS

LIBRARY = Path(__file__).parent.parent / "libreft_kernels_ops.so"


def define(namespace: str, schemas: tuple[str, ...] = SCHEMAS) -> torch.library.Library:
    """Native ops, by default the edit's, in a namespace of ``torch.ops``, still without implementations.

    Autograd and the counting of versions pass them by: whoever calls them sees to both.
    """
    library = torch.library.Library(namespace, "FRAGMENT")
    for schema in schemas:
        library.define(schema)
        for key in ("Autograd", "ADInplaceOrView"):
            library.impl(schema.partition("(")[0], torch.library.fallthrough_kernel, key)
    return library


_library = define("reft_kernels")


@functools.cache
def load() -> str | None:
    """Loads the library, once; why it cannot be, or None."""
    if not LIBRARY.is_file():
        return "the native library is not built (pip install -v prints why)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the native library does not load: {error.__cause__ or error}"
    if _fingerprint() != FINGERPRINT or build_info().get("schemas", FINGERPRINT) != FINGERPRINT:
        return "the native library was built from other sources; build it again (make setup, or pip install)"
    return None


def _fingerprint() -> str | None:
    """Of the schemas that the loaded library was compiled for; None if it does not tell."""
    try:
        function = ctypes.CDLL(str(LIBRARY)).reft_kernels_schemas
    except AttributeError:
        return None
    function.restype = ctypes.c_char_p
    return str(function().decode())


def build_info() -> dict[str, str]:
    """How the native library was built: compiler, flags, versions, CUDA architectures; empty if it was not."""
    try:
        from reft_kernels import _native
    except ImportError:
        return {}
    info: dict[str, str] = _native.build_info()
    return info


def has_kernels_for(device: str) -> bool:
    """Whether the loaded library has implementations for "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("reft_kernels::native_edit_forward", device)


class NativeOps:
    """``edit_forward`` and ``edit_backward`` of the backends' protocol by the native ops of a namespace."""

    def __init__(self, namespace: str) -> None:
        ops = getattr(torch.ops, namespace)
        self._forward: Callable[..., None] = ops.native_edit_forward.default
        self._backward: Callable[..., None] = ops.native_edit_backward.default

    def edit_forward(
        self, problem: EditProblem, inplace: bool, save_rows: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :func:`reft_kernels.backends.eager.edit_forward`."""
        p = problem
        batch, length, _ = p.h.shape
        h = with_unit_stride(p.h)
        rows = batch * (length if p.positions is None else p.positions.shape[1])
        linear = p.activation == "linear"
        y, delta, s, before = forward_results(p, h, rows, inplace, save_rows)
        if rows:
            copy_idle = p.positions is None and p.group is not None and not inplace
            self._forward(
                h, y, delta, None if linear else s, before if save_rows else None, *_operands(p), copy_idle
            )  # fmt: skip
            if inplace:
                written_in_place(h)
        return y, delta, s, before

    def edit_backward(
        self,
        grad: Tensor,
        problem: EditProblem,
        delta: Tensor,
        s: Tensor,
        needs: Needs,
        *,
        inplace: bool = False,
        rebuild: bool = False,
        into: tuple[Tensor | None, ...] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """See :func:`reft_kernels.backends.eager.edit_backward`."""
        p = problem
        batch, length, d = grad.shape
        rows = batch * (length if p.positions is None else p.positions.shape[1])
        linear = p.activation == "linear"
        if grad.stride(2) != 1 and d > 1:
            grad, inplace = grad.contiguous(), True
        dh = None
        if needs.h:
            if inplace:
                dh = grad
            elif p.positions is None:
                dh = torch.empty_like(grad, memory_format=torch.contiguous_format)
            else:
                dh = grad = grad.clone(memory_format=torch.contiguous_format)
        places = NO_PLACES if into is None else into
        dR, dW, db, dc = weight_gradients(p, rows, needs, places)
        if rows:
            gd = torch.empty_like(delta)
            gs = None if linear else torch.empty_like(delta)
            add = sum(1 << i for i, place in enumerate(places) if place is not None)
            copy_idle = dh is not None and p.positions is None and p.group is not None and dh is not grad
            self._backward(
                grad, dh, with_unit_stride(p.h), *_operands(p), delta, None if linear else s, gd, gs, dR, dW, db, dc,
                add, rebuild, copy_idle, barrier_word_beside(grad),
            )  # fmt: skip
        return dh, dR, dW, db, dc


def _operands(p: EditProblem) -> tuple[object, ...]:
    """The operands from R on as the ops take them."""
    R, W, b, c = weights(p)
    keep = (keep_threshold(p.dropout), 1 / (1 - p.dropout))
    return R, W, b, c, *p[5:9], p.subtract, ACTIVATIONS.index(p.activation), *keep


OPS = NativeOps("reft_kernels")
