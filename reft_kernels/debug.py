"""The debug mode: checks that read tensors back to the host."""

from __future__ import annotations

import os

_debug = os.environ.get("REFT_KERNELS_DEBUG", "0") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Turns the debug checks on or off: positions and groups are read back and checked for range and duplicates, and
    gradients of matrices with orthonormal rows for what is not finite.

    They cost a host synchronisation a call. The environment variable REFT_KERNELS_DEBUG=1 turns them on at import.
    """
    global _debug
    _debug = enabled


def debug_is_on() -> bool:
    """Whether the checks are made."""
    return _debug
