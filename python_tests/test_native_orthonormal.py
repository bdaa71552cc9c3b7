"""The CUDA kernels of matrices with orthonormal rows, run on the CPU by fibers, against the oracle.

The tests of every backend are run with the machine as the backend, and others that only a GPU's kernels need. Every
launch is searched for races, deadlocks and writes beyond the shared memory (machine.h), in an order of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import test_orthonormalize as maps
import test_stiefel_adamw_step as steps
import torch
from native_machine import ORTHONORMAL_SOURCES, Device, OrthonormalMachine, build
from test_orthonormalize import *  # noqa: F403
from test_stiefel_adamw_step import *  # noqa: F403
from torch import Tensor

from reft_kernels.backends import cuda_orthonormal
from reft_kernels.backends.orthonormal_registry import choose
from reft_kernels.orthonormal_problem import OrthonormalProblem, StiefelProblem
from reft_kernels.testing import assert_bitwise_equal, poison_empty

SMALL_SHARED = 99 << 10
# Several slabs, ranks on both sides of every limit, d that nothing divides.
SIZES = (
    (2500, 3), (1025, 8), (1030, 1), (1024, 4), (700, 12), (1100, 16), (520, 20), (600, 32), (513, 33), (530, 64),
    (5, 5), (1, 1), (64, 64), (70, 50),
)  # fmt: skip
DEVICES = (
    Device(90, 1), Device(90, 2), Device(90, 7), Device(90, 132), Device(80, 3, 163 << 10), Device(120, 5, SMALL_SHARED)
)  # fmt: skip


@pytest.fixture(scope="session")
def library() -> OrthonormalMachine:
    return OrthonormalMachine(build("orthonormal", ORTHONORMAL_SOURCES))


@pytest.fixture
def backend(library: OrthonormalMachine) -> Iterator[OrthonormalMachine]:
    """The machine, with a device of three multiprocessors; its barrier's word comes to rest, and is never zeroed."""
    library.use(Device())
    library.seed(0)
    yield library
    assert library.barrier & 0x7FFFFFFF == 0


# --- orthonormalize


def gradients_of(problem: OrthonormalProblem) -> list[Tensor]:
    return [torch.randn(X.shape[1], X.shape[0]) for X in problem.X]


def assert_map(backend, problem: OrthonormalProblem, grads: list[Tensor]) -> None:
    with poison_empty():
        R, factors = backend.orthonormalize_forward(problem)
        dX = backend.orthonormalize_backward(grads, problem, factors)
    expected, expected_dX = maps.oracle(problem, grads)
    for got, want, got_dX, want_dX in zip(R, expected, dX, expected_dX, strict=True):
        r = len(want)
        assert (got - want).abs().max() <= 5e-7, want.shape
        assert (got.double() @ got.double().T - torch.eye(r)).abs().max() <= 3e-7, want.shape
        assert (got_dX - want_dX).abs().max() <= 4e-6 * r**0.5 * (1 + want_dX.abs().max()), want.shape
        assert not got_dX.triu().any()


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_every_size_on_every_device(device: Device, backend) -> None:
    """One launch each, in an order of its own, whatever the device."""
    problem = maps.problem_of(SIZES, torch.float32)
    backend.use(device)
    backend.seed(DEVICES.index(device))
    launches = backend.launches
    assert_map(backend, problem, gradients_of(problem))
    assert backend.launches == launches + 2


@pytest.mark.slow
def test_bits_follow_from_a_matrix_alone(backend) -> None:
    """Neither from the device, nor from the order of threads, nor from the other matrices."""
    problem = maps.problem_of(SIZES, torch.float32)
    grads = gradients_of(problem)
    first_R, first_factors = backend.orthonormalize_forward(problem)
    first_dX = backend.orthonormalize_backward(grads, problem, first_factors)
    for seed, device in enumerate(DEVICES, start=1):
        backend.use(device)
        backend.seed(1000 * seed)
        R, factors = backend.orthonormalize_forward(problem)
        dX = backend.orthonormalize_backward(grads, problem, factors)
        assert_bitwise_equal(factors, first_factors)
        for got, want in zip((*R, *dX), (*first_R, *first_dX), strict=True):
            assert_bitwise_equal(got, want)
    for i in range(len(SIZES)):
        alone = OrthonormalProblem(*((tensors[i],) for tensors in problem))
        (R,), factors = backend.orthonormalize_forward(alone)
        assert_bitwise_equal(R, first_R[i])
        assert_bitwise_equal(backend.orthonormalize_backward([grads[i]], alone, factors)[0], first_dX[i])


@pytest.mark.parametrize("d", [4096, 8192])
@pytest.mark.parametrize("r", [4, 8])
def test_long_rows_stay_orthonormal(d: int, r: int, backend) -> None:
    problem = maps.problem_of(((d, r),), torch.float32, 0.5)
    backend.use(Device(90, 5))
    (R,), _ = backend.orthonormalize_forward(problem)
    (expected,), _ = maps.oracle(problem, [torch.zeros(r, d)])
    assert (R.double() @ R.double().T - torch.eye(r)).abs().max() <= 3e-7
    assert (R - expected).abs().max() <= 3e-7


def moved(tensor: Tensor) -> Tensor:
    """The same, where 16 bytes do not begin."""
    memory = tensor.new_empty(tensor.numel() + 1)
    assert memory.data_ptr() % 16 == 0
    return memory[1:].view(tensor.shape).copy_(tensor)


def test_any_alignment(backend) -> None:
    problem = maps.problem_of(((1100, 4), (80, 8), (97, 20), (40, 36)), torch.float32)
    grads = gradients_of(problem)
    R, factors = backend.orthonormalize_forward(problem)
    dX = backend.orthonormalize_backward(grads, problem, factors)
    other = OrthonormalProblem(*(tuple(map(moved, tensors)) for tensors in problem))
    other_R, other_factors = backend.orthonormalize_forward(other)
    other_dX = backend.orthonormalize_backward([moved(g) for g in grads], other, other_factors)
    for got, want in zip((*other_R, *other_dX), (*R, *dX), strict=True):
        assert_bitwise_equal(got, want)


def test_what_lies_above_the_diagonal_is_not_read(backend) -> None:
    problem = maps.problem_of(((50, 7), (66, 33)), torch.float32)
    grads = gradients_of(problem)
    R, factors = backend.orthonormalize_forward(problem)
    dX = backend.orthonormalize_backward(grads, problem, factors)
    for X in problem.X:
        X[torch.ones_like(X, dtype=torch.bool).triu(1)] = float("nan")
    again, again_factors = backend.orthonormalize_forward(problem)
    again_dX = backend.orthonormalize_backward(grads, problem, again_factors)
    for got, want in zip((*again, *again_dX), (*R, *dX), strict=True):
        assert_bitwise_equal(got, want)


def assert_factors(backend, problem: OrthonormalProblem) -> None:
    """Those of sums in float64: what float32 loses of a product is all that they lack."""
    _, factors = backend.orthonormalize_forward(problem)
    _, expected = maps.BACKENDS["eager"].orthonormalize_forward(problem)
    assert (factors - expected).abs().max() <= 1e-7 * (1 + expected.abs().max())
    assert_bitwise_equal(factors == 0, expected == 0)


def test_factors_are_those_of_the_eager_backend(backend) -> None:
    assert_factors(backend, maps.problem_of(((40, 6), (530, 40), (3000, 3)), torch.float32, 0.1))


def test_as_many_matrices_as_a_table_holds(backend) -> None:
    """The small table, one more than it, and all that the large one holds."""
    for count in (63, 64, cuda_orthonormal.MAX_MATRICES):
        problem = maps.problem_of(((5, 2),) * count, torch.float32)
        assert_map(backend, problem, gradients_of(problem))
    problem = maps.problem_of(((2, 1),) * (count + 1), torch.float32)
    assert "511 matrices" in cuda_orthonormal.unsupported_sizes(problem)
    with pytest.raises(RuntimeError, match="takes up to 511 matrices at once, got 512"):
        backend.orthonormalize_forward(problem)


# --- the step

SHAPES = (
    (3, 2500), (8, 1025), (5000,), (4, 1024), (33, 513), (64, 530), (1, 1030), (4097,), (20, 520), (), (16, 7, 3),
    (12, 700), (5, 5), (4, 9), (0,),
)  # fmt: skip
CONSTRAINED = tuple(len(shape) == 2 and shape != (4, 9) for shape in SHAPES)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_norm": 0.5},
    "riemannian": {"riemannian": True},
    "no eps": {"eps": 0.0},
    "all": {
        "riemannian": True, "max_norm": 2.0, "maximize": True, "grad_scale": torch.tensor(8.0),
        "found_inf": torch.tensor(0.0), "lr": torch.tensor(0.1, dtype=torch.float64), "beta1": 0.3,
    },
}  # fmt: skip


def assert_step(p: StiefelProblem, want: StiefelProblem) -> None:
    eps = torch.finfo(torch.float32).eps
    for i, own in enumerate(p.orthonormal):
        w = p.parameters[i]
        assert float(p.steps[i]) == float(want.steps[i])
        if not w.numel():
            continue
        for got, expected in zip(
            (p.exp_avgs[i], p.exp_avg_sqs[i]), (want.exp_avgs[i], want.exp_avg_sqs[i]), strict=True
        ):
            assert (got - expected).abs().max() <= 16 * eps * (1 + expected.abs().max()), SHAPES[i]
        expected = want.parameters[i]
        assert (w - expected).abs().max() <= 16 * eps * (1 + expected.abs().max()), SHAPES[i]
        if own:
            assert (w.double() @ w.double().T - torch.eye(len(w))).abs().max() <= 3e-7, SHAPES[i]


def problem_of(**settings: Any) -> StiefelProblem:
    return steps.problem_of(torch.float32, shapes=SHAPES, orthonormal=CONSTRAINED, **settings)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_step_of_every_size_on_every_device(name: str, device: Device, backend) -> None:
    """One launch, in an order of its own, whatever the device."""
    p = problem_of(**SETTINGS[name])
    want = steps.expected(p)
    backend.use(device)
    backend.seed(100 * DEVICES.index(device))
    launches = backend.launches
    with poison_empty():
        norm = backend.stiefel_adamw_step(p)
    assert backend.launches == launches + 1
    assert_step(p, want)
    if norm is not None:
        total = sum(float(g.double().square().sum()) for g in p.gradients) ** 0.5
        scale = 1.0 if p.grad_scale is None else float(p.grad_scale)
        assert float(norm) == pytest.approx(total / scale, rel=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_bits_of_a_step_do_not_depend_on_the_device(name: str, backend) -> None:
    p = problem_of(**SETTINGS[name])
    others = [steps.copied(p) for _ in DEVICES]
    backend.stiefel_adamw_step(p)
    for seed, (device, other) in enumerate(zip(DEVICES, others, strict=True), start=1):
        backend.use(device)
        backend.seed(1000 * seed)
        backend.stiefel_adamw_step(other)
        for got, want in zip(sum(other[:5], ()), sum(p[:5], ()), strict=True):
            assert_bitwise_equal(got, want)


@pytest.mark.parametrize("riemannian", [False, True])
def test_step_at_any_alignment(riemannian: bool, backend) -> None:
    p = problem_of(riemannian=riemannian)
    other = StiefelProblem(
        *(tuple(map(moved, tensors)) for tensors in p[:4]), tuple(t.clone() for t in p.steps), *p[5:]
    )
    backend.stiefel_adamw_step(p)
    backend.stiefel_adamw_step(other)
    for got, want in zip(sum(other[:5], ()), sum(p[:5], ()), strict=True):
        assert_bitwise_equal(got, want)


@pytest.mark.parametrize("settings", [{}, {"riemannian": True}], ids=str)
@pytest.mark.parametrize("where", [0, 1030, 2499])
def test_one_element_that_is_not_finite_leaves_all_slabs(where: int, settings: dict[str, Any], backend) -> None:
    """Also where another block has it."""
    p = problem_of(**settings)
    for tensor in (p.gradients[0], p.gradients[4]):
        tensor[1, min(where, tensor.shape[1] - 1)] = float("inf")
    before = steps.copied(p)
    backend.use(Device(90, 40))
    backend.stiefel_adamw_step(p)
    steps.unchanged(p, before, [0, 4])
    assert [float(t) for t in p.steps] == [3 if i in (0, 4) else 4 for i in range(len(SHAPES))]


def test_only_unconstrained_tensors(backend) -> None:
    """Several blocks read the count of one tensor that one of them writes."""
    shapes = ((20000,), (3,), (5, 4000))
    p = steps.problem_of(torch.float32, shapes=shapes, orthonormal=(False,) * 3)
    want = steps.expected(p)
    backend.use(Device(90, 6))
    backend.stiefel_adamw_step(p)
    for got, expected in zip(p.parameters, want.parameters, strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=1e-6, atol=1e-6)
    assert [float(t) for t in p.steps] == [4.0] * 3


def test_counts_of_many_steps(backend) -> None:
    """Bias corrections are those of any count."""
    for count in (1, 999, 123_456, 2**24 - 2):
        p = steps.problem_of(torch.float32, count, ((7,), (3, 40)), (False, True))
        want = steps.expected(p)
        backend.stiefel_adamw_step(p)
        for got, expected in zip(p.parameters, want.parameters, strict=True):
            torch.testing.assert_close(got, expected.float(), rtol=2e-6, atol=2e-6)


def test_as_many_tensors_as_a_table_holds(backend) -> None:
    for count in (110, 111, cuda_orthonormal.MAX_TENSORS):
        shapes = tuple((2, 5) if i % 3 else (4,) for i in range(count))
        p = steps.problem_of(torch.float32, shapes=shapes, orthonormal=tuple(len(s) == 2 for s in shapes))
        want = steps.expected(p)
        backend.stiefel_adamw_step(p)
        for got, expected in zip(p.parameters, want.parameters, strict=True):
            torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)
    shapes = ((1,),) * (count + 1)
    p = steps.problem_of(torch.float32, shapes=shapes, orthonormal=(False,) * (count + 1))
    assert "510 tensors" in cuda_orthonormal.unsupported_sizes(p)
    with pytest.raises(RuntimeError, match="takes up to 510 tensors at once, got 511"):
        backend.stiefel_adamw_step(p)


# --- what is refused


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"), [(((80, 65),), torch.float32, "r=65"), (((8, 2),), torch.float64, "float64")]
)
def test_what_no_kernel_takes_is_refused(sizes, dtype: torch.dtype, reason: str, backend) -> None:
    """By Python with a reason, and by the launcher too."""
    problem = maps.problem_of(sizes, dtype)
    assert reason in cuda_orthonormal.unsupported_sizes(problem)
    with pytest.raises(RuntimeError, match=reason.removeprefix("r=")):
        backend.orthonormalize_forward(problem)
    shapes = tuple((r, d) for d, r in sizes)
    step = steps.problem_of(dtype, shapes=shapes, orthonormal=(True,))
    assert reason in cuda_orthonormal.unsupported_sizes(step)
    with pytest.raises(RuntimeError, match=reason.removeprefix("r=")):
        backend.stiefel_adamw_step(step)


def test_a_rate_of_another_type_is_refused(backend) -> None:
    p = steps.problem_of(torch.float32, shapes=((4,),), orthonormal=(False,), lr=torch.tensor(1, dtype=torch.bfloat16))
    assert cuda_orthonormal.unsupported_sizes(p) == "takes lr in float32 or float64, got bfloat16"
    with pytest.raises(RuntimeError, match="expected float32 or float64"):
        backend.stiefel_adamw_step(p)


def test_a_device_that_is_too_old_is_refused(backend) -> None:
    backend.use(dataclasses.replace(Device(), capability=75))
    with pytest.raises(RuntimeError, match=r"needs compute capability 8\.0 or newer, the device has 7\.5"):
        backend.orthonormalize_forward(maps.problem_of(((8, 2),), torch.float32))


def test_tensors_elsewhere_are_refused_with_a_reason() -> None:
    problem = maps.problem_of(((8, 2),), torch.float32)
    assert cuda_orthonormal.unsupported_matrices(problem) == "needs matrices on a CUDA device, got cpu"
    why_not = cuda_orthonormal.unavailable() or "needs matrices on a CUDA device, got cpu"
    with pytest.raises(ValueError, match="backend='cuda' cannot take these matrices: ") as error:
        choose("cuda", problem)
    assert str(error.value).endswith(why_not)
