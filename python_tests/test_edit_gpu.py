"""The edit on a CUDA device: every dtype against the oracle, determinism, streams and graphs, launches counted.

Run by ``make test-gpu``; skipped where there is no GPU. What only a GPU can show stands first, as a run that is cut off
loses what comes last. Tests marked ``alone`` hold gigabytes: not to be run beside others.
"""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

import reft_kernels as rk
from benchmarks.ops.check import check
from benchmarks.ops.check import expected as expectation
from benchmarks.ops.counting import kernel_names
from benchmarks.ops.operands import make_sets
from benchmarks.ops.peers import Ours
from benchmarks.ops.programs import Step, fresh
from benchmarks.ops.workloads import Workload, workloads
from benchmarks.sanitizer_case import compare, on_device
from reft_kernels import reference
from reft_kernels.testing import EditCase, assert_bitwise_equal, assert_close, edit_cases, poison_empty, random_edit

pytestmark = pytest.mark.gpu

B, S, P = 4, 33, 5


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = rk.available_backends()[name]
    if reason != "ok":
        pytest.skip(f"backend {name}: {reason}")
    return name


def skip_unless_taken(backend: str, case: EditCase, seed: int) -> None:
    """CUDA kernels are compiled for the usual pairs of weights' types; what else comes up is Triton's."""
    operands = on_device(random_edit(case, seed), case.layout, "cuda")
    said = rk.explain(operands.h, **operands.keywords())[backend]
    if said != "ok":
        pytest.skip(said)


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


def indexed_step(backend: str, **changes: object) -> tuple[Step, torch.Tensor]:
    """A training step of an indexed edit in place, its gradient nobody else's, and the memory of that gradient."""
    workload = replace(Workload("indexed", 4, 64, 6, 4096, 4), **changes)
    operands = make_sets(workload, 1, torch.device("cuda"))[0]
    return Step(Ours(backend).prepare(workload, operands), operands.h, operands.grad), operands.grad


@pytest.mark.parametrize("r", [1, 4, 8, 32, 64])
def test_one_launch_forward_and_one_backward(r, backend: str):
    step, grad = indexed_step(backend, r=r)

    def without_autograd() -> torch.Tensor:
        with torch.no_grad():
            return step.prepared.apply(fresh(step.h))

    step.forward()
    for name, call in (("forward", without_autograd), ("forward", step.forward), ("backward", step.backward)):
        if name == "backward":
            step.forward()
        names = kernel_names(call)
        assert len(names) == 1, f"{name}: one kernel expected, these ran: {names}"
        assert f"edit_{name}" in names[0]
    assert step.dh is not None
    assert step.dh.data_ptr() == grad.data_ptr(), "the gradient was copied"


def test_two_streams_do_not_share_a_barrier(backend: str):
    tensors, settings = problem(2048, 4, torch.float32, 1, seed=6)
    h, R, W, b = (t.cuda().float().requires_grad_() for t in tensors)
    settings = {name: t.cuda() for name, t in settings.items()}
    expected = torch.autograd.grad(rk.edit(h, R, W, b, backend=backend, **settings).sum(), (h, R, W, b))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    found = []
    torch.cuda.synchronize()
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(torch.autograd.grad(rk.edit(h, R, W, b, backend=backend, **settings).sum(), (h, R, W, b)))
    torch.cuda.synchronize()
    for gradients in found:
        assert all(torch.equal(one, other) for one, other in zip(expected, gradients, strict=True))


def test_graphs_replay_in_any_order_and_at_once(backend: str):
    tensors, settings = problem(1024, 4, torch.float32, 1, seed=9)
    h, R, W, b = (t.cuda().float().requires_grad_() for t in tensors)
    settings = {name: t.cuda() for name, t in settings.items()}

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(rk.edit(h, R, W, b, backend=backend, **settings).square().sum(), (h, R, W, b))

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


def test_forward_and_backward_replay_in_a_graph(backend: str):
    tensors, settings = problem(1024, 4, torch.float32, 1, seed=7)
    h, R, W, b = (t.cuda().float().requires_grad_() for t in tensors)
    settings = {name: t.cuda() for name, t in settings.items()}

    def step() -> tuple[torch.Tensor, ...]:
        y = rk.edit(h, R, W, b, backend=backend, **settings)
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


def test_replays_read_positions_anew(backend: str):
    tensors, settings = problem(1024, 4, torch.float32, 1, seed=7)
    h, R, W, b = (t.cuda().float() for t in tensors)
    positions = settings["positions"].cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        rk.edit(h, R, W, b, positions=positions, backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rk.edit(h, R, W, b, positions=positions, backend=backend)
    for shift in (1, 2):
        positions.copy_(torch.where(positions >= 0, (positions + shift) % S, positions))
        h.normal_()
        graph.replay()
        assert_bitwise_equal(captured, rk.edit(h, R, W, b, positions=positions, backend=backend))


def test_work_goes_to_the_current_stream(backend: str):
    tensors, settings = problem(2048, 4, torch.float32, 1, seed=6)
    h, R, W, b = (t.cuda().float() for t in tensors)
    settings = {name: t.cuda() for name, t in settings.items()}
    wanted = rk.edit(h, R, W, b, backend=backend, **settings)
    late = torch.full_like(h, float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(h)
        found = rk.edit(late, R, W, b, backend=backend, **settings)
    stream.synchronize()
    assert_bitwise_equal(found, wanted)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("r", "groups", "every_token", "activation"),
    [(8, 2, False, "linear"), (64, 1, False, "linear"), (4, 1, True, "linear"), (64, 1, True, "gelu")],
)
def test_results_are_bitwise_reproducible(r, groups, every_token, activation, inplace, backend: str):
    tensors, settings = problem(4096, r, torch.bfloat16, groups, seed=5)
    h, R, W, b = (t.cuda().to(torch.bfloat16 if i == 0 else torch.float32) for i, t in enumerate(tensors))
    settings = {} if every_token else {name: t.cuda() for name, t in settings.items()}
    first = None
    for _ in range(20):
        leaves = [t.clone().requires_grad_() for t in (h, R, W, b)]
        y = rk.edit(leaves[0] * 1, *leaves[1:], inplace=inplace, activation=activation, backend=backend, **settings)
        found = [y.detach().clone(), *torch.autograd.grad(y.float().square().sum(), leaves)]
        first = first or found
        for name, one, other in zip("yhRWb", first, found, strict=True):
            assert_bitwise_equal(other, one, name=name)


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


def test_compiled_to_cuda_graphs_as_eager(backend: str):
    tensors, settings = problem(1024, 4, torch.float32, 1, seed=10)
    h, R, W, b = (t.cuda().float().requires_grad_() for t in tensors)
    settings = {name: t.cuda() for name, t in settings.items()}

    def function(h: torch.Tensor, *weights: torch.Tensor, inplace: bool = True) -> torch.Tensor:
        # Intermediate results, which the graphs' pool reuses: a barrier word from that pool would be overwritten.
        x = rk.edit(h * 2, *weights, inplace=inplace, backend=backend, **settings)
        x = rk.edit(torch.tanh(x) + h, *weights, inplace=inplace, backend=backend, **settings)
        return x.sin()

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    upstream = torch.randn_like(h)
    for _ in range(6):  # warm-up, capture, replays
        with torch.no_grad():
            h.normal_()
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(h, R, W, b)
        found = [y.detach().clone(), *(t.clone() for t in torch.autograd.grad(y, (h, R, W, b), upstream))]
        y = function(h, R, W, b, inplace=False)
        expected = [y.detach(), *torch.autograd.grad(y, (h, R, W, b), upstream)]
        for name, one, other in zip("yhRWb", found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_work_goes_to_the_device_of_its_operands(backend: str):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert torch.cuda.current_device() == 0
    compare(EditCase(dtype="mixed", positions="padded", shape=(4, 33), slots=7, d=1032, r=8), 4, backend, "cuda:1")


@pytest.mark.parametrize(
    "case",
    [
        EditCase(dtype="mixed", positions="padded", shape=(4, 33), slots=7, d=1032, r=8),
        EditCase(dtype="bfloat16", shape=(4, 65), d=520, r=64),
        EditCase(dtype="mixed", positions="some", groups=3, activation="silu", shape=(3, 17), slots=5, d=768, r=4),
        EditCase(dtype="float32", positions="nothing", shape=(3, 17), d=256, r=4),
    ],
    ids=str,
)
def test_nothing_is_left_unwritten_or_read_before_it_is_written(case: EditCase, backend: str):
    with poison_empty() as poison:
        compare(case, 3, backend, "cuda")
    assert poison.count > 0


def test_dropout_mask_is_that_of_the_cpu(backend: str):
    tensors, settings = problem(577, 4, torch.float32, 1, seed=8)
    h, R, W, b = (t.float() for t in tensors)
    expected = rk.edit(h, R, W, b, dropout=0.3, seed=11, backend="eager", **settings)
    settings = {name: t.cuda() for name, t in settings.items()}
    found = rk.edit(h.cuda(), R.cuda(), W.cuda(), b.cuda(), dropout=0.3, seed=11, backend=backend, **settings)
    assert torch.equal(expected == 0, found.cpu() == 0)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("d", "r"), [(60, 1), (768, 4), (4096, 8), (4097, 16), (576, 33), (2048, 64)])
@pytest.mark.parametrize("activation", ["linear", "gelu"])
@pytest.mark.parametrize("groups", [1, 3])
def test_forward_and_gradients_match_the_oracle(d, r, dtype, activation, groups, backend: str):
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
    y = rk.edit(*ours, activation=activation, backend=backend, **on_device)
    results = [y, *torch.autograd.grad(y, ours, grad.cuda())]
    for name, result, expected, reached in zip("yhRWb", results, oracle, baseline, strict=True):
        floor = 8 * torch.finfo(dtype if name in "yh" else torch.float32).eps * expected.abs().max().item()
        assert errors(result, expected) <= 3 * errors(reached, expected) + floor, name


# float64 runs in the interpreter only.
CASES = [case for case in edit_cases() if case.dtype != "float64"]


@pytest.mark.parametrize("seed", range(max(50, len(CASES))))
def test_random_edits_match_the_oracle_and_leave_other_rows_alone(seed, backend: str):
    # Rows that are not named hold NaN and infinities, and are compared bit by bit.
    case = CASES[seed % len(CASES)]
    skip_unless_taken(backend, case, 1000 + seed)
    compare(case, 1000 + seed, backend, "cuda")


FULL_SIZE = [
    pytest.param(w, id=w.name, marks=[pytest.mark.alone] if w.family == "all" else [])
    for w in workloads("cuda")
    if w.core
]


@pytest.mark.parametrize("workload", FULL_SIZE)
def test_edits_of_full_size_match_the_oracle(workload: Workload, backend: str):
    operands = make_sets(workload, 1, torch.device("cuda"))[0]
    check(Ours(backend), workload, operands, expectation(workload, operands))


@pytest.mark.alone
@pytest.mark.parametrize("every_token", [False, True])
def test_offsets_beyond_two_to_the_31(every_token, backend: str):
    d, length = 4096, 2**31 // (2 * 4096) + 8
    needed = 6 * 2 * length * d * 2  # h, a leaf, y, two gradients, and room
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory on the GPU")
    h = torch.randn(2, length, d, device="cuda", dtype=torch.bfloat16)
    assert h.numel() > 2**31
    R, W = (torch.randn(4, d, device="cuda") * d**-0.5 for _ in range(2))
    b = torch.randn(4, device="cuda")
    rows = [0, length - 2, length - 1]
    positions = None if every_token else torch.tensor([rows, rows], device="cuda")
    x, *leaves = (t.requires_grad_() for t in (h.clone(), R, W, b))
    y = rk.edit(x * 1, *leaves, positions=positions, inplace=True, backend=backend)
    grad = torch.zeros_like(h)
    grad[:, rows] = torch.randn(2, 3, d, device="cuda", dtype=torch.bfloat16)
    found = torch.autograd.grad(y, [x, *leaves], grad)

    def by_reference(dtype: torch.dtype) -> list[torch.Tensor]:
        some = [t.detach().cpu().to(dtype).requires_grad_() for t in (h[:, rows], *leaves)]
        out = reference.edit(*some)
        return [out.detach(), *torch.autograd.grad(out, some, grad[:, rows].cpu().to(dtype))]

    results = [y.detach()[:, rows], found[0][:, rows], *found[1:]]
    exact, plain = by_reference(torch.float64), by_reference(torch.bfloat16)
    for name, result, oracle, baseline in zip(("y", "dh", "dR", "dW", "db"), results, exact, plain, strict=True):
        assert_close(result, oracle, baseline.to(result.dtype), factor=3, name=name)
    between = slice(1, length - 2)
    if not every_token:
        assert torch.equal(y.detach()[:, between].view(torch.int16), h[:, between].view(torch.int16))
    assert not bool(found[0][:, between].any())
