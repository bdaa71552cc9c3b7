"""y of every backend against the float64 oracle, and what an edit must leave alone."""

from __future__ import annotations

import math

import pytest
import torch

import reft_kernels
from reft_kernels import edit
from reft_kernels.reference import ACTIVATIONS
from reft_kernels.testing import (
    METHODS,
    EditCase,
    EditOperands,
    assert_bitwise_equal,
    assert_close,
    edit_cases,
    poison_empty,
    random_edit,
)

BACKENDS = ("eager", "cpu", "triton")
backends = pytest.mark.parametrize("backend", BACKENDS)


def check_forward(o: EditOperands, backend: str, **changes) -> torch.Tensor:
    copies = {name: t.clone() for name, t in vars(o).items() if isinstance(t, torch.Tensor)}
    with poison_empty():
        y = o.edit(backend=backend, **changes)
    assert y.shape == o.h.shape
    assert y.dtype == o.h.dtype
    assert y.is_contiguous()
    named = o.named
    assert_close(y[named], o.reference()[named], o.reference(o.h.dtype)[named], name="y")
    assert_bitwise_equal(y[~named], o.h[~named], name="unnamed rows")
    for name, copy in copies.items():
        assert_bitwise_equal(getattr(o, name), copy, name=f"the caller's {name}")
    return y


@backends
@pytest.mark.parametrize("case", edit_cases(), ids=str)
def test_matches_the_oracle(case: EditCase, backend: str) -> None:
    check_forward(random_edit(case, seed=10), backend)


@backends
@pytest.mark.parametrize(
    ("d", "r", "dtype"),
    [
        (1, 1, "float32"), (3, 2, "bfloat16"), (60, 7, "float16"), (63, 16, "float32"), (768, 4, "bfloat16"),
        (768, 17, "float32"), (1025, 32, "float16"), (4097, 8, "float32"), (4097, 64, "mixed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("activation", ["linear", "silu"])
def test_odd_sizes(d: int, r: int, dtype: str, activation: str, backend: str) -> None:
    case = EditCase("noreft_with_c", activation, dtype, positions="some", shape=(1, 3), slots=2, d=d, r=r)
    check_forward(random_edit(case, seed=11), backend)


@backends
@pytest.mark.parametrize("r", [1, 2, 3, 5, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64])
def test_every_kind_of_rank(r: int, backend: str) -> None:
    check_forward(random_edit(EditCase("loreft", "tanh", shape=(2, 1), d=70, r=r), seed=12), backend)


@backends
@pytest.mark.parametrize("layout", ["contiguous", "slice", "columns", "rows", "transposed", "expanded"])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3), (2, 1, 2, 2)])
def test_any_number_of_dimensions(shape: tuple[int, ...], layout: str, backend: str) -> None:
    case = EditCase("loreft", "relu", layout=layout, groups=2 if shape else 0, scale="rows", shape=shape, d=12, r=2)
    check_forward(random_edit(case, seed=13), backend)


@backends
@pytest.mark.parametrize(
    ("shape", "slots", "positions"),
    [
        ((0,), 1, "none"), ((0, 4), 2, "some"), ((3, 0), 0, "some"), ((3, 4), 0, "some"), ((2, 0, 5), 1, "none"),
        ((1, 1), 1, "some"), ((1, 1), 1, "nothing"), ((3, 1), 1, "padded"),
    ],
)  # fmt: skip
def test_no_rows_and_one_row(shape, slots, positions, backend) -> None:
    case = EditCase("loreft", "gelu", positions=positions, groups=2, shape=shape, slots=slots, d=9, r=3)
    check_forward(random_edit(case, seed=14), backend)


@backends
def test_positions_in_an_empty_sequence_name_nothing(backend: str) -> None:
    h, R = torch.empty(2, 0, 8), torch.randn(2, 8)
    y = edit(h, R, positions=torch.tensor([[0, -1], [3, 1]]), backend=backend)
    assert y.shape == (2, 0, 8)


@backends
@pytest.mark.parametrize("method", METHODS)
def test_named_functions(method: str, backend: str) -> None:
    o = random_edit(EditCase(method, "linear", "float64", shape=(4,), d=10, r=3), seed=15)
    h, R, W, b, c = o.h, o.R, o.W, o.b, o.c
    rotated, source = h @ R.T, b if W is None else h @ W.T + b
    expected, arguments = {
        "loreft": (source - rotated, (h, R, W, b)),
        "noreft": (source - rotated, (h, R, W, b)),
        "noreft_with_c": (source - (rotated + (0 if c is None else c)), (h, R, W, b, c)),
        "consreft": (b - rotated, (h, R, b)),
        "lobireft": (b.expand(4, 3), (h, R, b)),
        "direft": (source, (h, R, W, b)),
        "nodireft": (source, (h, R, W, b)),
    }[method]
    function = getattr(reft_kernels, method.removesuffix("_with_c"))
    y = function(*arguments, backend=backend)
    torch.testing.assert_close(y, h + expected @ R, rtol=1e-13, atol=1e-13)


@backends
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_W_and_b(activation: str, backend: str) -> None:
    h, R = torch.randn(3, 8), torch.randn(2, 8)
    torch.testing.assert_close(edit(h, R, activation=activation, backend=backend), h - h @ R.T @ R)
    bare = edit(h, R, subtract=False, activation=activation, backend=backend)
    assert_bitwise_equal(bare, h, name="an edit by f(0) = 0")


@backends
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saturated_activations(activation: str, backend: str) -> None:
    """Pre-activations of 1e4 and more: no overflow, no NaN."""
    h = torch.eye(4)
    b = torch.tensor([-3e4, -88.8, 88.8, 3e4])
    R = torch.eye(4)
    y = edit(h, R, None, b, subtract=False, activation=activation, backend=backend)
    exact = reft_kernels.reference.activate(b.double(), activation)
    torch.testing.assert_close(y.double(), h.double() + exact, rtol=1e-5, atol=1e-5)


@backends
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_in_an_edited_row_stays_nan_and_in_its_row(activation: str, backend: str) -> None:
    h, R, W, b = torch.randn(4, 20), torch.randn(2, 20), torch.randn(2, 20), torch.randn(2)
    h[2, 7] = math.nan
    y = edit(h, R, W, b, activation=activation, backend=backend)
    assert bool(y[2].isnan().all())
    others = [0, 1, 3]
    torch.testing.assert_close(y[others], edit(h[others], R, W, b, activation=activation, backend=backend))


@backends
def test_nan_in_the_weights_of_one_group_stays_there(backend: str) -> None:
    case = EditCase("noreft_with_c", "gelu", groups=3, shape=(12,), d=20, r=3)
    o = random_edit(case, seed=16)
    for tensor in (o.R, o.W, o.b, o.c):
        tensor[1] = math.nan
    y = o.edit(backend=backend)
    assert bool(y[o.group == 1].isnan().all())
    assert (o.group == 0).any()
    assert bool(y[(o.group == 0) | (o.group == 2)].isfinite().all())


@backends
def test_entries_out_of_range_name_nothing(backend: str) -> None:
    h, R, b = torch.randn(2, 4, 8), torch.randn(2, 3, 8), torch.randn(2, 3)
    positions = torch.tensor([[0, 4, 100], [-7, 2, 2**40]])
    group = torch.tensor([[0, 1, 0], [0, 2, 1]])
    y = edit(h, R, None, b, positions=positions, group=group, backend=backend)
    expected = edit(h, R, None, b, positions=torch.tensor([[0], [-1]]), group=group[:, :1], backend=backend)
    assert_bitwise_equal(y, expected)
    assert not torch.equal(y[0, 0], h[0, 0])


@backends
def test_scale_of_zero_and_of_unnamed_slots(backend: str) -> None:
    h, R, b = torch.randn(1, 4, 8), torch.randn(3, 8), torch.randn(3)
    positions = torch.tensor([[1, -1, 2]])
    scale = torch.tensor([[0.0, math.nan, 2.0]])
    y = edit(h, R, None, b, positions=positions, scale=scale, backend=backend)
    assert_bitwise_equal(y[0, [0, 1, 3]], h[0, [0, 1, 3]])
    torch.testing.assert_close(y[0, 2], h[0, 2] + 2 * R.T @ (b - R @ h[0, 2]))


@backends
def test_scale_kinds_agree(backend: str) -> None:
    h, R, b = torch.randn(2, 4, 8), torch.randn(3, 8), torch.randn(3)
    by_number = edit(h, R, None, b, scale=-2, backend=backend)
    by_rows = edit(h, R, None, b, scale=torch.full((2, 4), -2.0), backend=backend)
    expanded = edit(h, R, None, b, scale=torch.tensor(-2.0).expand(2, 4), backend=backend)
    assert_bitwise_equal(by_number, by_rows)
    assert_bitwise_equal(by_number, expanded)
    torch.testing.assert_close(by_number, h - 2 * (b - h @ R.T) @ R)


@backends
@pytest.mark.parametrize("case", edit_cases(7)[:12], ids=str)
def test_same_bits_at_every_run(case: EditCase, backend: str) -> None:
    o = random_edit(case, seed=17)
    assert_bitwise_equal(o.edit(backend=backend), o.edit(backend=backend))


@backends
def test_order_and_company_of_positions_make_no_difference(backend: str) -> None:
    o = random_edit(EditCase("loreft", "tanh", positions="some", shape=(2, 6), slots=4, dropout=0.4, d=40), seed=18)
    y = o.edit(backend=backend)
    assert_bitwise_equal(o.edit(backend=backend, positions=o.positions.flip(1)), y)
    one = o.edit(backend=backend, positions=o.positions[:, :1])
    for batch in range(2):
        row = o.positions[batch, 0]
        torch.testing.assert_close(one[batch, row], y[batch, row], rtol=1e-5, atol=1e-5)


@backends
def test_all_positions_equal_no_positions(backend: str) -> None:
    o = random_edit(EditCase("noreft_with_c", "silu", groups=2, shape=(2, 5), dropout=0.2, d=33), seed=19)
    everything = torch.arange(5).expand(2, 5)
    assert_bitwise_equal(o.edit(backend=backend, positions=everything)[o.named], o.edit(backend=backend)[o.named])


def giant(rows: int, d: int, gap: int) -> torch.Tensor:
    """Rows ``gap`` elements apart in float16; memory that is not touched costs nothing."""
    try:
        buffer = torch.empty((rows - 1) * gap + d, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no address space for {2 * (rows - 1) * gap / 2**30:.0f} GiB: {error}")
    return buffer.as_strided((rows, d), (gap, 1))


@backends
@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("inplace", [False, True])
def test_offsets_beyond_32_bits(inplace: bool, dimension: int, backend: str) -> None:
    d, gap = 24, 2**31 + 1024
    rows = giant(2, d, gap)
    rows.copy_(torch.randn(2, d))
    h = rows.unsqueeze(1 - dimension)  # [2, 1, d] or [1, 2, d]
    R, W, b = torch.randn(3, d).half(), torch.randn(3, d).half(), torch.randn(3).half()
    positions = torch.tensor([[-1], [0]]) if dimension == 0 else torch.tensor([[1]])
    small = h.clone()
    expected = edit(small, R, W, b, positions=positions, backend="eager")
    assert not torch.equal(expected, small)
    y = edit(h, R, W, b, positions=positions, inplace=inplace, backend=backend)
    torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)
    if inplace:
        assert y is h
    else:
        assert_bitwise_equal(h, small)
