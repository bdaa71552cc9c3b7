"""Triton kernels that do nothing but what a ceiling is about."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from reft_kernels.triton.common import arrive, wait

READ_ELEMENTS = 2048
READ_BYTES = 4 * READ_ELEMENTS


@triton.jit
def empty_kernel(word_ptr):
    """Nothing."""


@triton.jit
def barriers_kernel(word_ptr, K):
    """K barriers across the grid."""
    for _ in range(K):
        wait(word_ptr, arrive(word_ptr))


@triton.jit
def reads_kernel(buffer_ptr, sink_ptr, TILES, K, BLOCK: tl.constexpr):
    """Reads TILES tiles of BLOCK floats K times in all, each time by other programs, past L1."""
    i_program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    o_block = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i_k in range(K):
        for i_tile in range((i_program + i_k) % n_programs, TILES, n_programs):
            b_sum += tl.load(buffer_ptr + i_tile * BLOCK + o_block, cache_modifier=".cg")
    # Never true; without a use the reads would be removed.
    tl.store(sink_ptr + o_block, b_sum, mask=(b_sum == float("inf")) & (o_block < 1))


def run_barriers(word: torch.Tensor, programs: int, count: int, warps: int) -> None:
    """One cooperative launch of ``count`` barriers among ``programs`` programs."""
    barriers_kernel[(programs,)](word, count, num_warps=warps, launch_cooperative_grid=True)


def run_reads(buffer: torch.Tensor, sink: torch.Tensor, programs: int, count: int) -> None:
    """Reads a buffer of whole tiles ``count`` times."""
    reads_kernel[(programs,)](buffer, sink, buffer.numel() // READ_ELEMENTS, count, READ_ELEMENTS, num_warps=8)
