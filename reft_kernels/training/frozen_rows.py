"""Batches of what changes alone: every row from its first edited token on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reft_kernels.training.collators import LOCATIONS, SUBSPACES
from reft_kernels.training.item_layout import IGNORE_INDEX

ROWS = "frozen_rows"
_KNOWN = ("input_ids", "labels", "attention_mask", LOCATIONS, SUBSPACES, "id")


@dataclass(frozen=True)
class SuffixRows:
    """The rows of a batch as they were; stays on the host.

    Attributes:
        tokens: the token ids of every row, int64 [S], without padding.
        starts: t0 of every row.
        keys: a digest of tokens and t0.
        locations: int64 [B, num_interventions, P], counted within the whole rows.
    """

    tokens: list[Tensor]
    starts: list[int]
    keys: list[str]
    locations: Tensor


class SuffixCollator:
    """Another collator's batch, cut in front of every row's first edited token.

    t0 is a row's first edited token, or the token that predicts its first label where that comes before (or where the
    row is not edited at all). With T the largest t0 and n the largest S - t0 of the batch it then holds

    - `input_ids`, `labels` and `position_ids` [B, n]: the row from t0 on, padded on the right;
    - `attention_mask` [B, T + n]: padding, t0 tokens before, the row from t0 on, padding;
    - `intervention_locations` [B, I, P], counted from t0;
    - `subspaces` as they were, and the rows (SuffixRows) under "frozen_rows".

    A batch without labels is left as it is.

    Raises ValueError where the inner collator pads on the left, has no locations, or makes more than the above.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, features: Any) -> Any:
        batch = self.collator(features)
        return batch if batch.get("labels") is None else suffix_batch(batch)


def suffix_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """See SuffixCollator."""
    _check(batch)
    ids, labels, locations = batch["input_ids"], batch["labels"], batch[LOCATIONS]
    mask = batch.get("attention_mask")
    lengths = torch.full((len(ids),), ids.shape[1]) if mask is None else _lengths(mask)
    if (labels.masked_fill(torch.arange(ids.shape[1]) < lengths[:, None], IGNORE_INDEX) != IGNORE_INDEX).any():
        raise ValueError("labels must be -100 where attention_mask is 0")
    starts = _starts(labels, locations, lengths)
    before, n = int(starts.max()), int((lengths - starts).max())
    columns = starts[:, None] + torch.arange(n)  # [B, n] in the whole row
    inside = columns < lengths[:, None]
    columns = columns.clamp(max=ids.shape[1] - 1)  # padding has a place that the model knows
    there = torch.cat([torch.arange(before) >= before - starts[:, None], inside], dim=1)
    tokens = [row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)]
    cut = {name: batch[name] for name in (SUBSPACES,) if name in batch}
    return {
        **cut,
        "input_ids": ids.gather(1, columns),
        "labels": labels.gather(1, columns).masked_fill(~inside, IGNORE_INDEX),
        "attention_mask": there.long(),
        "position_ids": columns,
        LOCATIONS: torch.where(locations >= 0, locations - starts[:, None, None], -1),
        ROWS: SuffixRows(tokens, starts.tolist(), list(map(_digest, tokens, starts.tolist())), locations),
    }


def _check(batch: Mapping[str, Any]) -> None:
    if more := [name for name in batch if name not in _KNOWN]:
        raise ValueError(f"frozen_cache does not know what {more[0]!r} of a batch means for a part of its tokens")
    if not isinstance(batch.get(LOCATIONS), Tensor) or batch[LOCATIONS].dim() != 3:
        raise ValueError(
            f"frozen_cache needs {LOCATIONS} [B, num_interventions, P] in every batch, to know where the first edited "
            f"token of a row is; the batch has {', '.join(batch)}"
        )
    for name in ("input_ids", "labels"):
        if not isinstance(batch.get(name), Tensor) or batch[name].dim() != 2:
            raise ValueError(f"frozen_cache needs {name} [B, S] in every batch, got {type(batch.get(name)).__name__}")


def _lengths(mask: Tensor) -> Tensor:
    lengths = mask.sum(1)
    if not torch.equal(mask.bool(), torch.arange(mask.shape[1]) < lengths[:, None]) or not lengths.all():
        raise ValueError("frozen_cache needs rows of at least one token that are padded on the right")
    return lengths


def _starts(labels: Tensor, locations: Tensor, lengths: Tensor) -> Tensor:
    """t0 of every row, int64 [B]."""
    edited = locations.masked_fill(locations < 0, 2**62).flatten(1)
    first = edited.amin(1) if edited.shape[1] else torch.full_like(lengths, 2**62)
    predicted = labels[:, 1:] != IGNORE_INDEX  # column j predicts the label of j + 1
    columns = torch.arange(predicted.shape[1]).expand_as(predicted).masked_fill(~predicted, 2**62)
    if columns.shape[1]:
        first = torch.minimum(first, columns.amin(1))
    return torch.minimum(first, lengths - 1)


def _digest(tokens: Tensor, start: int) -> str:
    digest = hashlib.blake2b(str(start).encode() + b":", digest_size=16)
    digest.update(tokens.contiguous().numpy().tobytes())
    return digest.hexdigest()
