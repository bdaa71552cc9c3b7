"""Rows that say which dimensions of the interventions' subspaces they train (paper, appendix G.1).

Abilities that are learnt from different rows in different dimensions of one LoReFT can be used together afterwards. The
interventions are the caller's own: they read `subspaces`, which the library's ignore, as pyreft's do.

A row's loss has no gradient by the other dimensions' rows of W, b and R. R with orthonormal rows moves as a whole all
the same, whatever keeps them orthonormal; free rows (`orthogonality="none"`) of other dimensions stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reft_kernels.model import ReftModel


def read_subspaces(value: object, where: str) -> tuple[int, ...] | None:
    """The field `subspaces` of a decoded row; None where there is none.

    Raises ValueError, which starts with `where`, for anything but a list of ints that is not empty.
    """
    if value is None:
        return None
    dimensions = tuple(value) if isinstance(value, (list, tuple)) else ()
    if not dimensions or not all(isinstance(k, int) and not isinstance(k, bool) for k in dimensions):
        raise ValueError(f"{where}: field 'subspaces' must be a list of ints, got {value!r}")
    return dimensions


def checked_subspaces(subspaces: Sequence[Sequence[int]], count: int, reft_model: ReftModel) -> list[list[int]]:
    """The dimensions of `count` examples, k of each.

    Raises ValueError where they are not one list of k different dimensions an example, each from 0 to r - 1 with the
    smallest rank r of the model's interventions.
    """
    if len(subspaces) != count:
        raise ValueError(f"expected subspaces for each of {count} prompts, got {len(subspaces)}")
    ranks = [item.low_rank_dimension for item in reft_model.representations if item.low_rank_dimension is not None]
    rank = min(ranks, default=None)
    rows = [list(row) for row in subspaces]
    for index, row in enumerate(rows):
        check_subspace(row, f"example {index}", len(rows[0]), rank)
    return rows


def check_subspace(dimensions: Sequence[int], where: str, count: int, rank: int | None) -> None:
    """Raises ValueError, which starts with `where`, unless these are `count` different dimensions from 0 to r - 1."""
    if not dimensions or len(dimensions) != count or len(set(dimensions)) != len(dimensions):
        raise ValueError(
            f"{where}: subspaces must be different dimensions, as many as the first example's {count}, got "
            f"{list(dimensions)}"
        )
    if min(dimensions) < 0 or (rank is not None and max(dimensions) >= rank):
        raise ValueError(f"{where}: subspaces must be from 0 to r - 1 with the rank r = {rank}, got {list(dimensions)}")
