"""orthonormal_rows: R of many modules in one computation, kept and shared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from python_tests.tiny_models import tiny_model
from reft_kernels import OrthonormalRows, ReftConfig, get_reft_model, orthonormal_rows, set_debug
from reft_kernels.backends import orthonormal_registry
from reft_kernels.orthogonal import shared_rows
from reft_kernels.testing import assert_bitwise_equal


class Counted:
    """A backend that counts its calls."""

    def __init__(self, backend) -> None:
        self._backend = backend
        self.forward: list[int] = []
        self.backward: list[int] = []

    def __getattr__(self, name: str):
        return getattr(self._backend, name)

    def orthonormalize_forward(self, problem):
        self.forward.append(len(problem.X))
        return self._backend.orthonormalize_forward(problem)

    def orthonormalize_backward(self, grads, problem, factors):
        self.backward.append(sum(g is not None for g in grads))
        return self._backend.orthonormalize_backward(grads, problem, factors)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted(orthonormal_registry.BACKENDS[orthonormal_registry.order(torch.device("cpu"))[0]])
    monkeypatch.setattr(orthonormal_registry, "BACKENDS", {"cpu": counted, "eager": counted})
    return counted


def modules_of(*sizes: tuple[int, int]) -> list[OrthonormalRows]:
    modules = [OrthonormalRows(d, r) for d, r in sizes]
    with torch.no_grad():
        for module in modules:
            module.X.add_(torch.randn_like(module.X).tril(-1))
    return modules


def test_one_computation_for_all(calls: Counted) -> None:
    modules = modules_of((12, 4), (30, 2), (12, 4))
    calls.forward.clear()
    rows = orthonormal_rows(modules)
    assert [tuple(R.shape) for R in rows] == [(4, 12), (2, 30), (4, 12)]
    assert calls.forward == [3]
    assert all(again is R for again, R in zip(orthonormal_rows(modules), rows, strict=True))
    assert all(module.weight is R for module, R in zip(modules, rows, strict=True))
    assert calls.forward == [3]
    sum(R.pow(3).sum() for R in rows).backward()
    assert calls.backward == [3]
    for module in modules:
        assert bool(module.X.grad.any())


def test_only_what_changed_is_computed_again(calls: Counted) -> None:
    modules = modules_of((12, 4), (30, 2), (12, 4))
    calls.forward.clear()
    rows = orthonormal_rows(modules)
    with torch.no_grad():
        modules[1].X.mul_(1.5)
    again = orthonormal_rows(modules)
    assert calls.forward == [3, 1]
    assert again[0] is rows[0]
    assert not torch.equal(again[1], rows[1])


def test_a_module_named_twice_is_computed_once(calls: Counted) -> None:
    (module,) = modules_of((12, 4))
    calls.forward.clear()
    first, second = orthonormal_rows([module, module])
    assert first is second
    assert calls.forward == [1]


def test_unused_and_frozen_ones_get_no_gradient(calls: Counted) -> None:
    modules = modules_of((12, 4), (12, 4), (9, 3))
    modules[1].requires_grad_(False)
    rows = orthonormal_rows(modules)
    assert [R.requires_grad for R in rows] == [True, False, True]
    (rows[0].pow(3).sum() + rows[1].sum()).backward()
    assert calls.backward == [1]
    assert modules[0].X.grad is not None
    assert modules[1].X.grad is None
    assert modules[2].X.grad is None


def test_dtypes_are_computed_apart_and_modules_of_none_are_nothing() -> None:
    modules = [*modules_of((12, 4), (12, 4)), OrthonormalRows(8, 2).double()]
    assert [R.dtype for R in orthonormal_rows(modules)] == [torch.float32, torch.float32, torch.float64]
    assert orthonormal_rows([]) == []


def test_micro_batches_through_shared_R_add_up() -> None:
    modules = modules_of((12, 4), (12, 2))
    h = torch.randn(6, 12)

    def gradients(parts: int) -> list[torch.Tensor]:
        for module in modules:
            module.X.grad = None
        for part in h.chunk(parts):
            with shared_rows(modules):
                sum(((part @ m.weight.T) ** 2).sum() for m in modules).backward()
        return [m.X.grad.clone() for m in modules]

    for got, want in zip(gradients(3), gradients(1), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_shared_rows_end_with_the_context() -> None:
    modules = modules_of((12, 4))
    with shared_rows(modules):
        inside = modules[0].weight
    assert modules[0].weight is inside  # from the cache
    with torch.no_grad():
        modules[0].X.mul_(1.5)
    assert modules[0].weight is not inside
    with pytest.raises(KeyError), shared_rows(modules):
        raise KeyError
    assert modules[0]._shared is None


def test_a_training_step_of_a_model_is_one_call_forward_and_one_backward(calls: Counted) -> None:
    model = tiny_model("llama")
    reft_model = get_reft_model(model, ReftConfig(method="loreft", layers="all", rank=2, positions="f1+l1"))
    ids = torch.randint(0, 50, (2, 6))
    layers = len(reft_model.interventions)
    assert layers > 1
    calls.forward.clear()
    optimizer = torch.optim.AdamW(reft_model.interventions.parameters(), lr=1e-2)
    for step in range(1, 3):
        for _ in range(2):  # micro-batches
            reft_model(input_ids=ids, labels=ids).loss.backward()
        assert calls.forward == [layers] * step
        assert calls.backward == [layers] * 2 * step
        with torch.no_grad():
            reft_model(input_ids=ids)
        assert calls.forward == [layers] * step
        optimizer.step()
        optimizer.zero_grad()


def test_not_finite_gradients_raise_in_debug_mode() -> None:
    modules = modules_of((12, 4), (9, 3))
    rows = orthonormal_rows(modules)
    set_debug(True)
    try:
        with pytest.raises(FloatingPointError, match=r"the gradient of R \[3, 9\], number 1, is not finite"):
            (rows[0].sum() + (rows[1] * float("inf")).sum()).backward()
        rows[0].sum().backward()
    finally:
        set_debug(False)


def test_the_op_is_an_op() -> None:
    modules = modules_of((12, 4), (9, 3))
    X = [m.X.detach().clone().requires_grad_() for m in modules]
    arguments = (X, [m.reflectors for m in modules], [m.signs for m in modules], "auto")
    torch.library.opcheck(torch.ops.reft_kernels.orthonormalize_forward.default, arguments)
    R, _ = torch.ops.reft_kernels.orthonormalize_forward(*arguments)
    for got, module in zip(R, modules, strict=True):
        assert_bitwise_equal(got.detach(), module.weight.detach())
    R[1].pow(3).sum().backward()
    modules[1].weight.pow(3).sum().backward()
    assert_bitwise_equal(X[1].grad, modules[1].X.grad)
    assert not X[0].grad.any()


def test_compiled_together() -> None:
    torch._dynamo.reset()
    modules = nn.ModuleList(modules_of((12, 4), (9, 3)))
    compiled = torch.compile(
        lambda: sum(R.pow(3).sum() for R in orthonormal_rows(list(modules))), fullgraph=True, backend="aot_eager"
    )
    for _ in range(2):
        loss = compiled()
        want = sum(m.weight.pow(3).sum() for m in modules)
        torch.testing.assert_close(loss, want)
        got = torch.autograd.grad(loss, list(modules.parameters()))
        for g, w in zip(got, torch.autograd.grad(want, list(modules.parameters())), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            modules[0].X.add_(torch.randn(12, 4).tril(-1))
