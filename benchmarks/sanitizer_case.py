"""A few small edits, forward and backward by the backends for GPUs: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitizer_case

Small, since a sanitizer makes kernels hundreds of times slower; odd sizes, so that every mask is at work. Each edit
is compared with the oracle as well. Exit status 1 if one is wrong, 2 without a CUDA device.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from reft_kernels import available_backends
from reft_kernels.testing import (
    EditCase,
    EditOperands,
    assert_bitwise_equal,
    assert_close,
    gradients,
    lay_out,
    random_edit,
)

CASES = (
    EditCase(dtype="mixed", positions="padded", shape=(2, 9), slots=4, d=513, r=4),
    EditCase(dtype="float32", positions="some", groups=3, scale="rows", shape=(2, 9), d=130, r=1, activation="gelu"),
    EditCase(dtype="bfloat16", shape=(3, 33), d=264, r=8),
    EditCase(dtype="float16", method="noreft_with_c", shape=(2, 17), d=96, r=33, dropout=0.3),
    EditCase(dtype="mixed", positions="some", shape=(2, 9), slots=5, d=192, r=64, layout="slice"),
)


def on_device(operands: EditOperands, layout: str, device: str | torch.device) -> EditOperands:
    """The same on another device, with h laid out anew, since a move makes it dense."""
    tensors = {name: value.to(device) for name, value in vars(operands).items() if isinstance(value, torch.Tensor)}
    return replace(operands, **{**tensors, "h": lay_out(tensors["h"], layout)})


def compare(case: EditCase, seed: int, backend: str, device: str) -> None:
    """Holds a backend's y and gradients against the oracle, with the eager backend's errors as the measure.

    Raises:
        AssertionError: something is wrong; the message names it.
    """
    operands = random_edit(case, seed)
    grad = torch.randn(operands.h.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wide = operands.to(torch.float64)
    oracle = gradients(wide.reference, wide, grad)
    plain = gradients(lambda **t: operands.edit(**t, backend="eager"), operands, grad)
    moved = on_device(operands, case.layout, device)
    found = gradients(lambda **t: moved.edit(**t, backend=backend), moved, grad.to(device))
    named = operands.named
    assert_close(found.y.cpu()[named], oracle.y[named], plain.y[named], name=f"{case}: y")
    assert_bitwise_equal(found.y.cpu()[~named], operands.h[~named], name=f"{case}: y at rows that are not named")
    for name, gradient in found.grads.items():
        assert_close(gradient, oracle.grads[name], plain.grads[name], factor=3, name=f"{case}: d{name}")
    if case.layout in ("columns", "expanded"):
        return  # cannot be written row by row
    inplace = moved.edit(h=lay_out(moved.h, case.layout), inplace=True, backend=backend)
    assert_bitwise_equal(inplace, found.y, name=f"{case}: y in place")


def main() -> int:
    """Compares every case, out of place and in place."""
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    for backend in ("triton", "cuda"):
        reason = available_backends()[backend]
        if reason != "ok":
            print(f"left out: {backend}: {reason}", flush=True)
            continue
        for seed, case in enumerate(CASES):
            compare(case, seed, backend, "cuda")
            print(f"ok {backend} {case}", flush=True)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
