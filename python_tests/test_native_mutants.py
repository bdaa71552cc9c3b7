"""The tests of the CUDA kernels can fail: each change below is noticed, by the machine or by the oracle.

All mutants are built at once. Each changed place holds what stood there and what the mutant has, and a number chooses;
a process of its own runs each, as a mutant may write anywhere. One whose text is no longer in the sources fails too:
change the list with the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from fenced_memory import fenced
from native_machine import FEW_SOURCES, Device, Machine, Wishes, build
from native_mutants import FLAGS, Mutant, fault_of, mutated
from test_edit_kernels import Launch, check_backward, check_forward, hostile_gradient

from reft_kernels.testing import EditCase, random_edit

BLOCK, ROWS, MMA = "edit_forward_block.cuh", "edit_forward_rows.cuh", "edit_forward_mma.cuh"
SLAB, BACK_ROWS, BACK_MMA = "edit_backward_slab.cuh", "edit_backward_rows.cuh", "edit_backward_mma.cuh"
TILES = "tiles.cuh"

MUTANTS: list[Mutant] = [
    # the forward: barriers and waits
    (ROWS, ("task.find_slots();", "sync_block();"), ";"),
    (ROWS, ("sum_groups<kColumns>(live);", "sync_block();"), ";"),
    (ROWS, ("Block::find_delta(", "sync_block();"), ";"),
    (ROWS, "wait_async<0>();", ";"),
    (ROWS, "commit_async();", ";"),
    (MMA, ("Block::find_slots();", "sync_block();"), ";"),
    (MMA, ("R for the first products", "sync_block();"), ";"),
    (MMA, ("Block::find_delta(", "sync_block();"), ";"),
    (MMA, "wait_async<0>();", ";"),
    (MMA, "commit_async();", ";"),
    # clusters and bulk copies
    (ROWS, "bulk_wait(barrier, 0);", ";"),
    (ROWS, "bulk_wait(barrier, 0);", "bulk_wait(barrier, 1);"),
    (ROWS, "bulk_expect(barrier, count * bytes);", "bulk_expect(barrier, bytes);"),
    (ROWS, "bulk_expect(barrier, count * bytes);", ";"),
    (ROWS, "if (thread != 0) return;", ";"),
    (ROWS, "row_of<H>(p.h, slots[m]) + begin", "row_of<H>(p.h, slots[m])"),
    (ROWS, "bulk_barrier_init(task.barrier);", ";"),
    (ROWS, ("bulk_barrier_init(", "cluster_arrive();"), ";"),
    (BLOCK, "cluster_wait();", ";"),
    (BLOCK, ("sync_warp();", "cluster_arrive();"), ";"),
    (BLOCK, ("sync_warp();", "cluster_wait();"), ";"),
    (BLOCK, "place_of(static_cast<int>(rank), m, product, k)", "place_of(0, m, product, k)"),
    (BLOCK, "static_cast<int>(blockIdx.x % cluster) * tile.slice", "static_cast<int>(blockIdx.x % cluster) * 64"),
    # masks and places
    (BLOCK, "find_slot(e, first + thread)", "find_slot(e, thread)"),
    (BLOCK, "m < rows && slots[m].live", "slots[m].live"),
    (BLOCK, "slots[m].group == group", "true"),
    (BLOCK, "w < warps", "w < warps - 1"),
    (BLOCK, "k < e.r && (live >> m & 1)", "k < e.r"),
    (BLOCK, "slots[m].scale * terms.delta", "terms.delta"),
    (BLOCK, "u[m * ranks + k] = scaled;", "if (k < e.r) u[m * ranks + k] = scaled;"),
    (BLOCK, "k < e.r && stores", "stores"),
    (BLOCK, "k < e.r && stores", "k < e.r"),
    (BLOCK, "slots[m].group * e.r + k", "k"),
    (BLOCK, "activate(s, e.activation)", "s"),
    (BLOCK, "e.c.data && e.subtract", "false"),
    (BLOCK, ("copy_idle_rows", "if (live >> m & 1) continue;"), ";"),
    (BLOCK, "begin + thread * kColumns", "thread * kColumns"),
    (ROWS, "m * tile.slice + (j - begin)", "m * tile.slice + j"),
    (ROWS, "lane % (32 / kCount) == 0 && k < e.r && (mine >> m & 1)", "k < e.r && (mine >> m & 1)"),
    (ROWS, "lane % (32 / kCount) == 0 && k < e.r && (mine >> m & 1)", "lane % (32 / kCount) == 0 && k < e.r"),
    (ROWS, "e.subtract && k < some", "k < some"),
    (ROWS, "u + m * ranks + k0", "u + k0"),
    (ROWS, "static_cast<H*>(p.rows) + (first + m) * e.d + j", "static_cast<H*>(p.rows) + m * e.d + j"),
    (ROWS, "slot.batch * e.length + slot.position", "slot.position"),
    (MMA, "live >> m & 1 ? row_of<H>(p.h, slots[m]) + (begin + 8 * q) : nullptr",
     "row_of<H>(p.h, slots[m]) + (begin + 8 * q)"),
    (MMA, "(block * 2 + half) * 32 + lane", "block * 64 + lane"),
    (MMA, "k < e.r ? k : e.r - 1", "k"),
    (MMA, "if (!(mine >> m & 1)) continue;", ";"),
    (MMA, "u + (g + 8 * (i % 2)) * ranks", "u + g * ranks"),
    (MMA, "slot.batch * e.length + slot.position", "slot.position"),
    (MMA, "i < column_blocks()", "i < column_blocks() - 1"),
    (TILES, "(word >> 1) >= edit.keep_threshold", "word >= edit.keep_threshold"),
    (TILES, "mine + shuffle_xor(theirs, kMask)", "mine + theirs"),
    # the backward: the grid's barrier, and the stream of slots
    (SLAB, "if (first) grid_wait(p.barrier, ticket);", ";"),
    (SLAB, "ticket = grid_arrive(p.barrier);", ";"),
    (SLAB, "if (owns) task.stream.open(begin, min(end, rows));", "task.stream.open(begin, end);"),
    (SLAB, "if (first) grid_wait(p.barrier, ticket);",
     "if (owns) task.stream.open_ranks(); if (first) grid_wait(p.barrier, ticket);"),
    (SLAB, ("REFT_DEVICE void open(", "sync_block();"), ";"),
    (SLAB, ("REFT_DEVICE void open_ranks(", "commit_async();"), ";"),
    (SLAB, "wait_pending(tile.stages - 1);", ";"),
    (SLAB, ("wait_pending(tile.stages - 1);", "sync_block();"), ";"),
    (SLAB, ("drop_columns(i);", "sync_block();"), ";"),
    (SLAB, ("REFT_DEVICE void advance(", "sync_block();"), ";"),
    (SLAB, ("REFT_DEVICE void advance(", "commit_async();"), ";"),
    (SLAB, ("REFT_DEVICE void advance(", "stage_ranks(i + tile.stages);"), "stage_ranks(i);"),
    (SLAB, "remainder(i, tile.stages + 1)", "remainder(i, tile.stages)"),
    (SLAB, "n >= end", "n > end"),
    (SLAB, "row.group != kIdle || j >= e.d", "j >= e.d"),
    (SLAB, "row.group != kIdle || j >= e.d", "true"),
    (SLAB, "item / slabs", "0"),
    (SLAB, "row.group == group && column + j < e.d", "false"),
    # its phases on CUDA cores
    (BACK_ROWS, ("REFT_DEVICE void project(", "sync_block();"), ";"),
    (BACK_ROWS, ("project_slots()[thread] =", "sync_block();"), ";"),
    (BACK_ROWS, ("if (lane % (32 / kSums) == 0) partial", "sync_block();"), ";"),
    (BACK_ROWS, "now.number / pieces % 2", "0"),
    (BACK_ROWS, "wait_pending(tile.ring - 1);", ";"),
    (BACK_ROWS, "slot.group == kNoSlot || k >= e.r", "k >= e.r"),
    (BACK_ROWS, "slot.group == kNoSlot || k >= e.r", "slot.group == kNoSlot"),
    (BACK_ROWS, "own && (kUsual || my_rank == 0)", "own"),
    (BACK_ROWS, "u[k] *= row.scale;", ";"),
    (BACK_ROWS, "static_cast<float>(e.keep_scale)", "1.0f"),
    (BACK_ROWS, ("REFT_DEVICE void reduce(", "sync_block();"), ";"),
    (BACK_ROWS, ("REFT_DEVICE void reduce(", "sync_block();", "sync_block();"), ";"),
    # and on tensor cores
    (BACK_MMA, ("REFT_DEVICE void project(", "sync_block();"), ";"),
    (BACK_MMA, ("project_slots()[thread] =", "sync_block();"), ";"),
    (BACK_MMA, ("REFT_DEVICE void store_ranks(", "sync_block();"), ";"),
    (BACK_MMA, ("REFT_DEVICE void store_ranks(", "sync_block();", "sync_block();"), ";"),
    (BACK_MMA, ("rebuild_rows(i);", "sync_block();"), ";"),
    (BACK_MMA, ("REFT_DEVICE void finish_item(", "sync_block();"), ";"),
    (BACK_MMA, ("REFT_DEVICE void finish_item(", "sync_block();", "sync_block();"), ";"),
    (BACK_MMA, ("REFT_DEVICE void finish_vectors(", "sync_block();"), ";"),
    (BACK_MMA, "slot.group != group || k >= e.r", "k >= e.r"),
    (BACK_MMA, "one.group == stream.group", "true"),
    (BACK_MMA, "project_slots()[m].group != kIdle || k >= e.r", "k >= e.r"),
    (BACK_MMA, "(which * kRankTiles + step) * kTiles + t", "step * kTiles + t"),
    (BACK_MMA, "k + c < e.r ? factor[half] * u[c] : 0.0f", "factor[half] * u[c]"),
    (BACK_MMA, "if (own[half] && j < e.d) store_16(to, pack_unit(sum, half));",
     "if (own[half]) store_16(to, pack_unit(sum, half));"),
    (BACK_MMA, "t / 4 * 32 + 8 * quad + i % 2 * 4 + t % 4", "t / 4 * 32 + 8 * quad + i % 2 * 4"),
]  # fmt: skip


# Edits of bfloat16 rows with R in float32: one that lacks nothing, a linear one, and every token with idle ones.
FULL = EditCase(
    "noreft_with_c", "gelu", "mixed", positions="padded", groups=3, scale="rows", dropout=0.3, shape=(3, 25), slots=24,
    r=6,
)  # fmt: skip
LINEAR = EditCase("noreft_with_c", "linear", "mixed", groups=2, scale="rows", shape=(2, 37), r=6)
PLAIN = EditCase("loreft", "tanh", "mixed", shape=(7, 43), r=6)


def forward(case: EditCase, wishes: Wishes) -> Callable[[Machine], object]:
    def run(machine: Machine) -> None:
        o = random_edit(case, seed=1)
        assert o.W is not None
        o = replace(o, h=fenced(o.h), R=fenced(o.R), W=fenced(o.W))
        with machine.forced(forward=wishes):
            check_forward(o, Launch(), backend=machine)

    return run


def backward(case: EditCase, wishes: Wishes, mode: str = "plain") -> Callable[[Machine], object]:
    def run(machine: Machine) -> None:
        o = random_edit(case, seed=2)
        found = check_forward(o, Launch(), backend=machine)
        with machine.forced(backward=wishes):
            check_backward(o, Launch(), hostile_gradient(o, "contiguous"), found, mode=mode, backend=machine)

    return run


CASES: list[Callable[[Machine], object]] = [
    forward(replace(FULL, d=576), Wishes(kernel="forward_rows", tile_rows=4, threads=128)),
    forward(replace(LINEAR, d=576), Wishes(kernel="forward_rows", tile_rows=8, rank_tile=4, threads=128)),
    forward(replace(FULL, d=576), Wishes(kernel="forward_cluster", cluster=3, tile_rows=4, threads=64)),
    forward(replace(LINEAR, d=576), Wishes(kernel="forward_cluster", cluster=2, tile_rows=8, rank_tile=4, threads=64)),
    forward(replace(FULL, d=33), Wishes(kernel="forward_rows")),
    forward(replace(LINEAR, method="nodireft", d=264), Wishes(kernel="forward_rows", rank_tile=4)),
    forward(replace(FULL, d=192, r=10), Wishes(kernel="forward_mma", threads=64)),
    forward(replace(LINEAR, d=192, r=10), Wishes(kernel="forward_mma", cluster=2, threads=64)),
    *(
        backward(
            replace(case, d=72, r=r),
            Wishes(kernel=kernel, rank_tile=rank_tile, slab=32, chunk=chunk, shared_bytes=shared),
            mode,
        )
        for kernel, r, rank_tile in (("backward_rows", 6, 4), ("backward_mma", 10, 16))
        for case, chunk, shared, mode in (
            (FULL, 16, None, "plain"),
            (LINEAR, 32, None, "rows"),
            (replace(LINEAR, activation="silu"), 32, None, "rebuild"),
            (PLAIN, 10**6, 99 * 1024, "plain"),
        )
    ),
    backward(replace(PLAIN, d=24), Wishes(kernel="backward_rows", rank_tile=4, slab=32, blocks=1, tile_rows=4)),
]


@pytest.fixture(scope="module")
def machine() -> Machine:
    sources = mutated("mutants", MUTANTS)
    machine = Machine(build("mutants", [*FEW_SOURCES, "mutant.cpp"], csrc=sources, flags=FLAGS))
    machine.use(Device(multiprocessors=3))
    return machine


@pytest.mark.slow
def test_what_is_not_changed_passes(machine: Machine) -> None:
    assert fault_of(machine, 0, CASES) == ""


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(MUTANTS) + 1))
def test_mutants_are_caught(number: int, machine: Machine) -> None:
    found = fault_of(machine, number, CASES)
    print(found)
    assert found, MUTANTS[number - 1]
