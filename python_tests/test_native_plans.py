"""How the CUDA launcher would launch an edit, asked of the compiled module: no GPU is needed for that."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from reft_kernels.backends import cuda, native
from reft_kernels.problem import EditProblem

if not native.build_info():
    pytest.skip("the native library is not built", allow_module_level=True)

from reft_kernels._native import build_info, plan_edit_backward, plan_edit_forward

# capability, multiprocessors, dynamic shared memory of a block, L2 cache
DEVICES: dict[str, dict[str, int]] = {
    "A100": {"capability": 80, "multiprocessors": 108, "shared_bytes": 163 << 10, "l2_bytes": 40 << 20},
    "A10": {"capability": 86, "multiprocessors": 72, "shared_bytes": 99 << 10, "l2_bytes": 6 << 20},
    "L40S": {"capability": 89, "multiprocessors": 142, "shared_bytes": 99 << 10, "l2_bytes": 96 << 20},
    "H100": {"capability": 90, "multiprocessors": 132, "shared_bytes": 227 << 10, "l2_bytes": 50 << 20},
    "B200": {"capability": 100, "multiprocessors": 148, "shared_bytes": 227 << 10, "l2_bytes": 126 << 20},
    "RTX5090": {"capability": 120, "multiprocessors": 170, "shared_bytes": 99 << 10, "l2_bytes": 96 << 20},
}
PLANS = {"forward": plan_edit_forward, "backward": plan_edit_backward}
SIZES = [
    {"batch": 1, "length": 1, "d": 4096},
    {"batch": 32, "length": 1, "d": 4096},
    {"batch": 32, "length": 512, "slots": 14, "d": 4096},
    {"batch": 32, "length": 512, "slots": 14, "d": 8192},
    {"batch": 64, "length": 512, "slots": 64, "d": 4096},
    {"batch": 32, "length": 2048, "d": 4096},
    {"batch": 4, "length": 100, "d": 577},
    {"batch": 1, "length": 3, "d": 1},
    {"batch": 2, "length": 9, "d": 65536},
]
TYPES = [("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", PLANS)
def test_every_plan_can_be_launched(direction: str, device: str) -> None:
    """Within the shared memory, of whole warps, and, for a grid barrier, of no more blocks than fit at once."""
    limits = DEVICES[device]
    for size, (h, weights), r in itertools.product(SIZES, TYPES, (1, 4, 8, 9, 33, 64)):
        plan = PLANS[direction](**size, r=r, h=h, R=weights, W=weights, **limits)
        said = f"{size} {h} r={r}: {plan}"
        assert plan["refusal"] == "", said
        assert plan["kernel"].startswith(direction), said
        assert 0 <= plan["shared_bytes"] <= limits["shared_bytes"], said
        assert plan["threads"] % 32 == 0, said
        assert 0 < plan["threads"] <= 1024, said
        assert plan["blocks"] >= 1, said
        assert plan["blocks"] % plan["cluster"] == 0, said
        assert plan["cluster"] in (1, 2, 4, 8), said
        assert plan["cluster"] == 1 or limits["capability"] >= 90, said
        rows = size["batch"] * size.get("slots", size["length"])
        if direction == "forward":
            assert plan["blocks"] // plan["cluster"] * plan["tile_rows"] >= rows, said
        else:
            assert plan["blocks"] <= limits["multiprocessors"], said
            assert 1 <= plan["chunk"] <= max(rows, plan["tile_rows"]), said


@pytest.mark.parametrize("direction", PLANS)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 65}, "65"),
        ({"h": "float64", "R": "float64", "W": "float64"}, "float64"),
        ({"R": "bfloat16", "W": "float32"}, "bfloat16"),
        ({"h": "float16", "R": "bfloat16", "W": "bfloat16"}, "bfloat16"),
        ({"capability": 75}, "7.5"),
    ],
)
def test_what_no_kernel_takes_is_refused_with_a_reason(direction: str, changes: dict[str, Any], reason: str) -> None:
    usual = {"batch": 2, "length": 9, "d": 64, "r": 4, "h": "bfloat16"}
    plan = PLANS[direction](**{**usual, **changes})
    assert plan["kernel"] == "none"
    assert reason in plan["refusal"]


@pytest.mark.parametrize("direction", PLANS)
def test_python_refuses_the_same_types(direction: str) -> None:
    names = ("float32", "float16", "bfloat16", "float64")
    for h, R, W in itertools.product(names, names, (*names, None)):
        plan = PLANS[direction](batch=1, length=2, d=8, r=2, h=h, R=R, W=W)
        tensors = [None if t is None else torch.zeros(1, 2, 8, dtype=getattr(torch, t)) for t in (h, R, W)]
        rest = (None,) * 6
        problem = EditProblem(*tensors, *rest, True, "linear", 0.0)  # type: ignore[arg-type]
        assert (plan["refusal"] == "") == (cuda.unsupported_operands(problem) is None), f"{h} {R} {W}: {plan}"


def test_few_rows_of_long_rows_are_spread_over_a_cluster() -> None:
    size = {"batch": 1, "length": 1, "d": 4096, "r": 4}
    assert plan_edit_forward(**size, **DEVICES["H100"])["cluster"] > 1
    assert plan_edit_forward(**size, **DEVICES["A100"])["cluster"] == 1


@pytest.mark.parametrize("direction", PLANS)
def test_tensor_cores_for_high_ranks_in_half_precision_that_lie_in_line(direction: str) -> None:
    size = {"batch": 32, "length": 2048, "d": 4096, **DEVICES["H100"]}
    plan = PLANS[direction]
    assert plan(**size, r=64)["kernel"] == f"{direction}_mma"
    assert plan(**size, r=64, h="float32")["kernel"] == f"{direction}_rows"
    assert plan(**size, r=64, aligned=False)["kernel"] == f"{direction}_rows"
    assert plan(**{**size, "d": 4095}, r=64)["kernel"] == f"{direction}_rows"
    assert plan(**size, r=1)["kernel"] == f"{direction}_rows"


def test_a_backward_of_many_rows_goes_in_chunks_of_the_cache() -> None:
    size = {"batch": 32, "length": 2048, "d": 4096, "r": 8}
    chunks = {name: plan_edit_backward(**size, **device)["chunk"] for name, device in DEVICES.items()}
    assert chunks["A10"] < chunks["H100"] < 32 * 2048
    assert plan_edit_backward(**{**size, "length": 8}, **DEVICES["H100"])["chunk"] == 32 * 8


def test_nonsense_is_an_error() -> None:
    with pytest.raises(ValueError, match="dtype: expected float16, bfloat16, float32 or float64, got 'int8'"):
        plan_edit_forward(batch=1, length=1, d=8, r=1, h="int8")
    with pytest.raises(ValueError, match="activation: expected linear"):
        plan_edit_backward(batch=1, length=1, d=8, r=1, activation="step")
    with pytest.raises(TypeError):
        plan_edit_forward(1, 1, 1, 8, 1)  # type: ignore[call-arg, misc]


def test_the_build_says_what_it_is() -> None:
    info = build_info()
    assert info["torch_target"] == "0x020a000000000000"
    assert info["compiler"]
    assert (info["cuda"] == "") == (info["cuda_reason"] != "")
