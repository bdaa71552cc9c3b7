"""Models whose matrices are split over processes."""

from __future__ import annotations

from typing import Any


def tensor_parallel_size(args: Any) -> int:
    """Over how many processes a model is split by TrainingArguments, which then all see the same batches."""
    config = getattr(args, "parallelism_config", None)
    return 1 if config is None else int(config.tp_size)
