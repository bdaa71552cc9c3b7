"""orthonormalize_forward and orthonormalize_backward of every backend against the oracle, sizes mixed in one call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reft_kernels import orthonormal_reference as reference
from reft_kernels.backends.orthonormal_registry import BACKENDS, refusal
from reft_kernels.orthonormal_problem import OrthonormalProblem
from reft_kernels.testing import assert_bitwise_equal

SIZES = ((12, 4), (12, 4), (5, 5), (7, 1), (1, 1), (300, 16), (65, 64), (129, 3), (576, 8))
DTYPES = (torch.float64, torch.float32)


def problem_of(
    sizes: tuple[tuple[int, int], ...], dtype: torch.dtype, amount: float = 1.0, flipped: bool = True
) -> OrthonormalProblem:
    """X away from the base, with something above its diagonal, and signs of both kinds."""
    X, reflectors, signs = [], [], []
    for d, r in sizes:
        eye = torch.eye(d, r, dtype=dtype)
        x = amount * torch.randn(d, r, dtype=dtype)
        sign = torch.where(torch.rand(r) < 0.5, -1.0, 1.0).to(dtype) if flipped else -torch.ones(r, dtype=dtype)
        x.diagonal().copy_(sign * torch.rand(r, dtype=dtype).clamp(min=1e-3))
        X.append(x)
        reflectors.append(torch.randn(d, r, dtype=dtype).tril(-1) / d**0.5 + eye)
        signs.append(torch.where(torch.rand(r) < 0.5, -1.0, 1.0).to(dtype))
    return OrthonormalProblem(tuple(X), tuple(reflectors), tuple(signs))


def oracle(problem: OrthonormalProblem, grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """R and dL/dX in float64."""
    R, dX = [], []
    for x, reflectors, signs, grad in zip(*problem, grads, strict=True):
        wide = x.double().requires_grad_()
        rows = reference.orthonormalize(wide, reflectors.double(), signs.double())
        R.append(rows.detach())
        dX.append(torch.autograd.grad(rows, wide, grad.double())[0])
    return R, dX


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest):
    return BACKENDS[request.param]


def checked(backend, problem: OrthonormalProblem):
    why_not = refusal(backend, problem)
    if why_not is not None:
        pytest.skip(why_not)
    return backend


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amount", [0.0, 0.1, 3.0])
def test_map_and_gradient(backend, dtype: torch.dtype, amount: float) -> None:
    problem = problem_of(SIZES, dtype, amount)
    checked(backend, problem)
    grads = [torch.randn(r, d, dtype=dtype) for d, r in SIZES]
    kept = [[t.clone() for t in ts] for ts in problem]
    R, factors = backend.orthonormalize_forward(problem)
    dX = backend.orthonormalize_backward(grads, problem, factors)
    expected, expected_dX = oracle(problem, grads)
    eps = torch.finfo(dtype).eps
    for got, want, got_dX, want_dX in zip(R, expected, dX, expected_dX, strict=True):
        r = len(want)
        assert got.dtype == got_dX.dtype == dtype
        assert got.is_contiguous()
        assert got_dX.is_contiguous()
        assert (got - want).abs().max() <= 16 * eps * (1 if dtype == torch.float32 else r)
        assert (got.double() @ got.double().T - torch.eye(r)).abs().max() <= 8 * eps * (1 + r**0.5)
        assert (got_dX - want_dX).abs().max() <= 64 * r * eps * (1 + want_dX.abs().max())
        assert not got_dX.triu().any()
    for before, after in zip(kept, problem, strict=True):
        for a, b in zip(before, after, strict=True):
            assert_bitwise_equal(b, a)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_matrix_is_as_one_of_many(backend, dtype: torch.dtype) -> None:
    """And a matrix without a gradient has none, whatever the others have."""
    sizes = ((40, 6), (64, 8), (40, 6), (17, 2))
    problem = problem_of(sizes, dtype)
    checked(backend, problem)
    grads = [torch.randn(r, d, dtype=dtype) for d, r in sizes]
    R, factors = backend.orthonormalize_forward(problem)
    some: list[Tensor | None] = [grads[0], None, grads[2], None]
    found = backend.orthonormalize_backward(some, problem, factors)
    assert [t is None for t in found] == [False, True, False, True]
    whole = backend.orthonormalize_backward(grads, problem, factors)
    tolerance = 64 * torch.finfo(dtype).eps
    for i in range(len(sizes)):
        alone = OrthonormalProblem(*((t[i],) for t in problem))
        (own,), own_factors = backend.orthonormalize_forward(alone)
        (own_dX,) = backend.orthonormalize_backward([grads[i]], alone, own_factors)
        torch.testing.assert_close(own, R[i], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(own_dX, whole[i], rtol=tolerance, atol=tolerance)
        if found[i] is not None:
            torch.testing.assert_close(found[i], whole[i], rtol=tolerance, atol=tolerance)


def test_factors_are_those_of_every_backend(backend) -> None:
    """So that one backend's backward may follow another's forward."""
    problem = problem_of(((40, 6), (64, 8)), torch.float64)
    checked(backend, problem)
    _, factors = backend.orthonormalize_forward(problem)
    _, expected = BACKENDS["eager"].orthonormalize_forward(problem)
    torch.testing.assert_close(factors, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_again(backend, dtype: torch.dtype) -> None:
    problem = problem_of(((400, 8), (33, 32)), dtype)
    checked(backend, problem)
    grads = [torch.randn(8, 400, dtype=dtype), torch.randn(32, 33, dtype=dtype)]
    first_R, factors = backend.orthonormalize_forward(problem)
    first = backend.orthonormalize_backward(grads, problem, factors)
    for _ in range(2):
        R, again = backend.orthonormalize_forward(problem)
        for got, want in zip((*R, again), (*first_R, factors), strict=True):
            assert_bitwise_equal(got, want)
        for got, want in zip(backend.orthonormalize_backward(grads, problem, factors), first, strict=True):
            assert_bitwise_equal(got, want)


def test_near_degenerate_X(backend) -> None:
    """Reflectors that nearly coincide, and ones that are long: R stays orthonormal, the gradient right."""
    for scale in (1.0, 1e3):
        problem = problem_of(((50, 6),), torch.float32)
        checked(backend, problem)
        X = problem.X[0]
        X[:, 1:] = X[:, :1] + 1e-4 * torch.randn(50, 5)
        X.mul_(scale)
        grads = [torch.randn(6, 50)]
        (R,), factors = backend.orthonormalize_forward(problem)
        (dX,) = backend.orthonormalize_backward(grads, problem, factors)
        (expected,), (expected_dX,) = oracle(problem, grads)
        assert (R.double() @ R.double().T - torch.eye(6)).abs().max() <= 2e-5
        assert (R - expected).abs().max() <= 2e-5
        assert (dX - expected_dX).abs().max() <= 1e-3 * expected_dX.abs().max()
