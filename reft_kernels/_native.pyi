"""How the native library was built, and how it would launch its kernels on a GPU."""

from collections.abc import Sequence
from typing import Any

def build_info() -> dict[str, str]: ...
def plan_edit_forward(
    *,
    batch: int,
    length: int,
    slots: int | None = None,
    d: int,
    r: int,
    groups: int = 1,
    h: str = "bfloat16",
    R: str = "float32",
    W: str | None = "float32",
    activation: str = "linear",
    subtract: bool = True,
    dropout: bool = False,
    aligned: bool = True,
    capability: int = 90,
    multiprocessors: int = 132,
    shared_bytes: int = ...,
    l2_bytes: int = ...,
) -> dict[str, Any]: ...
def plan_edit_backward(
    *,
    batch: int,
    length: int,
    slots: int | None = None,
    d: int,
    r: int,
    groups: int = 1,
    h: str = "bfloat16",
    R: str = "float32",
    W: str | None = "float32",
    activation: str = "linear",
    subtract: bool = True,
    dropout: bool = False,
    aligned: bool = True,
    capability: int = 90,
    multiprocessors: int = 132,
    shared_bytes: int = ...,
    l2_bytes: int = ...,
) -> dict[str, Any]: ...
def plan_orthonormalize(
    *,
    sizes: Sequence[tuple[int, int]],
    backward: bool = False,
    dtype: str = "float32",
    capability: int = 90,
    multiprocessors: int = 132,
    shared_bytes: int = ...,
) -> dict[str, Any]: ...
def plan_stiefel_adamw(
    *,
    constrained: Sequence[tuple[int, int]],
    rest: Sequence[int],
    riemannian: bool = False,
    dtype: str = "float32",
    capability: int = 90,
    multiprocessors: int = 132,
    shared_bytes: int = ...,
) -> dict[str, Any]: ...
