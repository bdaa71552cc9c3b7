"""Counter-based dropout masks: the same bits for a seed on every backend, forward and backward.

Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"). The element in column j of
row n takes word ``j % 4`` of the block with key ``seed`` and counter ``(j // 4, n mod 2^32, n div 2^32, 0)``, where
n counts the rows of h from its start. A mask therefore depends on the seed and on the place of the element alone,
not on the order or the number of the edited positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def philox_words(seed: Tensor, rows: Tensor, columns: int) -> Tensor:
    """The random words of whole rows.

    Args:
        seed: int64 [1], the 64-bit key.
        rows: int64 [N], row numbers.
        columns: d, the length of a row.

    Returns:
        int64 [N, d], each in [0, 2^32).
    """
    blocks = (columns + 3) // 4
    shape = (rows.numel(), blocks)
    c0 = torch.arange(blocks, device=rows.device, dtype=torch.int64).expand(shape)
    c1 = (rows & _MASK32)[:, None].expand(shape)
    c2 = ((rows >> 32) & _MASK32)[:, None].expand(shape)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        # A product of two 32-bit words wraps in int64, but its 64 bits are right: the mask after the arithmetic
        # shift takes the high word as if unsigned.
        low_a, low_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = ((low_b >> 32) & _MASK32) ^ c1 ^ k0
        c2 = ((low_a >> 32) & _MASK32) ^ c3 ^ k1
        c1, c3 = low_b & _MASK32, low_a & _MASK32
        k0, k1 = (k0 + _KEY_A) & _MASK32, (k1 + _KEY_B) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1).reshape(rows.numel(), 4 * blocks)[:, :columns]


def keep_threshold(dropout: float) -> int:
    """The word, shifted right by one so that it fits an int32, from which an element is kept."""
    return min(round(dropout * 2**31), 2**31 - 1)


def keep_mask(seed: Tensor, rows: Tensor, columns: int, dropout: float) -> Tensor:
    """Which elements survive dropout: bool [N, d], True with probability ``1 - dropout``.

    Args:
        seed: int64 [1].
        rows: int64 [N], row numbers, counted over all leading dimensions of h.
        columns: d.
        dropout: the probability of dropping, in [0, 1).
    """
    threshold = keep_threshold(dropout)
    # In parts: the rounds hold some ten int64 for every element.
    parts = rows.split(max(1, 2**20 // columns))
    return torch.cat([(philox_words(seed, part, columns) >> 1) >= threshold for part in parts])
