"""Gradients of every backend against the float64 oracle, and only those that are asked for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from reft_kernels import edit
from reft_kernels.backends import registry
from reft_kernels.problem import Needs
from reft_kernels.testing import (
    METHODS,
    EditCase,
    EditOperands,
    assert_bitwise_equal,
    assert_close,
    edit_cases,
    gradients,
    lay_out,
    poison_empty,
    random_edit,
)

BACKENDS = ("eager", "cpu", "triton")
backends = pytest.mark.parametrize("backend", BACKENDS)
GRAD_LAYOUTS = ("contiguous", "slice", "rows", "transposed", "columns", "expanded", "scalar")


def check_backward(o: EditOperands, backend: str, grad: torch.Tensor, **changes) -> dict[str, torch.Tensor]:
    """dh at the rows that are not named is the gradient's own bits, whatever they hold."""
    grad = grad.to(o.h.dtype)
    copy = grad.clone()
    with poison_empty():
        got = gradients(lambda **t: o.edit(**t, backend=backend, **changes), o, grad)
    assert_bitwise_equal(grad, copy, name="the caller's gradient")

    named = o.named
    clean = grad.where(named[..., None], 0)  # what stands at the other rows concerns nobody
    wide = o.to(torch.float64)
    oracle = gradients(lambda **t: wide.reference(**t), wide, clean)
    baselines = {}
    for dtype in {t.dtype for t in o.differentiable.values()}:
        plain = o.to(dtype)
        baselines[dtype] = gradients(lambda p=plain, dt=dtype, **t: p.reference(dt, **t), plain, clean).grads
    for name, value in got.grads.items():
        original = o.differentiable[name]
        assert value.dtype == original.dtype
        exact, baseline = oracle.grads[name], baselines[original.dtype][name]
        if name == "h":
            assert_bitwise_equal(value[~named], grad[~named], name="dh at unnamed rows")
            value, exact, baseline = value[named], exact[named], baseline[named]
        assert_close(value, exact, baseline, factor=3.0, name=f"d{name}")
    return got.grads


def hostile(o: EditOperands, layout: str) -> torch.Tensor:
    """A gradient that holds NaN and infinities at the rows that are not named."""
    grad = torch.randn(o.h.shape, dtype=torch.float64)
    if layout not in ("expanded", "scalar"):
        odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0], dtype=torch.float64)
        grad = grad.where(o.named[..., None], odd[torch.randint(0, 4, (*o.named.shape, 1))])
    return lay_out(grad.to(o.h.dtype), layout)


@backends
@pytest.mark.parametrize("index", range(len(edit_cases())), ids=[str(case) for case in edit_cases()])
def test_matches_the_oracle(index: int, backend: str) -> None:
    o = random_edit(edit_cases()[index], seed=20)
    check_backward(o, backend, hostile(o, GRAD_LAYOUTS[index % len(GRAD_LAYOUTS)]))


@backends
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 2, 2)])
def test_any_number_of_dimensions(shape: tuple[int, ...], layout: str, backend: str) -> None:
    o = random_edit(EditCase("loreft", "relu", shape=shape, d=12, r=2, scale="rows"), seed=21)
    check_backward(o, backend, hostile(o, layout))


@backends
@pytest.mark.parametrize(
    ("d", "r", "dtype"),
    [
        (1, 1, "float32"), (31, 2, "bfloat16"), (32, 16, "float16"), (60, 17, "float32"), (768, 4, "bfloat16"),
        (4097, 5, "float32"), (1031, 64, "mixed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("activation", ["linear", "gelu"])
def test_odd_sizes(d: int, r: int, dtype: str, activation: str, backend: str) -> None:
    slots = 2 if d < 1000 else 1
    case = EditCase("noreft_with_c", activation, dtype, positions="some", shape=(1, 3), slots=slots, d=d, r=r)
    o = random_edit(case, seed=22)
    check_backward(o, backend, hostile(o, "contiguous"))


@backends
@pytest.mark.parametrize("r", [1, 3, 8, 16, 17, 33, 64])
def test_more_rows_than_a_tile(r: int, backend: str) -> None:
    """Sums over several tiles of rows, slabs of columns and weight sets."""
    case = EditCase("noreft_with_c", "silu", positions="padded", groups=2, scale="rows",
                    shape=(3, 40), slots=27, d=70, r=r)  # fmt: skip
    o = random_edit(case, seed=23)
    check_backward(o, backend, hostile(o, "contiguous"))


@backends
@pytest.mark.parametrize(
    ("shape", "slots", "positions"),
    [((0,), 1, "none"), ((0, 4), 2, "some"), ((3, 4), 0, "some"), ((3, 4), 2, "nothing"), ((1, 1), 1, "some")],
)
@pytest.mark.parametrize("groups", [0, 2])
def test_no_rows_give_zero_gradients(shape, slots, positions, groups, backend) -> None:
    case = EditCase("noreft_with_c", "tanh", positions=positions, groups=groups, shape=shape, slots=slots, d=9, r=3)
    o = random_edit(case, seed=24)
    found = check_backward(o, backend, hostile(o, "contiguous"))
    if not o.named.any():
        for name in ("R", "W", "b", "c"):
            assert not bool(found[name].any()), name


@backends
def test_a_group_without_rows_gets_zeros(backend: str) -> None:
    o = random_edit(EditCase("noreft_with_c", "gelu", groups=3, shape=(7,), d=40, r=3), seed=25)
    o.group.copy_(torch.tensor([0, 2, 2, -1, 0, 2, 0]))
    found = check_backward(o, backend, torch.randn(7, 40))
    for name in ("R", "W", "b", "c"):
        assert not bool(found[name][1].any())
        assert bool(found[name][2].any())


@backends
def test_entries_out_of_range_have_no_gradient(backend: str) -> None:
    h = torch.randn(2, 4, 8)
    R, b = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    grad = torch.randn(2, 4, 8)
    results = []
    for positions, group in (
        ([[0, 4, 100], [-7, 2, 2**40]], [[0, 1, 0], [0, 2, 1]]),
        ([[0], [-1]], [[0], [0]]),
    ):
        y = edit(h, R, None, b, positions=torch.tensor(positions), group=torch.tensor(group), backend=backend)
        results.append(torch.autograd.grad(y, (R, b), grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
        assert bool(expected.any())


@backends
def test_scale_of_unnamed_slots_is_not_read(backend: str) -> None:
    h, grad = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    R, W, b = (torch.randn(*s, requires_grad=True) for s in ((3, 8), (3, 8), (3,)))
    positions = torch.tensor([[1, -1], [2, -1]])
    results = []
    for odd in (math.nan, math.inf, 1.0):
        scale = torch.tensor([[2.0, odd], [-1.0, odd]])
        y = edit(h, R, W, b, positions=positions, scale=scale, activation="tanh", backend=backend)
        results.append((y, *torch.autograd.grad(y, (R, W, b), grad)))
    for got in results[:2]:
        for one, other in zip(got, results[2], strict=True):
            assert_bitwise_equal(one.detach(), other.detach())


@backends
def test_nan_in_one_group_stays_there(backend: str) -> None:
    o = random_edit(EditCase("noreft_with_c", "silu", groups=2, shape=(6,), d=20, r=3), seed=26)
    o.group.copy_(torch.tensor([0, 1, 0, 1, -1, 0]))
    o.h[1, 3] = math.nan
    found = gradients(lambda **t: o.edit(**t, backend=backend), o, torch.randn(6, 20)).grads
    for name in ("R", "W", "b"):
        assert bool(found[name][0].isfinite().all()), name
        assert bool(found[name][1].isnan().any()), name


@backends
@pytest.mark.parametrize("case", edit_cases(9)[:12], ids=str)
def test_same_bits_at_every_run(case: EditCase, backend: str) -> None:
    o = random_edit(case, seed=27)
    grad = torch.randn(o.h.shape)
    one, other = (gradients(lambda **t: o.edit(**t, backend=backend), o, grad).grads for _ in range(2))
    for name, value in one.items():
        assert_bitwise_equal(value, other[name], name=name)


# Only what is asked for.


class Recorder:
    """A backend that notes which gradients it was asked for."""

    def __init__(self, inner: registry.Backend) -> None:
        self.inner, self.name = inner, inner.name
        self.calls: list[tuple[Needs, tuple]] = []
        self.forwards: list[bool] = []

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def edit_forward(self, problem, inplace, save_rows):
        self.forwards.append(save_rows)
        return self.inner.edit_forward(problem, inplace, save_rows)

    def edit_backward(self, grad, problem, delta, s, needs, **how):
        found = self.inner.edit_backward(grad, problem, delta, s, needs, **how)
        self.calls.append((needs, found))
        return found


@pytest.fixture
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recording = Recorder(registry.BACKENDS[request.param])
    monkeypatch.setitem(registry.BACKENDS, request.param, recording)
    return recording


SUBSETS = [s for n in range(1, 6) for s in itertools.combinations(("h", "R", "W", "b", "c"), n)]


@pytest.mark.parametrize("activation", ["linear", "gelu"])
@pytest.mark.parametrize("recorder", BACKENDS, indirect=True)
def test_only_gradients_asked_for_are_computed(recorder: Recorder, activation: str) -> None:
    case = EditCase("noreft_with_c", activation, "float64", positions="padded", shape=(2, 3), slots=2, d=6, r=2)
    o = random_edit(case, seed=28)
    grad = torch.randn(2, 3, 6, dtype=torch.float64)
    everything = gradients(lambda **t: o.reference(**t), o, grad).grads
    for wanted in SUBSETS:
        recorder.calls.clear()
        with poison_empty():
            found = gradients(lambda **t: o.edit(**t, backend=recorder.name), o, grad, wanted).grads
        (needs, returned) = recorder.calls[0]
        assert len(recorder.calls) == 1
        assert needs._asdict() == {name: name in wanted for name in Needs._fields}
        for name, value in zip(Needs._fields, returned, strict=True):
            assert (value is not None) == (name in wanted), (wanted, name)
        for name in wanted:
            torch.testing.assert_close(found[name], everything[name], rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("recorder", BACKENDS, indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_missing_operands_have_no_gradient(recorder: Recorder, method: str) -> None:
    o = random_edit(EditCase(method, shape=(2,), d=6, r=2), seed=29)
    gradients(lambda **t: o.edit(**t, backend=recorder.name), o, torch.randn(2, 6))
    (_, returned) = recorder.calls[0]
    assert [value is None for value in returned] == [getattr(o, name) is None for name in Needs._fields]


@pytest.mark.parametrize("recorder", ["eager"], indirect=True)
def test_no_backward_and_nothing_saved_where_nothing_requires_a_gradient(recorder: Recorder) -> None:
    o = random_edit(EditCase(shape=(2,), d=6, r=2), seed=30)
    y = o.edit(backend="eager")
    assert not y.requires_grad
    with torch.no_grad():
        y = o.edit(backend="eager", R=o.R.clone().requires_grad_(), inplace=True, h=o.h.clone())
    assert not y.requires_grad
    assert recorder.forwards == [False, False]
    assert not recorder.calls


@backends
def test_accumulation_over_two_backwards(backend: str) -> None:
    o = random_edit(EditCase("loreft", "silu", shape=(3,), d=10, r=2), seed=31)
    R = o.R.clone().requires_grad_()
    y = o.edit(R=R, backend=backend)
    y.sum().backward(retain_graph=True)
    once = R.grad.clone()
    y.sum().backward()
    assert_bitwise_equal(R.grad, 2 * once)


@backends
def test_offsets_beyond_32_bits(backend: str) -> None:
    d, gap = 24, 2**31 + 1024
    memory = []
    for _ in range(2):
        try:
            memory.append(torch.empty(gap + d, dtype=torch.float16).as_strided((1, 2, d), (1, gap, 1)))
        except RuntimeError as error:
            pytest.skip(f"no address space for two buffers of 4 GiB: {error}")
        memory[-1].copy_(torch.randn(1, 2, d))
    h, grad = memory
    R, W, b = (torch.randn(*s).half().requires_grad_() for s in ((3, d), (3, d), (3,)))
    results = []
    for x, g in ((h, grad), (h.clone(), grad.clone())):
        y = edit(x, R, W, b, positions=torch.tensor([[1]]), backend=backend)
        results.append(torch.autograd.grad(y, (R, W, b), g))
        x = x.detach().requires_grad_()
        y = edit(x, R, W, b, positions=torch.tensor([[1]]), backend=backend)
        results[-1] += torch.autograd.grad(y, x, g)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
        assert bool(expected.any())
