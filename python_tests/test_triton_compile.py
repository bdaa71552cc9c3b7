"""The Triton kernels compile ahead of time for every supported architecture, within its limits."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_kernels_compile_within_the_limits_of(arch: int, tmp_path: Path) -> None:
    # A process of its own: in this one the kernels may be bound to Triton's interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    table = tmp_path / "resources.csv"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", "--quick", "--arch", str(arch), "--out", str(table)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    rows = list(csv.DictReader(table.open()))
    assert {row["kernel"] for row in rows} == {"edit_forward", "edit_backward"}
    assert {int(row["r"]) for row in rows} >= {1, 4, 8, 16, 32, 64}
    for row in rows:
        assert int(row["arch"]) == arch
        assert 0 < int(row["registers"]) <= 255, row
        assert int(row["ffma"]) > 0, f"separate multiplications and additions: {row}"
        assert int(row["wide_loads"]) > 0, f"no 16-byte loads: {row}"
        assert int(row["mma"]) == 0, f"tensor cores would round float32 to tf32: {row}"
