"""pyreft's collators: batches whose edit positions are tensors, whatever the items' lists look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reft_kernels.positions import stack_locations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOCATIONS = "intervention_locations"
SUBSPACES = "subspaces"


@dataclass
class ReftDataCollator:
    """Another collator's batch, with `intervention_locations` and `subspaces` (pyreft `ReftDataCollator`).

    The inner collator, for example transformers' `DataCollatorForSeq2Seq`, makes the batch of everything else. Added
    are, where the items have them,

    - `intervention_locations` [B, num_interventions, P] int64: rows may differ in length and hold -1 ("no token"),
      with which they are filled up. Where the inner collator's tokenizer pads on the left, positions move along;
    - `subspaces` [B, num_interventions, k] int64.

    Attributes:
        data_collator: the inner collator.
        pyreft_compat: hand everything to the inner collator, as pyreft does, and cut locations after S entries. Most
            inner collators fail at rows of different lengths then, and positions stay where they are.

    Raises ValueError where only some items have locations or where they do not fit together.
    """

    data_collator: Callable[[list[Any]], Any]
    pyreft_compat: bool = False

    def __call__(self, instances: Sequence[Mapping[str, Any]]) -> Any:
        if self.pyreft_compat:
            batch = self.data_collator(list(instances))
            batch[LOCATIONS] = batch[LOCATIONS][..., : batch["input_ids"].shape[-1]]
            return batch
        batch = self.data_collator([_labels_as_list(item) for item in without_locations(instances)])
        add_locations(batch, instances, getattr(self.data_collator, "tokenizer", None))
        return batch


@dataclass
class ReftRewardCollator:
    """Items of ReftRewardDataset -> one batch of 2 B sequences, chosen and rejected by turns (pyreft
    `ReftRewardCollator`).

    The batch holds `input_ids` and `attention_mask` [2 B, S], `reward` [2 B] (1.0 and 0.0 where the items have no
    rewards), and `intervention_locations` and `subspaces` as ReftDataCollator makes them.

    Attributes:
        tokenizer, padding, max_length, pad_to_multiple_of, return_tensors: see the tokenizer's `pad`.
        pyreft_compat: hand the locations to `pad` as well, which fails at rows of different lengths, and cut them after
            S entries; positions do not move with padding on the left, and there are no `subspaces`.
    """

    tokenizer: PreTrainedTokenizerBase
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    pyreft_compat: bool = False

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = [row for feature in features for row in _chosen_and_rejected(feature)]
        batch = self.tokenizer.pad(
            rows if self.pyreft_compat else without_locations(rows),
            padding=self.padding,
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors=self.return_tensors,
        )
        joined = {name: batch[name] for name in ("input_ids", "attention_mask", "reward")}
        if self.pyreft_compat:
            joined[LOCATIONS] = batch[LOCATIONS][..., : batch["input_ids"].shape[-1]]
        else:
            add_locations(joined, rows, self.tokenizer)
        return joined


def _chosen_and_rejected(feature: Mapping[str, Any]) -> list[dict[str, Any]]:
    shared = {name: feature[name] for name in (LOCATIONS, SUBSPACES) if name in feature}
    return [
        {
            "input_ids": feature[f"{kind}_output"],
            "attention_mask": feature[f"{kind}_output_mask"],
            "reward": feature.get(f"{kind}_reward", otherwise),
            **shared,
        }
        for kind, otherwise in (("chosen", 1.0), ("rejected", 0.0))
    ]


def without_locations(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The items as other collators can take them."""
    return [{name: value for name, value in item.items() if name not in (LOCATIONS, SUBSPACES)} for item in items]


def _labels_as_list(item: dict[str, Any]) -> dict[str, Any]:
    """Token labels as ints: padded as tensors they are joined one by one through numpy, which is slow."""
    labels = item.get("labels")
    return {**item, "labels": labels.tolist()} if isinstance(labels, Tensor) and labels.dim() == 1 else item


def add_locations(batch: Any, items: Sequence[Mapping[str, Any]], tokenizer: Any = None) -> None:
    """Put the items' locations and subspaces into their batch, which the tokenizer, if any, padded on its side."""
    if (locations := _column(items, LOCATIONS)) is not None:
        offsets = None
        if getattr(tokenizer, "padding_side", "right") == "left" and "input_ids" in batch:
            offsets = [batch["input_ids"].shape[1] - len(item["input_ids"]) for item in items]
        batch[LOCATIONS] = stack_locations(locations, offsets)
    if (subspaces := _column(items, SUBSPACES)) is not None:
        batch[SUBSPACES] = _stacked(subspaces)


def pad_locations(locations: Tensor, width: int | None) -> Tensor:
    """`locations` [..., P] with `width` positions, the new ones -1. Raises ValueError where there are more."""
    if width is None or locations.shape[-1] == width:
        return locations
    if locations.shape[-1] > width:
        raise ValueError(f"num_positions={width}: a batch has {locations.shape[-1]} positions")
    return torch.nn.functional.pad(locations, (0, width - locations.shape[-1]), value=-1)


def _column(items: Sequence[Mapping[str, Any]], name: str) -> list[Any] | None:
    found = [item[name] for item in items if item.get(name) is not None]
    if found and len(found) < len(items):
        raise ValueError(f"{len(found)} of {len(items)} items of a batch have {name}: expected all or none")
    return found or None


def _stacked(subspaces: Sequence[Any]) -> Tensor:
    rows = [torch.as_tensor(item, dtype=torch.int64) for item in subspaces]
    shapes = {tuple(row.shape) for row in rows}
    if len(shapes) > 1:
        raise ValueError(f"subspaces of one batch must have one shape [num_interventions, k], got {sorted(shapes)}")
    return torch.stack(rows)
