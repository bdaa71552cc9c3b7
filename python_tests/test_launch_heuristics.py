"""The configurations of devices without a table fit every shape that they are chosen for."""

from __future__ import annotations

import itertools

import pytest
import torch

from reft_kernels.backends.triton import MAX_RANK
from reft_kernels.functional import _normalise
from reft_kernels.problem import EditProblem
from reft_kernels.triton.config_tables import ForwardConfig, make_config, misfit
from reft_kernels.triton.heuristics import (
    HELD_ROWS,
    HELD_WEIGHTS,
    MANY_SLOTS,
    backward_config,
    forward_config,
    padded_rank,
    power_of_two,
)

SLOTS = (1, 31, 448, MANY_SLOTS - 1, MANY_SLOTS, 65536)
H100 = 132


def problem(d: int, r: int, groups: int, dtype: torch.dtype, activation: str, dropout: float) -> EditProblem:
    meta = {"device": "meta"}
    h = torch.empty(1, 4, d, dtype=dtype, **meta)
    R = torch.empty(*((groups,) if groups else ()), r, d, **meta)
    group = torch.empty(1, 4, dtype=torch.int64, **meta) if groups else None
    seed = torch.empty(1, dtype=torch.int64, **meta)
    return _normalise(h, R, R, None, None, None, group, None, True, activation, dropout, seed)


@pytest.mark.parametrize("d", [1, 3, 60, 576, 4096, 4097, 8192, 16384, 16385])
@pytest.mark.parametrize("r", [1, 3, 8, 9, 16, 33, MAX_RANK])
@pytest.mark.parametrize("warpgroups", [False, True])
def test_they_fit(d: int, r: int, warpgroups: bool) -> None:
    rest = itertools.product((0, 2, 64), (torch.float32, torch.bfloat16), ("linear", "gelu"), (0.0, 0.1))
    for groups, dtype, activation, dropout in rest:
        p = problem(d, r, groups, dtype, activation, dropout)
        for slots in SLOTS:
            forward = forward_config(p, slots, warpgroups)
            backward = backward_config(p, slots, H100, warpgroups)
            for op, config in (("edit_forward", forward), ("edit_backward", backward)):
                assert make_config(op, config._asdict()) == config
                assert misfit(config, d) is None
                assert padded_rank(config, r) >= r
                assert config.BLOCK_D % 4 == 0  # dropout draws four columns at a time
                if config.METHOD == "tiles" or op == "edit_backward":
                    assert padded_rank(config, r) >= 16
            if forward.METHOD == "rows":
                assert forward.BLOCK_N * forward.BLOCK_D <= HELD_ROWS
            if forward.METHOD == "weights":
                assert p.group is None
                assert padded_rank(forward, r) * forward.BLOCK_D <= HELD_WEIGHTS


def test_each_method_has_its_sizes() -> None:
    def method(slots: int, r: int = 4, d: int = 4096, groups: int = 0) -> str:
        return forward_config(problem(d, r, groups, torch.bfloat16, "linear", 0.0), slots, True).METHOD

    assert method(448) == "rows"
    assert method(65536) == "weights"
    assert method(65536, r=8) == "tiles"
    assert method(448, r=16) == "tiles"
    assert method(32, r=16, groups=64) == "rows"
    assert method(448, d=20000) == "tiles"
    assert method(65536, groups=2) == "tiles"


def test_many_adapters_have_a_program_a_slot() -> None:
    p = problem(4096, 8, 64, torch.bfloat16, "linear", 0.0)
    assert forward_config(p, 32, True) == ForwardConfig("rows", BLOCK_N=1, BLOCK_D=4096, STAGES=2, num_warps=4)


def test_one_slab_a_program_where_that_is_possible() -> None:
    for d in (576, 2048, 4096, 8192):
        p = problem(d, 8, 0, torch.bfloat16, "linear", 0.0)
        assert -(-d // backward_config(p, 65536, H100, True).SLAB_D) <= H100


def test_power_of_two() -> None:
    assert [power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [1, 1, 2, 4, 4, 8, 1024, 2048]
