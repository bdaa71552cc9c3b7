"""A peer, a workload and a mode as calls without arguments, one for each set of operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from benchmarks.ops.operands import Operands
from benchmarks.ops.peers import Peer, Prepared
from benchmarks.ops.workloads import Workload

Call = Callable[[], object]


def calls(peer: Peer, workload: Workload, sets: Sequence[Operands], mode: str) -> list[Call]:
    """What is timed, for each set.

    forward   y, without autograd
    backward  the gradients of h, R, W and b, of a forward that ran before
    both      a forward that records, and its backward

    The peer's input is no leaf, and the gradient reaches it from a later node of the graph that gives it away: a
    backward that may write an incoming gradient in place can do so, as in a training step.
    """
    return [_call(peer.prepare(workload, operands), operands, mode) for operands in sets]


def _call(prepared: Prepared, operands: Operands, mode: str) -> Call:
    if mode == "forward":
        return lambda: _without_autograd(prepared, operands)
    step = Step(prepared, operands.h, operands.grad)
    if mode == "both":
        return step
    step.forward()
    return step.backward


def _without_autograd(prepared: Prepared, operands: Operands) -> Tensor:
    with torch.no_grad():
        return prepared.apply(fresh(operands.h))


class Step:
    """A forward and a backward through a peer, between two nodes that cost no kernel.

    After a backward ``dh`` is the gradient of h, in the memory of ``grad`` if the peer wrote it in place.
    """

    def __init__(self, prepared: Prepared, h: Tensor, grad: Tensor) -> None:
        self.prepared, self.h, self.grad = prepared, h, grad
        self.anchor = h.new_zeros((), requires_grad=True)
        self.one = h.new_ones(())
        self.dh: Tensor | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        """Forward and backward; the gradients of what is wanted."""
        self.forward()
        return self.backward(again=False)

    def forward(self) -> Tensor:
        """Records and returns y."""
        with torch.enable_grad():
            y = self.prepared.apply(_Enter.apply(fresh(self.h), self.anchor, self))
            self.end = _Leave.apply(y, self.grad)
        return y

    def backward(self, again: bool = True) -> tuple[Tensor, ...]:
        """The gradients of what is wanted; of the same forward once more if ``again``."""
        self.dh = None
        # The anchor leads autograd to h, which a peer may have turned into y.
        found = torch.autograd.grad(
            self.end, [*self.prepared.wanted.values(), self.anchor], self.one, retain_graph=again, allow_unused=True
        )
        return found[:-1]


def bare_step(device: str) -> Step:
    """A step without an edit in it: what the nodes around an edit cost by themselves."""
    h = torch.zeros(1, 1, 8, device=device)
    return Step(Prepared(lambda x: x, {}), h, h.clone())


def fresh(h: Tensor) -> Tensor:
    """The same memory with a version counter of its own.

    Sets share h without sharing rows; by one counter autograd would take an edit of one set for a write to what
    another has saved.
    """
    return h.data


class _Enter(torch.autograd.Function):
    """h as the output of an earlier layer: no leaf, so that it may be written in place."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, anchor: Tensor, step: Step) -> Tensor:
        ctx.mark_dirty(h)
        ctx.step = step
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.step.dh = grad
        return None, None, None


class _Leave(torch.autograd.Function):
    """A later layer: its backward hands out dL/dy as a tensor that nobody else holds, in memory made before.

    The way through DLPack gives the memory a storage of its own, so that its owner counts as one.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return y.new_empty(())

    @staticmethod
    def backward(ctx: Any, _one: Tensor) -> tuple[Tensor, None]:
        return from_dlpack(to_dlpack(ctx.grad)), None
