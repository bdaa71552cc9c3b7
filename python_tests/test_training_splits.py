"""Splits: deterministic, disjoint, complete, and pyreft's own rows."""

from __future__ import annotations

import pytest
import torch
from transformers import set_seed

from reft_kernels.training.splits import Split, glue_split, gsm8k_split, hold_out, take


def complete(split: Split, count: int) -> bool:
    return sorted([*split.kept, *split.held_out]) == list(range(count))


@pytest.mark.parametrize(
    ("count", "held_out"), [(2, 1), (277, 138), (1043, 521), (5000, 2500), (5001, 1000), (9815, 1000)]
)
def test_glue_halves_are_those_of_pyreft(count: int, held_out: int) -> None:
    for seed in (42, 43):
        split = glue_split(count, seed)
        assert (len(split.kept), len(split.held_out)) == (count - held_out, held_out)
        assert complete(split, count)
        assert glue_split(count, seed) == split
        # As pyreft's train.py: one seed for everything, then the split by torch's own generator.
        set_seed(seed)
        test, in_training = torch.utils.data.random_split(range(count), [count - held_out, held_out])
        assert split == (list(test.indices), list(in_training.indices))
    assert count < 10 or glue_split(count, 42) != glue_split(count, 43)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    hold_out(10, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_gsm8k() -> None:
    split = gsm8k_split(7473)
    assert split.kept == list(range(7173))
    assert split.held_out == list(range(7173, 7473))
    assert gsm8k_split(301).kept == [0]


def test_a_share_is_rounded_down() -> None:
    assert len(hold_out(10, 0.25).held_out) == 2
    assert len(hold_out(10, 2).held_out) == 2
    assert hold_out(10, 0.25, seed=1) == hold_out(10, 2, seed=1)
    assert complete(hold_out(10, 0.25), 10)


@pytest.mark.parametrize("size", [0, 10, -1, 0.0, 1.0, 0.05, 1.5])
def test_no_part_may_be_empty(size: float) -> None:
    with pytest.raises(ValueError, match=f"size must leave rows in both parts, got {size} of 10 rows"):
        hold_out(10, size)


def test_too_few_rows() -> None:
    with pytest.raises(ValueError, match="the last 300 rows are held out, got 300 rows"):
        gsm8k_split(300)
    with pytest.raises(ValueError, match="got 0 of 1 rows"):
        glue_split(1)


def test_take() -> None:
    assert take("abcd", [3, 0]) == ["d", "a"]
