"""Scores that need forward passes alone: logits of texts, and the loss of outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from reft_kernels.model import ReftModel
from reft_kernels.training.collators import LOCATIONS


def predict(
    model: nn.Module, dataset: Any, collate: Any, batch_size: int, progress: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The logits [N, num_labels] and the labels [N] of a dataset's items, in their order."""
    order = _by_length(dataset)
    logits, labels = [], []
    for batch in _batches(model, dataset, order, collate, batch_size, progress):
        labels.append(batch.pop("labels").cpu())
        logits.append(model(**batch).logits.float().cpu())
    back = torch.tensor(order).argsort()
    return torch.cat(logits)[back].numpy(), torch.cat(labels)[back].numpy()


def mean_loss(model: nn.Module, dataset: Any, collate: Any, batch_size: int, progress: bool) -> float:
    """The mean cross entropy of all labelled tokens of a dataset, in nats; NaN where there are none."""
    total, tokens = 0.0, 0
    for batch in _batches(model, dataset, _by_length(dataset), collate, batch_size, progress):
        count = int((batch["labels"][:, 1:] != -100).sum())
        if count:
            total += float(model(**batch, use_cache=False).loss) * count
            tokens += count
    return total / tokens if tokens else math.nan


def _by_length(dataset: Any) -> list[int]:
    """The longest first, so that what does not fit into memory shows at once."""
    lengths = dataset.lengths
    return sorted(range(len(dataset)), key=lambda index: -lengths[index])


def _batches(
    model: nn.Module, dataset: Any, order: list[int], collate: Any, batch_size: int, progress: bool
) -> Iterator[dict[str, Any]]:
    from tqdm.auto import tqdm

    device = next(model.parameters()).device
    edits = isinstance(model, ReftModel) and len(model.interventions) > 0
    with _evaluating(model), torch.inference_mode(), tqdm(total=len(order), unit="row", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            items = [dataset[index] for index in order[start : start + batch_size]]
            batch = {name: value.to(device) for name, value in collate(items).items()}
            if not edits:
                batch.pop(LOCATIONS, None)
            yield batch
            bar.update(len(items))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
