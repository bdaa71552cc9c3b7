"""The checks of an edit's operands, and the one layout that they are brought into."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from reft_kernels.problem import EditProblem, as_rows, grouped
from reft_kernels.reference import ACTIVATIONS

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)


def normalise(*operands: Any) -> EditProblem:
    """What :func:`checked` makes of the same arguments, in the layout of the backends."""
    return grouped(checked(*operands))


def checked(
    h: Tensor,
    R: Tensor,
    W: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    positions: Tensor | None,
    group: Tensor | None,
    scale: Tensor | float | None,
    subtract: bool,
    activation: str,
    dropout: float,
    seed: Tensor | int | None,
) -> EditProblem:
    """Checks every operand and makes a problem of them; R, W, b and c as they are given."""
    _check_tensor("h", h, _FLOATS)
    _check_tensor("R", R, _FLOATS)
    shape, weights = h.shape, R.shape  # each look at a tensor's shape makes one
    dims = len(shape)
    if dims == 0 or shape[-1] == 0:
        raise ValueError(f"h: expected [..., d] with d >= 1, got {_shape(h)}")
    if len(weights) != (2 if group is None else 3) or weights[-1] != shape[-1] or 0 in weights[:-1]:
        layout = "[r, d]" if group is None else "[G, r, d] (a group is given)"
        raise ValueError(f"R: expected {layout} with d={shape[-1]} and r >= 1, got {_shape(R)}")
    if W is not None:
        _check_weight("W", W, weights, R)
    if b is not None:
        _check_weight("b", b, weights[:-1], R)
    if c is not None:
        _check_weight("c", c, weights[:-1], R)
        if not subtract:
            raise ValueError("c: has no effect without subtract=True; expected None")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout!r}")
    slots = shape[:-1]
    if positions is not None:
        _check_tensor("positions", positions, _INTEGERS)
        if dims != 3:
            raise ValueError(f"h: expected [B, S, d] where positions are given, got {_shape(h)}")
        slots = positions.shape
        if len(slots) != 2 or slots[0] != shape[0]:
            raise ValueError(f"positions: expected [B, P] with B={shape[0]}, got {_shape(positions)}")
    rows = as_rows(h, positions is not None)
    if group is not None or scale is not None:
        group, scale = _slot_operands(group, scale, slots, rows, positions)
    seed = _seed_tensor(seed, h) if dropout > 0 else None
    device = h.device
    for name, tensor in (("R", R), ("W", W), ("b", b), ("c", c), ("positions", positions), ("group", group),
                         ("scale", scale), ("seed", seed)):  # fmt: skip
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected on the device of h, {device}, got {tensor.device}")
    return EditProblem(rows, R, W, b, c, positions, group, scale, seed, bool(subtract), activation, float(dropout))


def _check_weight(name: str, tensor: Tensor, shape: torch.Size, R: Tensor) -> None:
    _check_tensor(name, tensor, _FLOATS)
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)} to fit R {_shape(R)}, got {_shape(tensor)}")


def _slot_operands(
    group: Tensor | None, scale: Tensor | float | None, slots: torch.Size, rows: Tensor, positions: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """group and scale as [B, P]."""
    of = "the shape of h without its last dimension" if positions is None else "the shape of positions"
    per_slot = (rows.shape[0], rows.shape[1] if positions is None else positions.shape[1])
    if group is not None:
        _check_tensor("group", group, _INTEGERS)
        if group.shape != slots:
            raise ValueError(f"group: expected {list(slots)}, {of}, got {_shape(group)}")
        group = group.reshape(per_slot)
    if isinstance(scale, (int, float)):
        scale = torch.full((1, 1), float(scale), dtype=torch.float32, device=rows.device).expand(per_slot)
    elif scale is not None:
        _check_tensor("scale", scale, _FLOATS)
        if scale.requires_grad:
            raise ValueError("scale: is not differentiable; pass scale.detach()")
        if scale.dim() == 0:
            scale = scale.expand(slots)
        if scale.shape != slots:
            raise ValueError(f"scale: expected {list(slots)}, {of}, got {_shape(scale)}")
        scale = scale.reshape(per_slot)
    return group, scale


def _seed_tensor(seed: Tensor | int | None, h: Tensor) -> Tensor:
    """The seed as int64 [1] on the device of h, without a host synchronisation."""
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=h.device)
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: expected a 64-bit integer, got {seed}")
        return torch.full((1,), seed, dtype=torch.int64, device=h.device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"seed: expected None, an int or an int64 tensor of one element, got {_describe(seed)}")
    return seed.reshape(1)


def _check_tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected a tensor of {kinds}, got {_describe(value)}")


def check_writable(h: Tensor) -> None:
    """In place, h must be writable row by row without a copy."""
    if torch.is_grad_enabled():
        source = h._base if h._is_view() and h._base is not None else h
        if source.requires_grad and source.is_leaf:
            kind = "a leaf" if source is h else "a view of a leaf"
            raise ValueError(f"inplace: h is {kind} that requires a gradient and cannot be written; use inplace=False")
    check_layout(h)


def check_layout(h: Tensor) -> None:
    """In place, h must lie in memory such that a view of it has the rows [B, S, d]."""
    if h.is_contiguous():
        return
    shape, stride = h.shape, h.stride()
    joined = True
    if h.dim() > 3:  # the leading dimensions are taken as one
        leading = [(n, s) for n, s in zip(shape[:-1], stride[:-1], strict=True) if n != 1]
        joined = all(s == n_next * s_next for (_, s), (n_next, s_next) in pairwise(leading))
    if not joined or any(s == 0 and n > 1 for n, s in zip(shape, stride, strict=True)):
        raise ValueError(
            f"inplace: h of shape {_shape(h)} and strides {list(stride)} cannot be written row by row; "
            "use inplace=False"
        )
    if h.shape[-1] > 1 and h.stride(-1) != 1:
        raise ValueError(f"inplace: expected h with unit stride in its last dimension, got {h.stride(-1)}")


def check_contents(problem: EditProblem) -> None:
    """Debug mode: reads positions and groups back and checks every entry."""
    positions, group = problem.positions, problem.group
    if positions is not None:
        length = problem.h.shape[1]
        outside = (positions < -1) | (positions >= length)
        if outside.any():
            row, slot = outside.nonzero()[0].tolist()
            raise ValueError(
                f"positions: expected -1 or 0 <= position < S={length}, "
                f"got {int(positions[row, slot])} at [{row}, {slot}]"
            )
        ordered = positions.sort(dim=1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if twice.any():
            row, slot = twice.nonzero()[0].tolist()
            raise ValueError(
                f"positions: expected every position once, got {int(ordered[row, slot])} twice in batch row {row}"
            )
    if group is not None:
        groups = problem.R.shape[0]
        outside = (group < -1) | (group >= groups)
        if outside.any():
            row, slot = outside.nonzero()[0].tolist()
            raise ValueError(
                f"group: expected -1 or 0 <= group < G={groups}, got {int(group[row, slot])} at [{row}, {slot}]"
            )


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {_shape(value)}"
    return type(value).__name__
