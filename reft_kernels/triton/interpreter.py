"""Whether Triton runs kernels in its interpreter."""

from __future__ import annotations

import os


def interpreted() -> bool:
    """Whether it does in this process, by the words that Triton takes for yes."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
