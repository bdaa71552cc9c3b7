"""The ops under torch.library's own checks, torch.compile and torch.export."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from reft_kernels import edit
from reft_kernels.functional import _normalise
from reft_kernels.problem import EditProblem
from reft_kernels.testing import METHODS, EditCase, EditOperands, assert_bitwise_equal, gradients, pairwise, random_edit

backends = pytest.mark.parametrize("backend", ["eager", "triton"])
CASES = [
    EditCase(shape=(2, 3), slots=2, d=12, r=2, **row)
    for row in pairwise(
        {
            "method": list(METHODS),
            "activation": ("linear", "gelu"),
            "dtype": ("float32", "mixed"),
            "layout": ("contiguous", "slice", "columns", "transposed"),
            "positions": ("none", "some"),
            "groups": (0, 2),
            "scale": ("none", "rows"),
            "dropout": (0.0, 0.5),
        }
    )
]
cases = pytest.mark.parametrize("case", CASES[:18], ids=str)


def clean(case: EditCase, seed: int = 0) -> EditOperands:
    """Operands without NaN, which torch's own checks would find unequal to themselves."""
    o = random_edit(case, seed)
    o.h.nan_to_num_(0.5, 0.5, 0.5)
    return o


def problem_of(o: EditOperands) -> EditProblem:
    k = o.keywords()
    return _normalise(o.h, o.R, o.W, o.b, o.c, k["positions"], k["group"], k["scale"], k["subtract"],
                      k["activation"], k["dropout"], k["seed"])  # fmt: skip


@backends
@cases
def test_opcheck_of_forward(case: EditCase, backend: str) -> None:
    o = clean(case)
    for t in o.differentiable.values():
        t.requires_grad_()
    opcheck(torch.ops.reft_kernels.edit_forward.default, (*problem_of(o), backend))


@backends
@cases
@pytest.mark.parametrize("needs", [[True] * 5, [False, True, False, True, False]])
def test_opcheck_of_backward(needs: list[bool], case: EditCase, backend: str) -> None:
    problem = problem_of(clean(case))
    _, delta, s = torch.ops.reft_kernels.edit_forward(*problem, backend)
    grad = torch.randn_like(problem.h)
    opcheck(
        torch.ops.reft_kernels.edit_backward.default,
        (grad, *problem, delta, s, needs, backend),
        test_utils=("test_schema", "test_faketensor"),
    )


@cases
def test_fakes_have_the_metadata_of_the_real_thing(case: EditCase) -> None:
    o = clean(case)
    real = o.edit(backend="eager")
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in vars(o).items()}
        h = fake.pop("h")
        y = edit(h, **fake)
    assert (y.shape, y.dtype, y.stride()) == (real.shape, real.dtype, real.stride())


def test_meta_tensors_have_a_shape() -> None:
    h, R = torch.empty(2, 3, 8, device="meta"), torch.empty(2, 8, device="meta")
    y = edit(h, R)
    assert y.shape == h.shape
    assert y.device.type == "meta"


def compiled_agrees(o: EditOperands, backend: str, compiler: str, inplace: bool = False) -> None:
    grad = torch.randn(o.h.shape)

    def function(h: torch.Tensor, **others: torch.Tensor | None) -> torch.Tensor:
        return o.edit(h=h * 2, **others, backend=backend, inplace=inplace).sin()

    torch._dynamo.reset()
    expected = gradients(function, o, grad)
    got = gradients(torch.compile(function, fullgraph=True, backend=compiler), o, grad)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if o.h.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got.y, expected.y, **tolerance)
    for name, value in got.grads.items():
        torch.testing.assert_close(value, expected.grads[name], msg=name, **tolerance)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", CASES[:8], ids=str)
def test_compile_whole_graph(case: EditCase, inplace: bool) -> None:
    if inplace and case.layout == "columns":
        case = replace(case, layout="contiguous")  # not writable in place
    compiled_agrees(clean(case), "eager", "aot_eager", inplace)


@pytest.mark.parametrize("inplace", [False, True])
def test_compile_with_the_kernels(inplace: bool) -> None:
    case = EditCase("noreft_with_c", "gelu", positions="some", groups=2, scale="rows", dropout=0.3, d=12, r=2)
    compiled_agrees(clean(case), "triton", "aot_eager", inplace)


@pytest.mark.parametrize("layout", ["contiguous", "columns"])
def test_compile_with_inductor(layout: str) -> None:
    case = EditCase("loreft", "silu", positions="some", dropout=0.3, layout=layout, d=12, r=2)
    compiled_agrees(clean(case), "eager", "inductor")


def test_compiled_in_place_edit_writes_its_input() -> None:
    torch._dynamo.reset()
    R, b = torch.randn(2, 8), torch.randn(2)
    h = torch.randn(3, 8)
    expected = edit(h, R, None, b)
    compiled = torch.compile(lambda h: edit(h, R, None, b, inplace=True), fullgraph=True, backend="aot_eager")
    compiled(h)
    assert_bitwise_equal(h, expected)


def test_compiled_dropout_draws_a_new_mask_each_call() -> None:
    torch._dynamo.reset()
    h, R = torch.ones(1, 4, 64), torch.zeros(1, 64)
    compiled = torch.compile(lambda h: edit(h, R, dropout=0.5), fullgraph=True, backend="aot_eager")
    first, second = compiled(h), compiled(h)
    assert not torch.equal(first, second)
    for y in (first, second):
        assert 0.3 < float((y == 0).double().mean()) < 0.7


def test_dynamic_shapes_compile_once() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    R, W, b = (torch.randn(*s, requires_grad=True) for s in ((2, 8), (2, 8), (2,)))

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def function(h: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return edit(h, R, W, b, positions=positions, activation="tanh")

    counts = []
    # All unlike r and d: sizes that are equal at first share a symbol.
    for batch, length, slots in ((3, 7, 5), (4, 9, 3), (5, 11, 6), (6, 13, 4)):
        h = torch.randn(batch, length, 8, requires_grad=True)
        positions = torch.rand(batch, length).argsort(1)[:, :slots]
        y = function(h, positions)
        expected = edit(h, R, W, b, positions=positions, activation="tanh")
        torch.testing.assert_close(y, expected)
        inputs = (h, R, W, b)
        for got, want in zip(
            torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
        ):
            torch.testing.assert_close(got, want)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert set(counts) == {counts[0]}


def test_compiled_second_derivative_is_an_error() -> None:
    torch._dynamo.reset()
    h, R = torch.randn(2, 8, requires_grad=True), torch.randn(2, 8)
    y = torch.compile(lambda h: edit(h, R, activation="tanh"), backend="aot_eager")(h)

    def second_derivative() -> None:
        (first,) = torch.autograd.grad(y.square().sum(), h, create_graph=True)
        torch.autograd.grad(first.sum() + h.sum(), h)

    with pytest.raises(RuntimeError, match=r"double backward|second derivative"):  # NotImplementedError is one
        second_derivative()


def test_second_derivative_of_the_op_is_an_error() -> None:
    problem = problem_of(clean(EditCase(activation="tanh", shape=(2, 2), d=6, r=2)))
    h = problem.h.clone().requires_grad_()
    y = torch.ops.reft_kernels.edit_forward(*problem._replace(h=h), "eager")[0]
    (first,) = torch.autograd.grad(y.square().sum(), h, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(first.sum() + h.sum(), h)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.R = torch.nn.Parameter(torch.randn(2, 8))
        self.W = torch.nn.Parameter(torch.randn(2, 8))
        self.b = torch.nn.Parameter(torch.randn(2))

    def forward(self, h: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return edit(h.cos(), self.R, self.W, self.b, positions=positions, activation="gelu")


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_shapes(strict: bool) -> None:
    block = Block()
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    program = torch.export.export(
        block,
        (torch.randn(3, 5, 8), torch.tensor([[0, 1], [2, -1], [4, 3]])),
        dynamic_shapes=({0: batch, 1: length}, {0: batch}),
        strict=strict,
    )
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("reft_kernels.edit_forward" in name for name in names)
    h, positions = torch.randn(4, 9, 8), torch.randint(-1, 9, (4, 1)).repeat(1, 2)
    positions[:, 1] = -1
    torch.testing.assert_close(program.module()(h, positions), block(h, positions))


def test_errors_under_compile_name_the_culprit() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, R: edit(h, R, backend="triton"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="takes ranks up to 64, got r=65"):
        compiled(torch.randn(2, 128), torch.randn(65, 128))
