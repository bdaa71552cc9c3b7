"""The CUDA kernels of csrc, run on the CPU by fibers (python_tests/native), against the float64 oracle.

The very same headers and launchers are compiled that nvcc compiles. Every launch is searched for races, deadlocks and
misused copies (machine.h), in an order of its own; the plan is forced, so that small edits go through every path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from native_machine import KERNEL_SOURCES, Device, Machine, Wishes, build
from test_edit_kernels import (
    ALL,
    PRECISE,
    Launch,
    check_backward,
    check_forward,
    hostile_gradient,
    problem_of,
    rebuilt_error,
    regrouped,
    relative_errors,
)
from torch import Tensor

from reft_kernels.problem import Needs
from reft_kernels.reference import ACTIVATIONS
from reft_kernels.testing import (
    LAYOUTS,
    METHODS,
    EditCase,
    EditOperands,
    assert_bitwise_equal,
    pairwise,
    poison_empty,
    random_edit,
)

ANY = Launch()  # the other backend's path, which is not looked at


@pytest.fixture(scope="session")
def library() -> Machine:
    return Machine(build("kernels", KERNEL_SOURCES))


@pytest.fixture
def machine(library: Machine) -> Iterator[Machine]:
    """The machine, with a device of three multiprocessors; its barrier's word comes to rest, and is never zeroed."""
    library.use(Device())
    library.seed(0)
    yield library
    assert library.barrier & 0x7FFFFFFF == 0


def check(o: EditOperands, machine: Machine, *, grad_layout: str = "contiguous", **how: Any) -> None:
    forward = check_forward(o, ANY, backend=machine)
    check_backward(o, ANY, hostile_gradient(o, grad_layout), forward, backend=machine, **how)


FORWARD = {
    "kernel": ("forward_rows", "forward_cluster", "forward_mma"),
    "tile_rows": (1, 2, 4, 8),
    "rank_tile": (1, 4, 8, 16),
    "cluster": (1, 2, 3, 8),
    "threads": (64, 128, 256),
    "staged": (True, False),
}
BACKWARD = {
    "kernel": ("backward_rows", "backward_mma"),
    "tile_rows": (1, 2, 4, 16),
    "rank_tile": (1, 2, 4, 8, 16, 32, 64),
    "slab": (16, 32, 64),
    "blocks": (1, 2, 3),
    "chunk": (1, 20, 70, 10**6),
    "shared_bytes": (99 * 1024, 128 * 1024, None),
}
FACTORS: Mapping[str, tuple[Any, ...]] = {
    "method": tuple(METHODS),
    "activation": ACTIVATIONS,
    "dtype": ("float32", "float16", "bfloat16", "mixed", "mixed16"),
    "layout": LAYOUTS,
    "positions": ("none", "some", "padded", "nothing"),
    "groups": (0, 1, 3),
    "scale": ("none", "number", "rows"),
    "dropout": (0.0, 0.3),
    "size": (
        ((2, 5), 64, 4), ((1, 7), 33, 1), ((3, 2), 72, 9), ((4, 9), 8, 3), ((2, 3), 256, 8), ((1, 70), 40, 16),
        ((5, 4), 3, 2), ((2, 6), 96, 33), ((2, 5), 32, 24), ((1, 3), 128, 64), ((3, 1), 1, 1), ((2, 30), 512, 5),
        ((1, 130), 24, 6),
    ),
    "index": ("int64", "int32", "strided"),
    **{f"forward_{name}": values for name, values in FORWARD.items()},
    **{f"backward_{name}": values for name, values in BACKWARD.items()},
    "capability": (80, 90, 120),
    "grad_layout": ("contiguous", "slice", "rows", "transposed", "columns", "expanded", "scalar"),
    "mode": ("plain", "rows", "rebuild"),
    "into": (None, torch.float32, torch.bfloat16),
    "inplace": (False, True),
}  # fmt: skip


def matrix(
    seed: int, factors: Mapping[str, tuple[Any, ...]] = FACTORS
) -> list[tuple[EditCase, dict[str, Wishes], int, dict[str, Any]]]:
    """Cases in which every two values of the factors meet, but for what does not exist."""
    cases = []
    for row in pairwise(factors, seed):
        wishes = {
            way: Wishes(**{f.name: row.pop(f"{way}_{f.name}", None) for f in fields(Wishes)})
            for way in ("forward", "backward")
        }
        how = {name: row.pop(name) for name in ("grad_layout", "mode", "into", "inplace")}
        if how["mode"] == "rebuild" and row["dropout"] > 0:
            how["mode"] = "rows"
        if how["grad_layout"] in ("expanded", "scalar"):
            how["inplace"] = False
        capability = row.pop("capability")
        shape, d, r = row.pop("size")
        cases.append((EditCase(**row, shape=shape, d=d, r=r), wishes, capability, how))
    return cases


MATRIX = matrix(7)


@pytest.mark.parametrize("index", range(len(MATRIX)))
def test_every_path_matches_the_oracle(index: int, machine: Machine) -> None:
    case, wishes, capability, how = MATRIX[index]
    print(case, wishes, capability, how)  # shown where the test fails
    machine.use(Device(capability))
    machine.seed(1000 * index)
    with machine.forced(**wishes):
        check(random_edit(case, seed=100 + index), machine, **how)


FORWARD_PATHS = [
    Wishes(kernel="forward_rows"),
    Wishes(kernel="forward_rows", tile_rows=2, staged=False),
    Wishes(kernel="forward_cluster", cluster=3, tile_rows=4),
    Wishes(kernel="forward_mma"),
    Wishes(kernel="forward_mma", cluster=2, staged=False),
]
BACKWARD_PATHS = [Wishes(kernel="backward_rows", chunk=16), Wishes(kernel="backward_mma", chunk=16)]


def named(wishes: Wishes) -> str:
    return "-".join(f"{value}" for value in vars(wishes).values() if value is not None)


forward_paths = pytest.mark.parametrize("path", FORWARD_PATHS, ids=named)
backward_paths = pytest.mark.parametrize("path", BACKWARD_PATHS, ids=named)


@forward_paths
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_forward_of_every_method_and_activation(method: str, activation: str, path: Wishes, machine: Machine) -> None:
    case = EditCase(method, activation, "mixed", positions="padded", scale="rows", shape=(2, 9), slots=8, d=64, r=9)
    with machine.forced(forward=path):
        check_forward(random_edit(case, seed=1), ANY, backend=machine)


@backward_paths
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_backward_of_every_method_and_activation(method: str, activation: str, path: Wishes, machine: Machine) -> None:
    case = EditCase(method, activation, "mixed", positions="padded", scale="rows", shape=(2, 20), slots=18, d=64, r=9)
    o = random_edit(case, seed=1)
    forward = check_forward(o, ANY, backend=machine)
    with machine.forced(backward=path):
        for mode in ("plain", "rows", "rebuild"):
            check_backward(o, ANY, hostile_gradient(o, "contiguous"), forward, mode=mode, backend=machine)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 15, 17, 24, 40, 66, 129, 264])
def test_any_width(d: int, dropout: float, machine: Machine) -> None:
    case = EditCase("noreft_with_c", "silu", "mixed", dropout=dropout, shape=(1, 5), d=d, r=10)
    for forward, backward in zip(FORWARD_PATHS, BACKWARD_PATHS * 3, strict=False):
        with machine.forced(forward, backward):
            check(random_edit(case, seed=2), machine)


@pytest.mark.parametrize("r", [1, 2, 3, 7, 8, 12, 16, 24, 31, 40, 57, 64])
def test_any_rank(r: int, machine: Machine) -> None:
    for dtype in ("float32", "bfloat16"):
        case = EditCase("noreft_with_c", "gelu", dtype, groups=2, scale="rows", shape=(1, 20), d=32, r=r)
        for forward, backward in zip(FORWARD_PATHS, BACKWARD_PATHS * 3, strict=False):
            with machine.forced(forward, backward):
                check(random_edit(case, seed=3), machine)


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 4), (3, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("positions", ["none", "some"])
def test_no_rows_and_one(positions: str, shape: tuple[int, ...], machine: Machine) -> None:
    if positions != "none" and len(shape) != 2:
        pytest.skip("positions are those of a batch of rows")
    case = EditCase("loreft", "tanh", "float32", positions=positions, shape=shape, slots=2, d=16, r=3)
    o = random_edit(case, seed=4)
    for into in (None, torch.float32):
        launched = machine.launches
        check(o, machine, into=into, inplace=True)
        assert (machine.launches > launched) == (problem_of(o).h.numel() > 0)


both_paths = pytest.mark.parametrize(
    "paths", [(f, BACKWARD_PATHS[f.kernel == "forward_mma"]) for f in FORWARD_PATHS], ids=lambda pair: named(pair[0])
)


@both_paths
@pytest.mark.parametrize("names", [(2,), (0, 1, 2, 3, -1), (3, 1, -1), (-1,), (4, 1, -5, 99)], ids=str)
def test_groups_in_a_tile(names: tuple[int, ...], paths: tuple[Wishes, Wishes], machine: Machine) -> None:
    """Slots of one tile that belong to one weight set, to several, to none, and to one that is not there."""
    case = EditCase(
        "noreft_with_c", "tanh", "mixed", positions="padded", groups=4, scale="rows", shape=(3, 9), slots=8, d=32, r=10
    )  # fmt: skip
    o = random_edit(case, seed=5)
    drawn = torch.tensor(names)[torch.randint(0, len(names), o.group.shape)]
    o = regrouped(o, drawn.where((drawn >= 0) & (drawn < 4), -1))
    grad = hostile_gradient(o, "contiguous")
    with machine.forced(*paths):
        forward = check_forward(o, ANY, backend=machine)
        expected = check_backward(o, ANY, grad, forward, backend=machine)
        # Entries out of range count as -1.
        p = problem_of(replace(o, group=drawn))
        with poison_empty():
            y, delta, s, _ = machine.edit_forward(p, False, save_rows=False)
            found = machine.edit_backward(grad, p, delta, s, ALL)
    for got, like in zip((y, delta, s, *found), (*forward[:3], *expected.values()), strict=True):
        assert_bitwise_equal(got, like)


@both_paths
@pytest.mark.parametrize("broken", ["R", "W", "b", "c", "h", "grad", "scale"])
def test_what_is_not_finite_in_one_group_stays_there(
    broken: str, paths: tuple[Wishes, Wishes], machine: Machine
) -> None:
    case = EditCase("noreft_with_c", "silu", "mixed", groups=2, scale="rows", shape=(9,), d=32, r=10)
    o = random_edit(case, seed=6)
    o = regrouped(o, torch.tensor([0, 1, 0, 1, -1, 0, 1, 1, 0]))
    grad = torch.randn(1, 9, 32).bfloat16()
    own = o.group == 1

    def results() -> tuple[list[Tensor], list[Tensor]]:
        p = problem_of(o)
        with machine.forced(*paths), poison_empty():
            y, delta, s, _ = machine.edit_forward(p, False, save_rows=False)
            found = machine.edit_backward(grad, p, delta, s, ALL)
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


@backward_paths
@pytest.mark.parametrize("rebuild", [False, True])
@pytest.mark.parametrize("activation", ["linear", "gelu"])
def test_a_gradient_has_the_same_bits_whatever_else_is_asked_for(
    activation: str, rebuild: bool, path: Wishes, machine: Machine
) -> None:
    case = EditCase(
        "noreft_with_c", activation, "mixed", positions="padded", scale="rows", shape=(2, 20), slots=18, d=32, r=10
    )  # fmt: skip
    o = random_edit(case, seed=7)
    y, delta, s, _ = check_forward(o, ANY, backend=machine)
    p = problem_of(o)
    p = p._replace(h=y if rebuild else p.h)
    grad = hostile_gradient(o, "contiguous")
    copy = grad.clone()
    places = [torch.randn(t.shape) for t in (p.R, p.W, p.b, p.c)]

    def run(needs: Needs, into: bool) -> tuple[Tensor | None, ...]:
        own = tuple(t.clone() for t in places)
        with machine.forced(backward=path), poison_empty():
            found = machine.edit_backward(grad, p, delta, s, needs, rebuild=rebuild, into=own if into else None)
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


@pytest.mark.parametrize("kernel", ["backward_rows", "backward_mma"])
@pytest.mark.parametrize("activation", ["linear", "silu"])
def test_gradients_have_the_same_bits_for_every_grid_chunk_stage_and_order(
    activation: str, kernel: str, machine: Machine
) -> None:
    case = EditCase(
        "noreft_with_c", activation, "mixed", positions="padded", groups=2, scale="rows", shape=(3, 50), slots=45, d=64,
        r=10,
    )  # fmt: skip
    o = random_edit(case, seed=8)
    p = problem_of(o)
    _, delta, s, _ = machine.edit_forward(p, False, save_rows=False)
    grad = hostile_gradient(o, "contiguous")
    plans, results = set(), []
    for seed, (blocks, chunk, shared) in enumerate(
        [(1, 10**6, None), (2, 16, None), (3, 48, 99 * 1024), (7, 16, None), (5, 32, 128 * 1024), (5, 10**6, None)]
    ):
        machine.use(Device(90, multiprocessors=blocks))
        machine.seed(seed)
        # Slots are divided among threads by the slab in one kernel, but not in the other.
        slab = 64 if kernel == "backward_mma" and seed % 2 else 32
        wishes = Wishes(kernel=kernel, slab=slab, blocks=blocks, chunk=chunk, shared_bytes=shared)
        with machine.forced(backward=wishes), poison_empty():
            results.append(machine.edit_backward(grad, p, delta, s, ALL))
        plans.add((machine.plan["blocks"], machine.plan["chunk"], machine.plan["shared_bytes"]))
        assert machine.plan["kernel"] == kernel
    assert len(plans) >= 5, plans
    for found in results[1:]:
        for name, got, expected in zip(Needs._fields, found, results[0], strict=True):
            assert_bitwise_equal(got, expected, name=f"d{name}")


@forward_paths
def test_the_edit_has_the_same_bits_in_every_order(path: Wishes, machine: Machine) -> None:
    case = EditCase("loreft", "gelu", "mixed", groups=2, scale="rows", dropout=0.2, shape=(2, 21), d=64, r=10)
    p = problem_of(random_edit(case, seed=9))
    results = []
    for seed in range(6):
        machine.seed(seed)
        with machine.forced(forward=path), poison_empty():
            results.append(machine.edit_forward(p, False, save_rows=True))
    for found in results[1:]:
        for got, expected in zip(found[:3], results[0][:3], strict=True):
            assert_bitwise_equal(got, expected)


@forward_paths
@pytest.mark.parametrize("layout", ["contiguous", "slice", "rows", "transposed"])
def test_in_place(layout: str, path: Wishes, machine: Machine) -> None:
    """y is h itself, also where h is a part of something wider, whose other elements keep their bits."""
    case = EditCase("loreft", "relu", "mixed", layout, positions="padded", shape=(3, 6), slots=4, d=64, r=3)
    o = random_edit(case, seed=10)
    p = problem_of(o)
    with machine.forced(forward=path):
        expected, *_ = check_forward(o, ANY, backend=machine)
        storage = torch.empty(0, dtype=p.h.dtype).set_(p.h.untyped_storage())
        outside = storage.clone()
        outside.as_strided(p.h.shape, p.h.stride(), p.h.storage_offset()).zero_()
        with poison_empty():
            y, *_ = machine.edit_forward(p, True, save_rows=True)
    assert y is p.h
    assert_bitwise_equal(y, expected)
    y.zero_()
    assert_bitwise_equal(storage, outside, name="memory between the rows")


@both_paths
def test_offsets_beyond_32_bits(paths: tuple[Wishes, Wishes], machine: Machine) -> None:
    """Rows 2^31 elements apart, in memory of which little is ever touched."""
    o = random_edit(EditCase("loreft", "silu", "bfloat16", shape=(2, 3), d=64, r=10), seed=11)
    p = problem_of(o)
    far = torch.empty(2**31 + 3 * 64, dtype=torch.bfloat16).as_strided(p.h.shape, (2**31, 64, 1))
    grad = torch.empty_strided(far.shape, far.stride(), dtype=far.dtype)
    gradient = torch.randn(far.shape).bfloat16()
    with machine.forced(*paths):
        y, delta, s, _ = machine.edit_forward(p, False, save_rows=False)
        expected = machine.edit_backward(gradient, p, delta, s, ALL)
        found, *others = machine.edit_forward(p._replace(h=far.copy_(p.h)), True, save_rows=False)
        assert_bitwise_equal(found, y)
        for got, like in zip(others, (delta, s), strict=False):
            assert_bitwise_equal(got, like)
        far.copy_(p.h)
        got = machine.edit_backward(grad.copy_(gradient), p._replace(h=far), delta, s, ALL, inplace=True)
    for name, one, other in zip(Needs._fields[:4], got, expected, strict=False):
        assert_bitwise_equal(one, other, name=f"d{name}")


@both_paths
def test_rebuilt_rows_are_rounded_as_h_was(paths: tuple[Wishes, Wishes], machine: Machine) -> None:
    with machine.forced(*paths):
        assert rebuilt_error(ANY, machine) < 1e-5


@both_paths
@pytest.mark.parametrize("activation", ["linear", "gelu"])
def test_weights_count_in_full_precision(activation: str, paths: tuple[Wishes, Wishes], machine: Machine) -> None:
    with machine.forced(*paths):
        errors = relative_errors("rows", activation, machine)
    print(errors)
    assert max(errors.values()) <= PRECISE


@pytest.mark.parametrize(
    ("case", "capability", "reason"),
    [
        (EditCase("loreft", dtype="float64", shape=(3,), d=8, r=2), 90, "float64"),
        (EditCase("loreft", shape=(3,), d=8, r=65), 90, "ranks 1 to 64"),
        (EditCase("loreft", shape=(3,), d=8, r=2), 75, "compute capability 8.0"),
    ],
    ids=["float64", "rank", "device"],
)
def test_what_no_kernel_takes_is_refused(case: EditCase, capability: int, reason: str, machine: Machine) -> None:
    p = problem_of(random_edit(case, seed=12))
    machine.use(Device(capability))
    launched = machine.launches
    with pytest.raises(RuntimeError, match=reason):
        machine.edit_forward(p, False, save_rows=False)
    delta = p.h.new_zeros(3, case.r, dtype=p.accumulator)
    with pytest.raises(RuntimeError):
        machine.edit_backward(p.h, p, delta, delta[:0], ALL)
    assert machine.launches == launched


def test_one_launch_each_way(machine: Machine) -> None:
    o = random_edit(EditCase("loreft", "gelu", groups=2, shape=(2, 30), d=64, r=8), seed=13)
    launched = machine.launches
    check(o, machine)
    assert machine.launches == launched + 2
