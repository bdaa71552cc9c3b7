"""Which tokens are edited, against pyreft's own functions."""

from __future__ import annotations

import pyreft
import pytest
import torch
from peer import prompt_columns

from reft_kernels import positions

WRITTEN = ("f7+l7", "f1+l1", "f3", "l1", "l5", "f2+l5", "f5+l2")


@pytest.mark.parametrize("written", WRITTEN)
def test_parse_positions(written: str) -> None:
    assert positions.parse_positions(written) == pyreft.parse_positions(written)


@pytest.mark.parametrize("share_weights", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("interventions", [2, 6])
def test_get_intervention_locations(written: str, share_weights: bool, interventions: int) -> None:
    """The nested lists for every prompt length from 2 on, with pyreft's -1 for "none".

    One token has neither a first nor a last half. pyreft then writes an untied row as wide as a tied one,
    wider than every other row of the data set; ours keeps the width. Both name nothing.
    """
    widths = set()
    for length in range(1, 40):
        options = {
            "last_position": length,
            "positions": written,
            "num_interventions": interventions,
            "share_weights": share_weights,
        }
        expected = pyreft.get_intervention_locations(**options)
        actual = positions.get_intervention_locations(**options)
        widths |= {len(row) for row in actual}
        if length == 1:
            assert {column for rows in (actual, expected) for row in rows for column in row} == {-1}
        else:
            assert actual == expected, length
    assert len(widths) == 1


@pytest.mark.parametrize("pad_mode", ["first", "last"])
@pytest.mark.parametrize("share_weights", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("interventions", [0, 1, 2, 3, 6, 7])
def test_get_intervention_locations_with_pyreft_compat(interventions: int, share_weights: bool, pad_mode: str) -> None:
    """Every result, also those that are odd: no row for the last of an odd number, wide rows for one token."""
    for written in WRITTEN:
        for length in range(40):
            options = {
                "last_position": length,
                "positions": written,
                "num_interventions": interventions,
                "share_weights": share_weights,
                "pad_mode": pad_mode,
                "position": "of no effect",
            }
            expected = pyreft.get_intervention_locations(**options)
            assert positions.get_intervention_locations(**options, pyreft_compat=True) == expected, (written, length)
            first, last = pyreft.parse_positions(written)
            apart = {**options, "first_n": first, "last_n": last}
            del apart["positions"]
            assert positions.get_intervention_locations(**apart, pyreft_compat=True) == expected
            if share_weights or not (first and last) or (interventions % 2 == 0 and length > 1):
                assert positions.get_intervention_locations(**options) == expected


@pytest.mark.parametrize("share_weights", [True, False], ids=["tied", "untied"])
def test_an_odd_number_of_untied_interventions(share_weights: bool) -> None:
    """pyreft gives the last one no row and a single one none at all, which is noticed much later, if ever."""
    options = {"last_position": 9, "positions": "f1+l1", "share_weights": share_weights}
    found = [len(pyreft.get_intervention_locations(**options, num_interventions=count)) for count in (1, 3)]
    assert found == ([1, 3] if share_weights else [0, 2])
    if share_weights:
        return
    for count in (1, 3):
        with pytest.raises(ValueError, match="even number"):
            positions.get_intervention_locations(**options, num_interventions=count)


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompt_positions_on_the_device(written: str, side: str) -> None:
    """The same columns from the mask of a padded batch, in whatever order and with -1 wherever."""
    lengths = [1, 2, 3, 9, 13, 14, 15, 29]
    width = 31
    column, length = torch.arange(width), torch.tensor(lengths)[:, None]
    mask = column >= width - length if side == "left" else column < length
    first, last = positions.parse_positions(written)
    found = positions.prompt_positions(mask, first, last)
    assert found.shape == (len(lengths), first + last)
    for row, n in zip(found.tolist(), lengths, strict=True):
        (expected,) = prompt_columns(n, written, 1, tied=True, start=0)
        start = width - n if side == "left" else 0
        named = sorted(position for position in row if position >= 0)
        assert named == sorted(position + start for position in expected if position >= 0)
