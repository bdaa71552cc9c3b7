"""What the machine can do at best: the numbers that an edit's own are held against."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops import machine, store
from benchmarks.ops.programs import bare_step
from benchmarks.ops.timing import Call, Effort, Timing, host_microseconds, time_cpu, time_cuda

Ceilings = dict[str, dict[str, Any]]


def path_of(folder: Path, device: torch.device) -> Path:
    """Where the ceilings of a device lie, beside its CSV."""
    return folder / f"ceilings_{machine.slug(device)}.json"


def read(folder: Path, device: torch.device) -> Ceilings:
    """What was measured before; empty if nothing was."""
    path = path_of(folder, device)
    if not path.exists():
        return {}
    found: Ceilings = json.loads(path.read_text())["ceilings"]
    return found


def copy_bandwidth(ceilings: Ceilings) -> float | None:
    """GB/s of the device's copy, bytes read and bytes written both counted; None if not measured."""
    return ceilings.get("copy", {}).get("value")


def measure(folder: Path, device: torch.device, effort: Effort, quick: bool) -> Ceilings:
    """Measures all ceilings of a device and writes them; one that fails is stored with its error."""
    parts = _cuda_parts(device, effort, quick) if device.type == "cuda" else _cpu_parts(effort, quick)
    found: Ceilings = {}
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:  # the other ceilings are worth having; this one says what happened
            found[name] = {"value": None, "error": f"{type(error).__name__}: {error}"}
        shown = found[name]
        print(f"ceiling {name}: {shown['value']} {shown.get('unit', shown.get('error'))}", file=sys.stderr, flush=True)
        store.write_json(
            path_of(folder, device),
            {"environment": {**machine.environment(device), "clocks_mhz": machine.clocks(device)}, "ceilings": found},
        )
    return found


def _bandwidth(timing: Timing, moved: int, **more: Any) -> dict[str, Any]:
    value = round(moved / timing.p50 / 1e3, 1)
    return {"value": value, "unit": "GB/s", "p50_us": round(timing.p50, 2), "method": timing.method, **more}


def _latency(timing: Timing, **more: Any) -> dict[str, Any]:
    spread = {"p20_us": round(timing.p20, 3), "p80_us": round(timing.p80, 3), "method": timing.method}
    return {"value": round(timing.p50, 3), "unit": "us", **spread, **more}


def _cpu_parts(effort: Effort, quick: bool) -> dict[str, Any]:
    def timed(*calls: Call) -> Timing:
        return time_cpu({"": calls}, effort)[""]

    def copy() -> dict[str, Any]:
        elements = (4 if quick else 64) << 20
        source, target = torch.randn(elements), torch.empty(elements)
        return _bandwidth(timed(lambda: target.copy_(source)), 8 * elements, buffer_bytes=4 * elements)

    def empty_call() -> dict[str, Any]:
        one = torch.ones(1)
        return _latency(timed(lambda: one.add_(1)), what="add of one element in place")

    def harness() -> dict[str, Any]:
        return _latency(timed(bare_step("cpu")), what="forward and backward without an edit between")

    return {"copy": copy, "empty_call": empty_call, "harness": harness}


def _cuda_parts(device: torch.device, effort: Effort, quick: bool) -> dict[str, Any]:
    def copy() -> dict[str, Any]:
        size = (64 if quick else 1024) << 20
        source = torch.randn(size // 4, device=device)
        target = torch.empty_like(source)
        return _bandwidth(time_cuda([lambda: target.copy_(source)], effort), 2 * size, buffer_bytes=size)

    def empty_kernel() -> dict[str, Any]:
        from benchmarks.ops import ceiling_kernels as kernels

        word = torch.zeros(1, dtype=torch.int32, device=device)
        calls: list[Call] = [lambda: kernels.empty_kernel[(1,)](word)] * 200
        return _latency(time_cuda(calls, effort), what="an empty Triton kernel of one program, 200 in a graph")

    def one_element() -> dict[str, Any]:
        one = torch.ones(1, device=device)
        return _latency(time_cuda([lambda: one.add_(1)] * 200, effort), what="add of one element, 200 in a graph")

    def grid_barrier() -> dict[str, Any]:
        from benchmarks.ops import ceiling_kernels as kernels

        word = torch.zeros(1, dtype=torch.int32, device=device)
        programs = torch.cuda.get_device_properties(device).multi_processor_count
        by_warps = {}
        for warps in (4, 8):
            few, many = (
                time_cuda([lambda k=k, w=warps: kernels.run_barriers(word, programs, k, w)] * 8, effort).p50
                for k in (1, 101)
            )
            by_warps[f"{warps} warps"] = round((many - few) / 100, 3)
        return {"value": by_warps["4 warps"], "unit": "us", "programs": programs, "by_warps": by_warps,
                "what": "(101 barriers - 1 barrier) / 100 in one cooperative launch"}  # fmt: skip

    def l2_read() -> dict[str, Any]:
        from benchmarks.ops import ceiling_kernels as kernels

        size = machine.cache_bytes(device) * 2 // 5 // kernels.READ_BYTES * kernels.READ_BYTES
        buffer = torch.randn(size // 4, device=device)
        sink = torch.zeros(1, device=device)
        programs = 8 * torch.cuda.get_device_properties(device).multi_processor_count
        few, many = (time_cuda([lambda k=k: kernels.run_reads(buffer, sink, programs, k)], effort).p50 for k in (2, 22))
        moved = 20 * size
        return {"value": round(moved / (many - few) / 1e3, 1), "unit": "GB/s", "buffer_bytes": size,
                "what": "(22 reads - 2 reads) of a buffer that fits in L2, past L1"}  # fmt: skip

    def harness() -> dict[str, Any]:
        value = host_microseconds([bare_step("cuda")])
        return {"value": round(value, 3), "unit": "us", "what": "host time of a forward and backward without an edit"}

    parts = (copy, empty_kernel, one_element, grid_barrier, l2_read, harness)
    return {part.__name__: part for part in parts}
