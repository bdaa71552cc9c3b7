"""Matrices with orthonormal rows on a CUDA device: against the oracle, and as CUDA graphs. Run by ``make test-gpu``."""

from __future__ import annotations

from typing import Any

import pytest
import test_orthonormalize as parametrisation
import test_stiefel_adamw_step as stiefel
import torch

from reft_kernels.backends.orthonormal_registry import BACKENDS, refusal
from reft_kernels.orthonormal_problem import OrthonormalProblem, StiefelProblem
from reft_kernels.testing import assert_bitwise_equal

pytestmark = pytest.mark.gpu

SIZES = {
    "one rank": ((4096, 8), (2048, 8), (576, 8)),
    "ragged": ((4096, 3), (129, 16), (1, 1)),
    "high": ((8192, 64), (65, 33)),
}


@pytest.fixture(params=[name for name in BACKENDS if name not in ("eager", "cpu")])
def backend(request: pytest.FixtureRequest) -> Any:
    if BACKENDS[request.param].unavailable() is not None:
        pytest.skip(str(BACKENDS[request.param].unavailable()))
    return BACKENDS[request.param]


def on_device(p: OrthonormalProblem) -> OrthonormalProblem:
    return OrthonormalProblem(*(tuple(t.cuda() for t in ts) for ts in p))


def step_on_device(p: StiefelProblem) -> StiefelProblem:
    return StiefelProblem(*(tuple(t.cuda() for t in ts) for ts in p[:5]), *p[5:])


@pytest.mark.parametrize("name", SIZES)
def test_map_and_gradient(backend: Any, name: str) -> None:
    problem = parametrisation.problem_of(SIZES[name], torch.float32)
    grads = [torch.randn(r, d) for d, r in SIZES[name]]
    expected, expected_dX = parametrisation.oracle(problem, grads)
    mine, mine_grads = on_device(problem), [g.cuda() for g in grads]
    assert refusal(backend, mine) is None
    runs = []
    for _ in range(3):
        R, factors = backend.orthonormalize_forward(mine)
        runs.append((*R, factors, *backend.orthonormalize_backward(mine_grads, mine, factors)))
    for others in runs[1:]:
        for got, want in zip(others, runs[0], strict=True):
            assert_bitwise_equal(got.cpu(), want.cpu())
    R, dX = runs[0][: len(grads)], runs[0][len(grads) + 1 :]
    for got, want, got_dX, want_dX in zip(R, expected, dX, expected_dX, strict=True):
        r, wide = len(want), got.double().cpu()
        assert (wide - want).abs().max() <= 2e-6
        assert (wide @ wide.T - torch.eye(r)).abs().max() <= 1e-6
        assert (got_dX.cpu() - want_dX).abs().max() <= 64 * r * 1.2e-7 * (1 + want_dX.abs().max())


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("settings", ["plain", "riemannian clipped", "large lr"])
def test_step(backend: Any, name: str, settings: str) -> None:
    shapes = tuple((r, d) for d, r in SIZES[name])
    p = stiefel.problem_of(
        torch.float32, 3, (*shapes, (33,)), (*(True for _ in shapes), False), **stiefel.SETTINGS[settings]
    )
    want, mine = stiefel.expected(p), step_on_device(p)
    backend.stiefel_adamw_step(mine)
    for i, own in enumerate(p.orthonormal):
        w = mine.parameters[i].cpu()
        assert (w - want.parameters[i]).abs().max() <= 64 * 1.2e-7 * (1 + want.parameters[i].abs().max())
        assert float(mine.steps[i]) == float(want.steps[i])
        if own:
            assert (w.double() @ w.double().T - torch.eye(len(w))).abs().max() <= 1e-6


def test_all_three_replay_in_a_graph(backend: Any) -> None:
    """With gradients that only the graph knows, and a learning rate that is read on the device."""
    problem = on_device(parametrisation.problem_of(SIZES["one rank"], torch.float32))
    lr = torch.tensor(1e-2, device="cuda")
    start = step_on_device(
        stiefel.problem_of(torch.float32, 3, tuple((r, d) for d, r in SIZES["one rank"]), (True,) * 3, lr=1e-2)
    )
    p, q = (stiefel.copied(start)._replace(lr=lr) for _ in range(2))

    def run(p: StiefelProblem) -> list[torch.Tensor]:
        R, factors = backend.orthonormalize_forward(problem)
        dX = backend.orthonormalize_backward([2 * t for t in R], problem, factors)
        backend.stiefel_adamw_step(p._replace(gradients=tuple(3 * t for t in R)))
        return [*R, *dX]

    expected = run(q)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(stiefel.copied(start)._replace(lr=lr))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(p)
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip((*found, *p.parameters), (*expected, *q.parameters), strict=True):
        assert_bitwise_equal(got.cpu(), want.cpu())
    lr.fill_(1e-3)
    before = [w.clone() for w in p.parameters]
    graph.replay()
    torch.cuda.synchronize()
    assert all(0 < float((a - b).abs().max()) < 5e-3 for a, b in zip(p.parameters, before, strict=True))
