"""Which rows choose a model and which it is reported on: the paper's splits, as row numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch

GSM8K_HELD_OUT = 300

Row = TypeVar("Row")


class Split(NamedTuple):
    """Row numbers: `kept` for training, or for reporting; `held_out` to choose settings and the best epoch by."""

    kept: list[int]
    held_out: list[int]


def hold_out(count: int, size: int | float, seed: int = 42) -> Split:
    """Holds out rows drawn at random, the same for the same seed on every machine.

    Args:
        count: how many rows there are.
        size: how many to hold out, an int; or their share, a float between 0 and 1, rounded down.
        seed: of the draw.

    Both parts are in the order of the draw, that of `torch.utils.data.random_split(rows, [count - size, size])` after
    `torch.manual_seed(seed)`.

    Raises:
        ValueError: one of the two parts would be empty.
    """
    held_out = int(count * size) if isinstance(size, float) else size
    if not 0 < held_out < count:
        raise ValueError(f"size must leave rows in both parts, got {size!r} of {count} rows")
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return Split(order[: count - held_out], order[count - held_out :])


def glue_split(count: int, seed: int = 42) -> Split:
    """The paper's halves of a GLUE validation set: `held_out` chooses the best epoch, `kept` is reported.

    1,000 rows are held out of more than 5,000, else half of them, rounded down. Equal to pyreft's split in
    `examples/loreft/train.py` with the same seed, row for row.

    Raises ValueError for fewer than two rows.
    """
    return hold_out(count, 1000 if count > 5000 else count // 2, seed)


def gsm8k_split(count: int) -> Split:
    """The paper's validation rows of GSM8K: the last 300 of its training rows, in their order.

    Raises ValueError for 300 rows or fewer.
    """
    if count <= GSM8K_HELD_OUT:
        raise ValueError(f"the last {GSM8K_HELD_OUT} rows are held out, got {count} rows")
    rows = list(range(count))
    return Split(rows[:-GSM8K_HELD_OUT], rows[-GSM8K_HELD_OUT:])


def take(rows: Sequence[Row], numbers: Sequence[int]) -> list[Row]:
    """The rows of these numbers."""
    return [rows[number] for number in numbers]
