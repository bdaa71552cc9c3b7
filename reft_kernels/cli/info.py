"""Say what is installed, which devices there are, and which backends work here, or why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

HELP = "versions, devices and backends here"
USAGE = "[--json]"
PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "datasets")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `info`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def collect() -> dict[str, Any]:
    """Versions (None where a package is missing), devices and their launch configurations, backends, the native build.

    Of a backend "ok" or a reason; of a GPU the tables that its launch configurations come from, or what is wrong with
    them; of the native library compilers, flags, CUDA architectures (empty where it is not built).
    """
    import torch

    import reft_kernels
    from reft_kernels.backends import cpu, native
    from reft_kernels.functional import available_backends
    from reft_kernels.triton import config_tables, launch_configs

    versions: dict[str, str | None] = {
        "reft_kernels": reft_kernels.__version__,
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    configs = {}
    instructions = f", kernels for {cpu.instruction_set()}" if cpu.unavailable() is None else ""
    devices = [f"cpu, {torch.get_num_threads()} threads{instructions}"]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index}, {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
        try:
            configs[f"cuda:{index}"] = launch_configs.describe(gpu.name)
        except config_tables.TableError as error:
            configs[f"cuda:{index}"] = str(error)
    return {
        "versions": versions,
        "devices": devices,
        "backends": available_backends(),
        "launch_configs": configs,
        "native": native.build_info(),
    }


def run(arguments: argparse.Namespace) -> None:
    """Prints versions, devices and backends."""
    found = collect()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    for name, version in found["versions"].items():
        print(f"{name:14}{version or 'not installed'}")
    for device in found["devices"]:
        print(f"{'device':14}{device}")
    for name, reason in found["backends"].items():
        print(f"{'backend':14}{name}: {reason}")
    for name, source in found["launch_configs"].items():
        print(f"{'configs':14}{name}: {source}")
    for name, value in found["native"].items():
        if value:
            print(f"{'native':14}{name}: {value}")
