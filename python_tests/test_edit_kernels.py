"""The launcher of the Triton kernels against the float64 oracle, through every path that the kernels have.

The launch configuration decides which path an edit takes, and small edits would all take the same one: here it is
forced. So are the number of programs and the chunks of the backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import pytest
import torch
import triton.language as tl
from torch import Tensor

from reft_kernels.backends import triton as launcher
from reft_kernels.functional import _normalise
from reft_kernels.philox import keep_mask
from reft_kernels.problem import EditProblem, Needs
from reft_kernels.reference import ACTIVATIONS, activate, activation_slope
from reft_kernels.testing import (
    LAYOUTS,
    METHODS,
    EditCase,
    EditOperands,
    assert_bitwise_equal,
    assert_close,
    lay_out,
    pairwise,
    poison_empty,
    random_edit,
)
from reft_kernels.triton import common
from reft_kernels.triton.config_tables import BackwardConfig, Config, ForwardConfig
from reft_kernels.triton.heuristics import power_of_two

WEIGHTS = ("R", "W", "b", "c")
ALL = Needs(True, True, True, True, True)


@dataclass(frozen=True)
class Launch:
    """A path through the kernels. ``chunk`` is the number of slots a chunk, None for all of them in one."""

    forward: str = "rows"  # or weights, tiles
    forward_n: int = 2
    forward_d: int = 32
    phase1: str = "rows"  # or tiles
    rows_n: int = 2
    phase1_d: int = 32
    slab_n: int = 16
    slab_d: int = 32
    programs: int = 3
    chunk: int | None = None
    stages: int = 2

    def __str__(self) -> str:
        """All that differs from the default, as a test's name."""
        default = Launch()
        changed = {
            f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)
        }
        return "-".join(f"{name}={value}" for name, value in changed.items()) or "default"


@contextmanager
def forced(path: Launch) -> Iterator[None]:
    """Within the context the launcher takes this path."""

    def measured(op: str, p: EditProblem, rows: int) -> Config:
        wide = max(4, power_of_two(p.R.shape[2]))
        if op == "edit_forward":
            # The kernel holds one weight set in registers: rows that choose among several take another method.
            method = "rows" if path.forward == "weights" and p.group is not None else path.forward
            slots = 1 if method == "weights" else path.forward_n
            return ForwardConfig(method, slots, path.forward_d if method == "tiles" else wide, path.stages, 4)
        columns = path.phase1_d if path.phase1 == "tiles" else wide
        return BackwardConfig(
            path.phase1, path.rows_n, columns, path.slab_n, path.slab_d, path.stages, path.stages, num_warps=4
        )

    replaced = {
        "_measured": measured,
        "resident_programs": lambda device: path.programs,
        "_chunk": lambda rows, *others: rows if path.chunk is None else path.chunk,
    }
    with mock.patch.multiple(launcher, **replaced):
        yield


def problem_of(o: EditOperands) -> EditProblem:
    """The operands in the layout of a backend."""
    return _normalise(
        o.h, o.R, o.W, o.b, o.c, o.positions, o.group, o.scale, o.subtract, o.activation, o.dropout, o.seed
    )  # fmt: skip


def widened(p: EditProblem, dtype: torch.dtype) -> EditProblem:
    """The same problem with every float in ``dtype``."""
    return p._replace(**{
        name: t.to(dtype) for name, t in p._asdict().items() if isinstance(t, Tensor) and t.is_floating_point()
    })  # fmt: skip


def edited_slots(p: EditProblem, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slot, row of [B * S] and group of every slot that is edited."""
    shape = (batch, length) if p.positions is None else p.positions.shape
    positions = torch.arange(length).expand(shape) if p.positions is None else p.positions.long()
    group = torch.zeros(shape, dtype=torch.int64) if p.group is None else p.group.long()
    edited = (positions >= 0) & (positions < length) & (group >= 0) & (group < p.R.shape[0])
    rows = positions + torch.arange(shape[0])[:, None] * length
    slots = edited.reshape(-1).nonzero().squeeze(1)
    return slots, rows.reshape(-1)[slots], group.reshape(-1)[slots]


def down_projections(o: EditOperands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """delta and s [N, r] by the formulas; zeros where a slot is not edited."""
    p = widened(problem_of(o), dtype)
    slots, rows, group = edited_slots(p, *p.h.shape[:2])
    count = p.h.shape[0] * (p.h.shape[1] if p.positions is None else p.positions.shape[1])
    x = p.h.reshape(-1, p.h.shape[-1])[rows]
    delta, s = torch.zeros(2, count, p.R.shape[1], dtype=dtype)
    own = x.new_zeros(len(slots), p.R.shape[1])
    if p.W is not None:
        own = torch.einsum("nrd,nd->nr", p.W[group], x)
    if p.b is not None:
        own = own + p.b[group]
    s[slots] = own
    own = activate(own, p.activation)
    if p.subtract:
        own = own - torch.einsum("nrd,nd->nr", p.R[group], x)
        if p.c is not None:
            own = own - p.c[group]
    delta[slots] = own
    return delta, s


def formulas(
    grad: Tensor, problem: EditProblem, delta: Tensor, s: Tensor, *, rebuild: bool, dtype: torch.dtype
) -> dict[str, Tensor]:  # fmt: skip
    """The gradients of h, R, W, b and c by name, from what the forward has left; h is y if ``rebuild``."""
    p, grad, delta, s = widened(problem, dtype), grad.to(dtype), delta.to(dtype), s.to(dtype)
    batch, length, d = grad.shape
    slots, rows, group = edited_slots(p, batch, length)
    g, delta = grad.reshape(-1, d)[rows], delta[slots]
    R = p.R[group]
    scale = torch.ones(len(slots), 1, dtype=dtype) if p.scale is None else p.scale.reshape(-1)[slots].unsqueeze(1)
    if p.dropout > 0:
        g = torch.where(keep_mask(p.seed, rows, d, p.dropout), g / (1 - p.dropout), torch.zeros_like(g))
    x = p.h[slots] if p.h.dim() == 2 else p.h.reshape(-1, d)[rows]
    if rebuild:
        x = (x - scale * torch.einsum("nrd,nr->nd", R, delta)).to(problem.h.dtype).to(dtype)
    gd = scale * torch.einsum("nrd,nd->nr", R, g)
    gs = gd if p.activation == "linear" else gd * activation_slope(s[slots], p.activation)

    def outer(left: Tensor, right: Tensor) -> Tensor:
        return torch.zeros_like(p.R).index_add(0, group, left[:, :, None] * right[:, None, :])

    zeros = torch.zeros(p.R.shape[:2], dtype=dtype)
    dx, dR = g.clone(), outer(scale * delta, g)
    if p.W is not None:
        dx += torch.einsum("nrd,nr->nd", p.W[group], gs)
    if p.subtract:
        dx -= torch.einsum("nrd,nr->nd", R, gd)
        dR -= outer(gd, x)
    found = {
        "h": grad.reshape(-1, d).index_put((rows,), dx).reshape(grad.shape),
        "R": dR,
        "W": outer(gs, x),
        "b": zeros.index_add(0, group, gs),
        "c": -zeros.index_add(0, group, gd),
    }
    return {name: t for name, t in found.items() if name in ("h", "R") or getattr(p, name) is not None}


def hostile_gradient(o: EditOperands, layout: str) -> Tensor:
    """[B, S, d] in the dtype of h; NaN and infinities at the rows that are not edited, if they can differ."""
    shape = problem_of(o).h.shape
    grad = torch.randn(shape, dtype=torch.float64)
    if layout not in ("expanded", "scalar"):
        odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0], dtype=torch.float64)
        grad = grad.where(o.named.reshape(shape[:2])[..., None], odd[torch.randint(0, 4, (*shape[:2], 1))])
    return lay_out(grad.to(o.h.dtype), layout)


def check_forward(
    o: EditOperands, path: Launch, *, inplace: bool = False, backend: Any = launcher
) -> tuple[Tensor, ...]:
    """y, delta, s and the saved rows, checked against the oracle."""
    p = problem_of(o)
    original = p.h.clone()
    if inplace:
        p = p._replace(h=p.h.clone(memory_format=torch.preserve_format))
    with forced(path), poison_empty():
        y, delta, s, before = backend.edit_forward(p, inplace, save_rows=True)
    assert (y is p.h) == inplace
    if not inplace:
        assert_bitwise_equal(p.h, original, name="the caller's h")
    named = o.named.reshape(y.shape[:2])
    oracle = o.to(torch.float64).reference().reshape(y.shape)
    baseline = o.to(o.h.dtype).reference(o.h.dtype).reshape(y.shape)
    assert_bitwise_equal(y[~named], original[~named], name="unnamed rows")
    assert_close(y[named], oracle[named], baseline[named], name="y")

    exact = down_projections(o, torch.float64)
    plain = down_projections(o, p.accumulator)
    assert_close(delta, exact[0], plain[0], factor=4, name="delta")
    assert tuple(s.shape) == ((0,) if p.activation == "linear" else tuple(delta.shape))
    if p.activation != "linear":
        assert_close(s, exact[1], plain[1], factor=4, name="s")
    slots, rows, _ = edited_slots(p, *y.shape[:2])
    assert_bitwise_equal(before[slots], original.reshape(-1, y.shape[2])[rows], name="rows before the edit")
    return y, delta, s, before


def check_backward(
    o: EditOperands,
    path: Launch,
    grad: Tensor,
    forward: tuple[Tensor, ...],
    *,
    mode: str = "plain",
    into: torch.dtype | None = None,
    inplace: bool = False,
    backend: Any = launcher,
) -> dict[str, Tensor]:
    """The gradients asked for together, checked against the oracle; ``mode`` is one of plain, rows, rebuild."""
    p = problem_of(o)
    y, delta, s, before = forward
    rebuild = mode == "rebuild"
    p = p._replace(h={"plain": p.h, "rows": before, "rebuild": y}[mode])
    places = {
        name: torch.randn(t.shape, dtype=into) if into is not None else None
        for name in WEIGHTS
        if (t := getattr(p, name)) is not None
    }
    own = tuple(None if places.get(name) is None else places[name].clone() for name in WEIGHTS)
    given = grad.clone(memory_format=torch.preserve_format) if inplace else grad
    copy = grad.clone()
    with forced(path), poison_empty():
        found = backend.edit_backward(
            given, p, delta, s, ALL, inplace=inplace, rebuild=rebuild, into=None if into is None else own
        )
    if not inplace:
        assert_bitwise_equal(grad, copy, name="the caller's gradient")
        assert found[0].untyped_storage().data_ptr() != grad.untyped_storage().data_ptr()
    elif grad.stride(2) == 1:
        assert found[0] is given

    named = o.named.reshape(grad.shape[:2])
    clean = copy.where(named[..., None], 0)
    delta, s = (t.nan_to_num(0.0) for t in (delta, s))
    # Rows that are rebuilt are those of h but for roundings, which a rebuild in plain PyTorch has as well.
    original = problem_of(o) if rebuild else p
    oracle = formulas(clean, original, delta, s, rebuild=False, dtype=torch.float64)
    plain = formulas(clean, p, delta, s, rebuild=rebuild, dtype=p.accumulator)
    got = dict(zip(Needs._fields, found, strict=True))
    assert {name for name, t in got.items() if t is not None} == set(oracle)
    for name, exact in oracle.items():
        value, baseline = got[name], plain[name]
        if name == "h":
            assert_bitwise_equal(value[~named], copy[~named], name="dh at unnamed rows")
            value, exact, baseline = value[named], exact[named], baseline[named]
        elif into is not None:
            assert value is own[WEIGHTS.index(name)]
            exact, baseline = exact + places[name].double(), baseline + places[name].to(baseline.dtype)
        assert value.dtype == (into if into is not None and name != "h" else getattr(problem_of(o), name).dtype)
        assert_close(value, exact, baseline.to(value.dtype), factor=3, name=f"d{name}")
    return {name: t for name, t in got.items() if t is not None}


def check(
    o: EditOperands,
    path: Launch,
    *,
    grad_layout: str = "contiguous",
    inplace_forward: bool = False,
    backend: Any = launcher,
    **how: Any,
) -> None:
    """Forward and backward along one path."""
    forward = check_forward(o, path, inplace=inplace_forward, backend=backend)
    check_backward(o, path, hostile_gradient(o, grad_layout), forward, backend=backend, **how)


FACTORS: Mapping[str, tuple[Any, ...]] = {
    "method": tuple(METHODS),
    "activation": ACTIVATIONS,
    "dtype": ("float32", "float16", "bfloat16", "float64", "mixed", "mixed16"),
    "layout": LAYOUTS,
    "positions": ("none", "some", "padded", "nothing"),
    "groups": (0, 1, 3),
    "scale": ("none", "number", "rows"),
    "dropout": (0.0, 0.3),
    "size": (
        ((2, 5), 60, 4), ((1, 7), 33, 1), ((3, 2), 70, 9), ((4, 9), 8, 3), ((2, 3), 65, 8), ((1, 70), 37, 16),
        ((5, 4), 3, 2), ((2, 6), 97, 33), ((1, 3), 130, 64), ((3, 1), 1, 1),
    ),
    "index": ("int64", "int32", "strided"),
    "forward": ("rows", "weights", "tiles"),
    "forward_n": (1, 2, 4, 16, 64),
    "forward_d": (16, 64),
    "phase1": ("rows", "tiles"),
    "rows_n": (1, 2, 4, 16, 64),
    "phase1_d": (16, 64),
    "slab_n": (16, 64),
    "slab_d": (16, 32, 64),
    "programs": (1, 2, 3, 7, 40),
    "chunk": (None, 1, 5, 16, 37),
    "grad_layout": ("contiguous", "slice", "rows", "transposed", "columns", "expanded", "scalar"),
    "mode": ("plain", "rows", "rebuild"),
    "into": (None, torch.float32, torch.bfloat16),
    "inplace": (False, True),
}  # fmt: skip


def matrix(seed: int, factors: Mapping[str, tuple[Any, ...]]) -> list[tuple[EditCase, Launch, dict[str, Any]]]:
    """Cases in which every two values of the factors meet, but for what does not exist."""
    paths = {f.name for f in fields(Launch)}
    cases = []
    for row in pairwise(factors, seed):
        path = Launch(**{name: row.pop(name) for name in list(row) if name in paths})
        how = {name: row.pop(name) for name in ("grad_layout", "mode", "into", "inplace")}
        if how["mode"] == "rebuild" and row["dropout"] > 0:
            how["mode"] = "rows"
        if how["grad_layout"] in ("expanded", "scalar"):
            how["inplace"] = False
        if row["dtype"] == "float64" and how["into"] is not None:
            how["into"] = torch.float32  # the interpreter has no conversion from float64 to bfloat16
        shape, d, r = row.pop("size")
        cases.append((EditCase(**row, shape=shape, d=d, r=r), path, how))
    return cases


MATRIX = matrix(4, FACTORS)


@pytest.mark.parametrize("index", range(len(MATRIX)))
def test_every_path_matches_the_oracle(index: int) -> None:
    case, path, how = MATRIX[index]
    print(case, path, how)  # shown where the test fails
    check(random_edit(case, seed=100 + index), path, **how)


METHOD_PATHS = [
    Launch(forward=forward, phase1=phase1)
    for forward, phase1 in (("rows", "rows"), ("weights", "rows"), ("tiles", "tiles"))
]
paths = pytest.mark.parametrize("path", METHOD_PATHS, ids=lambda p: f"{p.forward}-{p.phase1}")
methods = pytest.mark.parametrize("method", ["rows", "tiles"])


@paths
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_method_and_activation(method: str, activation: str, path: Launch) -> None:
    case = EditCase(method, activation, "mixed", positions="padded", scale="rows", shape=(2, 6), slots=4, d=21, r=3)
    o = random_edit(case, seed=1)
    forward = check_forward(o, path)
    for mode in ("plain", "rows", "rebuild") if path.forward != "weights" else ():  # the backward has no such method
        check_backward(o, path, hostile_gradient(o, "contiguous"), forward, mode=mode)


@paths
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 15, 17, 31, 66, 129])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_any_width(d: int, dropout: float, path: Launch) -> None:
    """Rows that end within a block of four columns, within a tile, and at the width of a tile."""
    case = EditCase("noreft_with_c", "silu", "mixed", dropout=dropout, shape=(1, 5), d=d, r=2)
    check(random_edit(case, seed=2), replace(path, forward_d=16, phase1_d=16, slab_d=16))


@paths
@pytest.mark.parametrize("r", [1, 2, 3, 8, 9, 15, 16, 17, 33, 64])
def test_any_rank(r: int, path: Launch) -> None:
    case = EditCase("noreft_with_c", "gelu", "mixed", shape=(7,), d=34, r=r)
    check(random_edit(case, seed=3), path)


def regrouped(o: EditOperands, group: Tensor) -> EditOperands:
    """The same edit with other groups: rows that it names now are finite, others hold NaN."""
    o = replace(o, group=group)
    return replace(o, h=torch.randn(o.h.shape).to(o.h.dtype).where(o.named[..., None], math.nan))


@methods
@pytest.mark.parametrize("tile", [1, 4, 64])
@pytest.mark.parametrize("names", [(2,), (0, 1, 2, 3, -1), (3, 1, -1), (-1,), (4, 1, -5, 99)], ids=str)
def test_groups_in_a_tile(names: tuple[int, ...], tile: int, method: str) -> None:
    """Slots of one tile that belong to one weight set, to several, to none, and to one that is not there."""
    case = EditCase("noreft_with_c", "tanh", positions="padded", groups=4, scale="rows", shape=(3, 9), slots=7, d=20)
    o = random_edit(case, seed=4)
    drawn = torch.tensor(names)[torch.randint(0, len(names), o.group.shape)]
    o = regrouped(o, drawn.where((drawn >= 0) & (drawn < 4), -1))
    path = Launch(forward=method, phase1=method, forward_n=tile, rows_n=tile)
    forward = check_forward(o, path)
    grad = hostile_gradient(o, "contiguous")
    expected = check_backward(o, path, grad, forward)
    check_backward(o, path, grad, forward, mode="rebuild")
    # Entries out of range count as -1.
    p = problem_of(replace(o, group=drawn))
    with forced(path), poison_empty():
        y, delta, s, _ = launcher.edit_forward(p, False, save_rows=False)
        found = launcher.edit_backward(grad, p, delta, s, ALL)
    for got, like in zip((y, delta, s, *found), (*forward[:3], *expected.values()), strict=True):
        assert_bitwise_equal(got, like)


@methods
@pytest.mark.parametrize("broken", ["R", "W", "b", "c", "h", "grad", "scale"])
def test_what_is_not_finite_in_one_group_stays_there(broken: str, method: str) -> None:
    case = EditCase("noreft_with_c", "silu", groups=2, scale="rows", shape=(9,), d=20, r=3)
    o = random_edit(case, seed=5)
    o = regrouped(o, torch.tensor([0, 1, 0, 1, -1, 0, 1, 1, 0]))
    path = Launch(forward=method, phase1=method, forward_n=4, rows_n=4)
    grad = torch.randn(1, 9, 20)
    own = o.group == 1

    def results() -> tuple[list[Tensor], list[Tensor]]:
        p = problem_of(o)
        with forced(path), poison_empty():
            y, delta, s, _ = launcher.edit_forward(p, False, save_rows=False)
            found = launcher.edit_backward(grad, p, delta, s, ALL)
        by_row, sums = (y[0], delta, s, found[0][0]), found[1:]
        return [t[~own] for t in by_row] + [t[0] for t in sums], [t[own] for t in by_row] + [t[1] for t in sums]

    sound, _ = results()
    if broken in ("R", "W", "b", "c"):
        getattr(o, broken)[1, 0] = math.inf
        getattr(o, broken)[1, 1:] = math.nan
    else:
        (grad[0] if broken == "grad" else getattr(o, broken))[own] = math.nan
    others, hit = results()
    for got, expected in zip(others, sound, strict=True):
        assert_bitwise_equal(got, expected)
    assert any(bool(t.isnan().any()) for t in hit)


ALONE = [Needs(*(name == only for name in Needs._fields)) for only in Needs._fields]
ALL_BUT_ONE = [Needs(*(name != other for name in Needs._fields)) for other in Needs._fields]


@methods
@pytest.mark.parametrize("mode", ["plain", "rebuild"])
@pytest.mark.parametrize("activation", ["linear", "gelu"])
def test_a_gradient_has_the_same_bits_whatever_else_is_asked_for(activation: str, mode: str, method: str) -> None:
    case = EditCase(
        "noreft_with_c", activation, "mixed", positions="padded", scale="rows", shape=(2, 5), slots=4, d=18, r=2
    )  # fmt: skip
    o = random_edit(case, seed=6)
    path = Launch(forward=method, phase1=method, chunk=3, slab_d=16, rows_n=4)
    y, delta, s, _ = check_forward(o, path)
    p = problem_of(o)
    p = p._replace(h=y if mode == "rebuild" else p.h)
    grad = hostile_gradient(o, "contiguous")
    copy = grad.clone()
    places = [torch.randn(t.shape) for t in (p.R, p.W, p.b, p.c)]

    def run(needs: Needs, into: bool) -> tuple[Tensor | None, ...]:
        own = tuple(t.clone() for t in places)
        with forced(path), poison_empty():
            found = launcher.edit_backward(
                grad, p, delta, s, needs, rebuild=mode == "rebuild", into=own if into else None
            )  # fmt: skip
        assert_bitwise_equal(grad, copy, name="the caller's gradient")
        for needed, place, original in zip(needs[1:], own, places, strict=True):
            if not needed:
                assert_bitwise_equal(place, original, name="a place whose gradient is not asked for")
        return found

    for into in (False, True):
        together = run(ALL, into)
        for needs in ALONE if into else ALONE + ALL_BUT_ONE:
            found = run(needs, into)
            for name, needed, got, expected in zip(Needs._fields, needs, found, together, strict=True):
                assert (got is not None) == needed
                if needed:
                    assert_bitwise_equal(got, expected, name=f"d{name} of {needs}")


@pytest.mark.parametrize("phase1", ["rows", "tiles"])
def test_same_bits_for_every_grid_and_chunk(phase1: str) -> None:
    """However many programs there are, and however the launcher cuts the rows into chunks."""
    case = EditCase(
        "noreft_with_c", "silu", "mixed", positions="padded", groups=2, scale="rows", shape=(3, 30), slots=25, d=20, r=3
    )  # fmt: skip
    o = random_edit(case, seed=7)
    p = problem_of(o)
    _, delta, s, _ = launcher.edit_forward(p, False, save_rows=False)
    grad = hostile_gradient(o, "contiguous")
    chosen, results = set(), []
    choose = launcher._chunk

    def recorded(*arguments: Any) -> int:
        chunk = choose(*arguments)
        chosen.add(chunk)
        return chunk

    for programs, cache in ((1, 10**9), (4, 1), (4, 6000), (7, 1), (50, 10**9)):
        path = Launch(phase1=phase1, programs=programs, slab_n=16, slab_d=16)
        choice = mock.patch.multiple(launcher, _chunk=recorded, _l2_bytes=mock.Mock(return_value=cache))
        with forced(path), choice, poison_empty():
            results.append(launcher.edit_backward(grad, p, delta, s, ALL))
    assert len(chosen) >= 3, chosen
    for found in results[1:]:
        for name, got, expected in zip(Needs._fields, found, results[0], strict=True):
            assert_bitwise_equal(got, expected, name=f"d{name}")


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 64, 1000, 4099])
@pytest.mark.parametrize("programs", [6, 7, 132])
@pytest.mark.parametrize("cache", [1, 2**15, 2**20, 50 * 2**20])
def test_chunks_are_whole_steps(rows: int, programs: int, cache: int) -> None:
    config = BackwardConfig("rows", 4, 64, 32, 16, 1, 1, num_warps=4)
    tensor = torch.empty(0, dtype=torch.bfloat16)
    with mock.patch.object(launcher, "_l2_bytes", return_value=cache):
        chunk = launcher._chunk(rows, 64, tensor, tensor, config, programs, 6)
        assert launcher._chunk(rows, 64, tensor, tensor, config, programs, programs + 1) == rows
    assert 1 <= chunk <= rows
    if chunk < rows:
        assert chunk % 32 == 0
        assert chunk % (4 * programs) == 0
        assert 2 * chunk <= rows


@paths
@pytest.mark.parametrize("layout", ["contiguous", "slice", "rows", "transposed"])
def test_in_place(layout: str, path: Launch) -> None:
    """y is h itself, also where h is a part of something wider, whose other elements keep their bits."""
    case = EditCase("loreft", "relu", "mixed", layout, positions="padded", shape=(3, 6), slots=4, d=19, r=3)
    o = random_edit(case, seed=8)
    p = problem_of(o)
    expected, *_ = check_forward(o, path)
    storage = torch.empty(0, dtype=p.h.dtype).set_(p.h.untyped_storage())
    outside = storage.clone()
    outside.as_strided(p.h.shape, p.h.stride(), p.h.storage_offset()).zero_()
    with forced(path), poison_empty():
        y, *_ = launcher.edit_forward(p, True, save_rows=True)
    assert y is p.h
    assert_bitwise_equal(y, expected)
    y.zero_()
    assert_bitwise_equal(storage, outside, name="memory between the rows")


@pytest.mark.parametrize("wide", ["h", "R", "W"])
@paths
def test_float64_with_bfloat16(wide: str, path: Launch) -> None:
    """Either the backend says that it does not take such a mix, or what it computes is right."""
    o = random_edit(EditCase("loreft", "relu", "bfloat16", shape=(5,), d=20, r=3), seed=9)
    o = replace(o, **{wide: getattr(o, wide).double()})
    if launcher.unsupported(problem_of(o)) is None:
        check(o, path)


def relative(got: Tensor, exact: Tensor) -> float:
    """The root mean square of the error, over that of the exact result."""
    return float((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


PRECISE = 1e-6


def rebuilt_error(path: Launch, backend: Any = launcher) -> float:
    """Of dW from y alone, relative to dW from h, for a bfloat16 h and an edit that changes no value's exponent."""
    o = random_edit(EditCase("loreft", "tanh", "mixed", scale="rows", shape=(2, 9), d=40, r=3), seed=11)
    o = replace(o, h=(1.5 + 0.4 * torch.rand(o.h.shape)).bfloat16(), R=o.R * 0.02)
    p = problem_of(o)
    grad = hostile_gradient(o, "contiguous")
    with forced(path), poison_empty():
        y, delta, s, _ = backend.edit_forward(p, False, save_rows=False)
        dW = backend.edit_backward(grad, p, delta, s, ALL)[2]
        rebuilt = backend.edit_backward(grad, p._replace(h=y), delta, s, ALL, rebuild=True)[2]
    assert not torch.equal(y, p.h)
    return relative(rebuilt.float(), dW.double())


@methods
def test_rebuilt_rows_are_rounded_as_h_was(method: str) -> None:
    assert rebuilt_error(Launch(forward=method, phase1=method)) < 1e-5


def relative_errors(method: str, activation: str, backend: Any = launcher) -> dict[str, float]:
    """Of delta, s, dR, dW, db and dc for a bfloat16 h and float32 weights."""
    rows, d, r = 32, 512, 16
    rng = torch.Generator().manual_seed(10)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    h, grad = normal(1, rows, d).bfloat16(), normal(1, rows, d).bfloat16()
    R, W = normal(1, r, d) / math.sqrt(d), normal(1, r, d) / math.sqrt(d)
    p = EditProblem(h, R, W, normal(1, r), normal(1, r), None, None, None, None, True, activation, 0.0)
    path = Launch(forward=method, phase1=method, forward_n=16, forward_d=128, rows_n=16, phase1_d=128, slab_d=128)
    with forced(path), poison_empty():
        _, delta, s, _ = backend.edit_forward(p, False, save_rows=False)
        found = backend.edit_backward(grad, p, delta, s, ALL)
    wide = widened(p, torch.float64)
    exact_s = (wide.h[0] @ wide.W[0].T) + wide.b
    exact_delta = activate(exact_s, activation) - (wide.h[0] @ wide.R[0].T) - wide.c
    exact = formulas(grad, p, exact_delta, exact_s, rebuild=False, dtype=torch.float64)
    errors = {f"d{name}": relative(t, exact[name]) for name, t in zip(Needs._fields[1:], found[1:], strict=True)}
    errors["delta"] = relative(delta, exact_delta)
    if activation != "linear":
        errors["s"] = relative(s, exact_s)
    return errors


@methods
@pytest.mark.parametrize("activation", ["linear", "gelu"])
def test_weights_count_in_full_precision(activation: str, method: str) -> None:
    errors = relative_errors(method, activation)
    print(errors)
    assert max(errors.values()) <= PRECISE


def two_terms(b_w: Any) -> tuple[Any, Any, Any]:
    b_high = common.round_to(b_w, tl.bfloat16)
    b_low = common.operand(common.round_to(b_w - b_high.to(b_w.dtype), tl.bfloat16))
    return common.operand(b_high), b_low, b_low * 0


def one_term(b_w: Any) -> tuple[Any, Any, Any]:
    b_high = common.operand(common.round_to(b_w, tl.bfloat16))
    return b_high, b_high * 0, b_high * 0


@pytest.mark.parametrize("split", [one_term, two_terms])
@pytest.mark.parametrize("activation", ["linear", "gelu"])
def test_fewer_bfloat16_terms_are_noticed(activation: str, split: Any) -> None:
    """The bound of the test above is one that weights of fewer terms exceed, in each result."""
    with mock.patch.object(common, "split_in_three", split):
        errors = relative_errors("tiles", activation)
    print(errors)
    assert min(errors.values()) > PRECISE
