"""Which tokens are edited: from "f7+l7" or from lists to index tensors on the device, with no host synchronisation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Span = tuple[int, int]
"""(first, last): so many tokens at the start of the prompt, so many at its end."""

_POSITIONS = re.compile(r"(?:f(?P<first>\d+))?(?P<plus>\+)?(?:l(?P<last>\d+))?")


def parse_positions(positions: str) -> Span | None:
    """Read "f7+l7" as (7, 7), "f3" as (3, 0), "l1" as (0, 1) and "all" as None (every token).

    Raises TypeError where ``positions`` is no string and ValueError where it names no token. Source: pyreft's
    ``parse_positions``, which does not know "all".
    """
    if not isinstance(positions, str):
        raise TypeError(f"positions must be a string such as 'f7+l7', got {type(positions).__name__}")
    text = positions.strip()
    if text == "all":
        return None
    match = _POSITIONS.fullmatch(text)
    if match is not None:
        first, last = match["first"], match["last"]
        joined = match["plus"] is not None
        if joined == (first is not None and last is not None):
            span = int(first or 0), int(last or 0)
            if span != (0, 0):
                return span
    raise ValueError(f"positions must be 'fN', 'lN', 'fN+lM' or 'all' with N + M of at least 1, got {positions!r}")


def prompt_mask(attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
    """Which of the attended tokens are prompt: those up to the first label that is not -100.

    Args:
        attention_mask: [B, S], nonzero where a token is attended.
        labels: [B, T] with T <= S, of the last T tokens; None where everything attended is prompt.

    Returns:
        bool [B, S]. A row whose first attended token is labelled has no prompt of its own (plain language
        modelling): all of its attended tokens count.
    """
    attended = attention_mask.to(torch.bool)
    if labels is None:
        return attended
    answered = (labels != -100).cumsum(1) > 0
    if labels.shape[1] < attended.shape[1]:
        answered = torch.nn.functional.pad(answered, (attended.shape[1] - labels.shape[1], 0))
    prompt = attended & ~answered
    return torch.where(prompt.any(1, keepdim=True), prompt, attended)


def prompt_positions(prompt_mask: Tensor, first: int, last: int) -> Tensor:
    """Column indices of the first and the last tokens of each prompt, for left, right and any other padding.

    With n tokens in a row's prompt, the first min(first, n // 2) and the last min(last, n // 2) are named
    (pyreft's rule: the two ends never overlap).

    Args:
        prompt_mask: [B, S], nonzero on the tokens of the prompt.
        first: how many tokens at the start, at least 0.
        last: how many tokens at the end, at least 0.

    Returns:
        int64 [B, first + last] on the mask's device. Slot j < first holds the j-th prompt token, slot
        first + last - k the k-th from the end, and -1 stands where the prompt is too short.
    """
    if prompt_mask.dim() != 2:
        raise ValueError(f"prompt_mask must be [B, S], got shape {list(prompt_mask.shape)}")
    if first < 0 or last < 0:
        raise ValueError(f"first and last must be at least 0, got {first} and {last}")
    batch, width = prompt_mask.shape
    if width == 0:
        return prompt_mask.new_full((batch, first + last), -1, dtype=torch.long)
    count = prompt_mask.to(torch.bool).cumsum(1)  # [B, S], the last column is n
    total = count[:, -1:]
    half = total // 2
    start = torch.arange(first, device=count.device)  # 0 .. first - 1 from the front
    back = torch.arange(last, 0, -1, device=count.device)  # last .. 1 from the end
    nth = torch.cat([(start + 1).expand(batch, -1), total + 1 - back], dim=1)
    named = torch.cat([start < half, back <= half], dim=1)
    columns = torch.searchsorted(count, nth)
    return torch.where(named, columns, -1)


def shift_positions(positions: Tensor, offset: int, length: int) -> Tensor:
    """Positions of a whole sequence as seen from its part [offset, offset + length); outside of it -1."""
    moved = positions - offset
    return torch.where((moved >= 0) & (moved < length), moved, -1)


def drop_duplicates(positions: Tensor) -> Tensor:
    """Keep the first of equal positions along the last dimension and make the others -1."""
    if positions.shape[-1] < 2:
        return positions
    equal = positions.unsqueeze(-1) == positions.unsqueeze(-2)  # [..., P, P]
    return positions.masked_fill(equal.tril(-1).any(-1), -1)


def get_intervention_locations(
    last_position: int,
    *,
    positions: str | None = None,
    first_n: int | None = None,
    last_n: int | None = None,
    num_interventions: int,
    share_weights: bool = False,
    pad_mode: str = "first",
    pyreft_compat: bool = False,
    **others: Any,
) -> list[list[int]]:
    """Positions of every intervention for one prompt, in pyreft's layout (pyreft ``get_intervention_locations``).

    With n = last_position, the prefix is the first min(first_n, n // 2) tokens of the prompt, the suffix its last
    min(last_n, n // 2).

    Args:
        last_position: number of tokens of the prompt.
        positions: "f7+l7" and the like; or give first_n and last_n.
        first_n: how many tokens at the start of the prompt.
        last_n: how many tokens at its end.
        num_interventions: length of the outer list; 0 for a model that edits nothing (LoRA alone).
        share_weights: True where prefix and suffix have one intervention (tied).
        pad_mode: what stands in the slots that a short prompt leaves empty: -1, "no token", with "first";
            last_position, the first token after the prompt, with "last".
        pyreft_compat: pyreft's results where they are odd: a prompt of one token has rows of first_n + last_n, untied
            too, and of an odd number of untied interventions the last has no row.
        **others: have no effect; a data set passes all of its own keywords on.

    Returns:
        ``[num_interventions][P]``. Tied or one-sided: every intervention gets prefix and suffix, P = first_n +
        last_n. Untied: the first half of the interventions gets the prefix, the second half the suffix, P =
        max(first_n, last_n).

    Raises ValueError naming the argument, also for an odd number of untied interventions.
    """
    del others
    if not _is_int(last_position):
        raise TypeError(f"last_position must be an int, got {last_position!r}")
    first, last = _read_span(positions, first_n, last_n)
    if pad_mode not in ("first", "last"):
        raise ValueError(f"pad_mode must be 'first' or 'last', got {pad_mode!r}")
    if last_position < 0 or num_interventions < 0 or first < 0 or last < 0:
        raise ValueError(
            "last_position, first_n, last_n and num_interventions must be at least 0, got "
            f"{last_position}, {first}, {last} and {num_interventions}"
        )
    pad = -1 if pad_mode == "first" else last_position
    half = last_position // 2
    prefix = list(range(min(first, half)))
    suffix = list(range(last_position - min(last, half), last_position))
    two_sided = (prefix and suffix) if pyreft_compat else (first and last)
    if share_weights or not two_sided:
        row = _filled(prefix + suffix, first + last, pad)
        return [list(row) for _ in range(num_interventions)]
    if num_interventions % 2 and not pyreft_compat:
        raise ValueError(
            "an untied prefix and suffix need an even number of interventions (first all prefix, then all suffix "
            f"ones), got num_interventions={num_interventions}"
        )
    width = max(first, last)
    rows = [_filled(prefix, width, pad), _filled(suffix, width, pad)]
    return [list(row) for row in rows for _ in range(num_interventions // 2)]


def _read_span(positions: str | None, first_n: int | None, last_n: int | None) -> Span:
    if positions is not None:
        span = parse_positions(positions)
        if span is None:
            raise ValueError("positions 'all' has no locations: pass unit_locations=None instead")
        return span
    if first_n is None and last_n is None:
        raise ValueError("give positions, or first_n and last_n")
    return first_n or 0, last_n or 0


def _filled(columns: list[int], width: int, pad: int) -> list[int]:
    return columns + [pad] * (width - len(columns))


def stack_locations(locations: Sequence[Any], offsets: Sequence[int] | None = None) -> Tensor:
    """The locations of B examples as one table for ``intervention_locations``.

    Args:
        locations: for each example the lists or the int tensor [num_interventions][P]; rows may differ in length.
        offsets: how far each example's tokens stand from column 0 (padding on the left); added to its positions.

    Returns:
        int64 [B, num_interventions, P], filled up with -1 ("no token"). Examples with one flat list each, which
        stand for a model without interventions, give [B, P].

    Raises ValueError where the examples have different numbers of interventions or something else is nested.
    """
    tables = [_table(item) for item in locations]
    shapes = sorted({tuple(table.shape[:-1]) for table in tables})
    if len(shapes) > 1:
        raise ValueError(
            "intervention_locations of one batch must have one number of interventions, got those of shapes "
            f"{[list(table.shape) for table in tables]}"
        )
    width = max(table.shape[-1] for table in tables)
    padded = [torch.nn.functional.pad(table, (0, width - table.shape[-1]), value=-1) for table in tables]
    stacked = torch.stack(padded)
    if offsets is None or not any(offsets):
        return stacked
    moved = stacked + torch.tensor(offsets).reshape(-1, *[1] * (stacked.dim() - 1))
    return torch.where(stacked >= 0, moved, -1)


def _table(locations: Any) -> Tensor:
    """One example's locations, int64 [num_interventions, P], or [P] where they are one flat list."""
    if isinstance(locations, Tensor):
        return locations.to(torch.long)
    rows = list(locations)
    if all(_is_int(row) for row in rows):
        return torch.tensor(rows, dtype=torch.long)
    if not all(_is_list(row) and all(_is_int(position) for position in row) for row in rows):
        raise ValueError(f"intervention_locations must be ints nested [num_interventions][P], got {locations!s:.60}")
    width = max(len(row) for row in rows)
    return torch.tensor([_filled(list(row), width, -1) for row in rows], dtype=torch.long)


class GivenLocations(NamedTuple):
    """Positions that the caller named, for I interventions and a batch of B.

    table is int64 [I, B, P] on the device, None where every intervention edits every token; ``whole`` holds the
    interventions that edit every token (their part of the table is -1); ``host`` is the table on the CPU and
    ``highest`` its largest position where the caller gave lists, else None (a tensor is never read).
    """

    table: Tensor | None
    whole: frozenset[int]
    host: Tensor | None
    highest: int | None


def read_unit_locations(locations: Any, num_interventions: int, batch: int, device: torch.device) -> GivenLocations:
    """Read pyreft's ``unit_locations`` in any of its forms.

    ``{"sources->base": (None, L)}``, ``{"base": L}`` or L alone, where L is None (every token), an int, a flat list
    of ints (both the same for all), a nested list ``[num_interventions][B][P]`` whose parts may be None and whose
    rows may differ in length, or an int tensor [I, B, P]. -1 means "no token". NumPy's arrays and ints are lists and
    ints. The first of the pair, a list or a tuple, are positions in a source; they have no effect.

    Raises TypeError or ValueError naming what was expected and what came.
    """
    value = _base_part(locations)
    if isinstance(value, Tensor) and value.dim() > 0:
        return _from_tensor(value, num_interventions, batch, device)
    if value is None:
        return GivenLocations(None, frozenset(range(num_interventions)), None, None)
    if _is_int(value):
        value = [value]
    if not _is_list(value):
        raise TypeError(
            "unit_locations must be None, an int, a list or an int tensor, or a dict with the key 'sources->base' or "
            f"'base' holding one of these, got {type(value).__name__}"
        )
    if len(value) and all(_is_int(v) for v in value):
        value = [[[int(v) for v in value]] * batch] * num_interventions
    return _from_lists(value, num_interventions, batch, device)


def is_same_for_all(locations: Any) -> bool:
    """Whether ``unit_locations`` are an int or a flat list, in any of their forms."""
    value: Any = None if locations is None else _base_part(locations)
    return _is_int(value) or (_is_list(value) and len(value) > 0 and all(_is_int(v) for v in value))


def batch_of_locations(locations: Any) -> int | None:
    """For how many rows locations in a form of :func:`read_unit_locations` are; None for those that fit any number."""
    value = _base_part(locations)
    if isinstance(value, Tensor):
        return value.shape[1] if value.dim() == 3 else None
    parts = value if _is_list(value) else []
    return next((len(part) for part in parts if _is_list(part)), None)


def _base_part(locations: Any) -> Any:
    if not isinstance(locations, Mapping):
        return locations
    if set(locations) == {"base"}:
        return locations["base"]
    if set(locations) != {"sources->base"}:
        raise ValueError(
            f"unit_locations must have one key, 'sources->base' or 'base', got {sorted(map(str, locations))}"
        )
    pair = locations["sources->base"]
    if isinstance(pair, tuple) and len(pair) != 2:
        raise ValueError(f"unit_locations['sources->base'] must be a pair (None, locations), got {len(pair)} items")
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return pair
    if pair[1] is None and pair[0] is not None:
        raise ValueError("unit_locations['sources->base'] names positions in a source and none in the base")
    return pair[1]


def _is_int(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool)
    return isinstance(value, Integral) or (isinstance(value, Tensor) and value.dim() == 0 and _holds_ints(value))


def _holds_ints(table: Tensor) -> bool:
    return not (table.is_floating_point() or table.is_complex() or table.dtype == torch.bool)


def _is_list(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _from_tensor(table: Tensor, interventions: int, batch: int, device: torch.device) -> GivenLocations:
    if not _holds_ints(table):
        raise TypeError(f"unit_locations must be an int tensor, got {table.dtype}")
    if table.dim() == 1:
        table = table.expand(interventions, batch, -1)
    if table.dim() != 3 or tuple(table.shape[:2]) != (interventions, batch):
        raise ValueError(
            f"unit_locations must be [num_interventions, B, P] = [{interventions}, {batch}, P], got {list(table.shape)}"
        )
    return GivenLocations(table.to(device, torch.long, non_blocking=True), frozenset(), None, None)


def _from_lists(value: Sequence[Any], interventions: int, batch: int, device: torch.device) -> GivenLocations:
    nesting = "unit_locations must be nested [num_interventions][B][P]"
    if len(value) != interventions:
        raise ValueError(f"{nesting}: expected {interventions} interventions, got {len(value)}")
    rows: list[list[list[int]]] = []
    whole = set()
    for i, part in enumerate(value):
        if part is None:
            whole.add(i)
            rows.append([[]] * batch)
            continue
        if not _is_list(part):
            raise ValueError(f"{nesting}: item [{i}] must be a list of {batch} rows, got {part!r:.60}")
        if len(part) != batch:
            raise ValueError(f"{nesting}: expected {batch} rows in [{i}], got {len(part)}")
        for j, row in enumerate(part):
            if not _is_list(row) or not all(_is_int(p) for p in row):
                raise ValueError(f"{nesting}: item [{i}][{j}] must be a list of ints, got {row!r:.60}")
            if any(p < -1 for p in row):
                raise ValueError(
                    f"unit_locations[{i}][{j}] has the position {min(row)}: positions are at least 0, -1 means "
                    "'no token'"
                )
        rows.append([[int(p) for p in row] for row in part])
    if len(whole) == interventions:
        return GivenLocations(None, frozenset(whole), None, None)
    width = max((len(row) for part in rows for row in part), default=0)
    host = torch.tensor([[row + [-1] * (width - len(row)) for row in part] for part in rows], dtype=torch.long)
    host = drop_duplicates(host.reshape(interventions, batch, width))
    highest = int(host.max()) if host.numel() else -1
    sent = host.pin_memory() if device.type == "cuda" else host
    return GivenLocations(sent.to(device, non_blocking=True), frozenset(whole), host, highest)
