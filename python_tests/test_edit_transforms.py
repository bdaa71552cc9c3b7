"""The edit inside torch.func's transforms and forward-mode differentiation, which follow PyTorch's operations alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from reft_kernels import edit, explain, reference
from reft_kernels.testing import EditCase, random_edit

Call = Callable[..., Tensor]

CASES = {
    "linear": EditCase(dtype="float64", shape=(3, 4), r=2, d=6),
    "idle slots": EditCase(
        "noreft_with_c", "gelu", "float64", positions="padded", groups=2, scale="rows", dropout=0.3, shape=(3, 5), r=2,
        d=6, slots=3,
    ),
    "idle slots, no Rh": EditCase("nodireft", "tanh", "float64", positions="padded", shape=(3, 5), r=2, d=6, slots=3),
}  # fmt: skip


def square_sum(f: Call) -> Call:
    return lambda *tensors: f(*tensors).square().sum()


TRANSFORMS: dict[str, Callable[[Call, Tensor, Tensor, Tensor], Any]] = {
    "vmap over h": lambda f, h, R, W: vmap(lambda x: f(x, R, W))(torch.stack([h, 2 * h])),
    "vmap over R": lambda f, h, R, W: vmap(lambda w: f(h, w, W))(torch.stack([R, 2 * R])),
    "grad": lambda f, h, R, W: grad(square_sum(f), argnums=(0, 1, 2))(h, R, W),
    "vjp": lambda f, h, R, W: vjp(f, h, R, W)[1](h),
    "jvp": lambda f, h, R, W: jvp(f, (h, R, W), (h, R, W)),
    "jacrev": lambda f, h, R, W: jacrev(f, argnums=1)(h, R, W),
    "jacfwd": lambda f, h, R, W: jacfwd(f, argnums=1)(h, R, W),
    "hessian": lambda f, h, R, W: hessian(square_sum(f), argnums=1)(h, R, W),
    "vmap of grad": lambda f, h, R, W: vmap(grad(square_sum(f)), (None, 0, None))(h, torch.stack([R, 2 * R]), W),
    "functionalize": lambda f, h, R, W: functionalize(f)(h, R, W),
}


def operands(case: EditCase) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """h, R, W and the keywords of a random edit; rows that it does not name are finite, as they are summed up."""
    o = random_edit(case)
    rest = o.keywords()
    return (o.h.nan_to_num(1.0, 2.0, 3.0), rest.pop("R"), rest.pop("W")), rest


def assert_close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str, case: str, backend: str) -> None:
    """As of the reference, which is plain PyTorch."""
    tensors, rest = operands(CASES[case])
    transform = TRANSFORMS[name]
    found = transform(lambda h, R, W: edit(h, R, W, **rest, backend=backend), *tensors)
    assert_close(found, transform(lambda h, R, W: reference.edit(h, R, W, **rest), *tensors))


@pytest.mark.parametrize("positions", ["all", "padded"])
@pytest.mark.parametrize("name", ["vmap over h", "jvp", "grad"])
def test_in_place(name: str, positions: str) -> None:
    tensors, rest = operands(EditCase(dtype="float64", positions=positions, shape=(3, 5), slots=3, r=2, d=6))
    transform = TRANSFORMS[name]
    found = transform(lambda h, R, W: edit(h.clone(), R, W, **rest, inplace=True), *tensors)
    assert_close(found, transform(lambda h, R, W: reference.edit(h, R, W, **rest), *tensors))


def test_forward_mode_by_itself() -> None:
    o = random_edit(CASES["linear"])
    tangent = torch.randn_like(o.h)
    wanted = jvp(lambda h: reference.edit(h, o.R, o.W, o.b), (o.h,), (tangent,))[1]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(o.h, tangent)
        assert explain(o.h, o.R)["eager"] == "ok"
        assert "has a tangent" in explain(dual, o.R)["triton"]
        y = edit(dual, o.R.clone().requires_grad_(), o.W, o.b)
        assert_close(forward_ad.unpack_dual(y).tangent, wanted)
        # Where nothing has a tangent, everything is as it is outside.
        assert explain(o.h, o.R, o.W, o.b) == outside(o.h, o.R, o.W, o.b)


def outside(*operands: Tensor) -> dict[str, str]:
    with forward_ad._set_fwd_grad_enabled(False):
        return explain(*operands)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_of_many_outputs_at_once(inplace: bool, case: str) -> None:
    """The backward of an edit that was made outside, in a vmap over gradients."""
    tensors, rest = operands(CASES[case])
    inputs = tuple(t.clone().requires_grad_() for t in tensors)
    many = torch.randn(4, *tensors[0].shape, dtype=torch.float64)
    h, *weights = inputs
    y = edit(h.clone(), *weights, **rest, inplace=inplace)
    wanted = torch.autograd.grad(reference.edit(*inputs, **rest), inputs, many, is_grads_batched=True)
    assert_close(torch.autograd.grad(y, inputs, many, is_grads_batched=True, retain_graph=True), wanted)
    assert_close(vmap(lambda g: torch.autograd.grad(y, inputs, g, retain_graph=True))(many), wanted)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_kernels_say_why_they_cannot(backend: str) -> None:
    h, R = torch.randn(3, 4), torch.randn(2, 4)
    with pytest.raises(ValueError, match=rf"backend='{backend}' cannot take this edit: a transform of torch.func"):
        vmap(lambda x: edit(x, R, backend=backend))(h)
    said = []
    vmap(lambda x: said.append(explain(x, R)) or x)(h)
    assert "a transform of torch.func" in said[0][backend]
    assert said[0]["eager"] == "ok"
    assert explain(h, R)[backend] == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vmap over h", "grad", "jvp", "vmap of grad"])
def test_compiled(name: str) -> None:
    o = random_edit(CASES["linear"])
    transform = TRANSFORMS[name]

    def f(h: Tensor, R: Tensor, W: Tensor) -> Any:
        return transform(lambda *t: edit(*t, o.b), h, R, W)

    torch._dynamo.reset()
    found = torch.compile(f, fullgraph=True, backend="aot_eager")(o.h, o.R, o.W)
    assert_close(found, transform(lambda *t: reference.edit(*t, o.b), o.h, o.R, o.W))
