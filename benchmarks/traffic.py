"""Counts what the Triton kernels ask of memory and of the arithmetic units, without a GPU, against the minimum.

    python -m benchmarks.traffic [--out benchmarks/results/triton_traffic.csv]

The kernels run in Triton's interpreter as they would be launched on an H100 (its number of programs and its L2 cache);
each block that a program loads or stores counts with the bytes of its unmasked elements, each product and sum with its
size. ``min`` is what no kernel can do without: every edited row of h read and written once, the gradient and h read
and dh written once, the weights read once. What is asked for beyond that comes from cache, as far as it stays there:
weights read by every program, rows that are walked through twice.

Columns: MB asked for by operand, the minimum and their ratio; operations of CUDA cores and of tensor cores for each
edited element of h, and the minimum with a linear f: 4 r forward and 8 r backward, a multiply-add being two. Those of
CUDA cores are products and sums of blocks; what ``tl.sum`` adds up, as much as the products before it, is not counted.
Those of tensor cores include the padding of r to 16 and the three terms of a float32 operand.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import numpy
import torch
from triton.runtime import interpreter

from benchmarks.h100 import L2_BYTES, PROGRAMS
from reft_kernels.backends import triton as launcher
from reft_kernels.problem import EditProblem, Needs
from reft_kernels.reference import edit as reference_edit

MB = 1e6


@dataclass(frozen=True)
class Case:
    """A linear LoReFT edit of N slots, all of them or every second position, h bfloat16, the weights float32."""

    N: int
    d: int
    r: int
    positions: bool = True


CASES = (
    Case(32, 4096, 4), Case(448, 4096, 4), Case(448, 4096, 8), Case(448, 4096, 32), Case(4224, 512, 4, False),
    Case(2112, 512, 64, False),
)  # fmt: skip
QUICK = (Case(32, 256, 4), Case(64, 256, 16, False))


class Count:
    """What the interpreter was asked for while :func:`counting`."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.ranges = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), n) for n, t in tensors.items())
        self.bytes: collections.Counter[str] = collections.Counter()
        self.cores = 0
        self.tensor_cores = 0

    def access(self, addresses: Any, mask: Any, itemsize: int) -> None:
        """One block; its operand is that of its first unmasked element."""
        elements = int(numpy.count_nonzero(mask))
        if elements:
            first = int(addresses.flat[int(numpy.argmax(mask.reshape(-1)))])
            name = next((n for start, end, n in self.ranges if start <= first < end), "workspace")
            self.bytes[name] += elements * itemsize


@contextlib.contextmanager
def counting(count: Count) -> Iterator[None]:
    """Counts every load, store, product and sum of the interpreter."""
    builder = interpreter.InterpreterBuilder
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        result = load(self, ptrs, mask, *rest)
        count.access(ptrs.data, numpy.broadcast_to(mask.data, ptrs.data.shape), result.data.itemsize)
        return result

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count.access(ptrs.data, numpy.broadcast_to(mask.data, ptrs.data.shape), value.data.itemsize)
        return store(self, ptrs, value, mask, *rest)

    def counted_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        count.tensor_cores += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    def counted(name: str) -> Any:
        operation = getattr(builder, name)

        def count_elements(left: Any, right: Any) -> Any:
            result = operation(interpreter.interpreter_builder, left, right)
            count.cores += result.data.size
            return result

        return count_elements

    with contextlib.ExitStack() as stack:
        for name, function in (
            ("create_masked_load", counted_load), ("create_masked_store", counted_store), ("create_dot", counted_dot),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(builder, name, function))
        for name in ("create_fmul", "create_fadd", "create_fsub"):
            stack.enter_context(mock.patch.object(interpreter.interpreter_builder, name, counted(name), create=True))
        yield


@contextlib.contextmanager
def _as_on_an_h100() -> Iterator[None]:
    facts = {
        "resident_programs": lambda device: PROGRAMS, "warpgroups": lambda device: True,
        "_l2_bytes": lambda device: L2_BYTES,
    }  # fmt: skip
    with mock.patch.multiple(launcher, **facts):
        yield


def measure(case: Case) -> list[dict[str, Any]]:
    """One row for the forward and one for the backward of a case."""
    torch.manual_seed(0)
    length = 2 * case.N if case.positions else case.N
    h = torch.randn(1, length, case.d).bfloat16()
    R, W = (torch.randn(1, case.r, case.d) * case.d**-0.5 for _ in range(2))
    b = torch.zeros(1, case.r)
    positions = torch.arange(0, length, 2)[None] if case.positions else None
    problem = EditProblem(h, R, W, b, None, positions, None, None, None, True, "linear", 0.0)
    expected = reference_edit(h.float(), R[0], W[0], b[0], positions=positions)
    with _as_on_an_h100():
        count = Count({"h, y": h, "R": R, "W": W})
        with counting(count):
            y, delta, s, _ = launcher.edit_forward(problem, inplace=True, save_rows=False)
        torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
        forward = launcher.forward_config(problem, case.N, True)
        grad = torch.randn_like(h)
        backward_count = Count({"h, y": h, "g, dh": grad, "R": R, "W": W})
        with counting(backward_count):
            needs = Needs(True, True, True, True, False)
            launcher.edit_backward(grad, problem, delta, s, needs, inplace=True, rebuild=True)
        backward = launcher.backward_config(problem, case.N, PROGRAMS, True)
    element = h.element_size()
    weights = 2 * R.numel() * R.element_size()
    rows = case.N * case.d * element
    return [
        _row("edit_forward", forward.METHOD, case, count, 2 * rows + weights, 4 * case.r),
        _row("edit_backward", backward.METHOD, case, backward_count, 3 * rows + 2 * weights, 8 * case.r),
    ]


def _row(kernel: str, method: str, case: Case, count: Count, minimum: int, operations: int) -> dict[str, Any]:
    elements = case.N * case.d
    asked = sum(count.bytes.values())
    weights = count.bytes["R"] + count.bytes["W"]
    hidden = count.bytes["h, y"] + count.bytes["g, dh"]
    return {
        "kernel": kernel, "method": method, "N": case.N, "d": case.d, "r": case.r,
        "positions": "some" if case.positions else "all",
        "hidden_mb": f"{hidden / MB:.2f}", "weights_mb": f"{weights / MB:.2f}",
        "other_mb": f"{(asked - hidden - weights) / MB:.2f}",
        "asked_mb": f"{asked / MB:.2f}", "min_mb": f"{minimum / MB:.2f}", "asked_over_min": f"{asked / minimum:.2f}",
        "core_ops": f"{count.cores / elements:.1f}", "tensor_core_ops": f"{count.tensor_cores / elements:.1f}",
        "min_ops": operations,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Prints the table and writes it where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two small edits instead of all")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for case in QUICK if options.quick else CASES:
        print(f"counting {case}", file=sys.stderr, flush=True)
        rows += measure(case)
    columns = list(rows[0])
    table = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        partial = options.out.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(table)
        partial.replace(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
