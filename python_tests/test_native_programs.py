"""The C++ tests of python_tests/native, as CMake builds and ctest runs them, on sound sources and on broken ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


class Programs:
    """A copy of the native sources, and its build."""

    def __init__(self, folder: Path) -> None:
        tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        found = {name: shutil.which(name, path=tools) for name in ("cmake", "ctest", "ninja", "g++")}
        if missing := [name for name, path in found.items() if path is None]:
            pytest.skip(f"{', '.join(missing)} not found")
        self.cmake, self.ctest = str(found["cmake"]), str(found["ctest"])
        self.source, self.build = folder / "source", folder / "build"
        for part in ("csrc", "python_tests/native", "CMakeLists.txt", "pyproject.toml",
                     "reft_kernels/backends/native_schemas.py"):  # fmt: skip
            to = self.source / part
            to.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, to)
        configure = [
            self.cmake, "-S", str(self.source), "-B", str(self.build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={found['ninja']}", f"-DCMAKE_CXX_COMPILER={found['g++']}",
            f"-DPython_EXECUTABLE={sys.executable}", "-DREFT_KERNELS_TESTS=ON", "-DREFT_KERNELS_WERROR=ON",
        ]  # fmt: skip
        done = subprocess.run(configure, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def run(self) -> subprocess.CompletedProcess[str]:
        """Builds what has changed, and runs the tests."""
        make = [self.cmake, "--build", str(self.build), "--target", "native_tests", "--parallel", "1"]
        done = subprocess.run(make, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]
        test = [self.ctest, "--test-dir", str(self.build), "--output-on-failure", "--no-tests=error"]
        return subprocess.run(test, capture_output=True, text=True)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    programs = Programs(tmp_path_factory.mktemp("native"))
    done = programs.run()
    assert done.returncode == 0, done.stdout
    assert "100% tests passed" in done.stdout
    return programs


# A file of csrc, a line of it, what stands in its place, and tests that then fail.
MUTANTS: list[tuple[str, str, str, Sequence[str]]] = [
    ("edit_forward_plan.cpp", "(e.rows() + tile_rows - 1) / tile_rows", "e.rows() / tile_rows", ["plans"]),
    ("edit_backward_plan.cpp", "std::min<int64_t>(device.multiprocessors, std::max(tiles, items))",
     "std::max(tiles, items)", ["plans"]),
    ("cpu/slots.cpp", "next[g] = group_end_[g - 1];", "next[g] = 0;", ["avx512", "avx2", "baseline"]),
    ("cpu/edit_forward.cpp", "update[k] = scale * value;", "update[k] = scale;", ["avx512", "avx2", "baseline"]),
    ("cpu/edit_forward.cpp", "m.bias[k] -= m.subtracted[k]", "m.bias[k] += m.subtracted[k]", ["baseline"]),
    ("cpu/edit_backward.cpp", "tile_[k] += row[k]", "tile_[k] = row[k]", ["baseline"]),
    ("cpu/backward_rows.h", "gd[k] * activation_slope(", "s[k] * activation_slope(", ["baseline"]),
    ("cpu/backward_columns.h", "m.gd[to + k] = -gd[from + k];", "m.gd[to + k] = gd[from + k];", ["baseline"]),
    ("cpu/kernels_impl.h", "sum[n * kRanks + k] += v * a[k]", "sum[n * kRanks + k] = v * a[k]", ["baseline"]),
]  # fmt: skip


@pytest.mark.parametrize(("file", "text", "new", "failing"), MUTANTS, ids=[f"{m[0]}-{m[2]}" for m in MUTANTS])
def test_broken_lines_are_seen(file: str, text: str, new: str, failing: Sequence[str], programs: Programs) -> None:
    place = programs.source / "csrc" / file
    broken = place.read_text()
    assert broken.count(text) == 1, f"{text!r} is no longer in {file}"
    broken = broken.replace(text, new)
    if file == "cpu/kernels_impl.h":  # for one instruction set alone, as each is a long compilation
        place = place.with_name("kernels_baseline.cpp")
        broken = place.read_text().replace('#include "kernels_impl.h"', broken.replace("#pragma once", ""))
    sound = place.read_text()
    place.write_text(broken)
    try:
        done = programs.run()
    finally:
        place.write_text(sound)
    assert done.returncode != 0
    said = done.stdout.partition("The following tests FAILED")[2]
    assert all(name in said for name in failing), done.stdout
