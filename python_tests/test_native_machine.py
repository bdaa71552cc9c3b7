"""The machine that runs the CUDA kernels on a CPU (python_tests/native) does what a GPU does, and sees faults."""

from __future__ import annotations

import ctypes

import pytest
import torch
from native_machine import toy_library

# How many of its lines each kernel of toy_kernels.cu can be told to break.
TOYS = {
    "reduce": 6, "warp": 1, "grid": 4, "copy": 5, "mma_bfloat16": 1, "mma_float16": 1, "cluster": 4, "bulk": 7,
    "blocks": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def toys() -> ctypes.CDLL:
    return toy_library()


def run(toys: ctypes.CDLL, kernel: str, broken: int, order: int) -> str:
    return toys.run_toy(kernel.encode(), broken, order).decode()


@pytest.mark.parametrize("kernel", TOYS)
def test_sound_kernels_run_in_every_order(kernel: str, toys: ctypes.CDLL) -> None:
    assert [run(toys, kernel, 0, order) for order in range(60)] == [""] * 60


@pytest.mark.parametrize(("kernel", "broken"), [(k, n) for k, count in TOYS.items() for n in range(1, count + 1)])
def test_each_fault_is_seen_in_every_order(kernel: str, broken: int, toys: ctypes.CDLL) -> None:
    found = [run(toys, kernel, broken, order) for order in range(12)]
    assert all(found), found
    assert "no such kernel" not in found


def test_a_report_says_where(toys: ctypes.CDLL) -> None:
    found = run(toys, "reduce", 1, 0)
    assert "race" in found
    assert "shared memory of block 0" in found
    assert "toy_kernels.cu:" in found


def test_half_precision_is_rounded_to_nearest_even(toys: ctypes.CDLL) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    halves = torch.cat([every.view(torch.float16).float(), every.view(torch.bfloat16).float()])
    neighbours = [torch.nextafter(halves, torch.full_like(halves, side)) for side in (-torch.inf, torch.inf)]
    between = (halves[:-1] + halves[1:]) / 2  # ties
    values = torch.cat([halves, *neighbours, between, torch.randn(2**16) * torch.randn(2**16).mul(20).exp()])
    count = len(values)
    values = torch.cat([values, values.new_zeros(-count % 2**16)]).contiguous()
    bits = [torch.empty(len(values), dtype=torch.int16) for _ in range(2)]
    back = [torch.empty(len(values)) for _ in range(2)]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, *bits, *back)]
    toys.round_to_half(*pointers, ctypes.c_int64(len(values)))
    for got, again, dtype in zip(bits, back, (torch.bfloat16, torch.float16), strict=True):
        expected = values.to(dtype)
        same = (got.view(dtype) == expected) | (got.view(dtype).isnan() & expected.isnan())
        assert bool(same.all()), values[~same][:5]
        widened = every.view(dtype).float()
        assert torch.equal(again[: 2**16].nan_to_num(1.5e9), widened.nan_to_num(1.5e9))
