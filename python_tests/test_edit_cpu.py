"""What only the CPU kernels have: threads, instruction sets, memory. Results are tested with the other backends'."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import reft_kernels
from benchmarks.sanitizer_case import compare
from reft_kernels import available_backends, edit
from reft_kernels.testing import EditCase, assert_bitwise_equal, gradients, random_edit

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(available_backends()["cpu"] != "ok", reason=available_backends()["cpu"])

CASES = [
    EditCase(dtype="float32", positions="padded", shape=(8, 40), slots=24, d=513, r=8),
    EditCase(
        dtype="mixed", positions="some", groups=3, scale="rows", activation="gelu", shape=(6, 50), slots=20, d=300
    ),
    EditCase(dtype="bfloat16", shape=(3, 101), d=264, r=33, dropout=0.3),
    EditCase(dtype="float16", shape=(2, 300), d=96, r=5, layout="slice"),
    EditCase("nodireft", "silu", "float64", "slice", "padded", 2, "rows", shape=(4, 30), slots=9, d=130, r=12),
    EditCase(dtype="float32", shape=(1, 1), d=4096, r=4),
    EditCase(dtype="float32", shape=(2, 300), d=530, r=64),  # weights that have more bytes than a tile's rows
    EditCase(dtype="bfloat16", shape=(2, 300), d=532, r=64, groups=2, activation="silu", scale="rows"),
]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(case: EditCase, threads: None) -> None:
    operands = random_edit(case, 3)
    grad = torch.randn(operands.h.shape, dtype=torch.float64)
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(gradients(lambda **t: operands.edit(**t, backend="cpu"), operands, grad))
    for other in found[1:]:
        assert_bitwise_equal(other.y, found[0].y, name="y")
        for name, gradient in other.grads.items():
            assert_bitwise_equal(gradient, found[0].grads[name], name=f"d{name}")


@pytest.mark.parametrize("case", CASES[-2:], ids=str)
def test_many_rows_share_the_weights_of_high_ranks(case: EditCase) -> None:
    compare(case, 5, "cpu", "cpu")


# `compare` of the sanitizer's cases, as a program of its own: the instruction set is chosen once a process.
COMPARE = """
import sys
import torch
from benchmarks.sanitizer_case import compare
from reft_kernels.testing import edit_cases
for seed, case in enumerate(edit_cases()[int(sys.argv[1])::int(sys.argv[2])]):
    compare(case, seed, "cpu", "cpu")
print("agreed")
"""


def run(script: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another family of processors")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_agrees_with_the_oracle(isa: str) -> None:
    assert run(COMPARE, "0", "3", REFT_KERNELS_CPU_ISA=isa) == "agreed"


def test_nothing_of_the_size_of_h_is_allocated() -> None:
    """The peak of a whole process's memory, forward and backward in place: h is 256 MiB."""
    script = """
from pathlib import Path
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack
from reft_kernels import edit

def peak() -> int:  # MiB; what getrusage tells may be the parent's
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) >> 10

torch.manual_seed(0)
h, R, W, b = torch.randn(4, 4096, 4096), torch.randn(8, 4096), torch.randn(8, 4096), torch.randn(8)
grad = torch.ones_like(h)
for t in (R, W, b):
    t.requires_grad_()

class Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, anchor):
        return h.clone()
    @staticmethod
    def backward(ctx, _):
        return None, None

class Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.new_empty(())
    @staticmethod
    def backward(ctx, _):
        return from_dlpack(to_dlpack(grad))  # in a storage of its own: nobody else's

before = peak()
x = Enter.apply(h, torch.zeros(1, requires_grad=True))
after_copy = peak()
Leave.apply(edit(x, R, W, b, inplace=True, backend="cpu")).backward()
print(after_copy - before, peak() - after_copy)
"""
    copy, more = map(int, run(script, OMP_NUM_THREADS="2").split())
    assert copy >= 250, "the measure does not see what it should"
    assert more < 64, f"{more} MiB more than h"


def test_native_says_which_instructions_it_uses() -> None:
    assert reft_kernels.available_backends()["cpu"] == "ok"
    script = "from reft_kernels.backends import cpu; print(cpu.instruction_set())"
    assert run(script) in ("avx512", "avx2", "neon", "baseline")
    if platform.machine() == "x86_64":
        assert run(script, REFT_KERNELS_CPU_ISA="baseline") == "baseline"


def test_what_is_added_to_keeps_its_digits() -> None:
    """Sums are kept in float32 here, the gradients that they are added to are float64."""
    h, R = torch.randn(3, 8), torch.randn(2, 8)
    W, b, c = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 8), (2,), (2,)))
    expected = torch.tensor(1 + 2**-40, dtype=torch.float64)
    for leaf in (W, b, c):
        leaf.grad = expected.expand_as(leaf).clone()
    (0 * edit(h, R, W, b, c=c, accumulate=True, backend="cpu")).sum().backward()
    for leaf in (W, b, c):
        assert leaf.grad is not None
        assert_bitwise_equal(leaf.grad, expected.expand_as(leaf))


def test_one_row_of_one_number() -> None:
    h, R, W, b = torch.tensor([[3.0]]), torch.tensor([[2.0]]), torch.tensor([[5.0]]), torch.tensor([7.0])
    assert edit(h, R, W, b, backend="cpu").item() == 3 + 2 * (5 * 3 + 7 - 2 * 3)
