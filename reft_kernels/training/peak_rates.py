"""How many floating-point operations a second a device can do at most."""

from __future__ import annotations

import re
import time
from typing import NamedTuple

import torch

# Dense rates of the makers' data sheets in TFLOP/s: fp16 or bf16 with tensor cores, TF32, fp32 without.
# The first pattern that is found in the device's name counts.
_TABLE: tuple[tuple[str, float, float | None, float], ...] = (
    (r"B200|GB200", 2250, 1125, 75),
    (r"H100 PCIe", 756, 378, 51),
    (r"H100 NVL", 835, 417, 60),
    (r"GH200|H200|H100|H800", 989, 494, 67),
    (r"A100|A800", 312, 156, 19.5),
    (r"L40S", 362, 183, 91.6),
    (r"L40\b", 181, 90.5, 90.5),
    (r"L4\b", 121, 60, 30.3),
    (r"A10G", 70, 35, 35),
    (r"A10\b", 125, 62.5, 31.2),
    (r"A40\b", 149.7, 74.8, 37.4),
    (r"RTX A6000", 154.8, 77.4, 38.7),
    (r"RTX 6000 Ada", 364, 182, 91.1),
    (r"RTX 4090", 165.2, 82.6, 82.6),
    (r"RTX 3090\b", 71, 35.6, 35.6),
    (r"V100", 125, None, 15.7),
    (r"T4\b", 65, None, 8.1),
)
_MEASURE_SECONDS = 0.1


class PeakRate(NamedTuple):
    """A rate in FLOP/s and where it is from, or None and why there is none."""

    flops_per_second: float | None
    source: str


def peak_rate(device: torch.device, dtype: torch.dtype) -> PeakRate:
    """The highest rate of matrix products in `dtype`: of a GPU by its name, of a CPU as measured by one product.

    fp32 on a GPU means TF32 where PyTorch's matrix products are allowed to use it.
    """
    if device.type == "cpu":
        return PeakRate(measure_matmul(dtype), "of a measured matrix product")
    if device.type != "cuda":
        return PeakRate(None, f"no peak rate is known for {device.type} devices")
    name = torch.cuda.get_device_name(device)
    return rate_of(name, dtype, torch.backends.cuda.matmul.allow_tf32)


def rate_of(name: str, dtype: torch.dtype, tf32: bool) -> PeakRate:
    """The table's rate for the GPU of that name."""
    for pattern, half, reduced, single in _TABLE:
        if re.search(pattern, name):
            if dtype in (torch.float16, torch.bfloat16):
                rate: float | None = half
            elif dtype == torch.float32:
                rate = reduced if tf32 and reduced is not None else single
            else:
                rate = None
            if rate is None:
                return PeakRate(None, f"no peak rate of {name} is known in {dtype}")
            return PeakRate(rate * 1e12, f"peak of {name} in {str(dtype).removeprefix('torch.')}")
    return PeakRate(None, f"no peak rate is known for {name}")


@torch.no_grad()
def measure_matmul(dtype: torch.dtype, size: int = 512) -> float:
    """FLOP/s of the fastest of some products of two [size, size] matrices on the CPU."""
    a = torch.full((size, size), 0.5, dtype=dtype)
    best, started = float("inf"), time.perf_counter()
    a @ a
    while True:
        start = time.perf_counter()
        a @ a
        stop = time.perf_counter()
        best = min(best, stop - start)
        if stop - started > _MEASURE_SECONDS:
            return 2 * size**3 / best
