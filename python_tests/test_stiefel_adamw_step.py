"""stiefel_adamw_step of every backend: AdamW where nothing is constrained, a float64 reference where it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from reft_kernels import orthonormal_reference as reference
from reft_kernels.backends.orthonormal_registry import BACKENDS, refusal
from reft_kernels.orthonormal_problem import StiefelProblem
from reft_kernels.testing import assert_bitwise_equal

SHAPES = ((4, 12), (4, 12), (5, 5), (1, 7), (1, 1), (16, 300), (64, 65), (3, 129), (8, 576), (8,), (33,), ())
CONSTRAINED = tuple(len(shape) == 2 and i % 3 != 1 for i, shape in enumerate(SHAPES))
DTYPES = (torch.float64, torch.float32)


def problem_of(dtype: torch.dtype, steps: int = 3, shapes=SHAPES, orthonormal=CONSTRAINED, **settings: Any):
    """A step after ``steps`` of them, with moments of gradients that have been."""
    parameters, gradients, first, second = [], [], [], []
    for shape, own in zip(shapes, orthonormal, strict=True):
        value = torch.randn(shape, dtype=torch.float64)
        parameters.append((reference.polar(value) if own else value).to(dtype))
        gradients.append(torch.randn(shape, dtype=dtype))
        first.append(torch.randn(shape, dtype=dtype) if steps else torch.zeros(shape, dtype=dtype))
        second.append(torch.rand(shape, dtype=dtype) + 0.1 if steps else torch.zeros(shape, dtype=dtype))
    options: dict[str, Any] = {
        "weight_decays": tuple(0.1 * (i % 3) for i in range(len(shapes))),
        "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "max_norm": None, "riemannian": False,
        "maximize": False, "grad_scale": None, "found_inf": None, **settings,
    }  # fmt: skip
    counts = tuple(torch.tensor(float(steps)) for _ in shapes)
    return StiefelProblem(
        tuple(parameters), tuple(gradients), tuple(first), tuple(second), counts, tuple(orthonormal), **options
    )


def copied(p: StiefelProblem, dtype: torch.dtype | None = None) -> StiefelProblem:
    tensors = [tuple(t.to(dtype or t.dtype, copy=True) for t in ts) for ts in p[:4]]
    return StiefelProblem(*tensors, tuple(t.clone() for t in p.steps), *p[5:])


def expected(p: StiefelProblem) -> StiefelProblem:
    """The step in float64, as the formulas say."""
    q = copied(p, torch.float64)
    scale = 1.0 if p.grad_scale is None else 1 / float(p.grad_scale)
    gradients = [g * scale for g in q.gradients]
    if p.max_norm is not None:
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        gradients = [g * min(1.0, p.max_norm / (norm + 1e-6)) for g in gradients]
    for i, grad in enumerate(gradients):
        g = -grad if p.maximize else grad
        w, m, v, t = q.parameters[i], q.exp_avgs[i], q.exp_avg_sqs[i], q.steps[i].add_(1)
        if p.orthonormal[i] and p.riemannian:
            g = reference.tangent(w, g)
        m.mul_(p.beta1).add_(g, alpha=1 - p.beta1)
        v.mul_(p.beta2).add_(g.square(), alpha=1 - p.beta2)
        if not p.orthonormal[i]:
            w.mul_(1 - float(p.lr) * p.weight_decays[i])
        mean, variance = m / (1 - p.beta1 ** float(t)), v / (1 - p.beta2 ** float(t))
        w.sub_(float(p.lr) * mean / (variance.sqrt() + p.eps))
        if p.orthonormal[i]:
            w.copy_(reference.polar(w))
    return q


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest):
    return BACKENDS[request.param]


def checked(backend, problem: StiefelProblem):
    why_not = refusal(backend, problem)
    if why_not is not None:
        pytest.skip(why_not)
    return backend


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "first step": {"steps": 0},
    "clipped": {"max_norm": 0.5},
    "not clipped": {"max_norm": 1e6},
    "riemannian": {"riemannian": True},
    "riemannian clipped": {"riemannian": True, "max_norm": 2.0},
    "maximize": {"maximize": True},
    "scaled": {"grad_scale": torch.tensor(1024.0), "found_inf": torch.tensor(0.0)},
    "scaled and clipped": {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(0.0), "max_norm": 0.5},
    "tensor lr": {"lr": torch.tensor(3e-3)},
    "large lr": {"lr": 0.3},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(SETTINGS))
def test_step(backend, name: str, dtype: torch.dtype) -> None:
    p = problem_of(dtype, **SETTINGS[name])
    checked(backend, p)
    want = expected(p)
    gradients = [g.clone() for g in p.gradients]
    scale = 1.0 if p.grad_scale is None else 1 / float(p.grad_scale)
    norm = backend.stiefel_adamw_step(p)
    assert (norm is None) == (p.max_norm is None)
    if norm is not None:
        total = math.sqrt(sum(float(g.double().square().sum()) for g in gradients)) * scale
        assert norm.dtype == torch.float64
        assert norm.shape == ()
        assert float(norm) == pytest.approx(total, rel=1e-6)
    eps = torch.finfo(dtype).eps
    for i, own in enumerate(p.orthonormal):
        assert_bitwise_equal(p.gradients[i], gradients[i])
        assert float(p.steps[i]) == float(want.steps[i])
        assert (p.exp_avgs[i] - want.exp_avgs[i]).abs().max() <= 16 * eps * (1 + want.exp_avgs[i].abs().max())
        assert (p.exp_avg_sqs[i] - want.exp_avg_sqs[i]).abs().max() <= 16 * eps * want.exp_avg_sqs[i].abs().max()
        w, expected_w = p.parameters[i], want.parameters[i]
        assert (w - expected_w).abs().max() <= (64 if own else 16) * eps * (1 + expected_w.abs().max())
        if own:
            assert (w.double() @ w.double().T - torch.eye(len(w))).abs().max() <= max(
                1e-6 if eps > 1e-10 else 0, 64 * eps
            )


def test_many_steps_are_those_of_adamw_where_nothing_is_constrained(backend) -> None:
    shapes = ((4, 12), (8, 576), (33,))
    p = problem_of(torch.float32, 0, shapes, (False,) * 3, weight_decays=(0.1,) * 3, max_norm=1.0)
    checked(backend, p)
    twins = [torch.nn.Parameter(t.clone()) for t in p.parameters]
    optimizer = torch.optim.AdamW(twins, lr=1e-2, weight_decay=0.1, foreach=False)
    for _ in range(20):
        for g, twin in zip(p.gradients, twins, strict=True):
            g.normal_()
            twin.grad = g.clone()
        norm = torch.nn.utils.clip_grad_norm_(twins, 1.0)
        optimizer.step()
        found = backend.stiefel_adamw_step(p)
        assert found is not None
        assert float(found) == pytest.approx(float(norm), rel=1e-6)
    for got, twin in zip(p.parameters, twins, strict=True):
        torch.testing.assert_close(got, twin.detach(), rtol=2e-6, atol=2e-6)


def unchanged(p: StiefelProblem, before: StiefelProblem, indices) -> None:
    for i in indices:
        for after_of, before_of in zip(p[:5], before[:5], strict=True):
            assert_bitwise_equal(after_of[i], before_of[i])


def test_found_inf_changes_nothing(backend) -> None:
    p = problem_of(torch.float32, grad_scale=torch.tensor(2.0), found_inf=torch.tensor(1.0))
    checked(backend, p)
    before = copied(p)
    backend.stiefel_adamw_step(p)
    unchanged(p, before, range(len(SHAPES)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("riemannian", [False, True])
def test_a_gradient_that_is_not_finite_leaves_its_R(backend, bad: float, riemannian: bool) -> None:
    p = problem_of(torch.float32, riemannian=riemannian)
    checked(backend, p)
    p.gradients[5].view(-1)[299] = bad
    before = copied(p)
    backend.stiefel_adamw_step(p)
    unchanged(p, before, [5])
    for i in range(len(SHAPES)):
        if i != 5:
            assert p.parameters[i].isfinite().all()
            assert float(p.steps[i]) == float(before.steps[i]) + 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing(backend, bad: float) -> None:
    p = problem_of(torch.float32, max_norm=1.0)
    checked(backend, p)
    p.gradients[10][7] = bad  # of an unconstrained one
    before = copied(p)
    norm = backend.stiefel_adamw_step(p)
    assert norm is not None
    assert not norm.isfinite()
    unchanged(p, before, range(len(SHAPES)))


def test_same_bits_again(backend) -> None:
    p = problem_of(torch.float32, max_norm=0.5, riemannian=True)
    checked(backend, p)
    q = copied(p)
    backend.stiefel_adamw_step(p)
    backend.stiefel_adamw_step(q)
    for a, b in zip(p[:5], q[:5], strict=True):
        for x, y in zip(a, b, strict=True):
            assert_bitwise_equal(x, y)


@pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=pytest.mark.slow) if name == "triton" else name for name in BACKENDS],
    indirect=True,
)
def test_many_steps_stay_orthonormal(backend) -> None:
    shapes = ((4, 24), (20, 40))
    steps, lr = (10_000, 1e-2) if backend.name == "cpu" else (100, 3e-2)  # a step takes the interpreter 0.3 s
    p = problem_of(torch.float32, 0, shapes, (True, True), lr=lr)
    checked(backend, p)
    targets: list[Tensor] = [reference.polar(torch.randn(s)) for s in shapes]
    for _ in range(steps):
        for g, w, target in zip(p.gradients, p.parameters, targets, strict=True):
            torch.sub(w, target, out=g)
        backend.stiefel_adamw_step(p)
    for w, target in zip(p.parameters, targets, strict=True):
        assert (w.double() @ w.double().T - torch.eye(len(w))).abs().max() <= 1e-6
        assert (w - target).norm() < 0.5 * target.norm()
