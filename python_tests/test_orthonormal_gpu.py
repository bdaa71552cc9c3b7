"""Matrices with orthonormal rows on a CUDA device: the oracle, launches counted, graphs. Run by ``make test-gpu``."""

from __future__ import annotations

from typing import Any

import pytest
import test_orthonormalize
import test_stiefel_adamw_step
import torch
from torch import Tensor

from benchmarks.ops.counting import kernel_names
from reft_kernels import LoreftIntervention, OrthonormalRows, StiefelAdamW, orthonormal_rows
from reft_kernels.backends.orthonormal_registry import BACKENDS, refusal
from reft_kernels.orthonormal_problem import OrthonormalProblem, StiefelProblem
from reft_kernels.testing import assert_bitwise_equal

pytestmark = pytest.mark.gpu

SIZES = (*test_orthonormalize.SIZES, (4096, 4), (8192, 64))
GRAPH_SIZES = ((4096, 8), (2048, 8), (576, 8))


def on_cuda(problem: Any) -> Any:
    """The same problem with its tensors on the GPU."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.cuda()
        return tuple(moved(one) for one in value) if isinstance(value, tuple) else value

    return type(problem)(*(moved(value) for value in problem))


@pytest.fixture(params=["triton", "cuda", "eager"])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param not in BACKENDS:
        pytest.skip(f"no backend {request.param}")
    found = BACKENDS[request.param]
    reason = found.unavailable()
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return found


def test_map_and_gradient(backend: Any) -> None:
    problem = test_orthonormalize.problem_of(SIZES, torch.float32)
    grads = [torch.randn(r, d) for d, r in SIZES]
    expected, expected_dX = test_orthonormalize.oracle(problem, grads)
    moved = on_cuda(problem)
    R, factors = backend.orthonormalize_forward(moved)
    dX = backend.orthonormalize_backward([g.cuda() for g in grads], moved, factors)
    again, factors_again = backend.orthonormalize_forward(moved)
    assert_bitwise_equal(factors, factors_again)
    for got, twice, want, got_dX, want_dX in zip(R, again, expected, dX, expected_dX, strict=True):
        r = len(want)
        assert_bitwise_equal(got, twice)
        wide = got.double()
        assert (got.cpu() - want).abs().max() <= 16 * 1.2e-7
        assert (wide @ wide.T - torch.eye(r, device="cuda", dtype=torch.float64)).abs().max() <= 1e-6
        assert (got_dX.cpu() - want_dX).abs().max() <= 64 * r * 1.2e-7 * (1 + want_dX.abs().max())


@pytest.mark.parametrize("name", list(test_stiefel_adamw_step.SETTINGS))
def test_step(backend: Any, name: str) -> None:
    settings = test_stiefel_adamw_step.SETTINGS[name]
    problem = test_stiefel_adamw_step.problem_of(torch.float32, **settings)
    want = test_stiefel_adamw_step.expected(problem)
    moved: StiefelProblem = on_cuda(problem)
    twin = type(moved)(*(tuple(t.clone() for t in ts) for ts in moved[:5]), *moved[5:])
    if refusal(backend, moved) is not None:
        pytest.skip(str(refusal(backend, moved)))
    backend.stiefel_adamw_step(moved)
    backend.stiefel_adamw_step(twin)
    for i, own in enumerate(problem.orthonormal):
        w, expected_w = moved.parameters[i].cpu(), want.parameters[i]
        assert_bitwise_equal(moved.parameters[i], twin.parameters[i])
        assert float(moved.steps[i]) == float(want.steps[i])
        assert (w - expected_w).abs().max() <= (64 if own else 16) * 1.2e-7 * (1 + expected_w.abs().max())
        if own:
            assert (w.double() @ w.double().T - torch.eye(len(w))).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_one_launch_each(name: str) -> None:
    if name not in BACKENDS or BACKENDS[name].unavailable() is not None:
        pytest.skip(f"backend {name} is not there")
    backend = BACKENDS[name]
    problem = on_cuda(test_orthonormalize.problem_of(((4096, 8),) * 32, torch.float32))
    grads = [torch.randn_like(x).T.contiguous() for x in problem.X]
    _, factors = backend.orthonormalize_forward(problem)
    step = on_cuda(
        test_stiefel_adamw_step.problem_of(
            torch.float32, 3, ((4, 4096),) * 64 + ((4,),) * 32, (True,) * 32 + (False,) * 64,
            weight_decays=(0.0,) * 96, max_norm=1.0,
        )
    )  # fmt: skip
    calls = {
        "orthonormalize_forward": lambda: backend.orthonormalize_forward(problem),
        "orthonormalize_backward": lambda: backend.orthonormalize_backward(grads, problem, factors),
        "stiefel_adamw": lambda: backend.stiefel_adamw_step(step),
    }
    for stem, call in calls.items():
        names = [kernel for kernel in kernel_names(call) if not kernel.startswith("Mem")]
        assert len(names) == 1, f"{stem}: one kernel expected, these ran: {names}"
        assert stem.split("_")[0] in names[0]


def test_a_captured_step_is_the_eager_one() -> None:
    """R, a loss through it, the backward and the optimiser's step in one CUDA graph, replayed."""
    torch.manual_seed(0)
    modules = [
        LoreftIntervention(embed_dim=256, low_rank_dimension=4, orthogonality=o).cuda() for o in ("polar", "none")
    ]
    rows = [OrthonormalRows(256, 4).cuda() for _ in range(2)]
    parameters = [p for m in (*modules, *rows) for p in m.parameters()]
    start = [p.detach().clone() for p in parameters]
    h = torch.randn(8, 256, device="cuda")

    def train(steps: int, captured: bool) -> list[Tensor]:
        with torch.no_grad():
            for p, value in zip(parameters, start, strict=True):
                p.copy_(value)
                p.grad = torch.zeros_like(p)
        optimizer = StiefelAdamW(parameters, lr=1e-2, max_norm=1.0)

        def step() -> None:
            y = h
            for module in modules:
                y = module(y)
            loss = y.square().mean() + sum((y @ R.T).pow(3).mean() for R in orthonormal_rows(rows))
            loss.backward()
            optimizer.step()
            for p in parameters:
                p.grad.zero_()

        if not captured:
            for _ in range(steps):
                step()
        else:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            for _ in range(steps - 1):
                graph.replay()
        torch.cuda.synchronize()
        return [p.detach().clone() for p in parameters]

    for got, want in zip(train(6, True), train(6, False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_nothing_waits_for_the_device() -> None:
    problem: OrthonormalProblem = on_cuda(test_orthonormalize.problem_of(((64, 4),) * 3, torch.float32))
    step: StiefelProblem = on_cuda(test_stiefel_adamw_step.problem_of(torch.float32, max_norm=1.0, riemannian=True))
    for backend in BACKENDS.values():
        if backend.unavailable() is None and refusal(backend, problem) is None and refusal(backend, step) is None:
            _, factors = backend.orthonormalize_forward(problem)
            backend.stiefel_adamw_step(step)
            torch.cuda.set_sync_debug_mode("error")
            try:
                backend.orthonormalize_forward(problem)
                backend.orthonormalize_backward([x.T.contiguous() for x in problem.X], problem, factors)
                backend.stiefel_adamw_step(step)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_all_three_replay_in_a_graph(backend: Any) -> None:
    """With gradients that only the graph knows, and a learning rate that is read on the device."""
    problem = on_cuda(test_orthonormalize.problem_of(GRAPH_SIZES, torch.float32))
    lr = torch.tensor(1e-2, device="cuda")
    start = on_cuda(
        test_stiefel_adamw_step.problem_of(
            torch.float32, 3, tuple((r, d) for d, r in GRAPH_SIZES), (True,) * 3, lr=1e-2
        )
    )
    p, q = (test_stiefel_adamw_step.copied(start)._replace(lr=lr) for _ in range(2))

    def run(p: StiefelProblem) -> list[Tensor]:
        R, factors = backend.orthonormalize_forward(problem)
        dX = backend.orthonormalize_backward([2 * t for t in R], problem, factors)
        backend.stiefel_adamw_step(p._replace(gradients=tuple(3 * t for t in R)))
        return [*R, *dX]

    expected = run(q)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(test_stiefel_adamw_step.copied(start)._replace(lr=lr))
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
