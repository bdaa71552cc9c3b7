"""Whether a peer computes the edit: compared with the oracle in float64 before anything is timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ops.operands import Operands
from benchmarks.ops.peers import Peer
from benchmarks.ops.programs import Step, fresh
from benchmarks.ops.workloads import Workload
from reft_kernels import reference
from reft_kernels.testing import assert_bitwise_equal, assert_close

SAMPLED_ROWS = 24
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Expected:
    """What a workload's first set must give. Row numbers are of h.view(-1, d), on the device."""

    grad: Tensor  # dL/dy [B, S, d]
    sampled: Tensor  # int64 [M], the named rows that are compared
    silent: Tensor  # int64, the other named rows, whose dL/dy is zero
    others: Tensor  # int64, the rows that are not named
    oracle: dict[str, Tensor]  # y and dh [M, d], dR, dW, db, in float64
    baseline: dict[str, Tensor]  # the same in the dtype of h


def expected(workload: Workload, operands: Operands, seed: int = 0) -> Expected:
    """Draws dL/dy and asks the oracle.

    dL/dy is zero at all named rows but 24, so that the gradients of R, W and b need those alone, while a peer works
    on the whole problem, the very one that is timed.
    """
    w, device = workload, operands.h.device
    rng = torch.Generator().manual_seed(seed)
    between = torch.randperm(w.N, generator=rng)[: SAMPLED_ROWS - 2]
    chosen = torch.cat([between, torch.tensor([0, w.N - 1])]).unique()
    rows = operands.rows.cpu()
    sampled = rows[chosen]
    named, silent = (torch.zeros(w.B * w.S, dtype=torch.bool) for _ in range(2))
    named[rows] = silent[rows] = True
    silent[sampled] = False
    silent_rows, others, sampled_rows = (
        t.to(device) for t in (silent.nonzero()[:, 0], (~named).nonzero()[:, 0], sampled)
    )
    grad = torch.randn(
        operands.h.shape, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=operands.h.dtype
    )
    grad.view(-1, w.d)[silent_rows] = 0
    x, g = (t.view(-1, w.d)[sampled_rows].cpu() for t in (operands.h, grad))
    group = None if operands.group is None else operands.group.reshape(-1).cpu()[chosen]
    oracle, baseline = (
        _reference(dtype, w, operands, x, g, group) for dtype in (torch.float64, operands.h.dtype)
    )  # fmt: skip
    return Expected(grad, sampled_rows, silent_rows, others, oracle, baseline)


def _reference(
    dtype: torch.dtype, w: Workload, operands: Operands, x: Tensor, g: Tensor, group: Tensor | None
) -> dict[str, Tensor]:
    """y, dh, dR, dW and db of the sampled rows [M, d], by the oracle in ``dtype`` on the CPU."""
    leaves = [t.detach().cpu().to(dtype).requires_grad_() for t in (x, operands.R, operands.W, operands.b)]
    y = reference.edit(*leaves, group=group, activation=w.activation)
    found = torch.autograd.grad(y, leaves, g.to(dtype))
    return dict(zip(("y", "dh", "dR", "dW", "db"), (y.detach(), *found), strict=True))


def check(peer: Peer, workload: Workload, operands: Operands, wanted: Expected) -> None:
    """Fails unless y, with and without autograd, and the gradients of a peer are those of the oracle.

    Rows that are not named are compared bit by bit. ``operands`` are those that ``wanted`` was made from, unchanged.

    Raises:
        AssertionError: a result is wrong; the message names it.
    """
    d = workload.d
    h = operands.h.clone()
    before, grad_before = (t.view(-1, d)[wanted.others] for t in (h, wanted.grad))

    def compare(name: str, actual: Tensor, factor: float) -> None:
        assert_close(
            actual, wanted.oracle[name], wanted.baseline[name].to(actual.dtype), factor=factor, name=name
        )  # fmt: skip

    def compare_rows(name: str, actual: Tensor, unnamed: Tensor, factor: float) -> None:
        flat = actual.reshape(-1, d)
        compare(name, flat[wanted.sampled], factor)
        _assert_same_bits(flat[wanted.others], unnamed, f"{name} at rows that are not named")

    with torch.no_grad():
        y = peer.prepare(workload, operands).apply(fresh(h.clone()))
    compare_rows("y", y, before, 2)
    del y
    prepared = peer.prepare(workload, operands)
    step = Step(prepared, h, wanted.grad.clone())
    y = step.forward().detach()
    compare_rows("y", y, before, 2)
    if not bool(y.isfinite().all()):
        raise AssertionError("y: NaN or infinity")
    del y
    gradients = dict(zip(prepared.wanted, step.backward(again=False), strict=True))
    if step.dh is None:
        raise AssertionError("dh: no gradient reached h")
    compare_rows("dh", step.dh, grad_before, 3)
    if bool(step.dh.reshape(-1, d)[wanted.silent].any()):
        raise AssertionError("dh: not zero at named rows whose dL/dy is zero")
    for name, gradient in gradients.items():
        if f"d{name}" in wanted.oracle:  # a parametrised R has another gradient
            compare(f"d{name}", gradient, 3)


def _assert_same_bits(actual: Tensor, wanted: Tensor, name: str) -> None:
    """:func:`assert_bitwise_equal`, on the device as long as nothing differs."""
    integer = INTEGERS[actual.element_size()]
    alike = actual.shape == wanted.shape and actual.dtype == wanted.dtype
    if not alike or not torch.equal(actual.contiguous().view(integer), wanted.contiguous().view(integer)):
        assert_bitwise_equal(actual, wanted, name=name)
