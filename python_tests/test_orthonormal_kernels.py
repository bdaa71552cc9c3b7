"""The Triton kernels of matrices with orthonormal rows, cut into small slabs: every phase, mask and sum over slabs.

Each check compares in float64 with the oracle, in poisoned memory. Mutants of the kernels have to fail one of them; the
grid barriers are tried by the interpreter whose programs run at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import test_orthonormalize as parametrisation
import test_stiefel_adamw_step as stiefel
import torch
from test_edit_mutants import survivors
from torch import Tensor

from reft_kernels.backends import device_tables, eager_orthonormal
from reft_kernels.backends import triton_orthonormal as launcher
from reft_kernels.orthonormal_problem import OrthonormalProblem, StiefelProblem
from reft_kernels.testing import assert_bitwise_equal, poison_empty

pytest.importorskip("triton", reason="Triton is not installed")

TILES = {
    1: (1, 16, 32), 2: (2, 8, 16), 4: (4, 8, 16), 8: (8, 8, 16), 16: (16, 16, 32), 32: (32, 16, 32), 64: (64, 16, 32),
}  # fmt: skip
SIZES = {"sums": ((37, 3), (16, 4), (5, 5), (33, 8)), "dots": ((70, 20), (33, 3), (32, 32))}


@contextlib.contextmanager
def small(programs: int = 2) -> Iterator[None]:
    """Within the context matrices of a few dozen columns are many slabs, and few programs share them."""
    tiles = {rank: launcher._Tiles(*numbers) for rank, numbers in TILES.items()}
    with (
        mock.patch.object(launcher, "_TILES", tiles),
        mock.patch.object(launcher.edits, "resident_programs", return_value=programs),
        poison_empty(),
    ):
        yield


def near(got: Tensor, want: Tensor, name: str, tolerance: float = 1e-11) -> None:
    error = float((got.double() - want.detach().double()).abs().max())
    assert error <= tolerance * (1 + float(want.detach().abs().max())), (name, error)


def guarded(tensors: Any) -> Any:
    """Copies with NaN behind them."""
    copies = []
    for t in tensors:
        behind = torch.full((t.numel() + 64,), float("nan"), dtype=t.dtype)
        copies.append(behind[: t.numel()].view(t.shape).copy_(t))
    return tuple(copies)


def check_orthonormalize(kind: str) -> None:
    sizes = SIZES[kind]
    torch.manual_seed(1)
    problem = OrthonormalProblem(*map(guarded, parametrisation.problem_of(sizes, torch.float64)))
    grads: list[Tensor | None] = list(guarded(torch.randn(r, d, dtype=torch.float64) for d, r in sizes))
    expected, expected_dX = parametrisation.oracle(problem, grads)
    _, expected_factors = eager_orthonormal.orthonormalize_forward(problem)
    with small():
        R, factors = launcher.orthonormalize_forward(problem)
        dX = launcher.orthonormalize_backward(grads, problem, factors)
        some = launcher.orthonormalize_backward([None, *grads[1:]], problem, factors)
    near(factors, expected_factors, "factors", 1e-10)
    for i, (got, want) in enumerate(zip(R, expected, strict=True)):
        near(got, want, f"R of {i}")
    for i, (got, want) in enumerate(zip(dX, expected_dX, strict=True)):
        near(got, want, f"dX of {i}", 1e-9)
        assert not got.triu().any()
        assert (some[i] is None) == (i == 0)
        if i:
            near(some[i], want, f"dX of {i} without that of 0", 1e-9)


SHAPES = {
    "sums": ((4, 37), (3, 16), (5, 30), (2, 40), (), (0,)),
    "dots": ((20, 70), (3, 33), (32, 40), (5, 33), (1200,)),
}
OWN = (True, True, False, True, False, False)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all at once": {
        "riemannian": True, "max_norm": 0.7, "maximize": True, "grad_scale": torch.tensor(4.0),
        "found_inf": torch.tensor(0.0), "lr": torch.tensor(0.05), "steps": 2,
    },
    "riemannian": {"riemannian": True, "lr": 0.3},
}  # fmt: skip


def step_problem(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> StiefelProblem:
    shapes = SHAPES[kind]
    return stiefel.problem_of(dtype, settings.pop("steps", 3), shapes, OWN[: len(shapes)], **settings)


def check_step(kind: str) -> None:
    torch.manual_seed(2)
    for name, settings in SETTINGS.items():
        p = step_problem(kind, **settings)
        want = stiefel.expected(p)
        with small():
            norm = launcher.stiefel_adamw_step(p)
        assert (norm is None) == (p.max_norm is None)
        if norm is not None:
            near(norm, torch.stack([g.square().sum() for g in p.gradients]).sum().sqrt() / 4, "norm")
        for field in ("parameters", "exp_avgs", "exp_avg_sqs", "steps"):
            for i, (got, like) in enumerate(zip(getattr(p, field), getattr(want, field), strict=True)):
                if like.numel():
                    near(got, like, f"{name}: {field} of {i}", 1e-10)
    for index, bad, frozen, settings in (
        (0, float("nan"), (0,), {}), (0, float("inf"), (0,), {"riemannian": True}), (3, -float("inf"), (3,), {}),
        (2, float("inf"), range(4), {"max_norm": 1.0}), (2, 0.0, range(4), {"found_inf": torch.tensor(1.0)}),
    ):  # fmt: skip
        p = step_problem(kind, torch.float32, **settings)
        p.gradients[index].view(-1)[-1] = bad
        before = stiefel.copied(p)
        with small():
            launcher.stiefel_adamw_step(p)
        stiefel.unchanged(p, before, frozen)
        for i in set(range(4)) - set(frozen):
            assert float(p.steps[i]) == float(before.steps[i]) + 1
            assert p.parameters[i].isfinite().all()


@pytest.mark.parametrize("kind", SIZES)
def test_orthonormalize_slab_by_slab(kind: str) -> None:
    check_orthonormalize(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
def test_step_slab_by_slab(kind: str) -> None:
    check_step(kind)


def results_of(problem: OrthonormalProblem, grads: list[Tensor | None], p: StiefelProblem) -> list[Tensor]:
    """Everything that the three calls write."""
    R, factors = launcher.orthonormalize_forward(problem)
    dX = launcher.orthonormalize_backward(grads, problem, factors)
    norm = launcher.stiefel_adamw_step(p)
    assert norm is not None
    return [*R, factors, *(t for t in dX if t is not None), norm, *(t for ts in p[:5] for t in ts)]


@pytest.mark.slow
def test_same_bits_for_every_grid() -> None:
    problem = parametrisation.problem_of(SIZES["sums"], torch.float32)
    grads: list[Tensor | None] = [torch.randn(r, d) for d, r in SIZES["sums"]]
    p = step_problem("sums", torch.float32, max_norm=0.5, riemannian=True)
    found = []
    for programs in (1, 2, 7):
        with small(programs):
            found.append(results_of(problem, grads, stiefel.copied(p)))
    for others in found[1:]:
        for got, want in zip(others, found[0], strict=True):
            assert_bitwise_equal(got, want)


@pytest.mark.parametrize("r", [1, 8, pytest.param(64, marks=pytest.mark.slow)])
def test_rows_stay_orthonormal_at_a_width_of_8192(r: int) -> None:
    """In float32, by the tiles that a GPU gets. The interpreter adds up a tile's terms one by one, a GPU in pairs."""
    d = 8192 if r < 64 else 4096  # the interpreter takes its time
    problem = parametrisation.problem_of(((d, r),), torch.float32)
    (R,), _ = launcher.orthonormalize_forward(problem)
    assert (R.double() @ R.double().T - torch.eye(r)).abs().max() <= 1e-6
    p = stiefel.problem_of(torch.float32, 3, ((r, d),), (True,))
    launcher.stiefel_adamw_step(p)
    w = p.parameters[0].double()
    assert (w @ w.T - torch.eye(r)).abs().max() <= 1e-6


def test_ranks_above_64_and_other_devices_are_refused() -> None:
    problem = parametrisation.problem_of(((80, 65),), torch.float32)
    assert "r=65" in str(launcher.unsupported_matrices(problem))
    elsewhere = OrthonormalProblem(*(tuple(t.to("meta") for t in ts) for ts in problem))
    assert "meta" in str(launcher.unsupported_matrices(elsewhere))


def test_a_step_is_seen_by_autograd() -> None:
    p = step_problem("sums", torch.float32)
    versions = [t._version for ts in p[:5] for t in ts]
    launcher.stiefel_adamw_step(p)
    seen = [t._version for ts in p[:5] for t in ts]
    changed = [after > before for before, after in zip(versions, seen, strict=True)]
    assert changed == [True] * len(p.parameters) + [False] * len(p.parameters) + [True] * 3 * len(p.parameters)


def test_tables_are_made_once_and_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(device_tables, "CAPACITY", 3)
    device_tables._tables.clear()
    first = device_tables.device_table((1, 2), cpu)
    assert first.tolist() == [1, 2]
    assert device_tables.device_table([1, 2], cpu) is first
    for value in range(3):
        device_tables.device_table((value,), cpu)
    assert len(device_tables._tables) == 3
    assert device_tables.device_table((1, 2), cpu) is not first


def test_a_table_for_a_graph() -> None:
    """What a captured launch finds: a table that is there, kept for good, or one that kernels of the graph write."""
    cpu = torch.device("cpu")
    values = (2**62 + 12345, 0, -7, 2**40 + 1)
    device_tables._tables.clear()
    written = device_tables._for_graph(cpu, values)
    assert written.tolist() == list(values)
    assert not device_tables._tables
    there = device_tables.device_table(values, cpu)
    assert device_tables._for_graph(cpu, values) is there
    device_tables._tables.clear()
    assert device_tables._for_graph(cpu, values) is there
    device_tables._captured.clear()


@contextlib.contextmanager
def one_launch(programs: int, seed: int) -> Iterator[Tensor]:
    """Within the context the launches are those of a GPU, with programs that run at once. Gives the barrier's word."""
    from parallel_interpreter import ParallelKernel, shared_word

    kernels, word = launcher._kernels(), shared_word()
    parallel = SimpleNamespace(**vars(kernels))
    for name in ("forward", "backward", "step"):
        setattr(parallel, name, ParallelKernel(getattr(kernels, name), timeout=60, seed=seed))
    with (
        small(programs),
        mock.patch.object(launcher.edits, "_on_amd", return_value=True),  # which multiplies float32 as such
        mock.patch.multiple(
            launcher, _kernels=lambda: parallel, barrier_word=lambda device: word, interpreted=lambda: False
        ),
    ):
        yield word


def shared(tensors: Any) -> Any:
    """In memory that processes share: kernels find it by pointers of their tables."""
    for t in tensors:
        t.share_memory_()
    return tensors


def check_barriers(kind: str, programs: int = 3) -> None:
    torch.manual_seed(3)
    problem = parametrisation.problem_of(SIZES[kind], torch.float32)
    grads: list[Tensor | None] = [torch.randn(r, d) for d, r in SIZES[kind]]
    p = step_problem(kind, torch.float32, max_norm=0.5, riemannian=True)
    with small(programs):
        expected = results_of(problem, grads, stiefel.copied(p))
    for tensors in (*problem, grads):
        shared(tensors)
    for seed in range(programs):  # each is the slow one once
        mine = stiefel.copied(p)
        for ts in mine[:5]:
            shared(t for t in ts if t.numel())
        with one_launch(programs, seed) as word:
            found = results_of(problem, grads, mine)
        assert int(word) & 0x7FFFFFFF == 0
        for got, want in zip(found, expected, strict=True):
            assert_bitwise_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("programs", [1, 3])
def test_one_launch_gives_the_bits_of_one_a_phase(kind: str, programs: int) -> None:
    check_barriers(kind, programs)


MATRICES, PARAMETRISATION, STEP = "triton/matrices.py", "triton/orthonormalize.py", "triton/stiefel_adamw.py"
LAUNCHER = "backends/triton_orthonormal.py"

# As in test_edit_mutants. Those of the launch's barriers come last: the interpreter proper does not notice them.
BACKWARD = "def orthonormalize_backward_kernel"
MUTANTS: dict[str, list[tuple[str, str | tuple[str, str], str]]] = {
    "check_orthonormalize sums": [
        (MATRICES, "found += tl.sum(", "found = tl.sum(0 * "),
        (MATRICES, "mask=o_n < n, other=9223372036854775807", "mask=o_n < n, other=0"),
        (MATRICES, "(first <= i_item)", "(first < i_item)"),
        (MATRICES, "b_sum += tl.load(partials_ptr", "b_sum = tl.load(partials_ptr"),
        (MATRICES, "wide(i) * STRIDE", "wide(i) * BLOCK_R * BLOCK_R"),
        (MATRICES, "b_left[:, :, None] * b_right[:, None, :]", "b_left[:, None, :] * b_right[:, :, None]"),
        (MATRICES, "left_row: tl.constexpr = 1 if LEFT_T else BLOCK_R", "left_row: tl.constexpr = BLOCK_R"),
        (PARAMETRISATION, "start = (i_item - first) * SLAB_D", "start = i_item * SLAB_D"),
        (PARAMETRISATION, "tl.minimum(start + SLAB_D, d)", "d"),
        (PARAMETRISATION, "m_dr = (o_d < d)[:, None] & (o_r < r)[None, :]",
         "m_dr = (o_d < d)[:, None] & (o_r < BLOCK_R)[None, :]"),
        (PARAMETRISATION, "mask=o_d < r, other=1)[:, None]", "mask=o_d < r, other=0)[:, None]"),
        (PARAMETRISATION, "o_d[:, None] > o_r[None, :], b_X", "o_d[:, None] >= o_r[None, :], b_X"),
        (PARAMETRISATION, "b_diagonal < 0", "b_diagonal <= 1"),
        (PARAMETRISATION, "(gram_ptr + k * (BLOCK_R + 1)) / 2", "(gram_ptr + k * (BLOCK_R + 1))"),
        (PARAMETRISATION, "b_VV += gram(", "b_VV = gram("),
        (PARAMETRISATION, "b_M += gram(b_B, b_V * b_S,", "b_M += gram(b_B, b_V,"),
        (PARAMETRISATION, "b_BB += gram(", "b_BB = gram("),
        (PARAMETRISATION, "(b_SB_top - product", "(b_SB_top + product"),
        (PARAMETRISATION, "tl.where(b_X < 0, -b_S, b_S)", "b_S"),
        (PARAMETRISATION, "b_R -= times(", "b_R += times("),
        (PARAMETRISATION, "mask=(o_d < BLOCK_R)[:, None]", "mask=(o_d < 1)[:, None]"),
        (PARAMETRISATION, "b_VG += gram(b_V * b_S,", "b_VG += gram(b_V,"),
        (PARAMETRISATION, "b_BG += gram(", "b_BG = gram("),
        (PARAMETRISATION, "- b_VG) * b_D[None, :]", "- b_VG)"),
        (PARAMETRISATION, "b_upper + tl.trans(b_upper)", "b_upper"),
        (PARAMETRISATION, "b_dV = b_dV * b_S + times", "b_dV = b_dV + times"),
        (PARAMETRISATION, "tl.where(o_d[:, None] > o_r[None, :], b_dV, 0)", "b_dV"),
        (LAUNCHER, "factors[i] for i in members", "factors[0] for i in members"),
        (LAUNCHER, "self.full = min(ranks)", "self.full = max(ranks)"),
    ],
    "check_orthonormalize dots": [
        (MATRICES, "b_sum = tl.dot(b_left, b_right, b_sum,", "b_sum = tl.dot(b_left, b_right, b_sum * 0,"),
        (MATRICES, "tl.range(0, r, 16,", "tl.range(0, 16, 16,"),
        (MATRICES, "tl.dot(tl.trans(b_left), b_right,", "tl.dot(tl.trans(b_right), b_left,"),
        (PARAMETRISATION, "tl.static_range(3 if APART else 1)", "tl.static_range(1)"),
        (PARAMETRISATION, "tl.static_range(2 if APART else 1)", "tl.static_range(1)"),
        (PARAMETRISATION, "tl.range(0, r, ROWS, num_stages=1)", "tl.range(0, ROWS, ROWS, num_stages=1)"),
    ],
    "check_step sums": [
        (STEP, "o_elements = o_r * BLOCK_D + o_d", "o_elements = o_d"),
        (STEP, "tl.where(orthonormal, r, BLOCK_R)", "BLOCK_R"),
        (STEP, "b_squares += b_wide * b_wide", "b_squares = b_wide * b_wide"),
        (STEP, "b_tangent += gram(", "b_tangent = gram("),
        (STEP, "gain = 1 / tl.load", "gain = tl.load"),
        (STEP, "all_go = tl.load(found_inf_ptr) == 0", "pass"),
        (STEP, "all_go = all_go & (norm < INFINITY)", "pass"),
        (STEP, "clip = tl.minimum(bound / (norm + 1e-6), 1.0)", "clip = bound / bound"),
        (STEP, "clip = -clip", "pass"),
        (STEP, ".to(tl.float64) + 1\n", ".to(tl.float64)\n"),
        (STEP, "kept = tl.where(r > 0, 1.0, 1 - rate * decay)", "kept = (1 - rate * decay)"),
        (STEP, "goes = goes & (sum_of(", "goes = goes | (sum_of("),
        (STEP, "tl.load(tangent_ptr + tl.trans(o_rr))", "tl.load(tangent_ptr + o_rr)"),
        (STEP, "* (clip / 2)", "/ 2"),
        (STEP, "b_g -= tl.trans(", "b_g += tl.trans("),
        (STEP, "tl.sqrt(correction2)", "correction2"),
        (STEP, "(rate / correction1)", "rate"),
        (STEP, ("if goes:", "b_gram += gram(b_P, b_P"), "b_gram = gram(b_P, b_P"),
        (STEP, "tl.load(step_ptr) + tl.load(goes_ptr + i)", "tl.load(step_ptr) + 1"),
        (STEP, "(off > NEAR) & (i < MAX_ITERATIONS)", "(off > 0.5) & (i < MAX_ITERATIONS)"),
        (STEP, "(off > NEAR) & (i < MAX_ITERATIONS)", "(off > NEAR) & (i < 2)"),
        (STEP, "/ tl.sqrt(scale) - eye", "- eye"),
        (STEP, "b_P += times(", "b_P = times("),
        (STEP, "if goes:", "if all_go:"),
        (LAUNCHER, "max(1, -(-d //", "max(0, -(-d //"),
    ],
    "check_step dots": [
        (STEP, "b_sums += tl.sum(", "b_sums = 0 * tl.sum("),
        (STEP, "off = tl.maximum(off, ", "off = tl.minimum(off, "),
        (STEP, "i_pass + 1 < PASSES,", "False,"),
        (STEP, "b_gram += gram(b_P, b_P", "b_gram = gram(b_P, b_P"),
        (LAUNCHER, "slab = tiles.BLOCK_R * tiles.SLAB_D", "slab = tiles.SLAB_D"),
    ],
    "check_barriers sums": [
        (PARAMETRISATION, "meet(barrier_ptr)", "pass"),
        (PARAMETRISATION, ("PHASE == 2:", "meet(barrier_ptr)"), "pass"),
        (PARAMETRISATION, (BACKWARD, "meet(barrier_ptr)"), "pass"),
        (STEP, ("FIRST_PHASE == 1 and", "meet(barrier_ptr)"), "pass"),
        (STEP, ("FIRST_PHASE <= 2 and LAST_PHASE > 2", "meet(barrier_ptr)"), "pass"),
        (STEP, ("store_roots(table_ptr, goes_ptr", "meet(barrier_ptr)"), "pass"),
    ],
    "check_barriers dots": [(STEP, ("if i_pass + 1 < PASSES:", "meet(barrier_ptr)"), "pass")],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("check", MUTANTS)
def test_every_mutant_is_caught(tmp_path: Path, check: str) -> None:
    left = survivors(tmp_path, MUTANTS[check], f"test_orthonormal_kernels {check}")
    assert not left, "these broken lines are not noticed:\n" + "\n".join(left)
