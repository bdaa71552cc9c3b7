"""How many kernels Triton compiles for matrices with orthonormal rows: one for each class of ranks, whatever L and d.

As in test_triton_recompile: cache keys are counted in a process of its own and nothing is compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[1]
COUNTS = (1, 2, 3, 16, 17, 32, 129)  # matrices
WIDTHS = (64, 576, 1024, 4096, 8192)


def launched(*mutants: str) -> dict[str, int]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, __file__, *mutants],
        cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    counts: dict[str, int] = json.loads(ran.stdout)
    return counts


def test_one_kernel_a_class_of_ranks() -> None:
    """8 alone; ranks from 5 to 8 together, which are one class for the step; 64."""
    assert launched() == {
        "orthonormalize_forward": 3, "orthonormalize_backward": 3, "stiefel_adamw": 2,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["n", "n_items", "lr", "beta1"])
def test_a_specialised_value_is_noticed(name: str) -> None:
    assert max(launched(name).values()) > 3


def main(*mutants: str) -> None:
    from test_triton_recompile import Target
    from triton import knobs
    from triton.runtime import driver

    from benchmarks import aot_orthonormal
    from reft_kernels.backends import triton_orthonormal as launcher

    kernels = launcher._kernels()
    for kernel in (kernels.forward, kernels.backward, kernels.step):
        for parameter in kernel.params:
            if parameter.name in mutants:
                parameter.do_not_specialize = False
    keys: dict[str, set[str]] = defaultdict(set)
    driver.set_active(Target())
    current: list[str] = []
    knobs.runtime.jit_cache_hook = lambda *, key, **_: current.append(str(key)) or True
    for ranks in ((8,), (5, 8), (64,)):
        for matrices in COUNTS:
            for d in WIDTHS:
                all_ranks = [ranks[i % len(ranks)] for i in range(max(matrices, len(ranks)))]
                for name, kernel, arguments in aot_orthonormal.recorded(d, all_ranks):
                    if arguments.get("FIRST_PHASE", 1) == 1:
                        if "lr" in arguments:
                            arguments |= {"lr": (0, 1, 16)[d % 3], "beta1": (1, 2**62, 32)[d % 3]}
                        current.clear()
                        kernel.run(grid=(1,), warmup=False, **arguments)
                        keys[name].update(current)
    print(json.dumps({name: len(found) for name, found in keys.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
