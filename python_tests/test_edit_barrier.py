"""The backward as the one launch of a GPU: its grid barrier and its chunks, with programs that run at once.

The two launches of the interpreter proper, one a phase, are what it has to agree with bit by bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_edit_mutants import BACKWARD, COMMON, survivors


def check_launches(
    *,
    programs: int,
    path: dict[str, Any],
    cache: int,
    chunks: int,
    launches: int = 2,
    timeout: float = 120.0,
    word: torch.Tensor | None = None,
    **case: Any,
) -> None:
    """Launches one after the other on one barrier word, against two launches a phase.

    Args:
        programs: how many run at once.
        path: fields of test_edit_kernels.Launch.
        cache: bytes of the L2 cache, which the launcher cuts the rows into chunks for.
        chunks: how many there then have to be.
        launches: how many.
        timeout: seconds that each may take.
        word: of the barrier; None for a new one.
        case: fields of EditCase.
    """
    from parallel_interpreter import parallel_backward, shared_word
    from test_edit_kernels import ALL, Launch, forced, hostile_gradient, problem_of

    from reft_kernels.backends import triton as launcher
    from reft_kernels.testing import EditCase, assert_bitwise_equal, poison_empty, random_edit

    choose, chosen = launcher._chunk, []

    def recorded(rows: int, *others: object) -> int:
        chosen.append(-(-rows // (chunk := choose(rows, *others))))
        return chunk

    o = random_edit(EditCase(**{"method": "noreft_with_c", "activation": "silu", "d": 40, "r": 3, **case}), seed=1)
    word = shared_word() if word is None else word
    with (
        forced(Launch(programs=programs, slab_d=16, slab_n=16, **path)),
        mock.patch.multiple(launcher, _chunk=recorded, _l2_bytes=lambda device: cache),
        poison_empty(),
    ):
        p = problem_of(o)
        _, delta, s, _ = launcher.edit_forward(p, False, save_rows=False)
        for number in range(launches):
            torch.manual_seed(number)
            grad = hostile_gradient(o, "contiguous")
            given = grad.clone()
            expected = launcher.edit_backward(grad, p, delta, s, ALL)
            with parallel_backward(word, timeout=timeout, seed=number):
                found = launcher.edit_backward(given, p, delta, s, ALL, inplace=True)
            assert found[0] is given
            for name, got, like in zip("hRWbc", found, expected, strict=True):
                assert_bitwise_equal(got, like, name=f"d{name} of launch {number}")
            assert int(word) & 0x7FFFFFFF == 0, hex(int(word))
    assert set(chosen) == {chunks}, chosen


CASES: dict[str, dict[str, Any]] = {
    "one program": {"programs": 1, "path": {}, "cache": 10**9, "chunks": 1, "shape": (1, 9)},
    "more slabs than programs": {
        "programs": 2, "path": {"rows_n": 4}, "cache": 0, "chunks": 1,
        "positions": "padded", "groups": 3, "shape": (2, 20), "slots": 17,
    },
    "programs without rows": {"programs": 4, "path": {"rows_n": 4}, "cache": 10**9, "chunks": 1, "shape": (1, 5)},
    "programs without a slab": {"programs": 7, "path": {"rows_n": 1}, "cache": 10**9, "chunks": 1, "shape": (1, 20)},
    "chunks": {"programs": 4, "path": {"rows_n": 2}, "cache": 0, "chunks": 3, "scale": "rows", "shape": (1, 40)},
    "chunks of one program": {"programs": 1, "path": {"rows_n": 2}, "cache": 0, "chunks": 3, "d": 16, "shape": (1, 40)},
    "chunks of many groups": {
        "programs": 8, "path": {"rows_n": 2}, "cache": 0, "chunks": 3,
        "positions": "padded", "groups": 2, "shape": (3, 20), "slots": 16,
    },
    "chunks by tiles": {
        "programs": 2, "path": {"phase1": "tiles", "phase1_d": 16, "rows_n": 4}, "cache": 0, "chunks": 3,
        "dtype": "mixed", "shape": (1, 33), "d": 24,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_launch_gives_the_bits_of_two(name: str) -> None:
    check_launches(**CASES[name])


def test_grids_of_any_size_share_a_word() -> None:
    from parallel_interpreter import shared_word

    word = shared_word()
    for programs in (2, 1, 5, 3):
        check_launches(programs=programs, path={}, cache=10**9, chunks=1, shape=(1, 3), d=20, launches=1, word=word)


# What the interpreter proper, one phase a launch, would not notice.
MUTANTS = [
    (BACKWARD, "wait(barrier_ptr, ticket)", "pass"),
    (BACKWARD, "wait(barrier_ptr, ticket)", "wait(barrier_ptr, ticket) if start == 0 else None"),
    (BACKWARD, "if i_item == tl.program_id(0):", "if i_item == 0:"),
    (BACKWARD, "ticket = arrive(barrier_ptr)", "ticket = tl.load(barrier_ptr)"),
    (BACKWARD, ("if CHUNKED:", "ticket = arrive(barrier_ptr)"), "arrive(barrier_ptr)"),
    (BACKWARD, ("if CHUNKED:", "ticket = arrive(barrier_ptr)"), "pass"),
    (BACKWARD, "if CHUNKED:", "if False:"),
    (BACKWARD, "if end < N:", "if end + chunk < N:"),
    (BACKWARD, "if end < N:", "if start == 0:"),
    (BACKWARD, "end, tl.minimum(end + chunk, N),", "end, end,"),
    (BACKWARD, "end, tl.minimum(end + chunk, N),", "end + 1, tl.minimum(end + chunk, N),"),
    (BACKWARD, "end, tl.minimum(end + chunk, N),", "end, tl.minimum(end + chunk - 1, N),"),
    (BACKWARD, "end, tl.minimum(end + chunk, N),", "end, end + chunk - ROWS_N,"),
    (BACKWARD, "0, N if PHASE == 1 else tl.minimum(chunk, N),", "0, N if PHASE == 1 else tl.minimum(chunk - 1, N),"),
    (BACKWARD, "tl.maximum(n_items, tl.program_id(0) + 1)", "n_items"),
    (COMMON, "return tl.atomic_add(word_ptr, arrival,", "return tl.atomic_add(word_ptr, 0,"),
    (COMMON, "(n_programs.to(tl.int64) - 1)", "n_programs.to(tl.int64)"),
    (COMMON, "tl.where(tl.program_id(0) == 0,", "tl.where(tl.program_id(0) >= 0,"),
    (COMMON, "while ((now ^ before) & -2147483648) == 0:", "while ((now ^ before) & -2147483648) == 1:"),
    (COMMON, "while ((now ^ before) & -2147483648) == 0:", "while ((now ^ before) & 2147483647) == 0:"),
]  # fmt: skip


def check_mutant() -> None:
    """Two launches, whose programs have too much and too little to do."""
    check_launches(**CASES["chunks"], timeout=8)
    check_launches(**CASES["programs without a slab"], launches=1, timeout=8)


@pytest.mark.slow
def test_every_mutant_is_caught(tmp_path: Path) -> None:
    left = survivors(tmp_path, MUTANTS, "test_edit_barrier check_mutant")
    assert not left, "these broken lines are not noticed:\n" + "\n".join(left)
