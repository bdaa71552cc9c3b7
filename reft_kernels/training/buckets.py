"""Few sizes instead of many, for what is compiled or captured once for each shape."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Buckets:
    """The sizes that others are padded to: the multiples of an int, or the given ones.

    Raises ValueError where there is no size, or one below 1.
    """

    def __init__(self, sizes: int | Sequence[int]) -> None:
        self.multiple = sizes if isinstance(sizes, int) else None
        self.sizes = [] if isinstance(sizes, int) else sorted(set(sizes))
        if min([sizes] if isinstance(sizes, int) else self.sizes, default=0) < 1:
            raise ValueError(f"pad_to must be a number of at least 1 or a list of such numbers, got {sizes!r}")

    def next(self, size: int) -> int:
        """The smallest of the sizes that is at least `size`. Raises ValueError where all are smaller."""
        if self.multiple is not None:
            return max(-(-size // self.multiple), 1) * self.multiple
        index = bisect_left(self.sizes, size)
        if index == len(self.sizes):
            raise ValueError(f"pad_to: a batch of length {size} is longer than the longest length, {self.sizes[-1]}")
        return self.sizes[index]
