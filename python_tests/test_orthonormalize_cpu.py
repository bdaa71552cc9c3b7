"""What only the CPU kernels of orthonormal R have: threads, instruction sets, memory, how d and r are cut up."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_orthonormalize import oracle
from test_orthonormalize import problem_of as matrices_of
from test_stiefel_adamw_step import copied, expected
from test_stiefel_adamw_step import problem_of as step_of
from torch import Tensor

from reft_kernels import available_backends
from reft_kernels import orthonormal_reference as reference
from reft_kernels.backends import cpu_orthonormal as cpu
from reft_kernels.backends.orthonormal_registry import BACKENDS
from reft_kernels.orthonormal_problem import OrthonormalProblem, StiefelProblem
from reft_kernels.testing import assert_bitwise_equal

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(available_backends()["cpu"] != "ok", reason=available_backends()["cpu"])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def eye_error(R: Tensor) -> float:
    return float((R.double() @ R.double().T - torch.eye(len(R))).abs().max())


# Many matrices of a size, which stay with a thread each; one, whose chunks are shared; one that outweighs the others.
SHARED_OUT = (((700, 8),) * 9, ((5000, 12),), ((30, 3), (4000, 20), (64, 5), (1, 1), (600, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SHARED_OUT, ids=["many", "one", "uneven"])
def test_R_does_not_depend_on_the_number_of_threads(sizes, dtype: torch.dtype, threads: None) -> None:
    problem = matrices_of(sizes, dtype)
    grads = [torch.randn(r, d, dtype=dtype) for d, r in sizes]
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        R, factors = cpu.orthonormalize_forward(problem)
        found.append((*R, factors, *cpu.orthonormalize_backward(grads, problem, factors)))
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert_bitwise_equal(got, want)


@pytest.mark.parametrize("settings", [{}, {"max_norm": 1.0, "riemannian": True}], ids=str)
@pytest.mark.parametrize("sizes", SHARED_OUT, ids=["many", "one", "uneven"])
def test_a_step_does_not_depend_on_the_number_of_threads(sizes, settings: dict[str, Any], threads: None) -> None:
    shapes = [shape for d, r in sizes for shape in ((r, d), (r, d), (r,))]
    p = step_of(torch.float32, 3, shapes, [True, False, False] * len(sizes), **settings)
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        q = copied(p)
        norm = cpu.stiefel_adamw_step(q)
        found.append([t for ts in q[:5] for t in ts] + ([] if norm is None else [norm]))
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert_bitwise_equal(got, want)


# Around the widths of vectors, strips (64 to 256 columns), chunks (512 and more) and blocks of ranks; r above all.
SIZES = (
    (2, 1), (2, 2), (3, 2), (15, 15), (16, 16), (17, 9), (31, 8), (33, 31), (63, 7), (64, 24), (66, 65), (255, 3),
    (256, 4), (257, 5), (300, 260), (511, 11), (512, 2), (513, 1), (700, 70), (1025, 6), (8193, 2), (9000, 1),
)  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_map_and_gradient_of_every_size(size: tuple[int, int]) -> None:
    d, r = size
    for dtype in (torch.float64, torch.float32):
        problem = matrices_of((size,), dtype, 1 / math.sqrt(d))
        grads = [torch.randn(r, d, dtype=dtype)]
        (R,), factors = cpu.orthonormalize_forward(problem)
        (dX,) = cpu.orthonormalize_backward(grads, problem, factors)
        (want,), (want_dX,) = oracle(problem, grads)
        eps = torch.finfo(dtype).eps
        assert dX is not None
        assert (R - want).abs().max() <= 8 * eps * (1 if dtype == torch.float32 else r**0.5)
        assert (dX - want_dX).abs().max() <= 32 * eps * (1 + want_dX.abs().max())
        assert not dX.triu().any()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("riemannian", [False, True])
def test_step_of_every_size(size: tuple[int, int], riemannian: bool) -> None:
    d, r = size
    for dtype in (torch.float64, torch.float32):
        p = step_of(dtype, 3, ((r, d), (r, d)), (True, False), riemannian=riemannian, lr=0.1 / math.sqrt(d))
        want = expected(p)
        cpu.stiefel_adamw_step(p)
        eps = torch.finfo(dtype).eps
        for of_each, of_want in zip(p[:5], want[:5], strict=True):
            for got, good in zip(of_each, of_want, strict=True):
                assert (got - good).abs().max() <= 32 * eps * (1 + good.abs().max())
        assert eye_error(p.parameters[0]) <= (1.5 if dtype == torch.float32 else 64) * eps


@pytest.mark.parametrize("d", [576, 4096, 8192])
@pytest.mark.parametrize("r", [1, 8, 16, 64])
def test_rows_are_orthonormal_to_the_last_digits(d: int, r: int) -> None:
    """A float32 sum over d, or of what the first columns hold, would cost more."""
    for amount in (0.0, 0.01, 0.1, 3.0):
        for flipped in (False, True):
            (R,), _ = cpu.orthonormalize_forward(matrices_of(((d, r),), torch.float32, amount, flipped))
            assert eye_error(R) <= 2e-7


def test_rows_that_nearly_coincide_are_made_orthonormal() -> None:
    """One retraction is not enough where what is left of a row is rounding: the second is."""
    for r in (4, 24):
        p = step_of(torch.float32, 0, ((r, 300),), (True,), lr=0.0)
        R = p.parameters[0]
        R[1:] = R[:1] + 1e-6 * torch.randn(r - 1, 300)
        cpu.stiefel_adamw_step(p)
        assert eye_error(R) <= 1e-6


def test_a_rate_in_a_tensor() -> None:
    for lr in (torch.tensor(3e-3, dtype=torch.float64), torch.tensor(3e-3)):
        p = step_of(torch.float32)
        q, given = copied(p), copied(p)._replace(lr=lr)
        cpu.stiefel_adamw_step(q._replace(lr=float(lr)))
        cpu.stiefel_adamw_step(given)
        for a, b in zip(given.parameters, q.parameters, strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.5, 0.95])
def test_first_moments_end_nearest_the_nearer_end(beta1: float) -> None:
    p = step_of(torch.float32, beta1=beta1)
    want = [torch.lerp(m, g, 1 - beta1) for m, g in zip(p.exp_avgs, p.gradients, strict=True)]
    cpu.stiefel_adamw_step(p)
    for m, w, g in zip(p.exp_avgs, want, p.gradients, strict=True):
        torch.testing.assert_close(m, w, rtol=2e-7, atol=2e-7)
        if beta1 == 0:
            assert_bitwise_equal(m, g)


def test_a_gradient_too_large_to_square_in_float32_is_finite() -> None:
    p = step_of(torch.float32, 0, ((4, 40), (8,)), (True, False))
    p.gradients[0].fill_(1e30)
    cpu.stiefel_adamw_step(p)
    assert float(p.steps[0]) == 1
    clipped = step_of(torch.float32, 0, ((4, 40), (8,)), (True, False), max_norm=1.0)
    clipped.gradients[1].fill_(1e30)
    norm = cpu.stiefel_adamw_step(clipped)
    assert norm is not None
    assert float(norm) == pytest.approx(8**0.5 * 1e30, rel=1e-6)
    assert float(clipped.steps[1]) == 1


def test_no_matrices() -> None:
    none = OrthonormalProblem((), (), ())
    assert cpu.unsupported_matrices(none) is None
    R, factors = cpu.orthonormalize_forward(none)
    assert R == ()
    assert factors.shape == (0,)
    assert factors.dtype == torch.float64
    assert cpu.orthonormalize_backward([], none, factors) == ()
    step = step_of(torch.float32, 0, (), ())
    assert cpu.stiefel_adamw_step(step) is None
    norm = cpu.stiefel_adamw_step(step._replace(max_norm=1.0))
    assert norm is not None
    assert float(norm) == 0


def test_no_gradients() -> None:
    problem = matrices_of(((9, 2), (7, 3)), torch.float32)
    _, factors = cpu.orthonormalize_forward(problem)
    assert cpu.orthonormalize_backward([None, None], problem, factors) == (None, None)


def test_what_is_written_has_another_version() -> None:
    p = step_of(torch.float32)
    before = [t._version for ts in p[:5] for t in ts]
    cpu.stiefel_adamw_step(p)
    changed = [t._version > v for t, v in zip((t for ts in p[:5] for t in ts), before, strict=True)]
    count = len(p.parameters)
    assert changed == [True] * count + [False] * count + [True] * 3 * count


def test_operands_that_do_not_belong_together_are_refused() -> None:
    good = matrices_of(((9, 2), (7, 3)), torch.float32)
    _, factors = cpu.orthonormalize_forward(good)
    short = torch.randn(8, 2)
    for bad in (
        good._replace(X=(short, good.X[1])),
        good._replace(reflectors=(short, good.reflectors[1])),
        good._replace(signs=(torch.ones(1), good.signs[1])),
        good._replace(signs=good.signs[:1]),
        good._replace(reflectors=(good.reflectors[0].double(), good.reflectors[1])),
        good._replace(X=(torch.randn(2, 9).T, good.X[1])),
        good._replace(X=(torch.randn(2, 9), good.X[1])),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            cpu.orthonormalize_forward(bad)
    with pytest.raises(RuntimeError, match="expected"):
        cpu.orthonormalize_backward([torch.randn(2, 8), torch.randn(3, 7)], good, factors)
    with pytest.raises(RuntimeError, match="expected"):
        cpu.orthonormalize_backward([torch.randn(2, 9), torch.randn(3, 7)], good, factors[:-1])
    step = step_of(torch.float32)
    for field in ("gradients", "exp_avgs", "exp_avg_sqs", "steps"):
        tensors = getattr(step, field)
        for wrong in (tensors[:-1], (torch.zeros(2), *tensors[1:]), (tensors[0].double(), *tensors[1:])):
            with pytest.raises(RuntimeError, match="expected"):
                cpu.stiefel_adamw_step(step._replace(**{field: wrong}))


def agrees_with_eager(sizes: tuple[tuple[int, int], ...]) -> None:
    """Forward, backward and step of these sizes together, for programs of their own."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        tolerance = 64 * torch.finfo(dtype).eps
        problem = matrices_of(sizes, dtype, 0.3)
        grads: list[Tensor | None] = [torch.randn(r, d, dtype=dtype) for d, r in sizes]
        if len(sizes) > 1:
            grads[1] = None
        results = []
        for name in ("cpu", "eager"):
            R, factors = BACKENDS[name].orthonormalize_forward(problem)
            dX = BACKENDS[name].orthonormalize_backward(grads, problem, factors)
            results.append([*R, *(t for t in dX if t is not None)])
        for got, want in zip(*results, strict=True):
            assert (got - want).abs().max() <= tolerance * (1 + want.abs().max())
        shapes = [shape for d, r in sizes for shape in ((r, d), (r, d), (r,))]
        for settings in ({}, {"max_norm": 1.0, "riemannian": True, "grad_scale": torch.tensor(4.0)}):
            p = step_of(dtype, 3, shapes, [True, False, False] * len(sizes), lr=1e-3, **settings)
            q = copied(p)
            cpu.stiefel_adamw_step(p)
            BACKENDS["eager"].stiefel_adamw_step(q)
            for got, want in zip((t for ts in p[:5] for t in ts), (t for ts in q[:5] for t in ts), strict=True):
                assert (got - want).abs().max() <= tolerance * (1 + want.abs().max())


COMPARE = """
import torch
from reft_kernels.backends import cpu, cpu_orthonormal
assert cpu_orthonormal.unavailable() is None
import test_orthonormalize_cpu
torch.set_num_threads(1)
test_orthonormalize_cpu.agrees_with_eager(test_orthonormalize_cpu.SIZES[::2])
print(cpu.instruction_set())
"""


def run(script: str, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT / "python_tests"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another family of processors")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees_with_eager(isa: str) -> None:
    assert run(COMPARE, REFT_KERNELS_CPU_ISA=isa) in (isa, "baseline", "avx2")


def test_nothing_of_the_size_of_R_is_allocated() -> None:
    """The peak of a whole process's memory, beyond R and dL/dX, and beyond nothing for a step: X is 64 MiB."""
    script = """
from pathlib import Path
import torch
from reft_kernels.backends import cpu_orthonormal as cpu
from reft_kernels.orthonormal_problem import OrthonormalProblem, StiefelProblem

def peak() -> int:  # MiB; what getrusage tells may be the parent's
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) >> 10

assert cpu.unavailable() is None
d, r = 1 << 20, 16
X, grad, B = torch.ones(d, r), torch.ones(r, d), torch.zeros(d, r)
B.diagonal().fill_(1)
problem = OrthonormalProblem((X,), (B,), (torch.ones(r),))
before = peak()
(R,), factors = cpu.orthonormalize_forward(problem)
after_R = peak()
(dX,) = cpu.orthonormalize_backward([grad], problem, factors)
after_dX = peak()
zeros = [torch.zeros(r, d) for _ in range(2)]
for t in zeros:
    t.add_(1e-3)
step = StiefelProblem((R,), (grad,), (zeros[0],), (zeros[1],), (torch.zeros(()),), (True,), (0.0,), 1e-3, 0.9, 0.999,
                      1e-8, 1.0, True, False, None, None)
before_step = peak()
cpu.stiefel_adamw_step(step)
print(after_R - before, after_dX - after_R, peak() - before_step)
"""
    forward, backward, step = map(int, run(script, OMP_NUM_THREADS="2").split())
    assert 60 <= forward < 64 + 12, f"{forward} MiB for 64"
    assert 60 <= backward < 64 + 12, f"{backward} MiB for 64"
    assert step < 12, f"{step} MiB"


def test_polar_factors_of_rows_far_from_orthonormal() -> None:
    """Steps without any movement: what the retraction alone does."""
    for r, d in ((1, 5), (3, 40), (24, 25), (40, 300)):
        p = step_of(torch.float64, 0, ((r, d),), (True,), lr=0.0)
        p.parameters[0].copy_(torch.randn(r, d, dtype=torch.float64))
        want = reference.polar(p.parameters[0])
        cpu.stiefel_adamw_step(p)
        torch.testing.assert_close(p.parameters[0], want, rtol=1e-9, atol=1e-9)


def test_step_problems_are_refused_by_their_device_and_type() -> None:
    half: StiefelProblem = step_of(torch.float32, 0, ((4,),), (False,))._replace(
        parameters=(torch.zeros(4, dtype=torch.float16),)
    )
    assert cpu.unsupported_matrices(half) == "needs float32 or float64, got torch.float16"
    rate = step_of(torch.float32, lr=torch.tensor(1, dtype=torch.int64))
    assert cpu.unsupported_matrices(rate) == "needs lr in float32 or float64, got torch.int64"
    meta = half._replace(parameters=(torch.zeros(4, device="meta"),))
    assert cpu.unsupported_matrices(meta) == "needs matrices on the CPU, got meta"
