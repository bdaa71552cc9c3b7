"""A gradient is overwritten exactly where nothing else refers to it: graphs of every shape, against a copy always."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reft_kernels import edit, ownership
from reft_kernels.backends import eager
from reft_kernels.testing import assert_bitwise_equal

B, S, D, R_ = 2, 5, 8, 3
Tensors = dict[str, Tensor]
Edit = Callable[[Tensor], Tensor]


@pytest.fixture
def tensors() -> Tensors:
    shapes = {"h": (B, S, D), "R": (R_, D), "W": (R_, D), "b": (R_,), "M": (D, D), "x": (B, S, D)}
    return {name: torch.randn(shape, requires_grad=name != "x") for name, shape in shapes.items()}


POSITIONS = torch.tensor([[0, 3, -1], [4, 1, 2]])


class Watch:
    """Stands in for ``owned`` and notes its answers; ``answer`` overrides them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer: bool | None = None
        self.answers: list[bool] = []
        self.inplace: list[bool] = []
        # The counts are those of a call from the backward itself: no frame may stand between.
        monkeypatch.setattr(ownership, "_exclusive", self._exclusive)
        self._of_torch = ownership._measure()
        self._inner = eager.edit_backward
        monkeypatch.setattr(eager, "edit_backward", self._backward)

    def _exclusive(self) -> Any:
        if self.answer is None:
            return self._of_torch
        return _Anything() if self.answer else object()

    def _backward(self, grad: Tensor, *args: Any, inplace: bool = False, **how: Any) -> Any:
        self.inplace.append(inplace)
        return self._inner(grad, *args, inplace=inplace, **how)


class _Anything:
    """Equal to every count."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def editor(t: Tensors, **how: Any) -> Edit:
    return lambda h: edit(h, t["R"], t["W"], t["b"], positions=POSITIONS, backend="eager", **how)


def norm(h: Tensor) -> Tensor:
    return h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


# Graphs. Each builds on an edit `e` and returns a loss.


def residual_stream(e: Edit, t: Tensors) -> Tensor:
    y = e(t["h"] * 1)
    return (y + norm(y) @ t["M"]).square().sum()


def llama_block(e: Edit, t: Tensors) -> Tensor:
    h = t["h"] * 1
    for _ in range(3):
        attention = (norm(h) @ t["M"]).softmax(-1)
        h = h + attention
        h = e(h + torch.nn.functional.silu(norm(h) @ t["M"]))
    return norm(h).square().mul(t["x"]).sum()


def final_add(e: Edit, t: Tensors) -> Tensor:
    return (e(t["h"] * 1) * 2 + t["x"]).square().sum()


def younger_sibling(e: Edit, t: Tensors) -> Tensor:
    y = e(t["h"] * 1)
    return (y + t["x"] * t["h"].detach().requires_grad_()).square().sum()


def older_sibling(e: Edit, t: Tensors) -> Tensor:
    """The gradient of the sum is that of both; the sibling, made first, gets it after the edit has had it."""
    sibling = t["M"].sum() * t["x"]
    return (e(t["h"] * 1) + sibling).square().sum()


def expanded(e: Edit, t: Tensors) -> Tensor:
    return e(t["h"] * 1).sum()


def viewed(e: Edit, t: Tensors) -> Tensor:
    """The gradient is a view of what a matrix product returned."""
    return (e(t["h"] * 1) @ t["M"]).square().sum()


def two_readers(e: Edit, t: Tensors) -> Tensor:
    y = e(t["h"] * 1)
    return (y * t["x"]).sum() + y.square().sum()


def leaf_input(e: Edit, t: Tensors) -> Tensor:
    h = t["h"] * 1 if getattr(e, "inplace", False) else t["h"]
    return e(h).square().sum()


def chain(e: Edit, t: Tensors) -> Tensor:
    """Out of place every edit's gradient is a tensor that the next alone has; in place it is the same tensor."""
    h = t["h"] * 1
    for _ in range(3):
        h = e(h)
    return h.square().sum()


def checkpointed(e: Edit, t: Tensors) -> Tensor:
    y = checkpoint(lambda h: e(h * 2).square(), t["h"], use_reentrant=False)
    return y.mul(t["x"]).sum()


def checkpointed_at_its_end(e: Edit, t: Tensors) -> Tensor:
    return checkpoint(lambda h: e(h * 2), t["h"], use_reentrant=False).square().sum()


def checkpointed_reentrant(e: Edit, t: Tensors) -> Tensor:
    y = checkpoint(lambda h: e(h * 2).square(), t["h"], use_reentrant=True)
    return y.mul(t["x"]).sum()


def checkpointed_reentrant_at_its_end(e: Edit, t: Tensors) -> Tensor:
    """The backward inside is called with the gradient, which the caller still holds."""
    return checkpoint(lambda h: e(h * 2), t["h"], use_reentrant=True).square().sum()


def part_of_a_buffer(e: Edit, t: Tensors) -> Tensor:
    buffer = torch.cat([t["x"], t["h"]], 1)
    e(buffer[:, S:])
    return buffer.square().sum()


OWNED = {
    residual_stream: [True],
    llama_block: [True] * 3,
    final_add: [True],
    younger_sibling: [True],
    older_sibling: [False],
    expanded: [False],
    viewed: [False],
    two_readers: [True],
    leaf_input: [True],
    chain: [True] * 3,
    checkpointed: [True],
    checkpointed_at_its_end: [True],
    checkpointed_reentrant: [True],
    checkpointed_reentrant_at_its_end: [False],
}


def backward(graph: Callable[[Edit, Tensors], Tensor], t: Tensors, **how: Any) -> Tensors:
    for tensor in t.values():
        tensor.grad = None
    graph(editor(t, **how), t).backward()
    return {name: tensor.grad for name, tensor in t.items() if tensor.grad is not None}


def assert_same(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert_bitwise_equal(value, expected[name], name=f"d{name}")


@pytest.mark.parametrize("how", [{}, {"inplace": True}, {"inplace": True, "rebuild": True}], ids=str)
@pytest.mark.parametrize("graph", OWNED, ids=lambda g: g.__name__)
def test_overwritten_where_owned_and_right_everywhere(
    graph: Callable[[Edit, Tensors], Tensor], how: dict[str, bool], tensors: Tensors, watch: Watch
) -> None:
    if how and graph is leaf_input:
        pytest.skip("a leaf is not written")
    watch.answer = False
    expected = backward(graph, tensors, **how)
    assert not any(watch.inplace)
    watch.answer = None
    watch.inplace.clear()
    got = backward(graph, tensors, **how)
    assert watch.inplace == OWNED[graph]
    assert_same(got, expected)


def test_blind_overwriting_is_wrong(tensors: Tensors, watch: Watch) -> None:
    """The table above has teeth: with an older sibling an ``owned`` that always says yes gives another gradient."""
    watch.answer = False
    expected = backward(older_sibling, tensors)
    watch.answer = True
    wrong = backward(older_sibling, tensors)
    assert watch.inplace[-1]
    assert not torch.allclose(wrong["M"], expected["M"], rtol=1e-3)


def test_edit_of_a_view_in_place(tensors: Tensors, watch: Watch) -> None:
    watch.answer = False
    expected = backward(part_of_a_buffer, tensors, inplace=True)
    watch.answer = None
    assert_same(backward(part_of_a_buffer, tensors, inplace=True), expected)
    rebuilt = backward(part_of_a_buffer, tensors, inplace=True, rebuild=True)
    for name, value in expected.items():
        torch.testing.assert_close(rebuilt[name], value, rtol=1e-4, atol=1e-4)


# Holders in Python: the object's own references tell.


def held(tensors: Tensors, hold: Callable[[Tensor, list[Any]], Any]) -> tuple[list[Tensor], Tensors]:
    """What ``hold`` kept of the gradient of an edit, and the gradients."""
    kept: list[Tensor] = []

    def graph(e: Edit, t: Tensors) -> Tensor:
        y = e(t["h"] * 1)
        hold(y, kept)
        return (y * t["x"]).square().sum()

    return kept, backward(graph, tensors)


def keep_itself(y: Tensor, kept: list[Any]) -> None:
    y.register_hook(kept.append)


def keep_alias(y: Tensor, kept: list[Any]) -> None:
    y.register_hook(lambda grad: kept.append(grad.detach()))


def keep_part(y: Tensor, kept: list[Any]) -> None:
    y.register_hook(lambda grad: kept.append(grad[:, :, 1:]))


def keep_in_prehook(y: Tensor, kept: list[Any]) -> None:
    y.grad_fn.register_prehook(lambda grads: kept.append(grads[0]))


def keep_replaced(y: Tensor, kept: list[Any]) -> None:
    def replace(grad: Tensor) -> Tensor:
        kept.append(grad * 2)
        return kept[-1]

    y.register_hook(replace)


@pytest.mark.parametrize("hold", [keep_itself, keep_alias, keep_part, keep_in_prehook, keep_replaced])
def test_what_a_hook_keeps_is_left_alone(hold: Any, tensors: Tensors, watch: Watch) -> None:
    watch.answer = False
    kept, expected = held(tensors, hold)
    watch.answer = None
    watch.inplace.clear()
    kept_again, got = held(tensors, hold)
    assert watch.inplace == [False]
    assert_bitwise_equal(kept_again[0], kept[0], name="what the hook kept")
    assert_same(got, expected)
    # And overwriting it would have shown.
    watch.answer = True
    overwritten, _ = held(tensors, hold)
    assert not torch.equal(overwritten[0], kept[0])


def test_a_hook_that_keeps_nothing_costs_no_copy(tensors: Tensors, watch: Watch) -> None:
    held(tensors, lambda y, kept: y.register_hook(lambda grad: None))
    assert watch.inplace == [True]
    held(tensors, lambda y, kept: y.register_hook(lambda grad: grad * 2))
    assert watch.inplace == [True, True]


def test_retain_grad(tensors: Tensors, watch: Watch) -> None:
    results = []
    for answer in (False, None):
        watch.answer = answer
        kept: list[Tensor] = []

        def graph(e: Edit, t: Tensors, kept: list[Tensor] = kept) -> Tensor:
            h = t["h"] * 1
            h.retain_grad()
            y = e(h)
            y.retain_grad()
            kept.extend((h, y))
            return (y * t["x"]).square().sum()

        gradients = backward(graph, tensors)
        results.append((*kept, gradients))
    for a, b in zip(results[0][:2], results[1][:2], strict=True):
        assert_bitwise_equal(b.grad, a.grad)
    assert not torch.equal(results[1][0].grad, results[1][1].grad)
    assert_same(results[1][2], results[0][2])


def test_the_callers_grad_outputs_are_never_written(tensors: Tensors, watch: Watch) -> None:
    t = tensors
    e = editor(t)
    upstream = torch.randn(B, S, D)
    before = upstream.clone()
    for call in (
        lambda y: torch.autograd.grad(y, (t["h"], t["R"]), upstream),
        lambda y: torch.autograd.grad(y, (t["h"], t["R"]), grad_outputs=[upstream]),
        lambda y: y.backward(upstream),
        lambda y: torch.autograd.backward([y], [upstream]),
        lambda y: torch.autograd.grad(y, (t["h"], t["R"]), torch.ones_like(y)),
    ):
        call(e(t["h"]))
        call(e(t["h"] * 1))
        assert_bitwise_equal(upstream, before, name="grad_outputs")
    assert not any(watch.inplace)


def test_gradients_of_both_sides_of_the_edit(tensors: Tensors, watch: Watch) -> None:
    """y's own gradient is asked for: the engine has captured it when the edit's backward runs."""
    t = tensors
    results = []
    for answer in (False, None):
        watch.answer = answer
        h = t["h"] * 1
        y = editor(t)(h)
        results.append(torch.autograd.grad((y * t["x"]).square().sum(), (y, h, t["R"])))
    assert watch.inplace == [False, False]
    for got, expected in zip(results[1], results[0], strict=True):
        assert_bitwise_equal(got, expected)


def test_second_backward_of_a_retained_graph(tensors: Tensors, watch: Watch) -> None:
    t = tensors
    for how in ({}, {"inplace": True}, {"inplace": True, "rebuild": True}):
        loss = (editor(t, **how)(t["h"] * 1) * t["x"]).square().sum()
        first = torch.autograd.grad(loss, (t["h"], t["R"], t["W"], t["b"]), retain_graph=True)
        second = torch.autograd.grad(loss, (t["h"], t["R"], t["W"], t["b"]))
        for one, other in zip(first, second, strict=True):
            assert_bitwise_equal(other, one)
    assert all(watch.inplace)


def test_the_gradient_may_become_the_leafs(tensors: Tensors, watch: Watch) -> None:
    """A leaf h takes the overwritten gradient for its own; the next step adds to it and does not alias anything."""
    t = tensors
    upstream = [torch.randn(B, S, D) for _ in range(2)]
    for answer in (False, None):
        watch.answer = answer
        t["h"].grad = None
        for x in upstream:
            (editor(t)(t["h"]) * x).sum().backward()
        if answer is False:
            expected = t["h"].grad.clone()
    assert watch.inplace == [False, False, True, True]
    assert_bitwise_equal(t["h"].grad, expected)


def test_create_graph_copies(tensors: Tensors, watch: Watch) -> None:
    torch.autograd.grad((editor(tensors)(tensors["h"]) * 2).sum(), tensors["h"], create_graph=True)
    assert watch.inplace == [False]


def test_anomaly_mode(tensors: Tensors, watch: Watch) -> None:
    watch.answer = False
    expected = backward(llama_block, tensors)
    watch.answer = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            got = backward(llama_block, tensors)
    assert_same(got, expected)


def test_backwards_in_several_threads(tensors: Tensors, watch: Watch) -> None:
    t = tensors
    names = ("h", "R", "W", "b", "M")
    inputs = [t[name] for name in names]
    watch.answer = False
    expected = torch.autograd.grad(llama_block(editor(t), t), inputs)
    watch.answer = None
    found: list[Any] = []

    def work() -> None:
        for _ in range(5):
            found.append(torch.autograd.grad(llama_block(editor(t), t), inputs))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for gradients in found:
        for got, want in zip(gradients, expected, strict=True):
            assert_bitwise_equal(got, want)


class Edited(nn.Module):
    def __init__(self, e: Edit) -> None:
        super().__init__()
        self.e = e

    def forward(self, h: Tensor) -> Tensor:
        return self.e(h)


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_modules(kind: str, tensors: Tensors, watch: Watch) -> None:
    """What the hook keeps of grad_output is the gradient itself."""
    t = tensors
    results = []
    for answer in (False, None):
        watch.answer = answer
        kept: list[Any] = []
        module = Edited(editor(t))
        getattr(module, kind)(lambda module, *grads, kept=kept: kept.append(grads[-1][0]))
        t["h"].grad = None
        (module(t["h"] * 1) * t["x"]).square().sum().backward()
        results.append((kept[0], t["h"].grad))
    for got, expected in zip(results[1], results[0], strict=True):
        assert_bitwise_equal(got, expected)
    assert watch.inplace == [False, False]


# Torch without the counts, or with others.


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_measured", [])


def owned_of_fresh() -> bool:
    """What ``owned`` says of a gradient that is nobody else's."""
    said = []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            said.append(ownership.owned(grad))
            return grad

    (Ask.apply(torch.ones(3, requires_grad=True)) * 2).square().sum().backward()
    return said[0]


def test_measured_once(unmeasured: None) -> None:
    assert owned_of_fresh()
    assert len(ownership._measured) == 1
    assert owned_of_fresh()
    assert len(ownership._measured) == 1


@pytest.mark.parametrize("name", ["_storage_Use_Count", "TensorBase"])
def test_without_a_private_attribute_every_gradient_is_copied(
    name: str, unmeasured: None, monkeypatch: pytest.MonkeyPatch, tensors: Tensors
) -> None:
    expected = backward(llama_block, tensors)
    flags: list[bool] = []
    inner = eager.edit_backward

    def watched(*args: Any, inplace: bool = False, **how: Any) -> Any:
        flags.append(inplace)
        return inner(*args, inplace=inplace, **how)

    monkeypatch.setattr(eager, "edit_backward", watched)
    with monkeypatch.context() as without:
        without.setattr(ownership, "torch", Without(torch, name))
        ownership._measured.clear()
        got = backward(llama_block, tensors)
    assert flags == [False] * 3
    assert_same(got, expected)


class Without:
    """torch, with one attribute of torch._C missing."""

    def __init__(self, module: Any, missing: str) -> None:
        self._module, self._missing = module, missing

    def __getattr__(self, name: str) -> Any:
        if name == self._missing:
            raise AttributeError(name)
        found = getattr(self._module, name)
        return Without(found, self._missing) if name == "_C" else found


@pytest.mark.parametrize("blind", [("python",), ("storage",), ("tensor", "python")], ids="+".join)
def test_counts_that_do_not_show_a_holder_are_not_believed(
    blind: tuple[str, ...], unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torch whose counts no longer tell (always 1, say) makes every gradient a copied one."""
    inner = ownership._counts

    def constant(grad: Tensor) -> Any:
        counts = inner(grad)
        return None if counts is None else counts._replace(**dict.fromkeys(blind, 1))

    assert ownership._measure() is not None
    monkeypatch.setattr(ownership, "_counts", constant)
    assert ownership._measure() is None
    assert not owned_of_fresh()


def test_measuring_leaves_nothing_behind(unmeasured: None) -> None:
    """It runs inside of the first backward: modes, hooks and gradients of that are not disturbed."""
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    h = torch.randn(3, 8, requires_grad=True)
    y = edit(h, torch.randn(2, 8), backend="eager")
    loss = (y * 2).square().sum()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss.backward()
    assert not seen
    assert len(ownership._measured) == 1
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("rebuild", [False, True])
def test_nothing_is_kept_alive(rebuild: bool, part: bool, tensors: Tensors) -> None:
    """No cycle of y, its node and what that saved: the last name gone, the memory is too."""
    gc.disable()
    try:
        buffer = torch.cat([tensors["h"] * 1, tensors["h"] * 1], 1)
        storage = buffer.untyped_storage()
        y = editor(tensors, inplace=True, rebuild=rebuild)(buffer[:, S:] if part else buffer)
        loss = (y * 2).sum()
        del y, buffer
        assert (torch._C._storage_Use_Count(storage._cdata) > 1) == rebuild
        loss.backward()
        del loss
        assert torch._C._storage_Use_Count(storage._cdata) == 1
    finally:
        gc.enable()
