"""What the numbers were taken on: device, versions, commit."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_CPU_CACHE = 32 << 20


def choose_device(name: str) -> torch.device:
    """The device of "auto" (CUDA where there is one), "cpu" or "cuda".

    Raises:
        ValueError: "cuda" without a CUDA device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def slug(device: torch.device) -> str:
    """The device's name as part of a file's name."""
    name = re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_")
    return name if device.type == "cuda" else f"cpu_{name}"


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache: the GPU's L2, the processor's outermost."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes, default=DEFAULT_CPU_CACHE)


def clocks(device: torch.device) -> str:
    """Clocks now, in MHz: of multiprocessors and memory by nvidia-smi, or of the first core."""
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits", "--id=0"]
        try:
            found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            return "unknown"
        return "sm {}, memory {}".format(*(part.strip() for part in found.split(",")))
    with contextlib.suppress(OSError):
        found_mhz = re.search(r"^cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found_mhz:
            return f"{float(found_mhz[1]):.0f}"
    return "unknown"


@functools.cache
def commit() -> str:
    """The commit checked out, with "+dirty" where the tree differs from it in what runs here.

    Where there is no repository, what the environment variable REFT_KERNELS_COMMIT says.
    """
    git = ["git", "-C", str(ROOT)]
    code = ["reft_kernels", "csrc", "benchmarks", ":(exclude)benchmarks/results"]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", *code], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("REFT_KERNELS_COMMIT", "unknown")
    return head.stdout.strip() + "+dirty" * bool(changed.stdout.strip())


def environment(device: torch.device) -> dict[str, str]:
    """The columns that say where and with what a number was measured, but for the clocks, which change."""
    return {
        "device": device_name(device),
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def _version(module: str) -> str:
    if importlib.util.find_spec(module) is None:
        return ""
    return str(importlib.import_module(module).__version__)
