"""The tests of the CUDA kernels of orthonormal matrices can fail; see test_native_mutants.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_native_orthonormal as on_machine
import test_orthonormalize as maps
import test_stiefel_adamw_step as steps
import torch
from native_machine import ORTHONORMAL_SOURCES, Device, OrthonormalMachine, build
from native_mutants import FLAGS, Mutant, fault_of, mutated

from reft_kernels.orthonormal_problem import OrthonormalProblem

SUMS, TEAM, MAP, STEP = "column_sums.cuh", "block_team.cuh", "orthonormalize.cuh", "stiefel_adamw.cuh"

MUTANTS: list[Mutant] = [
    # staged columns and their sums
    (SUMS, "k < rows && c < columns ? from[c] : 0.0f", "k < rows ? from[c] : 0.0f"),
    (SUMS, "k < rows && vectors && columns >= 4", "k < rows && columns >= 4"),
    (SUMS, ("REFT_DEVICE void store_square(", "k < rows && vectors && columns >= 4"), "k < rows && columns >= 4"),
    (SUMS, "mine + shuffle_xor(theirs, kMask)", "mine + theirs"),
    (SUMS, "lost[i] += (before - (after - other)) + (term - other);", ";"),
    (SUMS, "static_cast<double>(sum[i]) + static_cast<double>(lost[i])", "static_cast<double>(sum[i])"),
    (SUMS, "active && group == 0", "active"),
    (SUMS, "active && group == 0", "false"),
    (SUMS, "max(at + group * run, in_double)", "at + group * run"),
    (SUMS, "min(at + (group + 1) * run, padded)", "padded"),
    (SUMS, "s.groups > 1 ? team % s.tiles : first + team", "team % s.tiles"),
    (SUMS, "(group * s.tiles + tile) * kTileSums", "tile * kTileSums"),
    (SUMS, "part + i < parts", "true"),
    (SUMS, "total += value[i];", "total = value[i];"),
    (SUMS, ("REFT_DEVICE double sum_over_block(", "sync_block();"), ";"),
    (SUMS, ("REFT_DEVICE double sum_over_block(", "sync_block();", "sync_block();"), ";"),
    (SUMS, "value += shuffle_xor(value, mask);", ";"),
    # a block's own ways
    (TEAM, ("REFT_DEVICE void multiply(", "team.sync();"), ";"),
    (TEAM, "sum[i][j] += left[i] * right[j];", "sum[i][j] = left[i] * right[j];"),
    (TEAM, "i0 + i < r && j0 + j < r", "true"),
    (TEAM, ("if (thread < r) T[thread", "team.sync();"), ";"),
    (TEAM, ("T[i * r + j] = -sum;", "team.sync();"), ";"),
    (TEAM, "T[i * r + j] = -sum;", "T[i * r + j] = sum;"),
    (TEAM, "if (j >= r) continue;", ";"),
    (TEAM, "if (e / r > e % r) T[e] = 0.0;", ";"),
    # the map and its gradient
    (MAP, "grid_wait(table.task.barrier, grid_arrive(table.task.barrier));", ";"),
    (MAP, ("work.lead();", "grid_wait(table.task.barrier, grid_arrive(table.task.barrier));"), ";"),
    (MAP, "work.lead();", ";"),
    (MAP, ("REFT_DEVICE void stage_chunk(", "sync_block();"), ";"),
    (MAP, ("REFT_DEVICE void stage_chunk(", "sync_block();", "sync_block();"), ";"),
    (MAP, "k < j ? sign * x[i] : k == j ? sign : 0.0f", "k <= j ? sign * x[i] : 0.0f"),
    (MAP, "k < j ? sign * x[i] : k == j ? sign : 0.0f", "k < j ? x[i] : k == j ? 1.0f : 0.0f"),
    (MAP, "r % 4 == 0 && aligned_16(from)", "r % 4 == 0"),
    (MAP, "column < count", "true"),
    (MAP, "(item - matrix().item) * slab_of(matrix().r)", "0"),
    (MAP, "i < r && j < r", "true"),
    (MAP, ("REFT_DEVICE void solve(", "sync_block();"), ";"),
    (MAP, ("REFT_DEVICE void solve(", "sync_block();", "sync_block();"), ";"),
    (MAP, ("REFT_DEVICE void spread_weights(", "sync_block();"), ";"),
    (MAP, ("REFT_DEVICE void find_weights(", "sync_block();"), ";"),
    (MAP, "leads() && item == matrix().item", "leads()"),
    (MAP, ("if (index != *solved)", "item == matrix().item"), "true"),
    (MAP, ("if (index != *solved)", "item == matrix().item"), "false"),
    (MAP, "index != *solved", "*solved < 0"),
    (MAP, "at.resident && end - begin == 1", "at.resident"),
    (MAP, "kBackward ? v % q : v / fours", "0"),
    (MAP, "sum[k][c] = head_at(4 * quad + k, j + c);", ";"),
    (MAP, "k < j + c ? sign * turned[c][i] + head_at(j + c, k) : 0.0f", "sign * turned[c][i] + head_at(j + c, k)"),
    (MAP, "sign * turned[c][i] + head_at(j + c, k)", "turned[c][i] + head_at(j + c, k)"),
    (MAP, "sign * turned[c][i] + head_at(j + c, k)", "sign * turned[c][i]"),
    # the step: barriers
    (STEP, "if (clips || projects) grid_wait(task.barrier, grid_arrive(task.barrier));", ";"),
    (STEP, "grid_wait(task.barrier, ticket);", ";"),
    (STEP, "grid_wait(task.barrier, ticket);", "work.count_free_items(rest); grid_wait(task.barrier, ticket);"),
    (STEP, ("work.lead(matrices);", "grid_wait(task.barrier, grid_arrive(task.barrier));"), ";"),
    (STEP, ("work.find_factors(rest);", "sync_block();"), ";"),
    (STEP, ("REFT_DEVICE double stage_moved(", "sync_block();"), ";"),
    (STEP, ("REFT_DEVICE double stage_moved(", "sync_block();", "sync_block();"), ";"),
    (STEP, ("REFT_DEVICE double stage_moved(", "sync_block();", "sync_block();", "sync_block();"), ";"),
    (STEP, ("REFT_DEVICE void stage_for_tangent(", "sync_block();", "sync_block();"), ";"),
    (STEP, ("REFT_DEVICE void find_symmetric(", "sync_block();"), ";"),
    (STEP, ("REFT_DEVICE void find_symmetric(", "sync_block();", "sync_block();"), ";"),
    (STEP, ("REFT_DEVICE void find_root(", "sync_block();"), ";"),
    (STEP, ("REFT_DEVICE void find_root(", "sync_block();", "sync_block();"), ";"),
    # what is written and what is not
    (STEP, "goes && norm - norm == 0.0", "goes"),
    (STEP, "goes && sum - sum == 0.0", "goes"),
    (STEP, "if (task.found_inf) goes = *task.found_inf == 0.0f;", ";"),
    (STEP, "if (clips) work.clip_gradients();", ";"),
    (STEP, "blockIdx.x == 0 && thread == 0", "thread == 0"),
    (STEP, "if (work.goes) work.count_free_items(rest);", ";"),
    (STEP, "if (item == tensor().item && thread == 0) *tensor().step = f.step;", ";"),
    (STEP, "item == tensor().item && thread == 0", "thread == 0"),
    # the arithmetic
    (STEP, "task.maximize ? -g : g", "g"),
    (STEP, "unscale * gradient * clip", "gradient * clip"),
    (STEP, "unscale * gradient * clip", "unscale * gradient"),
    (STEP, "task.maximize ? -0.5 * clip : 0.5 * clip", "0.5 * clip"),
    (STEP, "task.maximize ? -0.5 * clip : 0.5 * clip", "task.maximize ? -0.5 : 0.5"),
    (STEP, "if (n & 1) power *= x;", "power *= x;"),
    (STEP, "w[v][c] * f.keep - lost", "w[v][c] - lost"),
    (STEP, "int64_t{item - tensor().item} * kFlatItem", "0"),
    (STEP, "vectors && left >= 4", "left >= 4"),
    (STEP, "if (4 * quad + k >= tensor().r || c >= left) w[k][c] = 0.0f;", ";"),
    (STEP, "descent(g[k][c]) - normal[k][c]", "descent(g[k][c])"),
    (STEP, "if (i > j || j >= r) return;", ";"),
    (STEP, "work[j * r + i] = total;", ";"),
]  # fmt: skip

SIZES = ((70, 7), (2100, 3), (1024, 8), (600, 20), (70, 36), (550, 34))
SHAPES = ((3, 1100), (36, 540), (36, 44), (20, 530), (5000,), (7,), (8, 33))
CONSTRAINED = (True,) * 4 + (False,) * 3


def map_on(device: Device, sizes=SIZES, *, moved: bool = False) -> Callable[[OrthonormalMachine], object]:
    def run(machine: OrthonormalMachine) -> None:
        torch.manual_seed(3)
        machine.use(device)
        problem = maps.problem_of(sizes, torch.float32)
        if moved:
            problem = OrthonormalProblem(*(tuple(map(on_machine.moved, tensors)) for tensors in problem))
        on_machine.assert_map(machine, problem, on_machine.gradients_of(problem))

    return run


def factors(machine: OrthonormalMachine) -> None:
    torch.manual_seed(4)
    machine.use(Device())
    on_machine.test_factors_are_those_of_the_eager_backend(machine)


def step_on(device: Device, **settings: Any) -> Callable[[OrthonormalMachine], object]:
    def run(machine: OrthonormalMachine) -> None:
        torch.manual_seed(5)
        machine.use(device)
        p = steps.problem_of(torch.float32, shapes=SHAPES, orthonormal=CONSTRAINED, **settings)
        want = steps.expected(p)
        norm = machine.stiefel_adamw_step(p)
        on_machine.assert_step(p, want)
        total = sum(float(g.double().square().sum()) for g in p.gradients) ** 0.5
        if norm is not None and p.grad_scale is None:
            assert float(norm) == pytest.approx(total, rel=1e-6)

    return run


def moved_step(machine: OrthonormalMachine) -> None:
    torch.manual_seed(6)
    on_machine.test_step_at_any_alignment(False, machine)


def refused_steps(machine: OrthonormalMachine) -> None:
    torch.manual_seed(7)
    machine.use(Device())
    steps.test_found_inf_changes_nothing(machine)
    steps.test_a_norm_that_is_not_finite_changes_nothing(machine, float("nan"))
    steps.test_a_gradient_that_is_not_finite_leaves_its_R(machine, float("inf"), False)


CASES: list[Callable[[OrthonormalMachine], object]] = [
    map_on(Device(90, 3)),
    map_on(Device(80, 1, 99 << 10)),
    map_on(Device(90, 40)),
    map_on(Device(90, 2), ((66, 8), (40, 4)), moved=True),
    factors,
    step_on(Device(90, 3)),
    step_on(Device(90, 40), max_norm=0.5, eps=0.0),
    step_on(Device(90, 1), riemannian=True),
    step_on(
        Device(80, 5, 99 << 10), riemannian=True, max_norm=2.0, maximize=True, grad_scale=torch.tensor(8.0),
        found_inf=torch.tensor(0.0), lr=torch.tensor(0.1),
    ),
    moved_step,
    refused_steps,
]  # fmt: skip


@pytest.fixture(scope="module")
def machine() -> OrthonormalMachine:
    sources = mutated("orthonormal_mutants", MUTANTS)
    library = build("orthonormal_mutants", [*ORTHONORMAL_SOURCES, "mutant.cpp"], csrc=sources, flags=FLAGS)
    return OrthonormalMachine(library)


@pytest.mark.slow
def test_what_is_not_changed_passes(machine: OrthonormalMachine) -> None:
    assert fault_of(machine, 0, CASES) == ""


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(MUTANTS) + 1))
def test_mutants_are_caught(number: int, machine: OrthonormalMachine) -> None:
    found = fault_of(machine, number, CASES)
    print(found)
    assert found, MUTANTS[number - 1]
