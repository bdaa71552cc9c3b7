"""The compiled kernels of ``csrc``: their ops, the library that holds them, and the calls of both native backends.

The library ``libreft_kernels_ops.so`` registers implementations for the CPU and, where it was built with nvcc, for
CUDA. It knows nothing of Python, and by torch's stable ABI it loads under every supported torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from reft_kernels.backends.barrier_words import barrier_word_beside
from reft_kernels.philox import keep_threshold
from reft_kernels.problem import EditProblem, Needs
from reft_kernels.reference import ACTIVATIONS

LIBRARY = Path(__file__).parent.parent / "libreft_kernels_ops.so"

_OPERANDS = (
    "Tensor R, Tensor? W, Tensor? b, Tensor? c, Tensor? positions, Tensor? group, Tensor? scale, Tensor? seed, "
    "bool subtract, int activation, int keep_threshold, float keep_scale"
)
# Every tensor is the caller's: nothing is allocated. `add` has a bit for each of dR, dW, db, dc.
SCHEMAS = (
    f"native_edit_forward(Tensor h, Tensor(a!) y, Tensor(b!) delta, Tensor(c!)? s, Tensor(d!)? rows, {_OPERANDS}, "
    "bool copy_idle) -> ()",
    f"native_edit_backward(Tensor grad, Tensor(a!)? dh, Tensor x, {_OPERANDS}, Tensor delta, Tensor? s, "
    "Tensor(b!) gd, Tensor(c!)? gs, Tensor(d!)? dR, Tensor(e!)? dW, Tensor(f!)? db, Tensor(g!)? dc, int add, "
    "bool rebuild, bool copy_idle, Tensor(h!)? barrier) -> ()",
)


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
    return None


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
        batch, length, d = p.h.shape
        h = _with_unit_stride(p.h)
        rows, r = batch * (length if p.positions is None else p.positions.shape[1]), p.R.shape[1]
        linear = p.activation == "linear"
        if inplace:
            y = h
        elif p.positions is None:
            y = torch.empty_like(h, memory_format=torch.contiguous_format)
        else:
            y = h.clone(memory_format=torch.contiguous_format)
        delta = h.new_empty(rows, r, dtype=p.accumulator)
        s = h.new_empty(0 if linear else (rows, r), dtype=p.accumulator)
        before = h.new_empty((rows, d) if save_rows else 0)
        if rows:
            copy_idle = p.positions is None and p.group is not None and not inplace
            self._forward(
                h, y, delta, None if linear else s, before if save_rows else None, *_operands(p), copy_idle
            )  # fmt: skip
            if inplace and not h.is_inference():
                torch.autograd.graph.increment_version(h)
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
        places = (None,) * 4 if into is None else into
        outputs: list[Tensor | None] = []
        for weight, need, place in zip(p[1:5], needs[1:], places, strict=True):
            if weight is None or not need:
                outputs.append(None)
            elif place is not None:
                torch.autograd.graph.increment_version(place)
                outputs.append(place)
            elif rows:
                outputs.append(torch.empty_like(weight, memory_format=torch.contiguous_format))
            else:
                outputs.append(torch.zeros_like(weight, memory_format=torch.contiguous_format))
        dR, dW, db, dc = outputs
        if rows:
            gd = torch.empty_like(delta)
            gs = None if linear else torch.empty_like(delta)
            add = sum(1 << i for i, place in enumerate(places) if place is not None)
            copy_idle = dh is not None and p.positions is None and p.group is not None and dh is not grad
            self._backward(
                grad, dh, _with_unit_stride(p.h), *_operands(p), delta, None if linear else s, gd, gs, dR, dW, db, dc,
                add, rebuild, copy_idle, barrier_word_beside(grad),
            )  # fmt: skip
        return dh, dR, dW, db, dc


def _with_unit_stride(h: Tensor) -> Tensor:
    return h if h.stride(-1) == 1 or h.shape[-1] <= 1 else h.contiguous()


def _operands(p: EditProblem) -> tuple[object, ...]:
    """The operands from R on as the ops take them."""
    weights = (None if t is None else t.contiguous() for t in p[1:5])
    keep = (keep_threshold(p.dropout), 1 / (1 - p.dropout))
    return *weights, *p[5:9], p.subtract, ACTIVATIONS.index(p.activation), *keep


OPS = NativeOps("reft_kernels")
