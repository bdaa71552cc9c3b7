"""Several examples in one row, each with positions of its own and attention to itself alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reft_kernels.model import ReftModel
from reft_kernels.modules import inner_model
from reft_kernels.training.buckets import Buckets
from reft_kernels.training.collators import LOCATIONS, SUBSPACES, pad_locations
from reft_kernels.training.item_layout import IGNORE_INDEX


@dataclass
class PackedCollator:
    """Items of SupervisedDataset -> one batch, several items to a row, so that few columns are padding.

    A batch of the same items has the same loss and gradients as with SupervisedCollator. It holds `input_ids`, `labels`
    and `position_ids` [R, S] int64, which count from 0 in each item, and `intervention_locations` [R, I, P] int64: of
    all the items of a row, counted in the row. There is no `attention_mask`: transformers reads from position_ids which
    tokens belong together. Not every model does that; see :func:`check_packing`, which ReftTrainerForCausalLM calls.
    Columns of padding, whose position is 0, attend to themselves alone.

    Attributes:
        pad_token_id: fills padded columns.
        row_length: the most tokens of a row; longer rows are never made and a longer item raises ValueError. None puts
            all items into one row, which flash attention needs; other attention takes time that grows with the square
            of a row's length.
        pad_to: S is a multiple of this number, or one of these numbers; see :class:`Buckets`.
        num_positions: P, always; by default the largest number of the batch.

    Raises ValueError for items with `subspaces`, which are one choice for a row, and with masked tokens of their own.
    """

    pad_token_id: int = 0
    row_length: int | None = None
    pad_to: int | Sequence[int] | None = None
    num_positions: int | None = None

    def __post_init__(self) -> None:
        if self.row_length is not None and self.row_length < 2:
            raise ValueError(f"row_length must be at least 2, got {self.row_length}")
        self.buckets = None if self.pad_to is None else Buckets(self.pad_to)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        for feature in features:
            if feature.get(SUBSPACES) is not None:
                raise ValueError("items with subspaces cannot be packed: a row has one choice of subspaces")
            mask = feature.get("attention_mask")
            if mask is not None and not bool(torch.as_tensor(mask).all()):
                raise ValueError("items with an attention_mask that hides tokens cannot be packed")
        ids = [torch.as_tensor(feature["input_ids"], dtype=torch.int64) for feature in features]
        rows = pack([len(item) for item in ids], self.row_length)
        width = max(sum(len(ids[i]) for i in row) for row in rows)
        width = width if self.buckets is None else self.buckets.next(width)
        batch = {
            "input_ids": torch.full((len(rows), width), self.pad_token_id, dtype=torch.int64),
            "labels": torch.full((len(rows), width), IGNORE_INDEX, dtype=torch.int64),
            "position_ids": torch.zeros(len(rows), width, dtype=torch.int64),
        }
        has_locations = [feature.get(LOCATIONS) is not None for feature in features]
        if any(has_locations) and not all(has_locations):
            raise ValueError(f"{sum(has_locations)} of {len(features)} items of a batch have {LOCATIONS}: all or none")
        places: list[list[list[int]]] = []
        for number, row in enumerate(rows):
            start = 0
            moved: list[list[int]] = []
            for i in row:
                stop = start + len(ids[i])
                batch["input_ids"][number, start:stop] = ids[i]
                # The first token is predicted by none of its own example's.
                labels = torch.as_tensor(features[i]["labels"], dtype=torch.int64)
                batch["labels"][number, start + 1 : stop] = labels[1:]
                batch["position_ids"][number, start:stop] = torch.arange(len(ids[i]))
                if has_locations[0]:
                    named = _moved(features[i][LOCATIONS], start)
                    moved = [one + more for one, more in zip(moved, named, strict=True)] if moved else named
                start = stop
            places.append(moved)
        if has_locations[0]:
            batch[LOCATIONS] = pad_locations(_stacked(places), self.num_positions)
        return batch


def pack(lengths: Sequence[int], row_length: int | None) -> list[list[int]]:
    """Which items share a row: the longest first, each into the first row that has room.

    Args:
        lengths: of the items.
        row_length: the most tokens of a row; None is one row for all.

    Returns the items' numbers by row. Raises ValueError where an item is longer than a row.
    """
    if row_length is None:
        return [list(range(len(lengths)))]
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > row_length:
            raise ValueError(f"an item of {lengths[i]} tokens does not fit into row_length={row_length}")
        fitting = next((row for row, left in enumerate(room) if left >= lengths[i]), None)
        if fitting is None:
            rows.append([i])
            room.append(row_length - lengths[i])
        else:
            rows[fitting].append(i)
            room[fitting] -= lengths[i]
    return rows


def _moved(locations: Any, offset: int) -> list[list[int]]:
    """An item's positions [I][P] without "no token", counted from `offset` on."""
    table = locations.tolist() if isinstance(locations, Tensor) else locations
    return [[position + offset for position in row if position >= 0] for row in table]


def _stacked(places: list[list[list[int]]]) -> Tensor:
    width = max(len(row) for item in places for row in item)
    return torch.tensor([[[*row, *[-1] * (width - len(row))] for row in item] for item in places], dtype=torch.int64)


@torch.no_grad()
def check_packing(reft_model: ReftModel) -> None:
    """Tries whether the base model, with its attention, keeps the examples of a row apart.

    Two examples in a row are put through it, next to another neighbour, and each by itself. It is so for the models of
    transformers whose masks are made from position_ids (Llama, Qwen, Gemma, Mistral, GPT-2, GPT-NeoX and others) with
    "eager" and "sdpa" attention, and with flash attention where all is in one row.

    Raises ValueError, saying why, where it is not, and where positions of the interventions cannot be told in a row.
    """
    edits = [item.span is not None for item in reft_model.representations]
    if any(edits) and not all(edits):
        raise ValueError(
            "packing: some interventions edit all positions and some do not; data has no positions for either then"
        )
    base: Any = inner_model(reft_model.model)
    name = type(base).__name__
    if not (callable(getattr(base, "can_generate", None)) and base.can_generate()):
        raise ValueError(f"packing: {name} is no causal language model, and has one output for a whole row")
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise ValueError(f"packing: {name} takes no position_ids, so it cannot tell the examples of a row apart")
    embedding = base.get_input_embeddings()
    device, count = embedding.weight.device, embedding.weight.shape[0]
    if device.type == "meta":
        return
    training = [module for module in base.modules() if module.training]
    base.eval()
    try:
        apart = _try(base, device, count)
    finally:
        for module in training:
            module.training = True
    if not apart:
        attention = getattr(base.config, "_attn_implementation", None)
        raise ValueError(
            f"packing: {name} with attn_implementation={attention!r} does not keep the examples of a row apart; "
            "pad them instead (SupervisedCollator), or choose another attention"
        )


def _try(base: Any, device: torch.device, vocabulary: int) -> bool:
    first, second = 5, 4
    ids = torch.arange(2 * (first + second), device=device).view(2, -1) * 7 % vocabulary
    positions = torch.tensor([[*range(first), *range(second)]] * 2, device=device)
    neighbours = ids.clone()
    neighbours[:, :first] = (ids[:, :first] + 3) % vocabulary

    def output(ids: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = base(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits.float()

    packed = output(ids, positions)
    beside = output(neighbours, positions)[:, first:]
    alone = torch.cat([output(ids[:, :first], positions[:, :first]), output(ids[:, first:], positions[:, first:])], 1)
    wide = next(base.parameters()).dtype in (torch.float32, torch.float64)
    spread = alone.std()
    by_itself = (packed - alone).abs().max() <= (1e-3 if wide else 0.1) * spread
    return bool(by_itself & ((packed[:, first:] - beside).abs().max() <= 1e-3 * spread))
