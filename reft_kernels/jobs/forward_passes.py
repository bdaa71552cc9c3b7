"""Scores that need forward passes alone: logits of texts, and the loss of outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reft_kernels.jobs import processes
from reft_kernels.model import ReftModel
from reft_kernels.training.collators import LOCATIONS
from reft_kernels.training.item_layout import IGNORE_INDEX

Chosen = list[int]
Share = Callable[..., list[Any]]


def predict(
    model: nn.Module, dataset: Any, collate: Any, batch_size: int, progress: bool, share: Share = processes.share
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The logits [N, num_labels] and the labels [N] of a dataset's items, in their order.

    Args:
        share: shares batches among processes.
    """

    def run(chosen: list[Chosen]) -> list[tuple[Tensor, Tensor]]:
        found = []
        for batch in _batches(model, dataset, chosen, collate, progress):
            labels = batch.pop("labels").cpu()
            found.append((model(**batch).logits.float().cpu(), labels))
        return found

    batches = batches_by_length(dataset, batch_size)
    logits, labels = zip(*share(batches, run), strict=True)
    back = torch.tensor([index for batch in batches for index in batch]).argsort()
    return torch.cat(logits)[back].numpy(), torch.cat(labels)[back].numpy()


def mean_loss(
    model: nn.Module, dataset: Any, collate: Any, batch_size: int, progress: bool, share: Share = processes.share
) -> float:
    """The mean cross entropy of all labelled tokens of a dataset, in nats; NaN where there are none.

    Args:
        share: shares batches among processes.
    """

    def run(chosen: list[Chosen]) -> list[tuple[float, int]]:
        found = []
        for batch in _batches(model, dataset, chosen, collate, progress):
            count = count_targets(batch["labels"])
            found.append((float(model(**batch, use_cache=False).loss) * count if count else 0.0, count))
        return found

    return mean_of(share(batches_by_length(dataset, batch_size), run))


def count_targets(labels: Tensor) -> int:
    """How many tokens of a batch are predicted."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def mean_of(sums: list[tuple[float, int]]) -> float:
    """The mean over all of the items of which a sum and a number are given; NaN where there are none."""
    count = sum(n for _, n in sums)
    return sum(total for total, _ in sums) / count if count else math.nan


def batches_by_length(dataset: Any, size: int) -> list[Chosen]:
    """The indices of the batches, the longest first, so that what does not fit into memory shows at once."""
    lengths = dataset.lengths
    order = sorted(range(len(dataset)), key=lambda index: -lengths[index])
    return [order[start : start + size] for start in range(0, len(order), size)]


def _batches(
    model: nn.Module, dataset: Any, chosen: list[Chosen], collate: Any, progress: bool
) -> Iterator[dict[str, Any]]:
    from tqdm.auto import tqdm

    device = next(model.parameters()).device
    edits = isinstance(model, ReftModel) and len(model.interventions) > 0
    total = sum(map(len, chosen))
    with _evaluating(model), torch.inference_mode(), tqdm(total=total, unit="row", disable=not progress) as bar:
        for indices in chosen:
            items = [dataset[index] for index in indices]
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
