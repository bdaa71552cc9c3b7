"""The edit as Triton kernels: one launch forward, one cooperative launch backward.

With TRITON_INTERPRET=1 set before the first import, the same kernels run on CPU tensors in Triton's interpreter.
It runs programs one after the other, so that there the backward's two phases are two launches.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from reft_kernels.backends.barrier_words import barrier_word
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
from reft_kernels.transforms import transformed
from reft_kernels.triton.config_tables import BackwardConfig, Config
from reft_kernels.triton.heuristics import backward_config, forward_config, padded_rank
from reft_kernels.triton.interpreter import interpreted
from reft_kernels.triton.launch_configs import device_name, lookup

name = "triton"

MAX_RANK = 64
MIN_CAPABILITY = (8, 0)
MIN_TRITON = (3, 6)


@functools.cache
def unavailable() -> str | None:
    """Why Triton kernels cannot run on this machine; None if they can. Never initialises CUDA."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    # Not from the installed distribution: builds of torch bring Triton under several names.
    version: str = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
        return f"needs Triton {MIN_TRITON[0]}.{MIN_TRITON[1]} or newer, got {version}"
    if _on_amd():
        return "compiles for AMD GPUs, but has not been tried on one"
    if not (interpreted() or torch.cuda.is_available()):
        return "no GPU (torch.cuda.is_available() is False), and TRITON_INTERPRET=1 is not set"
    return None


def _on_amd() -> bool:
    """Whether this is a torch for AMD GPUs; benchmarks.aot compiles for them."""
    return torch.version.hip is not None


def unsupported(problem: EditProblem) -> str | None:
    """Why this edit is not for these kernels; None if it is."""
    device = problem.h.device
    if interpreted():
        if device.type != "cpu":
            return f"the interpreter takes CPU tensors, got h on {device}"
        operands = (problem.h, problem.R, problem.W, problem.b, problem.c, problem.scale)
        if problem.accumulator == torch.float64 and any(t is not None and t.dtype == torch.bfloat16 for t in operands):
            return "the interpreter does not convert between bfloat16 and float64"
    elif device.type != "cuda":
        return f"needs h on a CUDA device, got {device}"
    elif torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or newer, got {major}.{minor}"
    elif problem.accumulator == torch.float64:
        return "float64 runs in the interpreter only"
    if problem.R.shape[1] > MAX_RANK:
        return f"takes ranks up to {MAX_RANK}, got r={problem.R.shape[1]}"
    return transformed(problem)


@functools.cache
def _kernels() -> SimpleNamespace:
    import triton.language as tl

    from reft_kernels.triton.edit_backward import edit_backward_kernel
    from reft_kernels.triton.edit_forward import edit_forward_kernel

    return SimpleNamespace(
        forward=edit_forward_kernel,
        backward=edit_backward_kernel,
        accumulators={torch.float32: tl.float32, torch.float64: tl.float64},
    )


def edit_forward(problem: EditProblem, inplace: bool, save_rows: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`reft_kernels.backends.eager.edit_forward`."""
    p = problem
    batch, length, _ = p.h.shape
    h = with_unit_stride(p.h)
    slots = length if p.positions is None else p.positions.shape[1]
    rows = batch * slots
    y, delta, s, before = forward_results(p, h, rows, inplace, save_rows)
    if rows == 0:
        return y, delta, s, before
    kernels = _kernels()
    config = _measured("edit_forward", p, rows) or forward_config(p, rows, warpgroups(h.device))
    programs = -(-rows // config.BLOCK_N)
    if config.METHOD == "weights":
        programs = min(programs, resident_programs(h.device))
    with _on_device(h):
        kernels.forward[(programs,)](
            h, y, delta, s, before, *weights(p), p.positions, p.group, p.scale, p.seed,
            rows, slots, length, p.R.shape[0],
            h.stride(0), h.stride(1), y.stride(0), y.stride(1), *_slot_strides(p),
            1 / (1 - p.dropout),
            **_constants(p, config),
            HAS_B=p.b is not None,
            HAS_C=p.c is not None and p.subtract,
            SAVE_ROWS=save_rows,
            COPY_OTHERS=p.positions is None and p.group is not None and not inplace,
            ACCUMULATOR=kernels.accumulators[p.accumulator],
        )  # fmt: skip
    if inplace:
        written_in_place(h)
    return y, delta, s, before


def edit_backward(
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
    slots = length if p.positions is None else p.positions.shape[1]
    rows, r = batch * slots, p.R.shape[1]
    linear = p.activation == "linear"
    if grad.stride(2) != 1 and d > 1:
        grad = grad.contiguous()
    elif needs.h and not inplace:
        grad = grad.clone(memory_format=torch.contiguous_format)
    x = with_unit_stride(p.h)
    places = NO_PLACES if into is None else into
    dR, dW, db, dc = weight_gradients(p, rows, needs, places)
    gradients = (grad if needs.h else None, dR, dW, db, dc)
    if rows == 0:
        return gradients
    gd = delta.new_empty(rows, r)
    gs = gd if linear else torch.empty_like(gd)
    R, W, _, _ = weights(p)
    kernels = _kernels()
    resident = resident_programs(grad.device)
    config = _measured("edit_backward", p, rows) or backward_config(p, rows, resident, warpgroups(grad.device))
    assert isinstance(config, BackwardConfig)
    items = -(-d // config.SLAB_D) * p.R.shape[0]
    programs = min(max(-(-rows // config.ROWS_N), items), resident)
    chunk = _chunk(rows, d, grad, x, config, programs, items)
    phases = (1, 2) if interpreted() else (0,)
    with _on_device(grad):
        for phase in phases:
            kernels.backward[(programs,)](
                grad, x, delta, s, R, W, p.positions, p.group, p.scale, p.seed, gd, gs, dR, dW, db, dc,
                barrier_word(grad.device) if phase == 0 else None,
                rows, slots, length, p.R.shape[0], chunk,
                grad.stride(0), grad.stride(1), *((x.stride(0), x.stride(1)) if x.dim() == 3 else (0, 0)),
                *_slot_strides(p),
                1 / (1 - p.dropout),
                **_constants(p, config),
                CHUNKED=chunk < rows,
                X_IS_ROWS=x.dim() == 2,
                REBUILD=rebuild,
                NEED_H=needs.h,
                NEED_R=dR is not None,
                NEED_W=dW is not None,
                NEED_B=db is not None,
                NEED_C=dc is not None,
                ADD_R=places[0] is not None,
                ADD_W=places[1] is not None,
                ADD_B=places[2] is not None,
                ADD_C=places[3] is not None,
                PHASE=phase,
                ACCUMULATOR=kernels.accumulators[p.accumulator],
                **({} if interpreted() else {"launch_cooperative_grid": True}),
            )  # fmt: skip
    return gradients


def _measured(op: str, p: EditProblem, rows: int) -> Config | None:
    """The configuration that the tables of the device of h have for an edit of so many slots."""
    return lookup(
        op, device_name(p.h.device), N=rows, d=p.R.shape[2], r=p.R.shape[1], h=p.h.dtype, parameters=p.R.dtype,
        linear=p.activation == "linear", grouped=p.group is not None, dropout=p.dropout,
    )  # fmt: skip


def _chunk(rows: int, d: int, grad: Tensor, x: Tensor, config: BackwardConfig, programs: int, items: int) -> int:
    """Slots a chunk of the backward: what half of the L2 cache holds of the gradient and of x, if that helps."""
    if items > programs:
        return rows
    # Every tile of phase 2 starts at a multiple of BLOCK_N: the sums are the same whatever the chunk.
    step = math.lcm(programs * config.ROWS_N, config.BLOCK_N)
    fitting = _l2_bytes(grad.device) // 2 // (d * (grad.element_size() + x.element_size()))
    chunk = max(step, fitting // step * step)
    return chunk if 2 * chunk <= rows else rows


def _slot_strides(p: EditProblem) -> tuple[int, ...]:
    return tuple(stride for t in (p.positions, p.group, p.scale) for stride in ((0, 0) if t is None else t.stride()))


def _constants(p: EditProblem, config: Config) -> dict[str, Any]:
    """What both kernels are compiled for."""
    _, r, d = p.R.shape
    plain = interpreted() or _on_amd()
    return _constants_of(
        config, d, r, p.activation, p.subtract, p.W is not None, p.positions is not None, p.group is not None,
        p.scale is not None, p.dropout, plain,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _constants_of(
    config: Config, d: int, r: int, activation: str, subtract: bool, has_W: bool, has_positions: bool, has_group: bool,
    has_scale: bool, dropout: float, plain: bool,
) -> dict[str, Any]:  # fmt: skip
    constants = {
        **config._asdict(),
        "d": d,
        "r": r,
        "BLOCK_R": padded_rank(config, r),
        "ACTIVATION": activation,
        "SUBTRACT": subtract,
        "HAS_W": has_W,
        "HAS_POSITIONS": has_positions,
        "HAS_GROUP": has_group,
        "HAS_SCALE": has_scale,
        "DROPOUT": dropout > 0,
        "KEEP_THRESHOLD": keep_threshold(dropout),
        # Three products of tf32 terms: as good as float32. The interpreter and AMD GPUs multiply float32 as such.
        "FLOAT32_DOT": "ieee" if plain else "tf32x3",
        "enable_fp_fusion": True,
    }
    if not plain:
        # Or the compiler would spill registers, that two programs may share a multiprocessor.
        constants["maxnreg"] = min(255, 65536 // (32 * config.num_warps))
    return constants


_NOTHING = nullcontext()


def _on_device(tensor: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


@functools.cache
def resident_programs(device: torch.device) -> int:
    """How many programs surely run at once, as the grid barrier needs: one a multiprocessor."""
    if device.type != "cuda":
        return 3  # the interpreter: few, but more than one, so that the work is strided as on a GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def warpgroups(device: torch.device) -> bool:
    """Whether tensor cores take tiles of 64 rows from a group of four warps."""
    return device.type == "cuda" and not _on_amd() and torch.cuda.get_device_capability(device)[0] in (9, 10)


@functools.cache
def _l2_bytes(device: torch.device) -> int:
    """Bytes of the L2 cache."""
    if device.type != "cuda":
        return 32 * 1024  # the interpreter: little, so that tests go through several chunks
    return int(torch.cuda.get_device_properties(device).L2_cache_size)
