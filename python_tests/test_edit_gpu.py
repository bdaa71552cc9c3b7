"""The edit on a CUDA device: every dtype against the oracle, determinism, streams and graphs.

Run by ``make test-gpu``; skipped where there is no GPU.
"""

import pytest
import torch

import reft_kernels as rk
from reft_kernels import reference

pytestmark = pytest.mark.gpu

B, S, P = 4, 33, 5


def problem(d: int, r: int, dtype: torch.dtype, groups: int, seed: int) -> tuple[list[torch.Tensor], dict]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    lead = (groups,) if groups > 1 else ()
    tensors = [draw(B, S, d), draw(*lead, r, d, scale=d**-0.5), draw(*lead, r, d, scale=d**-0.5), draw(*lead, r)]
    positions = torch.stack([torch.randperm(S, generator=generator)[:P] for _ in range(B)])
    positions[0, 1] = -1
    settings = {"positions": positions, "scale": draw(B, P)}
    if groups > 1:
        settings["group"] = torch.randint(-1, groups, (B, P), generator=generator)
    return tensors, settings


def errors(result: torch.Tensor, oracle: torch.Tensor) -> float:
    return (result.detach().cpu().double() - oracle).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("d", "r"), [(60, 1), (768, 4), (4096, 8), (4097, 16), (576, 33), (2048, 64)])
@pytest.mark.parametrize("activation", ["linear", "gelu"])
@pytest.mark.parametrize("groups", [1, 3])
def test_forward_and_gradients_match_the_oracle(d, r, dtype, activation, groups):
    tensors, settings = problem(d, r, dtype, groups, seed=d + r)
    h, R, W, b = (t.to(dtype) if i == 0 else t.float() for i, t in enumerate(tensors))
    grad = torch.randn(B, S, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

    exact = [t.double().requires_grad_() for t in (h, R, W, b)]
    y64 = reference.edit(*exact, activation=activation, **settings)
    oracle = [y64.detach(), *torch.autograd.grad(y64, exact, grad.double())]
    plain = [t.to(dtype).requires_grad_() for t in (h, R, W, b)]
    y16 = reference.edit(*plain, activation=activation, **settings)
    baseline = [y16.detach(), *torch.autograd.grad(y16, plain, grad)]

    ours = [t.cuda().requires_grad_() for t in (h, R, W, b)]
    on_device = {name: t.cuda() for name, t in settings.items()}
    y = rk.edit(*ours, activation=activation, backend="triton", **on_device)
    results = [y, *torch.autograd.grad(y, ours, grad.cuda())]
    for name, result, expected, reached in zip("yhRWb", results, oracle, baseline, strict=True):
        floor = 8 * torch.finfo(dtype if name in "yh" else torch.float32).eps * expected.abs().max().item()
        assert errors(result, expected) <= 3 * errors(reached, expected) + floor, name


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_are_bitwise_reproducible(inplace):
    tensors, settings = problem(4096, 8, torch.bfloat16, 2, seed=5)
    h, R, W, b = (t.cuda().to(torch.bfloat16 if i == 0 else torch.float32) for i, t in enumerate(tensors))
    settings = {name: t.cuda() for name, t in settings.items()}
    first = None
    for _ in range(20):
        leaves = [t.clone().requires_grad_() for t in (h, R, W, b)]
        y = rk.edit(leaves[0] * 1, *leaves[1:], inplace=inplace, **settings)
        found = [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]
        first = first or found
        assert all(torch.equal(one, other) for one, other in zip(first, found, strict=True))


def test_two_streams_do_not_share_a_barrier():
    tensors, settings = problem(2048, 4, torch.float32, 1, seed=6)
    h, R, W, b = (t.cuda().float().requires_grad_() for t in tensors)
    settings = {name: t.cuda() for name, t in settings.items()}
    expected = torch.autograd.grad(rk.edit(h, R, W, b, **settings).sum(), (h, R, W, b))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    found = []
    torch.cuda.synchronize()
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(torch.autograd.grad(rk.edit(h, R, W, b, **settings).sum(), (h, R, W, b)))
    torch.cuda.synchronize()
    for gradients in found:
        assert all(torch.equal(one, other) for one, other in zip(expected, gradients, strict=True))


def test_forward_and_backward_replay_in_a_graph():
    tensors, settings = problem(1024, 4, torch.float32, 1, seed=7)
    h, R, W, b = (t.cuda().float().requires_grad_() for t in tensors)
    settings = {name: t.cuda() for name, t in settings.items()}

    def step() -> tuple[torch.Tensor, ...]:
        y = rk.edit(h, R, W, b, **settings)
        return y, *torch.autograd.grad(y.square().sum(), (h, R, W, b))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        h.copy_(torch.randn_like(h))
    for _ in range(3):
        graph.replay()
    expected = step()
    torch.cuda.synchronize()
    for one, other in zip(captured, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_graphs_replay_in_any_order_and_at_once():
    tensors, settings = problem(1024, 4, torch.float32, 1, seed=9)
    h, R, W, b = (t.cuda().float().requires_grad_() for t in tensors)
    settings = {name: t.cuda() for name, t in settings.items()}

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(rk.edit(h, R, W, b, **settings).square().sum(), (h, R, W, b))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graphs, captured = [], []
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            captured.append(step())
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(reversed(graphs), streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for gradients in captured:
        assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))


def test_captured_steps_train_R():
    rows = rk.OrthonormalRows(256, 4).cuda()
    _ = rows.weight  # cached before the capture
    optimizer = torch.optim.SGD(rows.parameters(), lr=1.0)
    target = torch.randn(4, 256, device="cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        (rows.weight * target).sum().backward()
        optimizer.step()

    rows.X.grad = torch.zeros_like(rows.X)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = rows.weight.detach().clone()
    for _ in range(3):
        graph.replay()
    after = rows.weight.detach()
    assert not torch.equal(before, after)
    torch.testing.assert_close(after @ after.T, torch.eye(4, device="cuda"), rtol=0, atol=1e-6)


def test_dropout_mask_is_that_of_the_cpu():
    tensors, settings = problem(577, 4, torch.float32, 1, seed=8)
    h, R, W, b = (t.float() for t in tensors)
    expected = rk.edit(h, R, W, b, dropout=0.3, seed=11, backend="eager", **settings)
    settings = {name: t.cuda() for name, t in settings.items()}
    found = rk.edit(h.cuda(), R.cuda(), W.cuda(), b.cuda(), dropout=0.3, seed=11, backend="triton", **settings)
    assert torch.equal(expected == 0, found.cpu() == 0)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
