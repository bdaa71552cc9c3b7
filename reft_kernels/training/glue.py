"""GLUE: its tasks as data, and texts with a label as token ids with the positions to edit.

The rows are single sentences or pairs for an encoder with a classifier head; positions count from its first token, the
one that the head reads (paper, eq. 5; pyreft `examples/loreft/dataset.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from reft_kernels.training.buckets import Buckets
from reft_kernels.training.collators import LOCATIONS, ReftDataCollator
from reft_kernels.training.item_layout import position_spans, span_locations
from reft_kernels.training.metrics import compute_metrics
from reft_kernels.training.sources import check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reft_kernels.model import ReftModel

MAX_LENGTH = 256
PLAIN_FIELDS = ("sentence1", "sentence2")


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        name: as GLUE's configurations are called.
        fields: the names of its texts in GLUE, one or two.
        labels: the names of the classes, by number; none for scores.
        metrics: what is measured, by the names of metrics.py.
        best_metric: which of them selects the best epoch and is reported (the paper's choice).
    """

    name: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    best_metric: str

    @property
    def num_labels(self) -> int:
        """How many logits the head has."""
        return len(self.labels) or 1

    @property
    def problem_type(self) -> Literal["regression", "single_label_classification"]:
        """The model's `config.problem_type`."""
        return "single_label_classification" if self.labels else "regression"

    def compute_metrics(self) -> Callable[[Any], dict[str, float]]:
        """What Trainer takes as `compute_metrics`, see metrics.py."""
        return compute_metrics(self.metrics, regression=not self.labels)


_PAIR = ("not_equivalent", "equivalent")
_ENTAILMENT = ("entailment", "not_entailment")
_ACCURACY = (("accuracy",), "accuracy")
_ACCURACY_F1 = (("accuracy", "f1"), "accuracy")

GLUE_TASKS: Mapping[str, GlueTask] = MappingProxyType(
    {
        task.name: task
        for task in (
            GlueTask(
                "cola",
                ("sentence",),
                ("unacceptable", "acceptable"),
                ("matthews_correlation",),
                "matthews_correlation",
            ),
            GlueTask("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), *_ACCURACY),
            GlueTask("mrpc", ("sentence1", "sentence2"), _PAIR, *_ACCURACY_F1),
            GlueTask("qnli", ("question", "sentence"), _ENTAILMENT, *_ACCURACY),
            GlueTask("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), *_ACCURACY_F1),
            GlueTask("rte", ("sentence1", "sentence2"), _ENTAILMENT, *_ACCURACY),
            GlueTask("sst2", ("sentence",), ("negative", "positive"), *_ACCURACY),
            GlueTask("stsb", ("sentence1", "sentence2"), (), ("pearson", "spearmanr"), "pearson"),
            GlueTask("wnli", ("sentence1", "sentence2"), _ENTAILMENT, *_ACCURACY),
        )
    }
)
"""The tasks by name."""


def glue_task(task: str | GlueTask) -> GlueTask:
    """The task of a name; a task is returned as it is. Raises ValueError for an unknown name."""
    if isinstance(task, GlueTask):
        return task
    if task not in GLUE_TASKS:
        raise ValueError(f"task must be one of {', '.join(GLUE_TASKS)}, got {task!r}")
    return GLUE_TASKS[task]


class GlueDataset(Dataset[dict[str, Any]]):
    """Rows of a GLUE task as token ids with a label and the positions to edit.

    Texts are tokenised with the tokenizer's special tokens and cut at `max_length` tokens, of a pair the longer text
    first. Positions are those of the tokens that are left, special ones included, so that none is cut off: with n
    tokens the first min(f, n // 2) and the last min(l, n // 2). No padding token is added: pyreft's data set has one at
    the end of every sequence, masked, where slots that a short text leaves empty point to; here they are -1.

    Items: `input_ids` [S] int64, `labels` (an int for a class, a float for a score), for a tokenizer with segments
    `token_type_ids` [S] int64, and `intervention_locations` [I, P] int64, one row for each of
    `reft_model.representations`, padded with -1 to the widest. The last is absent where a representation edits "all"
    positions.

    Args:
        tokenizer: a transformers tokenizer; nothing of it is changed.
        reft_model: its `representations` say which positions are edited.
        rows: mappings with the texts, under the task's own field names or as `sentence1` (and `sentence2`), and
            `label`: the number of the class or its name, or the score.
        task: a task or its name.
        max_length: the longest sequence, in tokens.
        labelled: False for rows to predict, whose labels are not looked at.

    Raises:
        ValueError: no rows, `max_length` too short for any text, or a bad row, which the message names by its number:
            a text or a label that is missing, empty or of another type, a class out of range.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reft_model: ReftModel,
        rows: Sequence[Mapping[str, Any]],
        task: str | GlueTask,
        *,
        max_length: int = MAX_LENGTH,
        labelled: bool = True,
    ) -> None:
        self.task = glue_task(task)
        if not len(rows):
            raise ValueError(f"no rows of {self.task.name}")
        spans = position_spans([representation.positions for representation in reft_model.representations])
        places = [f"{self.task.name}, row {number}" for number in range(len(rows))]
        texts = [_texts(row, where, self.task) for row, where in zip(rows, places, strict=True)]
        labels = [_label(row, where, self.task) for row, where in zip(rows, places, strict=True)] if labelled else None
        special = tokenizer.num_special_tokens_to_add(pair=len(self.task.fields) == 2)
        if max_length <= special:
            raise ValueError(f"max_length must be more than the {special} special tokens of a text, got {max_length}")
        encoded = tokenizer(
            *(list(column) for column in zip(*texts, strict=True)),
            padding=False,
            truncation="longest_first",
            max_length=max_length,
            verbose=False,
        )
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        locations: dict[int, Tensor] = {}
        self.items: list[dict[str, Any]] = []
        for number in range(len(rows)):
            item: dict[str, Any] = {name: torch.tensor(encoded[name][number], dtype=torch.int64) for name in names}
            if labels is not None:
                item["labels"] = labels[number]
            if spans is not None:
                length = len(item["input_ids"])
                if length not in locations:
                    locations[length] = span_locations(length, spans)
                item[LOCATIONS] = locations[length]
            self.items.append(item)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.items[index])

    @property
    def lengths(self) -> list[int]:
        """The length of every item's `input_ids`, in tokens."""
        return [len(item["input_ids"]) for item in self.items]


def check_glue_row(row: Mapping[str, Any], where: str, task: str | GlueTask) -> Mapping[str, Any]:
    """The row, if GlueDataset takes it. Raises ValueError, which starts with `where`, for a bad text or label."""
    task = glue_task(task)
    _texts(row, where, task)
    _label(row, where, task)
    return row


def _texts(row: Mapping[str, Any], where: str, task: GlueTask) -> tuple[str, ...]:
    plain = PLAIN_FIELDS[: len(task.fields)]
    fields = next((names for names in (task.fields, plain) if all(name in row for name in names)), None)
    if fields is None:
        wanted = " or ".join(" and ".join(names) for names in dict.fromkeys((task.fields, plain)))
        raise ValueError(f"{where}: expected the fields {wanted}, got {', '.join(map(str, row)) or 'none'}")
    for name in fields:
        if not isinstance(row[name], str):
            raise ValueError(f"{where}: field {name!r} must be text, got {type(row[name]).__name__}")
        if not row[name].strip():
            raise ValueError(f"{where}: field {name!r} is empty")
        check_text(row[name], f"{where}: field {name!r}")
    return tuple(row[name] for name in fields)


def _label(row: Mapping[str, Any], where: str, task: GlueTask) -> int | float:
    label = row.get("label")
    if label is None:
        raise ValueError(f"{where}: field 'label' is missing (fields there: {', '.join(map(str, row)) or 'none'})")
    if task.labels:
        if label in task.labels:
            return task.labels.index(label)
        if isinstance(label, bool) or not isinstance(label, Integral):
            raise ValueError(
                f"{where}: label must be the number of a class, from 0 to {task.num_labels - 1}, or one of "
                f"{', '.join(task.labels)}, got {label!r}"
            )
        if not 0 <= int(label) < task.num_labels:
            raise ValueError(f"{where}: label must be from 0 to {task.num_labels - 1}, got {label}")
        return int(label)
    if isinstance(label, bool) or not isinstance(label, Real) or not math.isfinite(label):
        raise ValueError(f"{where}: label must be a score, a finite number, got {label!r}")
    return float(label)


@dataclass
class _PaddedTexts:
    """Encoded texts -> a batch as the tokenizer pads it, S being of few sizes."""

    tokenizer: PreTrainedTokenizerBase
    buckets: Buckets | None

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> Any:
        from transformers import DataCollatorWithPadding

        if self.buckets is None:
            return DataCollatorWithPadding(self.tokenizer)(list(items))
        width = self.buckets.next(max(len(item["input_ids"]) for item in items))
        return DataCollatorWithPadding(self.tokenizer, padding="max_length", max_length=width)(list(items))


def glue_collator(tokenizer: PreTrainedTokenizerBase, pad_to: int | Sequence[int] | None = None) -> ReftDataCollator:
    """Items of GlueDataset -> a batch padded to its longest item, with `attention_mask` [B, S] and positions.

    Args:
        pad_to: S is a multiple of this number, or one of these numbers (see Buckets).

    Raises ValueError where the tokenizer has no padding token; in a call, for a batch that is longer than every number
    in `pad_to`.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad_token, which batches of texts are filled up with")
    return ReftDataCollator(_PaddedTexts(tokenizer, None if pad_to is None else Buckets(pad_to)))


def train_head(model: nn.Module) -> list[str]:
    """Let the classifier head of a base model (`classifier`, or `score`) be trained along with the interventions.

    Returns the names of its parameters. Raises ValueError where the model has no such head.
    """
    for name in ("classifier", "score"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Module):
            head.requires_grad_(True)
            return [f"{name}.{parameter}" for parameter, _ in head.named_parameters()]
    raise ValueError(f"{type(model).__name__} has no head named classifier or score")
