"""Callbacks that add values of their own to the Trainer's training logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback


class LogValues(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """A callback of ReftTrainer whose values stand beside the loss in every training log.

    They are part of the log before anything sees it, so the log history, what is printed, TensorBoard and wandb have
    them. A plain Trainer calls neither method.
    """

    def see_batch(self, inputs: Mapping[str, Any]) -> None:
        """Called in every process with each batch of training, before the model is. Must not wait for the device."""

    def log_values(self, args: Any, state: Any, model: Any) -> dict[str, float]:
        """The values since the last call; called in every process when a training log is made."""
        return {}
