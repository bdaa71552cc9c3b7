"""The public functions: one edit under its many names.

    y = D_p( h + scale * R^T ( f(W h + b) - gamma (R h + c) ) )

Checks the operands, brings them into one layout and hands them to a backend: through
:class:`reft_kernels.autograd.EditFunction` in eager mode, through the op ``reft_kernels::edit_forward`` under
``torch.compile`` and ``torch.export``.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from reft_kernels.autograd import Options, apply_edit, saves_through_hooks
from reft_kernels.backends.registry import BACKENDS, NAMES, availability, refusal
from reft_kernels.ops import edit_in_place, run_forward
from reft_kernels.problem import EditProblem, as_rows, grouped
from reft_kernels.reference import ACTIVATIONS

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)
_debug = os.environ.get("REFT_KERNELS_DEBUG", "0") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Turns the debug checks on or off: positions and groups are read back and checked for range and duplicates.

    They cost a host synchronisation a call. The environment variable REFT_KERNELS_DEBUG=1 turns them on at import.
    """
    global _debug
    _debug = enabled


def edit(
    h: Tensor,
    R: Tensor,
    W: Tensor | None = None,
    b: Tensor | None = None,
    *,
    c: Tensor | None = None,
    positions: Tensor | None = None,
    group: Tensor | None = None,
    scale: Tensor | float | None = None,
    subtract: bool = True,
    activation: str = "linear",
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    inplace: bool = False,
    rebuild: bool | None = None,
    accumulate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The low-rank edit of the named rows of h, differentiable to h, R, W, b and c.

        y = D_p( h + scale * R^T ( f(W h + b) - gamma (R h + c) ) )

    Args:
        h: hidden states [..., d], or [B, S, d] with ``positions``; float64, float32, float16 or bfloat16.
        R: [r, d], or [G, r, d] with ``group``. Any floating dtype, as W, b and c; sums are kept in float32
            (float64 where h or R is float64).
        W: as R. None counts as zero.
        b: [r], or [G, r] with ``group``. None counts as zero.
        c: as b; only with ``subtract``.
        positions: integers [B, P], the positions to edit in each batch row; -1 names none. No position may be
            named twice in a row. None: every row of h.
        group: integers [B, P], or h.shape[:-1] without positions: which weights edit the row; -1: none do.
        scale: floats of the shape of ``group``, or one number: the strength of each row's edit. Not differentiable.
        subtract: gamma. True for LoReFT, NoReFT and ConsReFT.
        activation: f, one of linear, relu, gelu, silu, tanh.
        dropout: probability in [0, 1) of dropping an element of an edited row, applied to the whole row as pyreft
            does; the others are divided by ``1 - dropout``.
        seed: of the dropout mask: an integer, or int64 [1] on the device of h. None draws one from torch's
            generator of that device. The same seed drops the same elements on every backend.
        inplace: write h itself and return it. Autograd is told; what else holds h sees the edit.
        rebuild: what an edit in place keeps for its backward. True: h itself as it is after the edit, of which the
            rows before it are rebuilt. That costs no memory and no write, and gives dW and dR one rounding of y more
            (for bfloat16 about 2e-3 relative); h may then not be written again before the backward. False: a copy of
            the rows. None: True where every row is edited and h is no view, else False. Another edit in place of the
            same tensor is no harm, it makes the copy. Not with dropout.
        accumulate: add the gradients of those of R, W, b and c that are leaves with a contiguous ``.grad`` of their
            dtype into that, without autograd's own addition. Hooks of the gradient's accumulation, such as
            DistributedDataParallel's, do not fire, and ``torch.autograd.grad`` does not see these gradients. Leaves
            with hooks of their own and every other tensor get their gradient as usual. Not under ``torch.compile``.
        backend: one of auto, triton, eager. ``auto`` takes the first that can, see :func:`explain`; one asked for
            by name is never replaced by another.

    Returns:
        The shape and dtype of h. Rows not named are those of h, bit for bit.

    Raises:
        TypeError: an operand is not a tensor of the kind named above.
        ValueError: shapes, devices or settings that do not fit, or a backend that cannot take this edit. In debug
            mode (:func:`set_debug`) also positions or groups out of range, and positions named twice; without it an
            out-of-range entry names no row, and of two edits of one row either may win.
        NotImplementedError: in the backward, where a second derivative is asked for.

    Source: Wu et al., 2024 (arXiv 2404.03592), equations 2 and 3 and appendix E; pyreft/interventions.py.
    """
    problem = _checked(h, R, W, b, c, positions, group, scale, subtract, activation, dropout, seed)
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {backend!r}")
    if rebuild and (dropout > 0 or not inplace):
        reason = "dropout loses what it drops" if inplace else "an edit out of place leaves h as it is"
        raise ValueError(f"rebuild: expected None or False, as {reason}; got True")
    if torch.compiler.is_compiling():
        if accumulate:
            raise ValueError("accumulate: expected False under torch.compile, which has no `.grad` to add to; got True")
        problem = grouped(problem)
        if not inplace:
            y: Tensor = torch.ops.reft_kernels.edit_forward(*problem, backend)[0]
            return y.view(h.shape)
        _check_layout(h)
        if rebuild is None:
            rebuild = positions is None and dropout == 0
        return edit_in_place(h, problem, rebuild, backend)
    if _debug:
        _check_contents(problem)
    if inplace:
        _check_writable(h)
    if torch.is_grad_enabled() and (
        h.requires_grad
        or R.requires_grad
        or (W is not None and W.requires_grad)
        or (b is not None and b.requires_grad)
        or (c is not None and c.requires_grad)
    ):
        options = Options(backend, inplace, _rebuilds(rebuild, inplace, h, problem), accumulate)
        return apply_edit(h, R, W, b, c, problem, options)
    y = run_forward(grouped(problem), backend, inplace, False)[0]
    return h if inplace else y.view(h.shape)


def loreft(h: Tensor, R: Tensor, W: Tensor | None, b: Tensor | None, **kw: Any) -> Tensor:
    """LoReFT: h + R^T (f(W h + b) - R h), R with orthonormal rows. Paper eq. 2, pyreft's LoreftIntervention.

    Arguments, result and errors as :func:`edit`.
    """
    return edit(h, R, W, b, subtract=True, **kw)


def noreft(h: Tensor, R: Tensor, W: Tensor | None, b: Tensor | None, c: Tensor | None = None, **kw: Any) -> Tensor:
    """NoReFT: h + R^T (f(W h + b) - (R h + c)), R free. Paper appendix E, pyreft's NoreftIntervention.

    Arguments, result and errors as :func:`edit`.
    """
    return edit(h, R, W, b, c=c, subtract=True, **kw)


def consreft(h: Tensor, R: Tensor, b: Tensor | None, **kw: Any) -> Tensor:
    """ConsReFT: h + R^T (b - R h), R with orthonormal rows. Paper appendix E, pyreft's ConsreftIntervention.

    Arguments, result and errors as :func:`edit`.
    """
    return edit(h, R, None, b, subtract=True, **kw)


def lobireft(h: Tensor, R: Tensor, b: Tensor | None, **kw: Any) -> Tensor:
    """LobiReFT: h + R^T b, R with orthonormal rows. Paper appendix E, pyreft's LobireftIntervention.

    Arguments, result and errors as :func:`edit`.
    """
    return edit(h, R, None, b, subtract=False, **kw)


def direft(h: Tensor, R: Tensor, W: Tensor | None, b: Tensor | None, **kw: Any) -> Tensor:
    """h + R^T f(W h + b), R with orthonormal rows. Paper appendix E, pyreft's DireftIntervention.

    The paper's own DiReFT, with R free, is :func:`nodireft`. Arguments, result and errors as :func:`edit`.
    """
    return edit(h, R, W, b, subtract=False, **kw)


def nodireft(h: Tensor, R: Tensor, W: Tensor | None, b: Tensor | None, **kw: Any) -> Tensor:
    """DiReFT: h + R^T f(W h + b), R free. Paper eq. 3 with R = W2 and W = W1, pyreft's NodireftIntervention.

    Arguments, result and errors as :func:`edit`.
    """
    return edit(h, R, W, b, subtract=False, **kw)


def explain(
    h: Tensor,
    R: Tensor,
    W: Tensor | None = None,
    b: Tensor | None = None,
    *,
    c: Tensor | None = None,
    positions: Tensor | None = None,
    group: Tensor | None = None,
    scale: Tensor | float | None = None,
    subtract: bool = True,
    activation: str = "linear",
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    inplace: bool = False,
    rebuild: bool | None = None,
    accumulate: bool = False,
    backend: str = "auto",
) -> dict[str, str]:
    """For each backend, in the order in which ``auto`` tries them: ``"ok"``, or why it would not take this edit.

    Arguments as :func:`edit`; how it is carried out (``inplace``, ``rebuild``, ``accumulate``, ``backend``) makes no
    difference.
    """
    seed = 0 if seed is None else seed  # asking draws nothing
    problem = _normalise(h, R, W, b, c, positions, group, scale, subtract, activation, dropout, seed)
    return {name: refusal(candidate, problem) or "ok" for name, candidate in BACKENDS.items()}


def available_backends() -> dict[str, str]:
    """For each backend ``"ok"``, or the reason why it cannot run on this machine."""
    return availability()


def _normalise(
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
    """Checks every operand and brings it into the layout of an EditProblem."""
    return grouped(_checked(h, R, W, b, c, positions, group, scale, subtract, activation, dropout, seed))


def _checked(
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
    """Checks every operand; R, W, b and c as they are given."""
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


def _rebuilds(rebuild: bool | None, inplace: bool, h: Tensor, problem: EditProblem) -> bool:
    """Whether the edit keeps y for its backward. By itself only where a copy of the rows would be one of all of h."""
    if rebuild is not None or not inplace:
        return bool(rebuild)
    # Through hooks (checkpointing's, say) autograd cannot tell that y was written again, and what else writes the base
    # of a view is no concern of this edit.
    return problem.positions is None and problem.dropout == 0 and not h._is_view() and not saves_through_hooks()


def _check_tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected a tensor of {kinds}, got {_describe(value)}")


def _check_writable(h: Tensor) -> None:
    """In place, h must be writable row by row without a copy."""
    if torch.is_grad_enabled():
        source = h._base if h._is_view() and h._base is not None else h
        if source.requires_grad and source.is_leaf:
            kind = "a leaf" if source is h else "a view of a leaf"
            raise ValueError(f"inplace: h is {kind} that requires a gradient and cannot be written; use inplace=False")
    _check_layout(h)


def _check_layout(h: Tensor) -> None:
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


def _check_contents(problem: EditProblem) -> None:
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
