"""The CUDA kernels on the CPU under AddressSanitizer and UBSan: tensors and shared memory have edges that show.

Builds one kernel of each kind, and runs edits of bfloat16 rows with R in float32 in a process of its own, as the
sanitizer's library has to be loaded before everything else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from native_machine import (
    FEW_SOURCES,
    ORTHONORMAL_SOURCES,
    Device,
    Machine,
    OrthonormalMachine,
    build,
    compiler,
    toy_library,
)

HERE = Path(__file__).parent


def sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs this file."""
    library = subprocess.run(
        [compiler(), "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()  # fmt: skip
    if not Path(library).is_absolute():
        pytest.skip("needs libasan, which comes with g++")
    environment = {
        **os.environ,
        "LD_PRELOAD": str(Path(library).resolve()),
        # Fibers are abandoned where a launch fails, and Python frees little at its end.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        "TRITON_INTERPRET": "1",
    }
    return subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow
def test_kernels_keep_within_their_memory() -> None:
    build("few", FEW_SOURCES, sanitize=True)
    run = sanitized("kernels")
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    assert "AddressSanitizer" not in run.stderr
    assert "runtime error" not in run.stderr
    assert int(run.stdout.split()[-2]) > 50, run.stdout


@pytest.mark.slow
def test_orthonormal_kernels_keep_within_their_memory() -> None:
    build("orthonormal", ORTHONORMAL_SOURCES, sanitize=True)
    run = sanitized("orthonormal")
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    assert "AddressSanitizer" not in run.stderr
    assert "runtime error" not in run.stderr
    assert run.stdout.split()[-2:] == ["8", "cases"], run.stdout


@pytest.mark.slow
def test_what_is_beyond_shared_memory_is_noticed() -> None:
    toy_library_is_built = build("toys", ["toy_kernels.cu"], sanitize=True)
    assert toy_library_is_built.exists()
    assert sanitized("toy", "0").stdout == "\n"
    run = sanitized("toy", "5")
    assert run.returncode != 0
    assert "AddressSanitizer: use-after-poison" in run.stderr, run.stderr[-3000:]


def cases() -> Iterator[tuple[object, ...]]:
    """Those of test_native_kernels that the few kernels take."""
    from test_native_kernels import FACTORS, matrix

    factors = {**FACTORS, "dtype": ("mixed",), "backward_slab": (32,)}
    for case, wishes, capability, how in matrix(11, factors):
        forward, backward = wishes["forward"], wishes["backward"]
        if case.r > 16:
            case = replace(case, r=case.r // 4)
        forward, backward = (replace(w, rank_tile=16 if "mma" in str(w.kernel) else 4) for w in (forward, backward))
        yield case, forward, backward, capability, how


def run_orthonormal_kernels() -> None:
    import test_native_orthonormal as on_machine
    import test_orthonormalize as maps
    import test_stiefel_adamw_step as steps
    import torch

    machine = OrthonormalMachine(build("orthonormal", ORTHONORMAL_SOURCES, sanitize=True))
    count = 0
    for device in (Device(90, 3), Device(80, 2, 99 << 10)):
        machine.use(device)
        problem = maps.problem_of(((70, 7), (1030, 3), (41, 8), (90, 20), (70, 36)), torch.float32)
        on_machine.assert_map(machine, problem, on_machine.gradients_of(problem))
        for settings in (on_machine.SETTINGS[name] for name in ("plain", "clipped", "all")):
            shapes = ((3, 1030), (36, 41), (20, 33), (4099,), (), (0,))
            p = steps.problem_of(torch.float32, shapes=shapes, orthonormal=(True,) * 3 + (False,) * 3, **settings)
            want = steps.expected(p)
            machine.stiefel_adamw_step(p)
            on_machine.assert_step(p, want)
            count += 1
        count += 1
    print(count, "cases")


def run_kernels() -> None:
    from test_native_kernels import check

    from reft_kernels.testing import random_edit

    machine = Machine(build("few", FEW_SOURCES, sanitize=True))
    count = 0
    for index, (case, forward, backward, capability, how) in enumerate(cases()):
        print(index, case, forward, backward, capability, how, file=sys.stderr)
        machine.use(Device(capability))
        machine.seed(1000 * index)
        with machine.forced(forward, backward):
            check(random_edit(case, seed=200 + index), machine, **how)
        count += 1
    print(count, "cases")


if __name__ == "__main__":
    if sys.argv[1] == "toy":
        print(toy_library(sanitize=True).run_toy(b"reduce", int(sys.argv[2]), 0).decode())
    elif sys.argv[1] == "orthonormal":
        run_orthonormal_kernels()
    else:
        run_kernels()
