"""Matrices with orthonormal rows as Triton kernels: one cooperative launch forward, one backward, one for the step.

With TRITON_INTERPRET=1 set before the first import, the same kernels run on CPU tensors in Triton's interpreter. It
runs programs one after the other, so that there each phase is a launch.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reft_kernels.backends import triton as edits
from reft_kernels.backends.barrier_words import barrier_word
from reft_kernels.backends.device_tables import device_table
from reft_kernels.orthonormal_problem import OrthonormalProblem, StiefelProblem, device_and_dtype
from reft_kernels.triton.heuristics import power_of_two
from reft_kernels.triton.interpreter import interpreted

name = "triton"

MAX_ELEMENTS = 2**31 - 1 - 2**20  # of a tensor: offsets within it are int32, those of a last tile too
WARPS = 8
_ALIGNMENT = 32  # elements between the starts of two outputs


class _Tiles(NamedTuple):
    """How matrices are cut, by the largest rank: the bits of the results depend on it, and on nothing else."""

    BLOCK_R: int
    BLOCK_D: int
    SLAB_D: int


_TILES = {
    1: _Tiles(1, 1024, 1024), 2: _Tiles(2, 1024, 1024), 4: _Tiles(4, 256, 512), 8: _Tiles(8, 128, 512),
    16: _Tiles(16, 64, 512), 32: _Tiles(32, 32, 512), 64: _Tiles(64, 16, 512),
}  # fmt: skip
MAX_RANK = max(_TILES)


def unavailable() -> str | None:
    """Why Triton kernels cannot run on this machine; None if they can. Never initialises CUDA."""
    return edits.unavailable()


def unsupported_matrices(problem: OrthonormalProblem | StiefelProblem) -> str | None:
    """Why these matrices are not for these kernels; None if they are."""
    device, dtype = device_and_dtype(problem)
    if interpreted():
        if device.type != "cpu":
            return f"the interpreter takes CPU tensors, got matrices on {device}"
    elif device.type != "cuda":
        return f"needs matrices on a CUDA device, got {device}"
    elif torch.cuda.get_device_capability(device) < edits.MIN_CAPABILITY:
        (needs, at_least), (major, minor) = edits.MIN_CAPABILITY, torch.cuda.get_device_capability(device)
        return f"needs compute capability {needs}.{at_least} or newer, got {major}.{minor}"
    elif dtype == torch.float64:
        return "float64 runs in the interpreter only"
    rank = max(_ranks(problem), default=0)
    if rank > MAX_RANK:
        return f"takes ranks up to {MAX_RANK}, got r={rank}"
    largest = max(t.numel() for t in problem[0])
    if largest > MAX_ELEMENTS:
        return f"takes tensors of up to {MAX_ELEMENTS} elements, got {largest}"
    return None


def _ranks(problem: OrthonormalProblem | StiefelProblem) -> list[int]:
    if isinstance(problem, OrthonormalProblem):
        return [X.shape[1] for X in problem.X]
    return [w.shape[0] for w, own in zip(problem.parameters, problem.orthonormal, strict=True) if own]


@functools.cache
def _kernels() -> SimpleNamespace:
    from reft_kernels.triton.orthonormalize import (
        BACKWARD_SCRATCH,
        FORWARD_SCRATCH,
        orthonormalize_backward_kernel,
        orthonormalize_forward_kernel,
    )
    from reft_kernels.triton.stiefel_adamw import SCRATCH, stiefel_adamw_kernel

    return SimpleNamespace(
        forward=orthonormalize_forward_kernel,
        backward=orthonormalize_backward_kernel,
        step=stiefel_adamw_kernel,
        forward_scratch=FORWARD_SCRATCH.value,
        backward_scratch=BACKWARD_SCRATCH.value,
        step_scratch=SCRATCH.value,
    )


def orthonormalize_forward(problem: OrthonormalProblem) -> tuple[tuple[Tensor, ...], Tensor]:
    """See :func:`reft_kernels.backends.eager_orthonormal.orthonormalize_forward`."""
    p = problem
    kernels = _kernels()
    batch = _Batch(p, range(len(p.X)))
    R = p.X[0].new_empty(batch.outputs)
    factors = R.new_empty(p.factor_count, dtype=torch.float64)
    squares = batch.tiles.BLOCK_R**2
    partials = factors.new_empty(batch.items * 3 * squares)
    scratch = factors.new_empty(len(p.X) * kernels.forward_scratch * squares)
    weights = R.new_empty(len(p.X) * 2 * squares)
    _launch(
        kernels.forward, _phases(), batch.items, batch.table,
        (R, factors, partials, scratch, weights), (len(p.X), batch.items), batch.constants(),
    )  # fmt: skip
    return tuple(batch.output(R, i, transposed=True) for i in range(len(p.X))), factors


def orthonormalize_backward(
    grads: Sequence[Tensor | None], problem: OrthonormalProblem, factors: Tensor
) -> tuple[Tensor | None, ...]:
    """See :func:`reft_kernels.backends.eager_orthonormal.orthonormalize_backward`."""
    p = problem
    found: list[Tensor | None] = [None] * len(p.X)
    asked = [(i, g) for i, g in enumerate(grads) if g is not None]
    if not asked:
        return tuple(found)
    kernels = _kernels()
    members = [i for i, _ in asked]
    pointers = [g.data_ptr() for _, g in asked]
    batch = _Batch(p, members)
    dX = p.X[0].new_empty(batch.outputs)
    squares = batch.tiles.BLOCK_R**2
    partials = factors.new_empty(batch.items * 2 * squares)
    scratch = factors.new_empty(len(members) * kernels.backward_scratch * squares)
    weights = dX.new_empty(len(members) * 4 * squares)
    _launch(
        kernels.backward, _phases(), batch.items, batch.table,
        (device_table(pointers, dX.device), dX, factors, partials, scratch, weights),
        (len(members), batch.items), batch.constants(pointers),
    )  # fmt: skip
    for number, i in enumerate(members):
        found[i] = batch.output(dX, number, transposed=False)
    return tuple(found)


class _Batch:
    """Some matrices of a problem as the kernels find them: their table, and where their results go."""

    def __init__(self, p: OrthonormalProblem, members: Sequence[int]) -> None:
        self.sizes = [tuple(p.X[i].shape) for i in members]
        ranks = [r for _, r in self.sizes]
        self.tiles = _TILES[power_of_two(max(ranks))]
        slabs = [-(-d // self.tiles.SLAB_D) for d, _ in self.sizes]
        self.items = sum(slabs)
        lengths = [-(-d * r // _ALIGNMENT) * _ALIGNMENT for d, r in self.sizes]
        self.begins = _starts(lengths)
        self.outputs = sum(lengths)
        factors = _starts([4 * X.shape[1] ** 2 for X in p.X])
        pointers = [[t[i].data_ptr() for i in members] for t in p]
        self.full = min(ranks) == self.tiles.BLOCK_R
        self.aligned = _aligned([d for d, _ in self.sizes], pointers[0] + pointers[1])
        rows = (
            *pointers,
            [d for d, _ in self.sizes],
            ranks,
            _starts(slabs),
            self.begins,
            [factors[i] for i in members],
        )
        self.table = device_table([value for row in rows for value in row], p.X[0].device)

    def constants(self, more_pointers: Sequence[int] = ()) -> dict[str, Any]:
        """What a kernel is compiled for."""
        return {
            **self.tiles._asdict(), "FULL": self.full, "ALIGNED": self.aligned and _aligned((), more_pointers),
        }  # fmt: skip

    def output(self, whole: Tensor, number: int, *, transposed: bool) -> Tensor:
        """The result of one matrix, [d, r] or [r, d], out of those of all."""
        d, r = self.sizes[number]
        shape = (r, d) if transposed else (d, r)
        return whole[self.begins[number] :][: d * r].view(shape)


def stiefel_adamw_step(problem: StiefelProblem) -> Tensor | None:
    """See :func:`reft_kernels.backends.eager_orthonormal.stiefel_adamw_step`."""
    p = problem
    kernels = _kernels()
    device, dtype = device_and_dtype(p)
    n, own = len(p.parameters), [i for i, o in enumerate(p.orthonormal) if o]
    tiles = _TILES[power_of_two(max((p.parameters[i].shape[0] for i in own), default=8))]
    rows = [w.shape[0] if o else 0 for w, o in zip(p.parameters, p.orthonormal, strict=True)]
    columns = [w.shape[1] if o else w.numel() for w, o in zip(p.parameters, p.orthonormal, strict=True)]
    slab = tiles.BLOCK_R * tiles.SLAB_D
    slabs = [max(1, -(-d // (tiles.SLAB_D if r else slab))) for r, d in zip(rows, columns, strict=True)]
    own_slabs = [s if r else 0 for r, s in zip(rows, slabs, strict=True)]
    pointers = [[t.data_ptr() for t in ts] for ts in (p.parameters, p.exp_avgs, p.exp_avg_sqs, p.steps)]
    gradients = [t.data_ptr() for t in p.gradients]
    fields = (
        *pointers, rows, columns, _starts(slabs), _starts([int(r > 0) for r in rows]), _starts(own_slabs),
        [_bits(decay) for decay in p.weight_decays],
    )  # fmt: skip
    table = device_table([value for field in fields for value in field], device)
    items, squares = sum(slabs), tiles.BLOCK_R**2
    double = functools.partial(torch.empty, dtype=torch.float64, device=device)
    norm = double(()) if p.max_norm is not None else None
    lr, lr_pointer = _scalar_or_pointer(p.lr, device)
    passes = 0 if not own else 2 if tiles.BLOCK_R > 16 else 1
    first = 1 if own or norm is not None else 2
    if interpreted():
        launches = [(phase, phase) for phase in (*range(first, 4), *(4, 5) * passes)]
    elif tiles.BLOCK_R <= 32:
        launches = [(first, 5 if own else 3)]
    else:
        launches = [(first, 3), (4, 5)]
    _launch(
        kernels.step, [{"FIRST_PHASE": begin, "LAST_PHASE": end} for begin, end in launches], items, table,
        (
            device_table(gradients, device),
            double(items),
            double(sum(own_slabs) * squares if p.riemannian else 0),
            double(sum(own_slabs) * squares),
            double(len(own) * kernels.step_scratch * squares),
            torch.empty(len(own) * squares, dtype=dtype, device=device),
            torch.empty(n, dtype=torch.int32, device=device),
            norm, lr_pointer, p.grad_scale, p.found_inf,
        ),
        (
            n, items, _bits(lr), _bits(p.beta1), _bits(p.beta2), _bits(_log(p.beta1)), _bits(_log(p.beta2)),
            _bits(p.eps), _bits(p.max_norm or 0.0),
        ),
        {
            **tiles._asdict(),
            "SLAB": slab,
            "ALIGNED": _aligned(columns, [pointer for ts in (*pointers[:3], gradients) for pointer in ts]),
            "ANY_ORTHONORMAL": bool(own),
            "CLIP": norm is not None,
            "RIEMANNIAN": p.riemannian and bool(own),
            "MAXIMIZE": p.maximize,
            "PASSES": passes,
        },
    )  # fmt: skip
    written = (*p.parameters, *p.exp_avgs, *p.exp_avg_sqs, *p.steps)
    torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])  # a kernel's stores do not
    return norm


def _phases() -> list[dict[str, int]]:
    """One launch for all three phases, or in the interpreter one for each."""
    return [{"PHASE": phase} for phase in ((1, 2, 3) if interpreted() else (0,))]


def _launch(
    kernel: Any,
    launches: Sequence[dict[str, int]],
    items: int,
    table: Tensor,
    tensors: tuple[Tensor | None, ...],
    scalars: tuple[int, ...],
    constants: dict[str, Any],
) -> None:
    """Launches with the same arguments but for the phases; cooperative ones, but in the interpreter."""
    programs = max(1, min(items, edits.resident_programs(table.device)))
    plain = interpreted() or edits._on_amd()
    word = None if interpreted() else barrier_word(table.device)
    constants = {**constants, "FLOAT32_DOT": "ieee" if plain else "tf32x3", "num_warps": WARPS}
    if not plain:
        constants["maxnreg"] = min(255, 65536 // (32 * WARPS))
    if not interpreted():
        constants |= {"launch_cooperative_grid": True, "enable_fp_fusion": True}
    with edits._on_device(table):
        for phases in launches:
            kernel[(programs,)](table, *tensors, word, *scalars, **constants, **phases)


def _starts(lengths: Sequence[int]) -> list[int]:
    """Where each begins, one after the other."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts[:-1]


def _aligned(lengths: Sequence[int], pointers: Sequence[int]) -> bool:
    """Whether all lengths are multiples of 4, and all pointers of 16."""
    return not any(length % 4 for length in lengths) and not any(pointer % 16 for pointer in pointers)


def _scalar_or_pointer(lr: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """The learning rate as a number, or as a tensor that the device can read."""
    if isinstance(lr, Tensor) and lr.device == device:
        return 0.0, lr
    return float(lr), None


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _bits(value: float) -> int:
    """The bits of a float64: Triton passes floating-point arguments as float32."""
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits
