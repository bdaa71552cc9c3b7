"""Logits for the columns of a batch that predict a target, and for no others."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from reft_kernels.training.item_layout import IGNORE_INDEX

COLUMNS = "target_columns"
# Logits of fewer columns cost about as much.
_LEAST = 16


def takes_columns(base: nn.Module) -> bool:
    """Whether the base model can be asked for some columns' logits and for a loss on labels shifted already."""
    parameters = inspect.signature(base.forward).parameters
    takes_more = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    shifts = LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss
    return "logits_to_keep" in parameters and takes_more and shifts


class TargetColumns:
    """Adds to a collator's batch the columns [K] whose logits predict a label in some row.

    Found here, on the host, since their number is a shape: on a GPU it would be waited for. Where the collator pads to
    few lengths (its `buckets`), K is one of few numbers too, a power of two: columns without a label are added.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.few_shapes = getattr(collator, "buckets", None) is not None

    def __call__(self, features: Any) -> Any:
        batch = self.collator(features)
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.ndim == 2:
            labelled = (labels[:, 1:] != IGNORE_INDEX).any(0)
            if self.few_shapes:
                count = int(labelled.sum())
                more = min(max(_LEAST, 1 << (count - 1).bit_length()), len(labelled)) - count
                labelled[(~labelled).nonzero()[:more, 0]] = True
            batch[COLUMNS] = labelled.nonzero()[:, 0]
        return batch
