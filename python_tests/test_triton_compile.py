"""The Triton kernels compile ahead of time for every supported architecture, within its limits."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_kernels_compile_within_the_limits_of(arch: str, tmp_path: Path) -> None:
    # A process of its own: in this one the kernels may be bound to Triton's interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    table = tmp_path / "resources.csv"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", "--quick", "--arch", arch, "--out", str(table)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    everything = list(csv.DictReader(table.open()))
    rows = [row for row in everything if row["kernel"].startswith("edit")]
    check_matrices([row for row in everything if row not in rows], arch)
    forward = [row for row in rows if row["kernel"] == "edit_forward"]
    backward = [row for row in rows if row["kernel"] == "edit_backward"]
    assert len(forward) == len(backward) == len(rows) // 2
    assert {row["method"] for row in forward} == {"rows", "weights", "tiles"}
    assert {row["method"] for row in backward} == {"rows", "tiles"}
    assert {int(row["r"]) for row in rows} >= {1, 4, 8, 16, 32, 64}
    for row in rows:
        assert row["arch"] == arch
        assert 0 < int(row["registers"]) <= (512 if arch == "gfx942" else 255), row
        assert int(row["spill_bytes"]) == 0, row
        if arch != "gfx942":  # whose 512 threads have less than that each of a small tile
            assert int(row["wide_loads"]) > 0, f"no 16-byte loads: {row}"
        dots = row["method"] == "tiles" or row["kernel"] == "edit_backward"
        assert (int(row["mma"]) > 0) == dots, row
        if row["method"] != "tiles":
            assert int(row["ffma"]) > 0, f"separate multiplications and additions: {row}"
        if row["h"] == "bfloat16" and row["rebuild"] == "False":
            assert int(row["mma_tf32"]) == 0, f"bfloat16 terms are exact, tf32 ones would not be: {row}"


def check_matrices(rows: list[dict[str, str]], arch: str) -> None:
    """The kernels of matrices with orthonormal rows: the parametrisation, its backward, and the optimiser's step."""
    if arch == "gfx942":  # not compiled for it yet
        assert not rows
        return
    assert {row["kernel"] for row in rows} == {"orthonormalize_forward", "orthonormalize_backward", "stiefel_adamw"}
    assert {int(row["r"]) for row in rows} == {4, 8, 64}
    for row in rows:
        assert row["arch"] == arch
        assert 0 < int(row["registers"]) <= 255, row
        assert int(row["spill_bytes"]) == 0, row
        assert int(row["wide_loads"]) > 0, f"no 16-byte loads: {row}"
        assert int(row["ffma"]) > 0, f"separate multiplications and additions: {row}"
        assert (int(row["mma"]) > 0) == (int(row["r"]) > 8), row
    launches = [row["method"] for row in rows if row["kernel"] == "stiefel_adamw" and row["r"] == "64"]
    assert launches == ["1-3", "4-5"]
