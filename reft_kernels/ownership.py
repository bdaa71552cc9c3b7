"""Whether a gradient may be overwritten: it may if the running backward alone refers to it.

Three counts tell: of the tensor's references in C++ (the engine's buffers of other nodes, tensors captured for
``torch.autograd.grad``), of its storage's (views, ``detach()``), and of its Python object's (a hook's closure, the
caller's ``grad_outputs``). None of them is part of torch's public interface, so nothing is taken for granted: what they
read for a gradient that is nobody else's is measured once, and so is that each kind of holder shows. Where it does not,
or a count is missing, no gradient counts as owned and every one is copied.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Counts(NamedTuple):
    tensor: int
    storage: int
    python: int


def owned(grad: Tensor) -> bool:
    """Whether ``grad`` is dense and nothing but its backward refers to it or to its memory.

    For the argument of the ``backward`` of a ``torch.autograd.Function``, called there directly: every further
    function that it is passed through, and every further name that it has, counts as a holder. When in doubt, False.
    The engine itself adds into a buffer under the same conditions (``InputBuffer::accumulate``).
    """
    if type(grad) is not Tensor or not grad.is_contiguous() or torch.is_grad_enabled():
        return False
    return _counts(grad) == _exclusive()


def _counts(grad: Tensor) -> _Counts | None:
    """The three counts; None where torch does not give them."""
    private: Any = torch._C
    try:
        tensor = private.TensorBase._use_count(grad)
        storage = private._storage_Use_Count(grad.untyped_storage()._cdata)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    return _Counts(tensor, storage, sys.getrefcount(grad))


_lock = threading.Lock()
_measured: list[_Counts | None] = []


def _exclusive() -> _Counts | object | None:
    """The counts of a gradient that is nobody else's; something equal to no counts where they cannot be told."""
    if not _measured:
        with _lock:
            if not _measured:
                _measured.append(_measure())
    return _measured[0] or _UNKNOWN


_UNKNOWN = object()


def _measure() -> _Counts | None:
    """Reads the counts in four small backwards: of a gradient of its own, and of one with each kind of holder."""
    with torch.inference_mode(False), torch.enable_grad():
        alone, again = _read(), _read()
        held = (
            _read(hook=lambda grad, kept: kept.append(grad)),
            _read(hook=lambda grad, kept: kept.append(grad.detach())),
            _read(sibling=True),
        )
    told_apart = alone is not None and alone == again and all(h is not None and h != alone for h in held)
    return alone if told_apart else None


def _read(hook: Any = None, sibling: bool = False) -> _Counts | None:
    """The counts of the gradient that arrives at one small node.

    ``hook`` is called with it and with a list that lives on. A ``sibling`` is made before the node and gets the same
    gradient, so that its buffer still holds it.
    """
    leaf = torch.ones(2, device="cpu", requires_grad=True)
    older = leaf * 3.0
    seen: list[_Counts | None] = []
    kept: list[Tensor] = []
    y = _Probe.apply(leaf, seen)
    if hook is not None:
        y.register_hook(lambda grad: hook(grad, kept))
    z = y + older if sibling else y
    torch.autograd.backward((z * 2.0).sum(), inputs=[leaf])  # nothing is saved, so that nobody's hooks are called
    return seen[0]


class _Probe(torch.autograd.Function):
    """The identity; its backward reads the counts, as deep in calls and as early as a caller of ``owned`` does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[_Counts | None]) -> Tensor:
        ctx.seen = seen
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(_observed(grad))
        return grad, None


def _observed(grad: Tensor) -> _Counts | None:
    """As deep as :func:`owned`."""
    if type(grad) is not Tensor:
        return None
    return _counts(grad)
