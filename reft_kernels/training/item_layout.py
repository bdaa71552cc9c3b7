"""From token ids to items: which of them are learned, and where the prompt is edited."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from reft_kernels.positions import get_intervention_locations, parse_positions

IGNORE_INDEX = -100


class ItemLayout:
    """From token ids and the length of their prompt to an item: labels on the output, positions to edit in the prompt.

    Args:
        positions: of each representation; None and "all" are every token. Where one of them edits every token, items
            have no `intervention_locations`.
    """

    def __init__(self, positions: Iterable[str | None]) -> None:
        self._spans = position_spans(positions)
        self._locations: dict[int, Tensor] = {}  # by length of the prompt

    def item(self, input_ids: Tensor, prompt_length: int) -> dict[str, Tensor]:
        """The item of `input_ids` int64 [S], of which the first `prompt_length` are prompt."""
        labels = input_ids.clone()
        labels[:prompt_length] = IGNORE_INDEX
        item = {"input_ids": input_ids, "labels": labels}
        if self._spans is not None:
            if prompt_length not in self._locations:
                self._locations[prompt_length] = span_locations(prompt_length, self._spans)
            item["intervention_locations"] = self._locations[prompt_length]
        return item


def position_spans(positions: Iterable[str | None]) -> list[tuple[int, int]] | None:
    """(first, last) of each representation; None without any, and as soon as one of them edits all positions."""
    spans: list[tuple[int, int]] = []
    for text in positions:
        span = None if text is None else parse_positions(text)
        if span is None:
            return None
        spans.append(span)
    return spans or None


def span_locations(prompt_length: int, spans: Sequence[tuple[int, int]]) -> Tensor:
    """The positions of a prompt [I, P], one row for each span, padded with -1 to the widest."""
    width = max(first + last for first, last in spans)
    rows: dict[tuple[int, int], list[int]] = {}
    for first, last in spans:
        if (first, last) not in rows:
            (row,) = get_intervention_locations(
                prompt_length, first_n=first, last_n=last, num_interventions=1, share_weights=True
            )
            rows[first, last] = [*row, *[-1] * (width - len(row))]
    return torch.tensor([rows[span] for span in spans], dtype=torch.int64)
