"""Positions: strings, masks with padding on either side, pyreft's nested lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reft_kernels.positions import (
    drop_duplicates,
    get_intervention_locations,
    parse_positions,
    prompt_mask,
    prompt_positions,
    read_unit_locations,
    shift_positions,
    stack_locations,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "span"), [("f7+l7", (7, 7)), ("f3", (3, 0)), ("l1", (0, 1)), ("all", None), (" f0+l12 ", (0, 12))]
)
def test_parse_positions(text: str, span: tuple[int, int] | None) -> None:
    assert parse_positions(text) == span


@pytest.mark.parametrize("text", ["", "7", "f", "f7l7", "+", "f7+", "+l7", "l7+f7", "f-1", "f0", "f0+l0", "f7+l7+l1"])
def test_parse_positions_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="positions must be"):
        parse_positions(text)


def test_parse_positions_wants_a_string() -> None:
    with pytest.raises(TypeError, match="int"):
        parse_positions(7)  # type: ignore[arg-type]


def expected_positions(columns: list[int], first: int, last: int) -> list[int]:
    """pyreft's rule for one row whose prompt lies at these columns."""
    n = len(columns)
    head = columns[: min(first, n // 2)]
    tail = columns[n - min(last, n // 2) :]
    return head + [-1] * (first - len(head)) + [-1] * (last - len(tail)) + tail


@pytest.mark.parametrize(("first", "last"), [(3, 2), (1, 0), (0, 4), (7, 7), (20, 20)])
@pytest.mark.parametrize("side", ["right", "left", "both", "holes"])
def test_prompt_positions(first: int, last: int, side: str) -> None:
    width = 12
    mask = torch.zeros(width + 1, width, dtype=torch.long)
    for n in range(width + 1):
        start = {"right": 0, "left": width - n, "both": (width - n) // 2, "holes": 0}[side]
        mask[n, start : start + n] = 1
    if side == "holes":
        mask = (torch.rand(40, width) < 0.5).long()
    found = prompt_positions(mask, first, last)
    assert found.dtype == torch.long
    for row, positions in zip(mask, found, strict=True):
        assert positions.tolist() == expected_positions(row.nonzero().flatten().tolist(), first, last)


def test_prompt_positions_of_no_tokens() -> None:
    assert prompt_positions(torch.ones(2, 0), 1, 2).tolist() == [[-1, -1, -1]] * 2
    with pytest.raises(ValueError, match=r"\[B, S\]"):
        prompt_positions(torch.ones(3), 1, 1)
    with pytest.raises(ValueError, match="at least 0"):
        prompt_positions(torch.ones(1, 3), -1, 1)


def test_prompt_ends_at_the_first_label() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, -100, -100, 5, -100], [-100] * 6, [4, 5, 6, 7, 8, 9]])
    wanted = [[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]  # the last row is all answer
    assert prompt_mask(mask, labels).long().tolist() == wanted
    assert prompt_mask(mask).equal(mask.bool())


def test_prompt_mask_with_labels_of_the_last_tokens() -> None:
    labels = torch.tensor([[-100, 7]])
    assert prompt_mask(torch.ones(1, 5), labels).long().tolist() == [[1, 1, 1, 1, 0]]


def test_shift_and_duplicates() -> None:
    positions = torch.tensor([[0, 3, -1, 5, 9]])
    assert shift_positions(positions, 3, 4).tolist() == [[-1, 0, -1, 2, -1]]
    assert drop_duplicates(torch.tensor([[2, 0, 2, -1, 0], [1, 1, 1, 1, 1]])).tolist() == [
        [2, 0, -1, -1, -1],
        [1, -1, -1, -1, -1],
    ]


def test_locations_of_pyreft() -> None:
    """Values that pyreft itself returns."""
    assert get_intervention_locations(6, positions="f7+l7", num_interventions=2) == [
        [0, 1, 2, -1, -1, -1, -1],
        [3, 4, 5, -1, -1, -1, -1],
    ]
    tied = get_intervention_locations(6, positions="f2+l3", num_interventions=3, share_weights=True)
    assert tied == [[0, 1, 3, 4, 5]] * 3
    assert get_intervention_locations(1, positions="l1", num_interventions=1) == [[-1]]
    untied = get_intervention_locations(20, first_n=1, last_n=2, num_interventions=4)
    assert untied == [[0, -1], [0, -1], [18, 19], [18, 19]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": "f1+l1", "num_interventions": 3}, "even number"),
        ({"positions": "f1+l1", "num_interventions": 1}, "even number"),
        ({"positions": "all", "num_interventions": 2}, "unit_locations=None"),
        ({"num_interventions": 2}, "give positions"),
        ({"first_n": -1, "num_interventions": 2}, "at least 0"),
        ({"first_n": 1, "num_interventions": -1}, "at least 0"),
        ({"first_n": 1, "num_interventions": 2, "pad_mode": "none"}, "pad_mode must be 'first' or 'last', got 'none'"),
    ],
)
def test_locations_refuse(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_intervention_locations(9, **arguments)


def test_locations_for_no_intervention_and_in_empty_slots() -> None:
    assert get_intervention_locations(9, positions="f1+l1", num_interventions=0) == []
    padded = get_intervention_locations(3, positions="f2+l2", num_interventions=2, pad_mode="last")
    assert padded == [[0, 3], [2, 3]]
    rows = get_intervention_locations(last_position=9, positions="l1", num_interventions=2, input_field="no effect")
    assert rows == [[8], [8]]
    assert rows[0] is not rows[1]


def test_odd_locations_with_pyreft_compat() -> None:
    """Values that pyreft itself returns."""
    assert get_intervention_locations(9, positions="f1+l1", num_interventions=1, pyreft_compat=True) == []
    assert get_intervention_locations(9, positions="f1+l1", num_interventions=3, pyreft_compat=True) == [[0], [8]]
    wide = get_intervention_locations(1, positions="f2+l2", num_interventions=2, pyreft_compat=True)
    assert wide == [[-1] * 4] * 2
    assert get_intervention_locations(1, positions="f2+l2", num_interventions=2) == [[-1] * 2] * 2


def test_stack_locations() -> None:
    stacked = stack_locations([[[0, 1], [7]], [[2], [-1, 3, 4]], torch.tensor([[5], [6]])])
    assert stacked.dtype == torch.long
    assert stacked.tolist() == [
        [[0, 1, -1], [7, -1, -1]],
        [[2, -1, -1], [-1, 3, 4]],
        [[5, -1, -1], [6, -1, -1]],
    ]
    moved = stack_locations([[[0, -1]], [[4, 2]]], offsets=[3, 0])
    assert moved.tolist() == [[[3, -1]], [[4, 2]]]
    assert stack_locations([[0], [0]]).tolist() == [[0], [0]]
    assert stack_locations([[], []]).shape == (2, 0)


@pytest.mark.parametrize(
    ("locations", "message"),
    [
        ([[[0], [1]], [[0]]], "one number of interventions"),
        ([[[0.5]]], r"ints nested \[num_interventions\]\[P\], got \[\[0.5\]\]"),
        ([[[0], 1]], "ints nested"),
        ([[[[0]]]], "ints nested"),
    ],
)
def test_stack_locations_refuses(locations: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stack_locations(locations)


NESTED = [[[0, 1], [2]], [[3, 3], [-1, 4]]]


@pytest.mark.parametrize(
    "form",
    [
        {"sources->base": (None, NESTED)},
        {"sources->base": [None, NESTED]},
        {"base": NESTED},
        NESTED,
    ],
)
def test_unit_locations_in_lists(form: Any) -> None:
    given = read_unit_locations(form, 2, 2, CPU)
    assert isinstance(given.table, Tensor)
    assert given.table.tolist() == [[[0, 1], [2, -1]], [[3, -1], [-1, 4]]]
    assert given.highest == 4
    assert not given.whole


def test_unit_locations_for_all() -> None:
    for form in (5, [5], {"sources->base": 5}, {"base": [5]}, {"sources->base": (None, 5)}, torch.tensor([5])):
        given = read_unit_locations(form, 3, 2, CPU)
        assert given.table is not None
        assert given.table.tolist() == [[[5], [5]]] * 3
    for form in (None, {"base": None}, {"sources->base": (None, None)}, [None, None, None]):
        assert read_unit_locations(form, 3, 2, CPU) == (None, {0, 1, 2}, None, None)
    given = read_unit_locations([None, [[1], [2]], None], 3, 2, CPU)
    assert given.whole == {0, 2}
    assert given.table is not None
    assert given.table.tolist() == [[[-1], [-1]], [[1], [2]], [[-1], [-1]]]


def test_unit_locations_on_the_device_are_never_read() -> None:
    table = torch.empty(2, 3, 4, dtype=torch.int32, device="meta")
    given = read_unit_locations(table, 2, 3, torch.device("meta"))
    assert given.host is None
    assert given.highest is None


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"base": NESTED, "sources->base": None}, "one key"),
        ({"source": NESTED}, "one key"),
        ({"sources->base": (None, NESTED, None)}, "pair"),
        ([NESTED[0]], "expected 2 interventions, got 1"),
        ([[[1], [1], [1]], [[1], [1]]], r"expected 2 rows in \[0\], got 3"),
        ([[1, 2], [[1], [1]]], r"item \[0\]\[0\] must be a list of ints, got 1"),
        ([[[1], [1]], 3], r"item \[1\] must be a list of 2 rows, got 3"),
        ([[[1], [1.5]], [[1], [1]]], r"item \[0\]\[1\]"),
        ([[[1], [-2]], [[1], [1]]], r"\[0\]\[1\] has the position -2"),
        (torch.zeros(2, 2, dtype=torch.long), r"\[2, 2, P\], got \[2, 2\]"),
        (torch.zeros(3, 2, 1, dtype=torch.long), r"\[2, 2, P\], got \[3, 2, 1\]"),
    ],
)
def test_unit_locations_refuse(form: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_unit_locations(form, 2, 2, CPU)


@pytest.mark.parametrize(("form", "message"), [("f1", "str"), (1.5, "float"), (torch.zeros(2, 2, 1), "int tensor")])
def test_unit_locations_of_another_type(form: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        read_unit_locations(form, 2, 2, CPU)
