"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, through their ops, against the oracle.

Builds the ops library once more, with the sanitizers, for a process whose first library theirs has to be. That takes
minutes, so that only ``make test-sanitized`` does it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    os.environ.get("REFT_KERNELS_SANITIZE") != "1", reason="minutes of compilation: make test-sanitized"
)

COMPARE = """
import sys
from pathlib import Path
import torch
from reft_kernels.backends import cpu, native
native.LIBRARY = Path(sys.argv[1])
from benchmarks.sanitizer_case import compare
from reft_kernels.testing import edit_cases
assert cpu.unavailable() is None, cpu.unavailable()
torch.set_num_threads(2)
for seed, case in enumerate(edit_cases()[:: int(sys.argv[2])]):
    compare(case, seed, "cpu", "cpu")
print("agreed with", cpu.instruction_set())
"""
COMPARE_ORTHONORMAL = """
import sys
from pathlib import Path
import torch
from reft_kernels.backends import cpu, cpu_orthonormal, native
native.LIBRARY = Path(sys.argv[1])
assert cpu_orthonormal.unavailable() is None, cpu_orthonormal.unavailable()
from test_orthonormalize_cpu import SHARED_OUT, SIZES, agrees_with_eager
torch.set_num_threads(2)
agrees_with_eager(tuple((d, r) for d, r in SIZES if r <= 70))
for sizes in SHARED_OUT:
    agrees_with_eager(sizes)
print("agreed with", cpu.instruction_set())
"""
# y has half the memory of what is written to it.
OVERRUN = """
import sys
from pathlib import Path
import torch
from reft_kernels.backends import native
native.LIBRARY = Path(sys.argv[1])
assert native.load() is None
h, R, delta = torch.zeros(1, 4, 64), torch.zeros(1, 2, 64), torch.zeros(4, 2)
y = torch.zeros(1, 2, 64).as_strided((1, 2, 64), (128, 64, 1))
y = torch.from_numpy(__import__("numpy").lib.stride_tricks.as_strided(y.numpy(), (1, 4, 64)))
torch.ops.reft_kernels.native_edit_forward(
    h, y, delta, None, None, R, None, None, None, None, None, None, None, True, 0, 0, 1.0, False
)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake, ninja, compiler = (shutil.which(name, path=tools) for name in ("cmake", "ninja", "g++"))
    if cmake is None or ninja is None or compiler is None:
        pytest.skip("needs cmake, ninja and g++")
    build = tmp_path_factory.mktemp("sanitized")
    configure = [
        cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DREFT_KERNELS_SANITIZE=ON",
        "-DCMAKE_BUILD_TYPE=Debug", f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_COMPILER={compiler}",
    ]  # fmt: skip
    for command in (configure, [cmake, "--build", build, "--target", "reft_kernels_ops", "--parallel", "1"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return build / "libreft_kernels_ops.so"


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("agreed with ")
    assert "runtime error" not in done.stderr


def sanitized(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    environment = {
        **os.environ,
        "LD_PRELOAD": str(Path(runtime.strip()).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python_tests")]),
        "TRITON_INTERPRET": "0",
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(("isa", "every"), [("avx512", "3"), ("avx2", "6"), ("baseline", "6")])
def test_cpu_kernels_keep_to_their_memory(library: Path, isa: str, every: str) -> None:
    check(sanitized(COMPARE, str(library), every, REFT_KERNELS_CPU_ISA=isa))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_cpu_kernels_of_orthonormal_rows_keep_to_their_memory(library: Path, isa: str) -> None:
    check(sanitized(COMPARE_ORTHONORMAL, str(library), REFT_KERNELS_CPU_ISA=isa))


def test_the_sanitizer_is_at_work(library: Path) -> None:
    done = sanitized(OVERRUN, str(library))
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
