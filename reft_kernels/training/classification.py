"""The Trainer of sequence classifiers and its loss."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reft_kernels.model import ReftModel
from reft_kernels.training.item_layout import IGNORE_INDEX
from reft_kernels.training.trainer import ReftTrainer

Problem = Literal["regression", "single_label_classification", "multi_label_classification"]


class ReftTrainerForSequenceClassification(ReftTrainer):
    """Trains a ReftModel over a model with a classifier head (pyreft `ReftTrainerForSequenceClassification`).

    As ReftTrainer. The loss is computed here, in float32 (float64 where the logits are), and is a mean over all targets
    of an optimiser step, however they are split into batches:

    - regression: squared error; labels [B], or [B, num_labels];
    - single label: cross entropy; int labels [B], -100 for "leave out", with `label_smoothing_factor`;
    - several labels: binary cross entropy; float labels [B, num_labels].

    Which of the three, the base model's `config.problem_type` says; where it is None, one label in the config means
    regression, int labels a single label, and other labels several. The config is not changed.

    `evaluate()` gives `compute_metrics` the logits and the labels of all examples. A head whose parameters require
    gradients is trained, saved and loaded again with the adapter.
    """

    def __init__(self, model: ReftModel, args: Any = None, data_collator: Any = None, **kwargs: Any) -> None:
        super().__init__(model, args, data_collator, **kwargs)
        # The loss is scaled here, by the number of targets that Trainer counts for every step.
        self.model_accepts_loss_kwargs = True

    def _shifts_labels(self) -> bool:
        return False

    def problem_type(self, labels: Tensor) -> Problem:
        """Which loss these labels have."""
        config = getattr(self._base, "config", None)
        stated: Problem | None = getattr(config, "problem_type", None)
        if stated is not None:
            return stated
        if getattr(config, "num_labels", None) == 1:
            return "regression"
        is_class = labels.dtype in (torch.int64, torch.int32)
        return "single_label_classification" if is_class else "multi_label_classification"

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """See ReftTrainer.compute_loss. Raises ValueError where there are no labels or they do not fit the problem."""
        inputs = self._model_inputs(inputs)
        labels: Tensor | None = inputs.pop("labels", None)
        if labels is None:
            raise ValueError(f"a batch for training needs labels, got {sorted(inputs)}")
        outputs = model(**inputs)
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        else:
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
            smoothing = self.args.label_smoothing_factor
            losses, count = target_losses(logits, labels, self.problem_type(labels), smoothing)
            loss = losses.sum() / (count if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None:
            loss = self._across_processes(loss)
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Every number of a regression is a target, also one that equals the mark of labels to leave out."""
        counted = []
        for batch in batch_samples:
            labels = batch.get("labels")
            if isinstance(labels, Tensor) and self.problem_type(labels) != "single_label_classification":
                batch = {**batch, "labels": torch.zeros_like(labels)}
            counted.append(batch)
        return super()._get_num_items_in_batch(counted, device)


def target_losses(
    logits: Tensor, labels: Tensor, problem: Problem, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor | int]:
    """The loss of every target, in float32 or float64, and how many targets there are.

    Args:
        logits: [B, num_labels].
        labels: [B] or [B, num_labels], see ReftTrainerForSequenceClassification.
        label_smoothing: of a single label.

    Raises ValueError where the shapes do not fit the problem, or for another problem.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    num_labels = logits.shape[-1]
    if problem == "single_label_classification":
        if labels.numel() != logits.shape[0] or labels.is_floating_point():
            raise ValueError(
                f"a single label needs int labels [B] = [{logits.shape[0]}], got {labels.dtype} {list(labels.shape)}"
            )
        classes = labels.reshape(-1).long()
        losses = F.cross_entropy(
            wide.reshape(-1, num_labels),
            classes,
            ignore_index=IGNORE_INDEX,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        return losses, (classes != IGNORE_INDEX).sum()
    if problem not in ("regression", "multi_label_classification"):
        raise ValueError(f"problem_type must be one of {', '.join(get_args(Problem))}, got {problem!r}")
    if labels.numel() != logits.numel():
        raise ValueError(
            f"{problem} with {num_labels} labels needs labels {list(logits.shape)}, got {list(labels.shape)} "
            f"({labels.dtype})"
        )
    targets = labels.reshape(wide.shape).to(wide.dtype)
    if problem == "regression":
        losses = F.mse_loss(wide, targets, reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(wide, targets, reduction="none")
    return losses, losses.numel()
