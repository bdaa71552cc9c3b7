"""What compiled kernels are made of: NVIDIA's machine code by its instructions, and tables of what was found."""

from __future__ import annotations

import csv
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def tool(name: str) -> Path | None:
    """One of NVIDIA's disassemblers, of CUDA or of Triton's own package; None if there is neither."""
    if found := shutil.which(name):
        return Path(found)
    spec = importlib.util.find_spec("triton")
    places = spec.submodule_search_locations if spec else None
    beside = Path(places[0]) / "backends" / "nvidia" / "bin" / name if places else None
    return beside if beside is not None and beside.exists() else None


def disassembled(cubin: Path) -> str:
    """The code of all kernels of a cubin."""
    return output_of(_needed("nvdisasm"), "-c", str(cubin))


def resource_usage(cubin: Path) -> str:
    """Registers, stack and shared memory of all kernels of a cubin."""
    return output_of(_needed("cuobjdump"), "-res-usage", str(cubin))


def _needed(name: str) -> Path:
    found = tool(name)
    if found is None:
        raise FileNotFoundError(f"{name}: not on the PATH, and Triton, which brings one, is not installed")
    return found


def output_of(program: Path | str, *arguments: str) -> str:
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


_INSTRUCTIONS = {
    "wide_loads": r"\bLDG(?:STS)?\.\S*128",  # of 16 bytes, into registers or straight into shared memory
    "ffma": r"\bFFMA",
    "mma": r"\b(?:HMMA|HGMMA|UTC\w*MMA)",
    "mma_tf32": r"\b(?:HMMA|HGMMA)\S*TF32|\bUTCHMMA\S*TF32",
    "async_copies": r"\bLDGSTS\b",
    "bulk_copies": r"\bUBLKCP\b",
    "cluster_barriers": r"\bUCGABAR_ARV\b",
    "shuffles": r"\bSHFL\b",
    "block_barriers": r"\bBAR\.SYNC",
}


def instruction_counts(code: str) -> dict[str, int]:
    """How often each kind of instruction stands in the code."""
    return {kind: len(re.findall(pattern, code)) for kind, pattern in _INSTRUCTIONS.items()}


def only(pattern: str, text: str) -> str:
    """The group of the one match of a pattern."""
    found = re.findall(pattern, text)
    if len(found) != 1:
        raise ValueError(f"expected {pattern!r} once in the output of a tool, found it {len(found)} times")
    return str(found[0])


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    columns = list(rows[0])
    lines = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def write_table(rows: Sequence[Mapping[str, object]], out: Path) -> None:
    """As a CSV file, which is whole or not there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(out)
