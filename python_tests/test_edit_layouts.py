"""Strides of every operand: what is passed as a view gives the bits of what is passed contiguous."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reft_kernels import edit
from reft_kernels.testing import LAYOUTS, EditCase, assert_bitwise_equal, gradients, lay_out, random_edit

BACKENDS = ("eager", "cpu", "triton")
backends = pytest.mark.parametrize("backend", BACKENDS)


def alike(got: torch.Tensor, expected: torch.Tensor, backend: str, name: str) -> None:
    """Bitwise on Triton; the eager backend's matrix products may take another path for other strides."""
    if backend == "triton":
        assert_bitwise_equal(got, expected, name=name)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@backends
@pytest.mark.parametrize("positions", ["none", "padded"])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
def test_h_and_grad_as_views(layout: str, positions: str, backend: str) -> None:
    case = EditCase("noreft_with_c", "tanh", layout=layout, positions=positions, shape=(3, 4), d=40, r=3)
    o = random_edit(case, seed=1)
    grad = lay_out(torch.randn(3, 4, 40), layout)
    assert not o.h.is_contiguous()
    assert not grad.is_contiguous()
    got = gradients(lambda **t: o.edit(**t, backend=backend), o, grad)
    h = o.h.contiguous()
    expected = gradients(lambda **t: o.edit(**{**t, "h": t["h"].contiguous()}, backend=backend), o, grad.contiguous())
    assert_bitwise_equal(h, o.h)
    alike(got.y, expected.y, backend, "y")
    for name, value in got.grads.items():
        alike(value, expected.grads[name], backend, name)


@backends
@pytest.mark.parametrize("name", ["R", "W", "b", "c", "positions", "group", "scale"])
@pytest.mark.parametrize("layout", ["slice", "columns", "rows", "transposed"])
def test_other_operands_as_views(layout: str, name: str, backend: str) -> None:
    case = EditCase(
        "noreft_with_c", "gelu", positions="padded", groups=2, scale="rows", shape=(3, 5), slots=4, d=24, r=3
    )
    o = random_edit(case, seed=2)
    grad = torch.randn(3, 5, 24)
    view = lay_out(getattr(o, name), layout)
    expected = gradients(lambda **t: o.edit(**t, backend=backend), o, grad)

    changed = replace(o, **{name: view})
    got = gradients(lambda **t: changed.edit(**t, backend=backend), changed, grad)
    alike(got.y, expected.y, backend, "y")
    for key, value in got.grads.items():
        alike(value, expected.grads[key], backend, key)


@backends
def test_gradient_of_sum_and_mean(backend: str) -> None:
    """Autograd hands these on as one number expanded to the whole shape."""
    o = random_edit(EditCase("loreft", "silu", shape=(2, 5), d=20, r=3), seed=3)
    for reduce in (torch.sum, torch.mean):
        leaves = {n: t.clone().requires_grad_() for n, t in o.differentiable.items()}
        reduce(o.edit(**leaves, backend=backend)).backward()
        weight = 1.0 if reduce is torch.sum else 1 / o.h.numel()
        expected = gradients(lambda **t: o.reference(torch.float64, **t), o, torch.full(o.h.shape, weight))
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, expected.grads[name], rtol=1e-4, atol=1e-5)


@backends
def test_the_gap_between_rows_is_not_written(backend: str) -> None:
    buffer = torch.full((3, 4, 30), 7.0)
    h = buffer[..., 5:25]
    h.copy_(torch.randn(h.shape))
    before = buffer.clone()
    R, W, b = torch.randn(3, 20), torch.randn(3, 20), torch.randn(3)
    y = edit(h, R, W, b, positions=torch.tensor([[1, -1], [0, 3], [-1, -1]]), inplace=True, backend=backend)
    assert y is h
    changed = (buffer != before).any(dim=-1)
    assert changed.nonzero().tolist() == [[0, 1], [1, 0], [1, 3]]
    assert_bitwise_equal(buffer[..., :5], before[..., :5])
    assert_bitwise_equal(buffer[..., 25:], before[..., 25:])


@backends
def test_results_own_their_memory(backend: str) -> None:
    """Neither y nor dh shares memory with what the caller holds."""
    for method in ("loreft", "lobireft"):
        for positions in ("none", "some", "nothing"):
            o = random_edit(EditCase(method, positions=positions, shape=(2, 3), d=8, r=2), seed=4)
            grad = torch.randn(2, 3, 8)
            found = gradients(lambda o=o, **t: o.edit(**t, backend=backend), o, grad)
            held = {o.h.untyped_storage().data_ptr(), grad.untyped_storage().data_ptr()}
            assert found.y.untyped_storage().data_ptr() not in held
            assert found.grads["h"].untyped_storage().data_ptr() not in held
            for name, value in found.grads.items():
                assert value.is_contiguous(), name
