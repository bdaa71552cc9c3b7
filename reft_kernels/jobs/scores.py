"""What an evaluation gives: numbers, and what was said row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scores:
    """Metrics of one data set (fractions, not percent), the number of rows, and one record for each row if there are
    any: prompt, text, answer, gold, correct."""

    metrics: Mapping[str, float]
    rows: int
    predictions: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
