"""The ops under torch.library's own checks, torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.fx_passes import post_grad
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from reft_kernels import edit
from reft_kernels.functional import _normalise
from reft_kernels.problem import EditProblem
from reft_kernels.testing import METHODS, EditCase, EditOperands, assert_bitwise_equal, gradients, pairwise, random_edit

backends = pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
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


@backends
@cases
@pytest.mark.parametrize("save_rows", [False, True])
def test_opcheck_of_forward_in_place(save_rows: bool, case: EditCase, backend: str) -> None:
    o = clean(replace(case, layout="contiguous"))
    opcheck(
        torch.ops.reft_kernels.edit_forward_.default,
        (*problem_of(o), save_rows, backend),
        test_utils=("test_schema", "test_faketensor"),
    )


@backends
@cases
def test_opcheck_of_backward_in_place(case: EditCase, backend: str) -> None:
    problem = problem_of(clean(replace(case, layout="contiguous", dropout=0.0)))
    y, delta, s = torch.ops.reft_kernels.edit_forward(*problem, backend)
    opcheck(
        torch.ops.reft_kernels.edit_backward_.default,
        (torch.randn_like(y), *problem._replace(h=y), delta, s, [True] * 5, backend),
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


# In place within a compiled graph.


class Graphs:
    """The graphs that Inductor generates code from, after it decided which mutations need a copy first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs: list[torch.fx.Graph] = []
        inner = post_grad.decompose_auto_functionalized

        def decompose(graph: torch.fx.Graph) -> object:
            result = inner(graph)
            self.graphs.append(graph)
            return result

        monkeypatch.setattr(post_grad, "decompose_auto_functionalized", decompose)

    def edits(self) -> list[str]:
        return [name for graph in self.graphs for name in self._names(graph) if "reft_kernels" in name]

    def copies(self, size: int) -> list[int]:
        """How many copies of ``size`` elements stand in each graph."""
        return [
            sum(
                any(word in str(node.target) for word in ("clone", "copy"))
                and isinstance(node.meta.get("val"), torch.Tensor)
                and node.meta["val"].numel() == size
                for node in graph.nodes
                if node.op == "call_function"
            )
            for graph in self.graphs
        ]

    @staticmethod
    def _names(graph: torch.fx.Graph) -> list[str]:
        return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    torch._dynamo.reset()
    with inductor_config.patch(force_disable_caches=True):
        yield Graphs(monkeypatch)


POSITIONS = torch.tensor([[0, 3, -1], [4, 1, 2]])
Operands = dict[str, torch.Tensor]


def written(t: Operands, h: torch.Tensor, **how: object) -> torch.Tensor:
    how = {"positions": POSITIONS, "inplace": True, **how}
    return edit(h, t["R"], t["W"], t["b"], backend="eager", **how)


def two_blocks(t: Operands, **how: object) -> torch.Tensor:
    h = t["x"]
    for _ in range(2):
        h = written(t, h + torch.tanh(h @ t["M"]), **how)
    return (h + torch.tanh(h @ t["M"])).square().sum()


def two_blocks_rebuilt(t: Operands) -> torch.Tensor:
    return two_blocks(t, rebuild=True)


def every_row(t: Operands) -> torch.Tensor:
    return two_blocks(t, positions=None)


def older_sibling(t: Operands) -> torch.Tensor:
    sibling = t["x"] * 3
    return (written(t, t["x"] * 1) + sibling @ t["M"]).square().sum()


# The first forward and backward compiled in a process take the longest.
@pytest.mark.slow
@pytest.mark.parametrize("graph", [two_blocks, two_blocks_rebuilt, every_row, older_sibling], ids=lambda g: g.__name__)
def test_compiled_in_place_edit_copies_nothing(graph: Callable[[Operands], torch.Tensor], graphs: Graphs) -> None:
    shapes = {"x": (2, 24, 16), "R": (3, 16), "W": (3, 16), "b": (3,), "M": (16, 16)}
    tensors = {name: torch.randn(shape).mul_(0.3).requires_grad_() for name, shape in shapes.items()}
    inputs = list(tensors.values())
    expected = torch.autograd.grad(graph(tensors), inputs)
    got = torch.autograd.grad(torch.compile(graph, fullgraph=True)(tensors), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    names = graphs.edits()
    assert set(names) == {"reft_kernels.edit_forward_.default", "reft_kernels.edit_backward_.default"}
    assert graphs.copies(tensors["x"].numel()) == [0, 0]


@pytest.mark.parametrize("rebuild", [None, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_in_place_edit_that_is_written_again(compiler: str, rebuild: bool | None) -> None:
    """What the backward needs is kept from before the second write, which no version counter tells of."""
    x, R = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    W, b = torch.randn(2, 8, requires_grad=True), torch.randn(2, requires_grad=True)

    def function(h: torch.Tensor, inplace: bool) -> torch.Tensor:
        how = {"inplace": True, "rebuild": rebuild} if inplace else {}
        y = edit(h * 1.0, R, W, b, backend="eager", **how)
        return y.mul_(2.0) if inplace else y * 2.0

    torch._dynamo.reset()
    upstream = torch.randn_like(x)
    inputs = (x, R, W, b)
    got = torch.autograd.grad(torch.compile(function, fullgraph=True, backend=compiler)(x, True), inputs, upstream)
    for one, other in zip(got, torch.autograd.grad(function(x, False), inputs, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_compiled_in_place_edit_leaves_the_callers_gradient_alone(graphs: Graphs) -> None:
    """The gradient of a graph's output is the caller's: it is copied, and the count above can count."""
    x, R = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    y = torch.compile(lambda h: written({"R": R, "W": R * 2, "b": R[:, 0]}, h.sin()), fullgraph=True)(x)
    upstream = torch.randn_like(y)
    before = upstream.clone()
    got = torch.autograd.grad(y, (x, R), upstream)
    assert_bitwise_equal(upstream, before)
    assert graphs.copies(x.numel()) == [0, 1]
    y = edit(x.sin(), R, R * 2, R[:, 0], positions=POSITIONS, backend="eager")
    for one, other in zip(got, torch.autograd.grad(y, (x, R), upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rebuild", [None, False, True])
def test_compiled_in_place_with_dynamic_shapes_once_and_without_a_break(rebuild: bool | None) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    R, W, b = (torch.randn(*s, requires_grad=True) for s in ((2, 8), (2, 8), (2,)))

    def function(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        h = edit(x + x.sin(), R, W, b, positions=positions, activation="tanh", inplace=True, rebuild=rebuild)
        return edit(h * 2, R, W, b, inplace=True, rebuild=rebuild)

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    counts = []
    for batch, length, slots in ((3, 7, 5), (4, 9, 3), (5, 11, 6)):
        x = torch.randn(batch, length, 8, requires_grad=True)
        positions = torch.rand(batch, length).argsort(1)[:, :slots].contiguous()
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(x, dim)
            torch._dynamo.mark_dynamic(positions, dim)
        y, expected = compiled(x, positions), function(x, positions)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        inputs = (x, R, W, b)
        for got, want in zip(
            torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts == [1, 1, 1]
    torch._dynamo.reset()
    explained = torch._dynamo.explain(function)(x, positions)
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1


def test_what_compiled_edits_in_place_refuse() -> None:
    torch._dynamo.reset()
    R = torch.randn(2, 8)
    h = torch.randn(8, 6).T
    for call, message in (
        (lambda: edit(h, R, inplace=True), "unit stride"),
        (lambda: edit(torch.randn(2, 3, 2, 8).transpose(0, 2), R, inplace=True), "cannot be written row by row"),
        (lambda: edit(h, R, accumulate=True), "accumulate: expected False under torch.compile"),
        (lambda: edit(h, R, inplace=True, dropout=0.5, rebuild=True), "dropout loses what it drops"),
    ):
        with pytest.raises(Exception, match=message):
            torch.compile(call, fullgraph=True, backend="eager")()


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
