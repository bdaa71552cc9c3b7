"""The edit as an ``autograd.Function``: what runs in eager mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reft_kernels.ops import NO_SECOND_DERIVATIVE, run_backward, run_forward
from reft_kernels.ownership import owned
from reft_kernels.problem import EditProblem, Needs, as_rows, grouped
from reft_kernels.transforms import stands_for_many


class Options(NamedTuple):
    """How an edit is carried out; none of it changes what it computes."""

    backend: str
    inplace: bool
    rebuild: bool  # in place: keep y for the backward instead of a copy of the rows before the edit
    accumulate: bool  # add the gradients of R, W, b and c into their leaves' `.grad`


def apply_edit(
    h: Tensor, R: Tensor, W: Tensor | None, b: Tensor | None, c: Tensor | None, problem: EditProblem, options: Options
) -> Tensor:
    """:class:`EditFunction`, also of a tensor that an edit before it kept for its own backward."""
    if options.inplace:
        _keep_before_overwriting(h)
    y: Tensor = EditFunction.apply(h, R, W, b, c, problem, options)
    node: Any = y.grad_fn
    if options.rebuild and isinstance(node, _Node):  # for a view of another tensor autograd puts a node of its own
        node.version = y._version
    return y


class EditFunction(torch.autograd.Function):
    """y = D_p( h + scale * R^T ( f(W h + b) - gamma (R h + c) ) ); see :mod:`reft_kernels.reference`.

    Autograd sees the caller's own h, R, W, b and c; ``problem`` holds h as rows [B, S, d] and the others as given. No
    view stands in the graph. Saves h itself, or, where the edit is in place, its named rows before the edit
    or y. A gradient that nothing else refers to is overwritten by that of h, any other is copied.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        R: Tensor,
        W: Tensor | None,
        b: Tensor | None,
        c: Tensor | None,
        problem: EditProblem,
        options: Options,
    ) -> Tensor:
        """Returns y in the shape of h; h itself where ``options.inplace``."""
        backend, inplace, rebuild, _ = options
        problem = grouped(problem)
        y, delta, s, rows = run_forward(problem, backend, inplace, inplace and not rebuild)
        if inplace:
            ctx.mark_dirty(h)
            x = h.detach() if rebuild else rows  # detached: no cycle, and the version counter is still that of h
        else:
            x = h
        ctx.save_for_backward(
            x, R, W, b, c, problem.positions, problem.group, problem.scale, problem.seed, delta, s
        )  # fmt: skip
        ctx.weights = problem[1:5]  # views of what is saved, which watches their versions
        ctx.settings = problem[9:]
        ctx.options = options
        # Not a view as autograd knows it: whoever adds to the result in place may do so.
        return h if inplace else torch.ops.aten._unsafe_view(y, h.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of h, R, W, b and c, those asked for."""
        options: Options = ctx.options
        backend = options.backend
        if stands_for_many(grad):
            reuse, backend = False, "eager" if backend == "auto" else backend
        else:
            reuse = ctx.needs_input_grad[0] and owned(grad)  # before anything else refers to it
        create_graph = torch.is_grad_enabled()
        if options.inplace and create_graph:
            # No tensor that is left leads to h before the edit, so a second derivative could not be told of it.
            raise NotImplementedError(f"{NO_SECOND_DERIVATIVE}; with inplace=True create_graph must be False")
        saved = _saved_tensors(ctx)
        x = saved[0]
        positions, group, scale, seed, delta, s = saved[5:]
        into = _places(ctx, saved[1:5], group is not None) if options.accumulate else None
        if options.rebuild or not options.inplace:
            x = as_rows(x, positions is not None)
        R, W, b, c = ctx.weights
        problem = EditProblem(x, R, W, b, c, positions, group, scale, seed, *ctx.settings)
        needs = Needs(*ctx.needs_input_grad[:5])
        with torch.no_grad() if create_graph else nullcontext():
            dh, *rest = run_backward(
                as_rows(grad, positions is not None), problem, delta, s, needs, backend,
                inplace=reuse, rebuild=options.rebuild, into=into,
            )  # fmt: skip
            if into is not None:
                rest = [None if place is not None else t for t, place in zip(rest, into, strict=True)]
            if group is None:
                rest = [t if t is None else t.squeeze_(0) for t in rest]  # the backend's own results: no more views
        if reuse:
            dh = grad
        elif dh is not None and dh.shape != grad.shape:
            dh = dh.view(grad.shape)
        gradients = (dh, *rest)
        if create_graph:
            gradients = first_derivative_only(gradients, (grad, *saved))
        return *gradients, None, None


_Node: Any = EditFunction._backward_cls


def saves_through_hooks() -> bool:
    """Whether hooks handle what is saved for the backward (``torch.autograd.graph.saved_tensors_hooks``)."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


_ADVICE = (
    "This edit was made in place with rebuild=True, which keeps h itself for the backward. If it is h that was written "
    "after the edit, pass rebuild=False: a copy of the edited rows is then kept instead"
)


def advise(y: Tensor, advice: str) -> None:
    """What the error shall say where ``y``, which an edit with ``rebuild`` returned, is written before its backward."""
    node: Any = y.grad_fn
    if isinstance(node, _Node):
        node.advice = advice


def _saved_tensors(ctx: Any) -> tuple[Any, ...]:
    try:
        saved: tuple[Any, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if not ctx.options.rebuild or "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(f"{error}\nreft_kernels: {getattr(ctx, 'advice', _ADVICE)}") from error
    return saved


def _keep_before_overwriting(h: Tensor) -> None:
    """Where h is the result of an edit that kept it for its backward, that edit gets a copy of its own."""
    node: Any = h.grad_fn
    if isinstance(node, _Node) and node.options.rebuild and node.version == h._version:
        try:
            saved = node._raw_saved_tensors
        except RuntimeError:  # its backward has been, and what it kept is gone
            return
        saved[0].register_hooks(_copy, _itself)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone()


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _places(ctx: Any, weights: Sequence[Tensor | None], by_group: bool) -> tuple[Tensor | None, ...] | None:
    """The `.grad` of those of R, W, b and c that are leaves and have one to add to, in the layout [G, ...].

    Not of a leaf whose gradient the engine would not accumulate, as in ``torch.autograd.grad`` or with ``inputs=``,
    nor of one that stands for two of them: the additions to one memory would not wait for each other.
    """
    edges = iter(ctx.next_functions[1:])  # those of tensors alone, after that of h
    nodes = [None if t is None else next(edges)[0] for t in weights]
    places = [
        _place(t) if need and _will_run(node) else None
        for t, need, node in zip(weights, ctx.needs_input_grad[1:5], nodes, strict=True)
    ]
    for i, leaf in enumerate(weights):
        if any(leaf is other for j, other in enumerate(weights) if j != i):
            places[i] = None
    if all(place is None for place in places):
        return None
    return tuple(t if t is None or by_group else t.unsqueeze(0) for t in places)


def _will_run(node: Any) -> bool:
    """Whether the running backward is going to run a node; False where torch does not tell."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except (AttributeError, RuntimeError, TypeError):  # RuntimeError: its gradient is what autograd.grad was asked for
        return False


def _place(leaf: Tensor | None) -> Tensor | None:
    """A leaf's `.grad`, where it can be added to and nobody waits for the gradient that is added."""
    if leaf is None or not leaf.is_leaf or leaf._backward_hooks or leaf._post_accumulate_grad_hooks:
        return None
    grad = leaf.grad
    if grad is None or grad.layout != torch.strided or grad.dtype != leaf.dtype:
        return None
    return grad if grad.is_contiguous() and not grad.requires_grad else None


def first_derivative_only(
    gradients: tuple[Tensor | None, ...], inputs: Iterable[Tensor | None], message: str = NO_SECOND_DERIVATIVE
) -> tuple[Tensor | None, ...]:
    """Gradients as they are, but such that differentiating them raises; for ``create_graph=True``.

    Without it autograd would take them for constants, and a second derivative would be wrong in silence. ``inputs``
    are the tensors that the gradients depend on.
    """
    anchors = [t for t in inputs if t is not None and t.requires_grad]
    return _FirstDerivative.apply(message, len(gradients), *gradients, *anchors)  # type: ignore[no-any-return]


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.message = message
        return tuple(t if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(ctx.message)
