"""How the CUDA launchers would launch the kernels of orthonormal matrices, asked of the compiled module."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from reft_kernels.backends import native

if not native.build_info():
    pytest.skip("the native library is not built", allow_module_level=True)

from test_native_plans import DEVICES

from reft_kernels._native import plan_orthonormalize, plan_stiefel_adamw
from reft_kernels.backends import cuda_orthonormal

HARDWARE = {name: {k: v for k, v in d.items() if k != "l2_bytes"} for name, d in DEVICES.items()}
RANKS = (1, 3, 4, 5, 8, 12, 16, 20, 32, 33, 40, 64)


@pytest.mark.parametrize("device", HARDWARE)
def test_every_plan_can_be_launched(device: str) -> None:
    """Within the shared memory, and for the grid barrier in no more blocks than fit at once."""
    limits = HARDWARE[device]
    for d, r, count, flag in itertools.product((64, 576, 4096, 8192), RANKS, (1, 32, 80), (False, True)):
        plans = (
            plan_orthonormalize(sizes=[(d, r)] * count, backward=flag, **limits),
            plan_stiefel_adamw(constrained=[(d, r)] * count, rest=[d * r, r] * count, riemannian=flag, **limits),
        )
        for plan in plans:
            said = f"d={d} r={r} {count} {flag}: {plan}"
            assert plan["refusal"] == "", said
            assert plan["shared_bytes"] <= limits["shared_bytes"], said
            assert plan["blocks"] == min(limits["multiprocessors"], plan["items"]), said
            assert plan["threads"] == 256, said
            assert 0 < plan["workspace"] <= 40 * count * (d * r + 64 * r * r + 256 * (d // 512 + 1)), said


@pytest.mark.parametrize("r", [4, 8])
def test_a_models_matrices_fill_the_gpu_once(r: int) -> None:
    """32 layers of d = 4096: a slab to each block of an H100."""
    for plan in (
        plan_orthonormalize(sizes=[(4096, r)] * 32, **HARDWARE["H100"]),
        plan_orthonormalize(sizes=[(4096, r)] * 32, backward=True, **HARDWARE["H100"]),
        plan_stiefel_adamw(constrained=[(4096, r)] * 32, rest=[], **HARDWARE["H100"]),
    ):
        assert plan["items"] == plan["blocks"] == 128


def test_few_matrices_are_given_as_a_small_parameter() -> None:
    """Of 4 KiB, or of all that a kernel's parameters may be."""
    assert plan_orthonormalize(sizes=[(64, 4)] * 63)["capacity"] == 63
    assert plan_orthonormalize(sizes=[(64, 4)] * 64)["capacity"] == cuda_orthonormal.MAX_MATRICES
    assert plan_stiefel_adamw(constrained=[(64, 4)] * 32, rest=[256, 4] * 32)["capacity"] == 110
    assert plan_stiefel_adamw(constrained=[], rest=[8] * 111)["capacity"] == cuda_orthonormal.MAX_TENSORS


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sizes": [(80, 65)]}, "takes ranks 1 to 64, got 65"),
        ({"sizes": [(4, 8)]}, "takes d from r"),
        ({"dtype": "float64"}, "takes float32, got float64"),
        ({"dtype": "bfloat16"}, "takes float32, got bfloat16"),
        ({"capability": 75}, "7.5"),
        ({"sizes": [(8, 2)] * 512}, "takes up to 511 matrices at once, got 512"),
        ({"shared_bytes": 40 << 10, "sizes": [(4096, 64)]}, "shared memory"),
    ],
)
def test_what_no_kernel_takes_is_refused_with_a_reason(changes: dict[str, Any], reason: str) -> None:
    plan = plan_orthonormalize(**{"sizes": [(64, 4)], **changes})
    assert reason in plan["refusal"]
    changes = {"constrained" if name == "sizes" else name: value for name, value in changes.items()}
    plan = plan_stiefel_adamw(**{"constrained": [(64, 4)], "rest": [], **changes})
    assert reason.replace("511 matrices", "510 tensors") in plan["refusal"]
