"""Models whose matrices are split over processes."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

# Whether Trainer knows that processes share a batch.
_COUNTS_SHARING = "get_tp_size" in Trainer.compute_loss.__code__.co_names


def tensor_parallel_size(args: Any) -> int:
    """Over how many processes a model is split by TrainingArguments, which then all see the same batches."""
    config = getattr(args, "parallelism_config", None)
    return 1 if config is None else int(config.tp_size)


def surplus_of_loss(args: Any) -> int:
    """How many times too large Trainer makes the loss of a split model that it divides by labelled tokens.

    transformers 4.57 multiplies it by the number of all processes, as if each had a batch of its own; later versions
    leave out those that share one.
    """
    return 1 if _COUNTS_SHARING or not args.average_tokens_across_devices else tensor_parallel_size(args)
