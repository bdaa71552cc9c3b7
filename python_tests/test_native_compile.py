"""The CUDA kernels compile ahead of time without spills, and to the instructions that they are written for."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.machine_code import tool
from benchmarks.native_aot import faults

ROOT = Path(__file__).parents[1]


def test_kernels_compile_as_they_are_meant_to(tmp_path: Path) -> None:
    """One file for one architecture; `python -m benchmarks.native_aot` does all."""
    for name, found in (("nvcc", shutil.which("nvcc")), ("nvdisasm", tool("nvdisasm"))):
        if found is None:
            pytest.skip(f"{name} is not there")
    table = tmp_path / "resources.csv"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.native_aot", "--arch", "90a", "--file", "edit_forward_float32",
         "--out", str(table)],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    rows = list(csv.DictReader(table.open()))
    assert rows
    for row in rows:
        assert 0 < int(row["registers"]) <= 255, row
        assert int(row["instructions"]) > 100, row


SOUND = {
    "kernel": "edit_forward_rows",
    "arguments": "float, float, float, true, 4, true",
    "arch": "90a",
    "stack_bytes": 0,
    "spill_bytes": 0,
    "wide_loads": 9,
    "ffma": 9,
    "bulk_copies": 9,
    "cluster_barriers": 9,
    "shuffles": 9,
}


@pytest.mark.parametrize("broken", [
    {"spill_bytes": 4}, {"stack_bytes": 8}, {"wide_loads": 0}, {"ffma": 0}, {"bulk_copies": 0}, {"cluster_barriers": 0},
    {"kernel": "edit_sideways"},
], ids=str)  # fmt: skip
def test_what_is_not_as_it_should_be_is_named(broken: dict[str, object]) -> None:
    assert faults(SOUND) == []
    (found,) = faults({**SOUND, **broken})
    assert "nothing is known" in found if "kernel" in broken else next(iter(broken)) in found
    if "bulk_copies" in broken:
        assert faults({**SOUND, **broken, "arch": "80"}) == []
