"""Finite differences in float64: every row of the table, every activation, every backend, in place and out."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from reft_kernels.backends import registry
from reft_kernels.reference import ACTIVATIONS
from reft_kernels.testing import METHODS, EditCase, pairwise, random_edit


def finite_differences_agree(case: EditCase, backend: str, inplace: bool, fast: bool) -> None:
    o = random_edit(case, seed=1)
    names = list(o.differentiable)
    inputs = tuple(t.clone().requires_grad_() for t in o.differentiable.values())

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        operands = dict(zip(names, tensors, strict=True))
        if inplace:
            operands["h"] = operands["h"] * 1.0
        return o.edit(**operands, backend=backend, inplace=inplace)

    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=fast, nondet_tol=0.0)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_on_the_cpu(backend: str, method: str, activation: str, inplace: bool) -> None:
    case = EditCase(method, activation, "float64", "expanded", "padded", 2, "rows", 0.25, shape=(2, 4), d=5, r=2)
    finite_differences_agree(case, backend, inplace, fast=False)


@pytest.mark.parametrize(
    "case",
    [
        EditCase(dtype="float64", shape=(2, 3), slots=2, d=9, r=3, layout="expanded", **row)
        for row in pairwise(
            {
                "method": list(METHODS),
                "activation": ACTIVATIONS,
                "positions": ("none", "padded"),
                "groups": (0, 2),
                "scale": ("none", "number", "rows"),
                "dropout": (0.0, 0.25),
            }
        )
    ],
    ids=str,
)
def test_triton(case: EditCase) -> None:
    inplace = case.groups > 0
    finite_differences_agree(case, "triton", inplace, fast=True)


@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
def test_the_check_can_fail(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = registry.BACKENDS[backend].edit_backward

    def wrong(grad, problem, delta, s, needs, **how):
        dh, dR, dW, db, dc = inner(grad, problem, delta, s, needs, **how)
        return dh, dR * (1 + 1e-4), dW, db, dc

    monkeypatch.setattr(registry.BACKENDS[backend], "edit_backward", wrong)
    with pytest.raises(GradcheckError):
        finite_differences_agree(EditCase("loreft", "tanh", "float64", shape=(2,), d=5, r=2), backend, False, True)
