"""Batches of examples of about one length, so that little is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGroups(Sampler[int]):
    """A random order of examples in which those of one batch have about the same length.

    transformers' own order (`get_length_grouped_indices`): random runs of 50 batches, each sorted by length, the
    longest example of all first. It follows from seed and epoch alone, so every process has the same one, and a run
    that is resumed goes on with the examples that it would have seen.

    Args:
        lengths: of all examples, in tokens.
        batch_size: how many examples should have one length: those of an optimiser step.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch by the Trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        order: list[int] = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        return iter(order)


def groups_by_length(args: Any) -> bool:
    """Whether TrainingArguments ask for it: `train_sampling_strategy`, in transformers 4.57 `group_by_length`."""
    return bool(getattr(args, "group_by_length", False) or _strategy(args) == "group_by_length")


def length_grouping() -> dict[str, Any]:
    """The keyword that asks TrainingArguments of the installed transformers for batches of one length."""
    from transformers import TrainingArguments

    if "group_by_length" in TrainingArguments.__dataclass_fields__:
        return {"group_by_length": True}
    return {"train_sampling_strategy": "group_by_length"}


def _strategy(args: Any) -> str:
    strategy = getattr(args, "train_sampling_strategy", "")
    return str(getattr(strategy, "value", strategy))
