"""What one edit costs on the host beside its arithmetic, stage by stage, with tiny tensors on the CPU.

    python -m benchmarks.host_cost
    python -m benchmarks.host_cost --rounds 50 --calls 500

The backend is a stub that returns tensors made beforehand, so that what is left is bookkeeping: checks, layout, the
choice of a backend, autograd's node. The last rows are the eager backend in its place. Times are microseconds of the
thread's own processor time a call; all stages are measured in turn, once a round, and the table gives quantiles over
the rounds. A backward is measured by the call of ``torch.autograd.grad``; what that costs for a graph of a single
multiplication stands beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reft_kernels import edit, ownership
from reft_kernels.backends import registry
from reft_kernels.operands import checked
from reft_kernels.problem import EditProblem, Needs, autocast_is_on, grouped

BATCH, LENGTH, SLOTS, WIDTH, RANK = 1, 4, 2, 8, 2


class Stub:
    """A backend that computes nothing."""

    name = "stub"

    def __init__(self) -> None:
        self.delta = torch.zeros(BATCH * SLOTS, RANK)
        self.s = torch.zeros(0)
        self.rows = torch.zeros(BATCH * SLOTS, WIDTH)
        self.y = torch.zeros(BATCH, LENGTH, WIDTH)
        self.weight, self.bias = torch.zeros(1, RANK, WIDTH), torch.zeros(1, RANK)

    def unavailable(self) -> None:
        return None

    def unsupported(self, problem: EditProblem) -> None:
        return None

    def edit_forward(self, problem: EditProblem, inplace: bool, save_rows: bool) -> tuple[Tensor, ...]:
        return problem.h if inplace else self.y, self.delta, self.s, self.rows if save_rows else self.s

    def edit_backward(
        self, grad: Tensor, problem: EditProblem, delta: Tensor, s: Tensor, needs: Needs, *, inplace: bool = False,
        rebuild: bool = False, into: Any = None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        # New tensors at every call, as a backend's are.
        weight, bias = self.weight.shape, self.bias.shape
        return grad if inplace else self.y, torch.empty(weight), torch.empty(weight), torch.empty(bias), None


class Node(torch.autograd.Function):
    """The cheapest node with the arguments of an edit: what autograd itself costs."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, R: Tensor, W: Tensor, b: Tensor, shapes: tuple[Any, Any]) -> Tensor:
        ctx.mark_dirty(h)
        ctx.shapes = shapes
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias = ctx.shapes
        return grad, torch.empty(weight), torch.empty(weight), torch.empty(bias), None


class Stage(NamedTuple):
    name: str
    run: Callable[[], object]


@contextlib.contextmanager
def registered(backend: Any) -> Iterator[None]:
    """``backend`` in the place of the eager one."""
    real = registry.BACKENDS["eager"]
    registry.BACKENDS["eager"] = backend
    try:
        yield
    finally:
        registry.BACKENDS["eager"] = real


def stages() -> list[tuple[Stage, bool]]:
    """Every stage, and whether the stub stands in for the eager backend in it."""
    source = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    R, W = (torch.randn(RANK, WIDTH, requires_grad=True) for _ in range(2))
    b = torch.randn(RANK, requires_grad=True)
    positions = torch.tensor([[0, 2]])
    plain = source.detach()
    upstream = torch.ones_like(source)
    leaves = (source, R, W, b)
    slots = (positions, None, None, True, "linear", 0.0, None)
    problem = checked(plain, R, W, b, None, *slots)
    shapes = (R.shape, b.shape)

    def forward(h: Tensor, **how: Any) -> Tensor:
        return edit(h, R, W, b, positions=positions, backend="eager", **how)

    def without_gradient() -> Tensor:
        with torch.no_grad():
            return forward(plain, inplace=True)

    def layout() -> EditProblem:
        with torch.no_grad():
            return grouped(problem)

    def owned() -> bool:
        with torch.no_grad():
            return ownership.owned(torch.empty_like(plain))

    def no_grad() -> None:
        with torch.no_grad():
            pass

    def backward(y: Tensor, inputs: Sequence[Tensor] = leaves) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y * 1, inputs, upstream)

    whole = [
        ("edit, no gradient, in place", without_gradient),
        ("edit forward, in place", lambda: forward(source.detach(), inplace=True)),
        ("edit forward, in place, rebuild", lambda: forward(source.detach(), inplace=True, rebuild=True)),
        ("edit forward, out of place", lambda: forward(source)),
        ("edit forward + backward, in place", lambda: backward(forward(source * 1, inplace=True))),
        ("edit forward + backward, rebuild", lambda: backward(forward(source * 1, inplace=True, rebuild=True))),
    ]
    pieces = [
        ("checks of the operands", lambda: checked(plain, R, W, b, None, *slots)),
        ("layout [G, ...], with no_grad", layout),
        ("no_grad alone", no_grad),
        ("autocast, whether it is on", lambda: autocast_is_on(plain.device)),
        ("choice of the backend", lambda: registry.choose("eager", problem)),
        ("owned, of a new tensor, with no_grad", owned),
        ("bare autograd.Function forward", lambda: Node.apply(source.detach(), R, W, b, shapes)),
        ("bare autograd.Function, both", lambda: backward(Node.apply(source * 1, R, W, b, shapes))),
        ("graph without an edit, both", lambda: backward(source * 1, (source,))),
    ]
    return [
        *((Stage(name, run), True) for name, run in pieces),
        *((Stage(name, run), True) for name, run in whole),
        *((Stage(f"eager backend: {name}", run), False) for name, run in whole),
    ]


def measure(rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds a call of every stage, one value for each round, sorted."""
    stub, real = Stub(), registry.BACKENDS["eager"]
    times: dict[str, list[float]] = {}
    entries = stages()
    for number in range(rounds + 1):
        for stage, with_stub in entries:
            with registered(stub if with_stub else real):
                start = time.thread_time_ns()
                for _ in range(calls):
                    stage.run()
                spent = (time.thread_time_ns() - start) / calls / 1000
            if number:  # the first round warms up
                times.setdefault(stage.name, []).append(spent)
    return {name: sorted(values) for name, values in times.items()}


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="how often every stage is measured (20)")
    parser.add_argument("--calls", type=int, default=300, help="calls in a row (300)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    times = measure(options.rounds, options.calls)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}; microseconds a call")
    print(f"{'stage':<52} {'min':>8} {'p20':>8} {'median':>8} {'p80':>8}")
    for name, values in times.items():
        last = len(values) - 1
        cells = [values[0], *(values[round(q * last)] for q in (0.2, 0.5, 0.8))]
        print(f"{name:<52} {' '.join(f'{cell:8.1f}' for cell in cells)}")
    empty = times["graph without an edit, both"][0]
    both = times["edit forward + backward, in place"][0]
    print(f"forward and backward of an edit less those of the graph without it, at least: {both - empty:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
