"""Autograd's rules: in-place edits, saved tensors, autocast, second derivatives, inference, checkpointing."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from reft_kernels import autograd, edit, reference
from reft_kernels.testing import (
    EditCase,
    assert_bitwise_equal,
    assert_close,
    edit_cases,
    gradients,
    poison_empty,
    random_edit,
)

backends = pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])


def operands(*shape: int, r: int = 3, requires_grad: bool = True) -> tuple[torch.Tensor, ...]:
    d = shape[-1]
    tensors = (torch.randn(shape), torch.randn(r, d), torch.randn(r, d), torch.randn(r))
    return tuple(t.requires_grad_(requires_grad) for t in tensors)


@backends
@pytest.mark.parametrize("case", [c for c in edit_cases(3) if c.layout not in ("expanded", "columns")][:24], ids=str)
def test_inplace_is_the_edit(case: EditCase, backend: str) -> None:
    """The same y and gradients as out of place, from kernels the same bits."""
    o = random_edit(case, seed=1)
    grad = torch.randn(o.h.shape)
    expected = gradients(lambda **t: o.edit(**t, backend=backend), o, grad)

    def inplace(h: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        own = torch.empty_strided(h.shape, h.stride(), dtype=h.dtype).copy_(h) if case.layout != "slice" else h.clone()
        address, version = own.data_ptr(), own._version
        with poison_empty():
            y = o.edit(h=own, **others, backend=backend, inplace=True, rebuild=False)
        assert y is own
        assert y.data_ptr() == address
        assert y._version > version
        return y

    got = gradients(inplace, o, grad)
    if backend == "eager":  # its matrix products may take another path for other strides
        torch.testing.assert_close(got.y, expected.y, rtol=1e-2, atol=1e-2, equal_nan=True)
    else:
        assert_bitwise_equal(got.y, expected.y, name="y")
    for name, value in got.grads.items():
        if backend == "triton":
            assert_bitwise_equal(value, expected.grads[name], name=f"d{name}")
        else:
            torch.testing.assert_close(value, expected.grads[name], rtol=1e-2, atol=1e-2, equal_nan=True)


@backends
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 1, 3, 8)])
def test_inplace_without_a_gradient(shape: tuple[int, ...], backend: str) -> None:
    h, R, W, b = operands(*shape, requires_grad=False)
    expected = edit(h, R, W, b, backend=backend)
    version = h._version
    assert edit(h, R, W, b, inplace=True, backend=backend) is h
    assert_bitwise_equal(h, expected)
    assert h._version > version


@backends
@pytest.mark.parametrize("frozen", [(), ("R", "W", "b"), ("h",)])
def test_inplace_with_some_of_it_frozen(frozen: tuple[str, ...], backend: str) -> None:
    o = random_edit(EditCase("loreft", "gelu", positions="padded", shape=(2, 4), slots=3, d=8, r=2), seed=2)
    grad = torch.randn(2, 4, 8)
    wanted = [n for n in ("h", "R", "W", "b") if n not in frozen]
    expected = gradients(lambda **t: o.edit(**t, backend=backend), o, grad, wanted).grads
    if "h" in frozen:
        got = gradients(lambda h, **t: o.edit(h=h.clone(), **t, backend=backend, inplace=True), o, grad, wanted).grads
    else:
        got = gradients(lambda h, **t: o.edit(h=h * 1, **t, backend=backend, inplace=True), o, grad, wanted).grads
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], equal_nan=True)


@backends
def test_inplace_on_a_leaf_that_requires_a_gradient_is_refused(backend: str) -> None:
    h, R, W, b = operands(2, 4, 8)
    before = h.detach().clone()
    with pytest.raises(ValueError, match="inplace: h is a leaf"):
        edit(h, R, W, b, inplace=True, backend=backend)
    with pytest.raises((ValueError, RuntimeError), match="leaf"):
        edit(h[:, 1:], R, W, b, inplace=True, backend=backend)
    assert_bitwise_equal(h.detach(), before, name="h, which must not be written")
    with torch.no_grad():
        assert edit(h, R, W, b, inplace=True, backend=backend) is h


@backends
def test_inplace_on_memory_that_cannot_be_written_is_refused(backend: str) -> None:
    _, R, W, b = operands(8, requires_grad=False)
    for h, message in (
        (torch.randn(1, 8).expand(3, 8), r"inplace: h of shape \[3, 8\] and strides \[0, 1\]"),
        (torch.randn(8, 3).T, "unit stride in its last dimension, got 3"),
        (torch.randn(2, 3, 2, 8).transpose(0, 2), "cannot be written row by row"),
    ):
        before = h.clone()
        with pytest.raises(ValueError, match=message):
            edit(h, R, W, b, inplace=True, backend=backend)
        assert_bitwise_equal(h, before)


@backends
def test_inplace_on_a_view_reaches_its_base_and_autograd_knows(backend: str) -> None:
    source, R, W, b = operands(2, 4, 8)

    def run(in_place: bool) -> tuple[torch.Tensor, ...]:
        base = source * 1
        if in_place:
            edit(base[:, 1:3], R, W, b, inplace=True, backend=backend)
        else:
            base = torch.cat((base[:, :1], edit(base[:, 1:3], R, W, b, backend=backend), base[:, 3:]), 1)
        return base, *torch.autograd.grad(base.square().sum(), (source, R, W, b))

    for got, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, expected)


@backends
@pytest.mark.parametrize("grad", [True, False])
def test_other_holders_of_h_see_the_edit_and_autograd_notices(grad: bool, backend: str) -> None:
    """What another op saved for its backward has been overwritten: an error, never a wrong gradient."""
    source, R, W, b = operands(2, 8)
    h = source * 1
    holder = h
    other = h.square()  # saves h
    if grad:
        y = edit(h, R, W, b, inplace=True, backend=backend)
    else:
        with torch.no_grad():
            y = edit(h, R, W, b, inplace=True, backend=backend)
    assert holder is y
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward()


@backends
@pytest.mark.parametrize("name", ["h", "R", "W", "b", "positions", "group", "scale"])
def test_what_the_backward_needs_may_not_change_before_it(name: str, backend: str) -> None:
    case = EditCase("loreft", "tanh", positions="padded", groups=2, scale="rows", shape=(2, 4), d=8, r=2)
    o = random_edit(case, seed=3)
    leaves = {n: t.clone().requires_grad_() for n, t in o.differentiable.items()}
    slots = {n: getattr(o, n).clone() for n in ("positions", "group", "scale")}
    y = o.edit(**leaves, **slots, backend=backend)
    with torch.no_grad():
        {**leaves, **slots}[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@backends
def test_second_backward_needs_retain_graph(backend: str) -> None:
    h, R, W, b = operands(3, 8)
    y = edit(h, R, W, b, backend=backend).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@backends
@pytest.mark.parametrize("method", ["loreft", "lobireft", "noreft_with_c"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("wanted", ["h", "R", "b", "hRb"])
def test_double_backward_is_an_error_never_a_number(wanted: str, inplace: bool, method: str, backend: str) -> None:
    o = random_edit(EditCase(method, "tanh", "float64", shape=(2,), d=5, r=2), seed=4)
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in o.differentiable.items()}
    inputs = [leaves[n] for n in wanted]
    for reduce in (torch.sum, torch.linalg.vector_norm):
        y = o.edit(**{**leaves, "h": leaves["h"] * 1}, backend=backend, inplace=inplace)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            second_derivative(reduce(y), inputs)


def second_derivative(loss: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    first = torch.autograd.grad(loss, inputs, create_graph=True)  # an edit in place refuses here already
    # Something that can be differentiated stands beside it: a gradient that counts as constant would pass.
    total = sum(g.square().sum() for g in first) + sum(t.square().sum() for t in inputs)
    torch.autograd.grad(total, inputs)


@backends
def test_create_graph_gives_the_same_first_derivative(backend: str) -> None:
    h, R, W, b = operands(3, 8)
    plain = torch.autograd.grad(edit(h, R, W, b, backend=backend).sum(), (h, R, W, b))
    created = torch.autograd.grad(edit(h, R, W, b, backend=backend).sum(), (h, R, W, b), create_graph=True)
    for one, other in zip(plain, created, strict=True):
        assert_bitwise_equal(other.detach(), one)


def test_the_reference_has_second_derivatives() -> None:
    h, R, W, b = (t.detach().double().requires_grad_() for t in operands(2, 3, r=2))
    assert torch.autograd.gradgradcheck(lambda *t: reference.edit(*t, activation="tanh"), (h, R, W, b))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_autocast_makes_no_difference(inplace: bool, dtype: torch.dtype, backend: str) -> None:
    o = random_edit(EditCase("noreft_with_c", "gelu", positions="some", shape=(2, 4), d=40, r=3), seed=5)
    o = o.to(dtype)
    grad = torch.randn(o.h.shape)

    def run(**t: torch.Tensor) -> torch.Tensor:
        return o.edit(**{**t, "h": t["h"].clone()}, backend=backend, inplace=inplace)

    expected = gradients(run, o, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(run, o, grad)
        assert torch.is_autocast_enabled("cpu")
    assert got.y.dtype == dtype
    assert_bitwise_equal(got.y, expected.y, name="y")
    for name, value in got.grads.items():
        assert_bitwise_equal(value, expected.grads[name], name=f"d{name}")


@backends
def test_inference_mode(backend: str) -> None:
    h, R, W, b = operands(2, 3, 8)
    expected = edit(h.detach(), R.detach(), W.detach(), b.detach(), backend=backend)
    with torch.inference_mode():
        y = edit(h, R, W, b, backend=backend)
        assert_bitwise_equal(y, expected)
        fresh = torch.zeros_like(h).add_(h)
        assert edit(fresh, R, W, b, inplace=True, backend=backend) is fresh
        assert_bitwise_equal(fresh, expected)


@backends
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_edit(reentrant: bool, backend: str) -> None:
    h, R, W, b = operands(2, 3, 8)

    def block(x: torch.Tensor) -> torch.Tensor:
        return edit(x * 2, R, W, b, activation="silu", dropout=0.3, backend=backend, inplace=True).square()

    results = []
    for wrapped in (False, True):
        torch.manual_seed(7)
        y = checkpoint(block, h, use_reentrant=reentrant) if wrapped else block(h)
        for tensor in (h, R, W, b):
            tensor.grad = None
        y.sum().backward()
        results.append((y.detach(), *(t.grad for t in (h, R, W, b))))
    for got, expected in zip(results[1], results[0], strict=True):
        assert_bitwise_equal(got, expected)


@backends
def test_inplace_chain_of_edits(backend: str) -> None:
    """Layer on layer in one buffer, as the hooks of a model would."""
    source, R, W, b = operands(2, 3, 8)

    def run(in_place: bool) -> tuple[torch.Tensor, ...]:
        x = source * 1
        for _ in range(3):
            x = edit(x, R, W, b, activation="tanh", scale=0.5, inplace=in_place, backend=backend)
        return x, *torch.autograd.grad(x.square().sum(), (source, R, W, b))

    for got, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# Edits in place that keep y and rebuild the rows before it.


@backends
@pytest.mark.parametrize("case", [c for c in edit_cases(4) if c.layout != "expanded" and not c.dropout][:24], ids=str)
def test_rebuilt_rows_give_the_gradients(case: EditCase, backend: str) -> None:
    """As near to the oracle as three times plain PyTorch, half precision excepted: there y was rounded once more."""
    case = replace(case, layout="contiguous")
    o = random_edit(case, seed=6)
    grad = torch.randn(o.h.shape).to(o.h.dtype).double().where(o.named[..., None], 0.0)
    got = gradients(lambda h, **t: o.edit(h=h * 1, **t, backend=backend, inplace=True, rebuild=True), o, grad)
    wide = o.to(torch.float64)
    oracle = gradients(lambda **t: wide.reference(**t), wide, grad)
    plain = gradients(lambda **t: o.reference(torch.float32, **t), o, grad)
    for name, value in got.grads.items():
        rows = o.named if name == "h" else ...
        want, near = oracle.grads[name][rows], plain.grads[name][rows]
        if o.h.dtype in (torch.float32, torch.float64) or name not in ("R", "W"):
            assert_close(value[rows], want, near, factor=4, name=f"d{name}")
        elif want.numel():
            rounding = 4 * torch.finfo(o.h.dtype).eps * float(want.norm() + 1)
            assert float((value[rows].double() - want).norm()) <= rounding


def options_of(y: torch.Tensor) -> autograd.Options:
    return y.grad_fn.options


@pytest.mark.parametrize(
    ("how", "rebuilt"),
    [
        ({}, False),
        ({"inplace": True}, True),
        ({"inplace": True, "rebuild": False}, False),
        ({"inplace": True, "dropout": 0.5}, False),
        ({"inplace": True, "positions": torch.tensor([[1], [-1]])}, False),
        ({"inplace": True, "positions": torch.tensor([[1], [-1]]), "rebuild": True}, True),
    ],
    ids=str,
)
def test_what_is_rebuilt_by_itself(how: dict, rebuilt: bool) -> None:
    """Where a copy of the rows would be one of all of h, and nothing speaks against it."""
    h, R, W, b = operands(2, 4, 8)
    y = edit(h * 1, R, W, b, backend="eager", **how)
    assert options_of(y).rebuild == rebuilt
    kept = [t for t in y.grad_fn.saved_tensors if t is not None and t.shape == y.shape]
    assert any(t.data_ptr() == y.data_ptr() for t in kept) == rebuilt


def test_what_is_not_rebuilt_by_itself() -> None:
    """A view, whose base others write; and what is saved through hooks, where nobody sees that it was written."""
    h, R, W, b = operands(2, 4, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert not options_of(edit(h * 1, R, W, b, inplace=True, backend="eager")).rebuild
    base = h * 1
    edit(base[:, 1:], R, W, b, inplace=True, backend="eager")
    base[:, :1].mul_(2)
    base.square().sum().backward()
    base = h * 1
    edit(base[:, 1:], R, W, b, inplace=True, rebuild=True, backend="eager")
    base[:, :1].mul_(2)
    with pytest.raises(RuntimeError, match="pass rebuild=False"):
        base.square().sum().backward()


@pytest.mark.parametrize(
    ("how", "reason"), [({}, "out of place"), ({"inplace": True, "dropout": 0.1}, "dropout loses what it drops")]
)
def test_rebuild_where_it_cannot_be(how: dict, reason: str) -> None:
    h, R, W, b = operands(2, 4, 8)
    with pytest.raises(ValueError, match=f"rebuild: expected None or False, as .*{reason}.*got True"):
        edit(h * 1, R, W, b, rebuild=True, **how)


@backends
@pytest.mark.parametrize("how", [{}, {"rebuild": True}, {"rebuild": False}], ids=str)
def test_writing_what_was_kept_is_an_error_that_says_what_to_do(how: dict, backend: str) -> None:
    h, R, W, b = operands(2, 4, 8)
    expected = torch.autograd.grad((edit(h * 1, R, W, b, backend=backend) + 1).square().sum(), (h, R, W, b))
    y = edit(h * 1, R, W, b, inplace=True, backend=backend, **how)
    loss = y.add_(1).square().sum()
    if how == {"rebuild": False}:
        for got, want in zip(torch.autograd.grad(loss, (h, R, W, b)), expected, strict=True):
            torch.testing.assert_close(got, want)
    else:
        with pytest.raises(RuntimeError, match=r"(?s)modified by an inplace operation.*pass rebuild=False"):
            loss.backward()


@backends
def test_another_operand_written_is_the_plain_error(backend: str) -> None:
    h, R, W, b = operands(2, 4, 8)
    y = edit(h * 1, R, W, b, inplace=True, rebuild=False, backend=backend)
    with torch.no_grad():
        W.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        y.sum().backward()
    assert "rebuild" not in str(caught.value)


@backends
def test_an_edit_that_kept_h_copies_it_before_the_next_writes_it(backend: str) -> None:
    source, R, W, b = operands(2, 3, 8)

    def run(rebuild: bool, touch: bool = False) -> tuple[torch.Tensor, ...]:
        x = source * 1
        for _ in range(3):
            x = edit(x, R, W, b, activation="tanh", inplace=True, rebuild=rebuild, backend=backend)
            if touch:
                with torch.no_grad():
                    x.mul_(1.0)
        return x, *torch.autograd.grad(x.square().sum(), (source, R, W, b))

    for got, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # Written by something else in between, it could not have been copied in time.
    with pytest.raises(RuntimeError, match="pass rebuild=False"):
        run(True, touch=True)


@backends
def test_rebuilt_under_checkpointing_is_right_or_not_done(backend: str) -> None:
    """What is saved goes through hooks there, and autograd does not see that it was written again."""
    h, R, W, b = operands(2, 3, 8)

    def block(x: torch.Tensor) -> torch.Tensor:
        return edit(x * 2, R, W, b, inplace=True, backend=backend).mul_(3).square()

    got = torch.autograd.grad(checkpoint(block, h, use_reentrant=False).sum(), (h, R, W, b))
    y = (edit(h * 2, R, W, b, backend=backend) * 3).square().sum()
    for one, other in zip(got, torch.autograd.grad(y, (h, R, W, b)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@backends
def test_gradients_through_views_of_the_weights(backend: str) -> None:
    """R, W and b may be views or results; their gradients reach the leaves."""
    stacked = torch.randn(2, 3, 8, requires_grad=True)
    flat = torch.randn(6, requires_grad=True)
    h = torch.randn(4, 8)
    y = edit(h, stacked[1].T.contiguous().T, stacked[0] * 2, flat[::2], backend=backend)
    got = torch.autograd.grad(y.square().sum(), (stacked, flat))
    y = reference.edit(h, stacked[1], stacked[0] * 2, flat[::2])
    for one, other in zip(got, torch.autograd.grad(y.square().sum(), (stacked, flat)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@backends
def test_grad_hooks_and_retain_grad(backend: str) -> None:
    h, R, W, b = operands(3, 8)
    seen = []
    x = h * 1
    x.register_hook(lambda g: seen.append(g.clone()))
    y = edit(x, R, W, b, backend=backend)
    y.retain_grad()
    y.sum().backward()
    assert_bitwise_equal(y.grad, torch.ones_like(y))
    assert_bitwise_equal(seen[0], h.grad)


def test_graph_is_freed_with_the_result() -> None:
    h, R, W, b = operands(3, 8)
    x = h * 1
    gone = weakref.ref(x)
    y = edit(x, R, W, b, activation="gelu")
    del x
    gc.collect()
    y.sum().backward()
    del y
    gc.collect()
    assert gone() is None


def test_results_can_be_copied_and_detached() -> None:
    h, R, W, b = operands(3, 8)
    y = edit(h, R, W, b)
    assert not copy.deepcopy(y.detach()).requires_grad
    assert y.grad_fn is not None


# Gradients added into `.grad` by the backend.


ACCUMULATED = [
    EditCase("noreft_with_c", "linear", shape=(2, 3), d=6, r=2),
    EditCase("noreft_with_c", "gelu", positions="padded", groups=3, scale="rows", shape=(2, 4), d=6, r=2),
    EditCase("loreft", "linear", "mixed", positions="some", shape=(2, 4), d=6, r=2),
    EditCase("lobireft", "tanh", dropout=0.3, shape=(2, 4), d=6, r=2),
]


@backends
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", ACCUMULATED, ids=str)
def test_accumulated_gradients_are_the_sum_of_those_of_every_backward(
    case: EditCase, inplace: bool, backend: str
) -> None:
    o = random_edit(case, seed=8)
    upstream = [torch.randn(o.h.shape).to(o.h.dtype).where(o.named[..., None], 0.0) for _ in range(3)]
    results = []
    for accumulate in (False, True):
        leaves = {name: t.detach().clone().requires_grad_() for name, t in o.differentiable.items()}
        for step, g in enumerate(upstream):
            tensors = {**leaves, "h": leaves["h"] * 1}
            y = o.edit(**tensors, backend=backend, inplace=inplace, accumulate=accumulate)
            before = {name: t.grad for name, t in leaves.items()}
            y.backward(g)
            if step and accumulate:
                assert all(t.grad is before[name] for name, t in leaves.items() if name != "h")
        results.append({name: t.grad for name, t in leaves.items()})
    for name, expected in results[0].items():
        close = {"rtol": 2e-2, "atol": 2e-2} if expected.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(results[1][name], expected, equal_nan=True, msg=name, **close)


def test_leaves_with_hooks_of_their_own_get_their_gradient_as_usual() -> None:
    h, R, W, b = operands(2, 4, 8)
    edit(h, R, W, b, backend="eager").square().sum().backward()
    expected = {name: 2 * t.grad for name, t in (("R", R), ("W", W), ("b", b))}
    hooked = []
    R.register_post_accumulate_grad_hook(lambda t: hooked.append(t))
    W.register_hook(lambda grad: hooked.append(grad))
    edit(h, R, W, b, accumulate=True, backend="eager").square().sum().backward()
    assert len(hooked) == 2
    for name, t in (("R", R), ("W", W), ("b", b)):
        torch.testing.assert_close(t.grad, expected[name])


def test_accumulated_gradients_reach_no_accumulation_node() -> None:
    """What autograd is given for them is None: its node, where DistributedDataParallel hooks in, is not called."""
    h, R, W, b = operands(2, 4, 8)
    called = {"R": 0, "W": 0, "b": 0}
    nodes = []
    for name, t in (("R", R), ("W", W), ("b", b)):
        node = t.expand_as(t).grad_fn.next_functions[0][0]
        node.register_prehook(lambda grads, name=name: called.__setitem__(name, called[name] + (grads[0] is not None)))
        nodes.append(node)
    for step in range(3):
        edit(h * 1, R, W, b, accumulate=True, inplace=True, backend="eager").square().sum().backward()
        assert called == {"R": 1, "W": 1, "b": 1}, step  # the first has no `.grad` to add to


def test_what_cannot_be_accumulated_is_handed_over() -> None:
    """No leaf, no gradient yet, another layout: as without ``accumulate``."""
    h, R, W, b = operands(2, 4, 8)
    expected = torch.autograd.grad(edit(h, R, W, b, backend="eager").square().sum(), (h, R, W, b))
    R.grad = torch.ones(8, 3).T
    y = edit(h, R, W * 1, b, accumulate=True, backend="eager")
    y.square().sum().backward()
    torch.testing.assert_close(R.grad - 1, expected[1], rtol=1e-4, atol=1e-4)
    for t, want in ((h, expected[0]), (W, expected[2]), (b, expected[3])):
        torch.testing.assert_close(t.grad, want)
    # Frozen ones are not touched.
    W.requires_grad_(False)
    before = W.grad.clone()
    edit(h, R, W, b, accumulate=True, backend="eager").square().sum().backward()
    assert_bitwise_equal(W.grad, before)


def test_accumulated_gradients_count_as_written() -> None:
    h, R, W, b = operands(2, 4, 8)
    edit(h, R, W, b, accumulate=True, backend="eager").sum().backward()
    version = R.grad._version
    edit(h, R, W, b, accumulate=True, backend="eager").sum().backward()
    assert R.grad._version > version


def test_only_what_the_backward_accumulates_is_accumulated() -> None:
    h, R, W, b = (torch.randn(*shape, requires_grad=True) for shape in ((3, 8), (2, 8), (2, 8), (2,)))
    edit(h, R, W, b, accumulate=True, backend="eager").sum().backward()
    before = [t.grad.clone() for t in (R, W, b)]
    y = edit(h, R, W, b, accumulate=True, backend="eager")
    expected = torch.autograd.grad(edit(h, R, W, b, backend="eager").square().sum(), (h, R))
    (dh,) = torch.autograd.grad(y.square().sum(), h, retain_graph=True)
    dR = torch.autograd.grad(y.square().sum(), R, retain_graph=True)[0]
    y.square().sum().backward(inputs=[h], retain_graph=True)
    assert_bitwise_equal(dh, expected[0])
    assert_bitwise_equal(dR, expected[1])
    for t, grad in zip((R, W, b), before, strict=True):
        assert_bitwise_equal(t.grad, grad)
    y.square().sum().backward(inputs=[h, R])
    torch.testing.assert_close(R.grad, before[0] + expected[1])
    assert_bitwise_equal(W.grad, before[1])


def test_a_leaf_that_is_two_operands_is_accumulated_by_autograd() -> None:
    h, R, b = torch.randn(3, 8), torch.randn(2, 8, requires_grad=True), torch.randn(2, requires_grad=True)
    once = torch.autograd.grad(edit(h, R, R, b, activation="tanh", backend="eager").square().sum(), (R, b))
    for _ in range(2):
        edit(h, R, R, b, activation="tanh", accumulate=True, backend="eager").square().sum().backward()
    torch.testing.assert_close(R.grad, 2 * once[0])
    torch.testing.assert_close(b.grad, 2 * once[1])


def test_a_result_whose_backward_has_been_can_be_edited_again() -> None:
    h, R = torch.randn(3, 8, requires_grad=True), torch.randn(2, 8)
    y = edit(h * 1, R, inplace=True, rebuild=True, backend="eager")
    y.sum().backward()
    expected = edit(y.detach(), R, backend="eager")
    assert_bitwise_equal(edit(y, R, inplace=True, backend="eager"), expected)
