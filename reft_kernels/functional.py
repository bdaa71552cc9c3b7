"""The public functions: one edit under its many names.

    y = D_p( h + scale * R^T ( f(W h + b) - gamma (R h + c) ) )

Checks the operands, brings them into one layout and hands them to a backend: through
:class:`reft_kernels.autograd.EditFunction` in eager mode, through the op ``reft_kernels::edit_forward`` under
``torch.compile`` and ``torch.export``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reft_kernels.autograd import Options, apply_edit, saves_through_hooks
from reft_kernels.backends.registry import BACKENDS, NAMES, availability, order, refusal
from reft_kernels.debug import debug_is_on
from reft_kernels.operands import check_contents, check_layout, check_writable, checked
from reft_kernels.operands import normalise as _normalise
from reft_kernels.ops import edit_in_place, run_forward
from reft_kernels.problem import EditProblem, grouped
from reft_kernels.transforms import torch_func_is_active, transformed


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
            rows before it are rebuilt. That costs no memory and no write; values whose exponent the edit changed keep
            the rounding of y (for bfloat16 dW is off by 6e-4 to 2e-3 relative), and h may not be written again before
            the backward. False: a copy of the rows. None: True where every row is edited and h is no view, else
            False. Another edit in place of the same tensor is no harm, it makes the copy. Not with dropout; under
            ``torch.compile``, where nothing would notice that h was written again, the copy is kept in any case.
        accumulate: add the gradients of those of R, W, b and c that are leaves with a contiguous ``.grad`` of their
            dtype into that, without autograd's own addition. Hooks of the gradient's accumulation, such as
            DistributedDataParallel's, do not fire. Leaves with hooks of their own, leaves that the backward at hand
            does not accumulate into (``torch.autograd.grad``, ``inputs=``) and every other tensor get their gradient
            as usual. Call the backward from the forward's stream. Not under ``torch.compile``.
        backend: one of auto, triton, cuda, cpu, eager. ``auto`` takes the first that can, see :func:`explain`; one
            asked for by name is never replaced by another. Inside a transform of torch.func, and of a tensor with a
            forward-mode tangent, only ``eager`` can, whose operations are then differentiated as they stand.

    Returns:
        The shape and dtype of h. Rows not named are those of h, bit for bit.

    Raises:
        TypeError: an operand is not a tensor of the kind named above.
        ValueError: shapes, devices or settings that do not fit, or a backend that cannot take this edit. In debug
            mode (:func:`reft_kernels.set_debug`) also positions or groups out of range, and positions named twice;
            without it an out-of-range entry names no row, and of two edits of one row either may win.
        NotImplementedError: in the backward, where a second derivative is asked for (but for torch.func's).

    Source: Wu et al., 2024 (arXiv 2404.03592), equations 2 and 3 and appendix E; pyreft/interventions.py.
    """
    problem = checked(h, R, W, b, c, positions, group, scale, subtract, activation, dropout, seed)
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {backend!r}")
    if rebuild and (dropout > 0 or not inplace):
        reason = "dropout loses what it drops" if inplace else "an edit out of place leaves h as it is"
        raise ValueError(f"rebuild: expected None or False, as {reason}; got True")
    if torch.compiler.is_compiling():
        if accumulate:
            raise ValueError("accumulate: expected False under torch.compile, which has no `.grad` to add to; got True")
        problem = grouped(problem)
        if torch_func_is_active():  # the ops know neither forward mode nor torch.func's grad; `eager` is traced instead
            y: Tensor = run_forward(problem, "eager" if backend == "auto" else backend, inplace, False)[0]
            return h if inplace else y.view(h.shape)
        if not inplace:
            y = torch.ops.reft_kernels.edit_forward(*problem, backend)[0]
            return y.view(h.shape)
        check_layout(h)
        return edit_in_place(h, problem, backend)
    if debug_is_on():
        check_contents(problem)
    if inplace:
        check_writable(h)
    differentiable = torch.is_grad_enabled() and (
        h.requires_grad
        or R.requires_grad
        or (W is not None and W.requires_grad)
        or (b is not None and b.requires_grad)
        or (c is not None and c.requires_grad)
    )
    if differentiable and transformed(problem) is None:
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
    """For each backend, in the order in which ``auto`` tries them here: ``"ok"``, or why it would not take this edit.

    Arguments as :func:`edit`; how it is carried out (``inplace``, ``rebuild``, ``accumulate``, ``backend``) makes no
    difference.
    """
    seed = 0 if seed is None else seed  # asking draws nothing
    problem = _normalise(h, R, W, b, c, positions, group, scale, subtract, activation, dropout, seed)
    return {name: refusal(BACKENDS[name], problem) or "ok" for name in order(problem)}


def available_backends() -> dict[str, str]:
    """For each backend ``"ok"``, or the reason why it cannot run on this machine."""
    return availability()


def _rebuilds(rebuild: bool | None, inplace: bool, h: Tensor, problem: EditProblem) -> bool:
    """Whether the edit keeps y for its backward. By itself only where a copy of the rows would be one of all of h."""
    if rebuild is not None or not inplace:
        return bool(rebuild)
    # Through hooks (checkpointing's, say) autograd cannot tell that y was written again, and what else writes the base
    # of a view is no concern of this edit.
    return problem.positions is None and problem.dropout == 0 and not h._is_view() and not saves_through_hooks()
