"""OrthonormalRows: torch's map and gradients, an exact cache, and no d x d matrix."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from reft_kernels import OrthonormalRows, orthonormal_rows
from reft_kernels.testing import assert_bitwise_equal

SIZES = [(12, 4), (5, 5), (7, 1), (1, 1), (64, 8), (33, 32)]


def moved(d: int, r: int, amount: float = 1.0, dtype: torch.dtype = torch.float32) -> OrthonormalRows:
    """A module that training has moved away from its base."""
    module = OrthonormalRows(d, r).to(dtype)
    with torch.no_grad():
        module.X.add_(amount * torch.randn(d, r).tril(-1))
    return module


def orthonormality(R: Tensor) -> float:
    R = R.detach().double()
    return float((R @ R.T - torch.eye(len(R), dtype=torch.float64)).abs().max())


def base_of(module: OrthonormalRows) -> Tensor:
    """The base as the d x d matrix that the module never forms: H_1 ... H_r diag(signs, 1)."""
    base = torch.eye(module.d, dtype=torch.float64)
    for v in module.reflectors.double().T:
        base = base @ (torch.eye(module.d, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v))
    ones = torch.ones(module.d - module.r, dtype=torch.float64)
    return base * torch.cat((module.signs.double(), ones))


def torchs(module: OrthonormalRows, dtype: torch.dtype) -> nn.Module:
    """torch's own parametrisation on the same X and base; its weight is R^T."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(module.d, module.r, dtype=dtype))
            nn.init.orthogonal_(self.weight)

    holder = Holder()
    parametrizations.orthogonal(holder, orthogonal_map="householder")
    with torch.no_grad():
        holder.parametrizations.weight[0].base.copy_(base_of(module))
        holder.parametrizations.weight.original.copy_(module.X)
    return holder


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("d", "r"), [*SIZES, (300, 16)])
def test_map_and_gradient_are_torchs(d: int, r: int, dtype: torch.dtype, tolerance: float) -> None:
    module = moved(d, r, 0.5, dtype)
    flipped = torch.rand(r) < 0.5
    with torch.no_grad():
        module.X.diagonal().mul_(torch.where(flipped, -1.0, 1.0))
    other = torchs(module, dtype)
    torch.testing.assert_close(module.weight, other.weight.T, rtol=tolerance, atol=tolerance)
    grad = torch.randn(r, d, dtype=dtype)
    (got,) = torch.autograd.grad(module.weight, module.X, grad)
    (expected,) = torch.autograd.grad(other.weight, other.parametrizations.weight.original, grad.T)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max() + 1))
    assert got.abs().max() > 0 or d == r == 1


@pytest.mark.parametrize(("d", "r"), SIZES)
def test_gradcheck(d: int, r: int) -> None:
    if d > 20:
        d, r = 9, 8
    module = moved(d, r, 0.7, torch.float64)

    def function(X: Tensor) -> Tensor:
        problem = ([X], [module.reflectors], [module.signs])
        return torch.ops.reft_kernels.orthonormalize_forward(*problem, "auto")[0][0]

    assert torch.autograd.gradcheck(function, module.X.detach().clone().requires_grad_(), atol=1e-7)


@pytest.mark.parametrize(("d", "r"), [*SIZES, (4096, 64)])
def test_rows_are_orthonormal(d: int, r: int) -> None:
    assert orthonormality(OrthonormalRows(d, r).weight) < 2e-6
    for amount in (0.01, 1.0, 30.0):
        assert orthonormality(moved(d, r, amount).weight) < 4e-6


def test_start_is_random_and_seeded() -> None:
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        starts.append(OrthonormalRows(10, 3).weight.detach())
    assert_bitwise_equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_shapes_dtypes_and_parameters() -> None:
    module = OrthonormalRows(10, 3)
    assert module.weight.shape == (3, 10)
    assert module.weight.dtype == torch.float32
    assert module.weight.requires_grad
    assert [(n, tuple(p.shape)) for n, p in module.named_parameters()] == [("X", (10, 3))]
    assert set(module.state_dict()) == {"X", "reflectors", "signs"}
    assert sum(t.numel() for t in module.state_dict().values()) == 2 * 30 + 3
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        converted = copy.deepcopy(module).to(dtype)
        assert converted.weight.dtype == expected
        assert orthonormality(converted.weight) < 2e-6


@pytest.mark.parametrize(("d", "r"), [(3, 4), (3, 0), (3, -1), (0, 0)])
def test_impossible_sizes(d: int, r: int) -> None:
    with pytest.raises(ValueError, match=rf"r: expected 1 <= r <= d={d}, got {r}"):
        OrthonormalRows(d, r)


@pytest.mark.parametrize(("d", "r"), SIZES)
def test_assign_and_read(d: int, r: int) -> None:
    module = moved(d, r)
    R = torch.linalg.qr(torch.randn(d, r)).Q.T
    module.assign(R)
    torch.testing.assert_close(module.weight.detach(), R, rtol=0, atol=2e-6)
    R = torch.eye(d)[:r]  # unit vectors, whose reflectors are degenerate
    for chosen in (R, -R, R.flip(0), R.flip(1)):
        module.assign(chosen)
        torch.testing.assert_close(module.weight.detach(), chosen, rtol=0, atol=2e-6)


def test_assign_refuses_what_is_not_orthonormal() -> None:
    module = OrthonormalRows(6, 2)
    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match=r"R: expected \[2, 6\], got \[6, 2\]"):
        module.assign(torch.eye(6)[:, :2])
    for bad in (torch.ones(2, 6), 2 * torch.eye(6)[:2], torch.zeros(2, 6), torch.full((2, 6), float("nan"))):
        with pytest.raises(ValueError, match="R: expected orthonormal rows"):
            module.assign(bad)
    assert_bitwise_equal(module.weight.detach(), before)


# The cache.


def test_same_object_until_X_changes() -> None:
    module = moved(8, 3)
    R = module.weight
    assert module.weight is R
    with torch.no_grad():
        assert module.weight is R
    with torch.inference_mode():
        assert module.weight is R
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.weight is R


def changes() -> dict[str, object]:
    def in_place(m: OrthonormalRows) -> None:
        with torch.no_grad():
            m.X.add_(torch.randn_like(m.X).tril(-1))

    def step(kind: type, **options) -> object:
        def function(m: OrthonormalRows) -> None:
            optimizer = kind(m.parameters(), lr=0.1, **options)
            m.weight[0].sum().backward()
            optimizer.step()

        return function

    class DataWriter(torch.optim.Optimizer):
        def __init__(self, parameters, lr: float) -> None:
            super().__init__(parameters, {"lr": lr})

        def step(self, closure=None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad.data, alpha=-group["lr"])

    def load(m: OrthonormalRows) -> None:
        m.load_state_dict(moved(8, 3).state_dict())

    def load_assign(m: OrthonormalRows) -> None:
        m.load_state_dict(moved(8, 3).state_dict(), assign=True)

    def write_data_of_a_loaded_parameter(m: OrthonormalRows) -> None:
        load_assign(m)
        m.weight.sum()
        m.X.data.add_(torch.randn(8, 3).tril(-1))

    def replace_data(m: OrthonormalRows) -> None:
        m.X.data = m.X.data + torch.randn(8, 3).tril(-1)

    return {
        "in place": in_place,
        "SGD": step(torch.optim.SGD),
        "AdamW": step(torch.optim.AdamW),
        "AdamW foreach": step(torch.optim.AdamW, foreach=True),
        "AdamW fused": step(torch.optim.AdamW, fused=True),
        "optimiser that writes .data": step(DataWriter),
        "load_state_dict": load,
        "load_state_dict assign": load_assign,
        "new .data": replace_data,
        "write to .data": lambda m: m.X.data.add_(torch.randn(8, 3).tril(-1)),
        "write to .data of a loaded parameter": write_data_of_a_loaded_parameter,
        "assign": lambda m: m.assign(torch.linalg.qr(torch.randn(8, 3)).Q.T),
        "reset": lambda m: m.reset_parameters(),
        "double": lambda m: m.double(),
        "new parameter": lambda m: setattr(m, "X", nn.Parameter(m.X.detach() + torch.randn(8, 3).tril(-1))),
    }


@pytest.mark.parametrize("name", list(changes()))
def test_recomputed_when_something_changed(name: str) -> None:
    module = moved(8, 3)
    stale = module.weight
    changes()[name](module)
    fresh = module.weight
    assert fresh is not stale
    problem = ([module.X.detach()], [module.reflectors], [module.signs])
    again = torch.ops.reft_kernels.orthonormalize_forward(*problem, "auto")[0][0]
    assert_bitwise_equal(fresh.detach(), again)
    if name != "double":
        assert not torch.equal(fresh.detach(), stale.detach())
    assert module.weight is fresh
    (gradient,) = torch.autograd.grad(fresh.double().pow(3).sum(), module.X)
    assert gradient.dtype == module.X.dtype
    assert bool(gradient.any())


def test_frozen_and_unfrozen() -> None:
    module = moved(8, 3)
    module.requires_grad_(False)
    assert not module.weight.requires_grad
    module.requires_grad_(True)
    assert module.weight.requires_grad


def test_copies_are_independent() -> None:
    module = moved(8, 3)
    R = module.weight  # fills the cache
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_bitwise_equal(twin.weight.detach(), R.detach())
        with torch.no_grad():
            twin.X.mul_(2)
        assert not torch.equal(twin.weight, R)
        assert_bitwise_equal(module.weight.detach(), R.detach())
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = OrthonormalRows(8, 3)
    other.load_state_dict(torch.load(buffer))
    assert_bitwise_equal(other.weight.detach(), R.detach())


@pytest.mark.parametrize("assign", [False, True])
def test_state_is_exact_after_training(assign: bool) -> None:
    module = moved(20, 5)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        module.weight.pow(3).sum().backward()
        optimizer.step()
    other = OrthonormalRows(20, 5)
    other.load_state_dict({n: t.clone() for n, t in module.state_dict().items()}, assign=assign)
    assert_bitwise_equal(other.weight.detach(), module.weight.detach())


# Training through the cached R.


def test_micro_batches_through_one_R_add_up() -> None:
    module = moved(8, 3, dtype=torch.float64)
    h = torch.randn(6, 8, dtype=torch.float64)
    module.X.grad = None
    ((h @ module.weight.T) ** 2).sum().backward()
    whole = module.X.grad.clone()
    module.X.grad = None
    R = module.weight
    for part in h.split(2):
        assert module.weight is R
        ((part @ module.weight.T) ** 2).sum().backward()
    torch.testing.assert_close(module.X.grad, whole, rtol=1e-12, atol=1e-12)
    assert bool(whole.any())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_first_read_without_gradients_then_training(mode) -> None:
    module = moved(8, 3)
    twin = copy.deepcopy(module)
    with mode():
        module.weight.sum()
    for m in (module, twin):
        m.weight.pow(3).sum().backward()
    assert_bitwise_equal(module.X.grad, twin.X.grad)
    assert bool(module.X.grad.any())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    results = []
    module = moved(8, 3)
    h = torch.randn(4, 8, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return x + (x @ module.weight.T).tanh() @ module.weight

    for wrapped in (False, True):
        module.zero_grad()
        h.grad = None
        x = h
        for _ in range(3):
            x = checkpoint(block, x, use_reentrant=reentrant) if wrapped else block(x)
        x.square().sum().backward()
        results.append((x.detach(), h.grad, module.X.grad))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_autocast_makes_no_difference() -> None:
    module = moved(16, 4)
    twin = copy.deepcopy(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        R = module.weight
        R.pow(3).sum().backward()
    twin.weight.pow(3).sum().backward()
    assert_bitwise_equal(R.detach(), twin.weight.detach())
    assert_bitwise_equal(module.X.grad, twin.X.grad)


@pytest.mark.parametrize("own_first", [True, False])
def test_second_derivative_is_an_error(own_first: bool) -> None:
    module = moved(8, 3)
    R = module.weight
    (first,) = torch.autograd.grad(R.pow(3).sum() if own_first else R.sum(), module.X, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(first.square().sum() + module.X.sum(), module.X)


def test_backward_of_an_old_R_after_X_was_written_is_an_error() -> None:
    module = moved(8, 3)
    R = module.weight
    torch.autograd.grad(R.pow(3).sum(), module.X)
    with torch.no_grad():
        module.X.mul_(1.5)
    with pytest.raises(
        RuntimeError, match=r"X \[8, 3\], number 0 .*modified by an inplace operation.*read `weight` again"
    ):
        torch.autograd.grad(R.pow(3).sum(), module.X)
    torch.autograd.grad(module.weight.pow(3).sum(), module.X)


def test_weight_decay_does_not_kill_R() -> None:
    """Only the signs of X's diagonal count, so that a diagonal shrunk towards zero keeps R orthonormal."""
    module = OrthonormalRows(10, 3)
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.X.mul_(1e-6)
    assert orthonormality(module.weight) < 2e-6
    torch.testing.assert_close(module.weight.detach(), before, rtol=0, atol=1e-5)
    with torch.no_grad():
        module.X.zero_()
    assert orthonormality(module.weight) < 2e-6


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_a_thousand_steps_stay_orthonormal_and_learn(weight_decay: float) -> None:
    d, r = 24, 4
    module = OrthonormalRows(d, r)
    target = torch.linalg.qr(torch.randn(d, r)).Q.T
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=weight_decay)
    losses = []
    for _ in range(1000):
        optimizer.zero_grad()
        loss = (module.weight - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert orthonormality(module.weight) < 1e-6
    assert losses[-1] < 0.2 * losses[0]


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(out)[0]:
            if isinstance(leaf, Tensor):
                self.numel = max(self.numel, leaf.numel())
        return out


def test_no_square_matrix_is_ever_formed() -> None:
    d, r = 256, 4
    with Largest() as largest:
        module = OrthonormalRows(d, r)
        module.weight.pow(3).sum().backward()
        torch.optim.AdamW(module.parameters()).step()
        module.assign(torch.linalg.qr(torch.randn(d, r)).Q.T)
        module.weight.sum().backward()
        other = OrthonormalRows(d, r)
        other.load_state_dict(module.state_dict())
    assert d * r <= largest.numel <= 2 * d * r
    with Largest() as largest:
        torch.eye(d) @ torch.eye(d)
    assert largest.numel == d * d


def test_compiled_weight() -> None:
    torch._dynamo.reset()
    module = moved(8, 3)
    compiled = torch.compile(lambda h: h @ module.weight.T, fullgraph=True, backend="aot_eager")
    h = torch.randn(2, 8)
    for _ in range(2):
        torch.testing.assert_close(compiled(h), h @ module.weight.T)
        (got,) = torch.autograd.grad(compiled(h).square().sum(), module.X)
        (expected,) = torch.autograd.grad((h @ module.weight.T).square().sum(), module.X)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            module.X.add_(torch.randn(8, 3).tril(-1))


def test_meta_device() -> None:
    with torch.device("meta"):
        module = OrthonormalRows(8, 3)
    assert module.X.is_meta
    module = module.to_empty(device="cpu")
    module.load_state_dict(moved(8, 3).state_dict())
    assert orthonormality(module.weight) < 2e-6


def test_repr_names_the_sizes() -> None:
    assert "d=8, r=3" in repr(OrthonormalRows(8, 3))


def test_compiled_under_autocast_R_is_as_exact() -> None:
    module = moved(64, 4)
    compiled = torch.compile(lambda: module.weight * 1, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        R = compiled()
    torch.testing.assert_close(R, module.weight, rtol=0, atol=1e-6)
    assert orthonormality(R) < 1e-6


def test_a_module_made_in_inference_mode_works() -> None:
    with torch.inference_mode():
        module = OrthonormalRows(16, 3)
        first = module.weight.clone()
        module.X.add_(torch.randn(16, 3).tril(-1))
        assert not torch.equal(module.weight, first)
        assert orthonormality(module.weight) < 1e-6


def test_a_cast_of_the_model_keeps_R_in_float32() -> None:
    module = moved(16, 3)
    R = module.weight.detach().clone()
    model = nn.Sequential(module, nn.Linear(2, 2))
    assert model.to(torch.bfloat16)[1].weight.dtype == torch.bfloat16
    assert_bitwise_equal(module.weight.detach(), R)
    assert model.half()[0].X.dtype == torch.float32
    assert model.double()[0].weight.dtype == torch.float64


def test_a_narrow_default_dtype_changes_nothing() -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = OrthonormalRows(16, 3)
    finally:
        torch.set_default_dtype(default)
    assert module.weight.dtype == torch.float32
    assert orthonormality(module.weight) < 1e-6


# What a review found.


def test_an_R_that_was_written_is_computed_anew() -> None:
    module, other = moved(8, 3), moved(8, 3)
    kept, kept_other = (R.detach().clone() for R in orthonormal_rows([module, other]))
    with torch.no_grad():
        module.weight.mul_(3)
    assert_bitwise_equal(module.weight.detach(), kept)
    assert_bitwise_equal(other.weight.detach(), kept_other)
    (module.weight.pow(3).sum() + other.weight.pow(3).sum()).backward()
    assert bool(module.X.grad.any())


def test_what_another_process_may_write_is_not_kept() -> None:
    module = moved(8, 3)
    module.share_memory()
    R = module.weight
    assert module.weight is not R
    assert_bitwise_equal(module.weight.detach(), R.detach())


def test_invalidate_forgets_R() -> None:
    module = moved(8, 3)
    R = module.weight
    module.invalidate()
    assert module.weight is not R


def test_a_move_leaves_no_memory_behind() -> None:
    module = moved(8, 3)
    module.weight.sum()
    module.to("meta")
    assert module._cache is None


def test_a_write_to_one_X_is_no_concern_of_the_others() -> None:
    one, other = moved(8, 3), moved(8, 3)
    rows = orthonormal_rows([one, other])
    rows[0].pow(3).sum().backward(retain_graph=True)
    with torch.no_grad():
        one.X.mul_(1.5)
    rows[1].pow(3).sum().backward()
    assert bool(other.X.grad.any())
    with pytest.raises(RuntimeError, match=r"X \[8, 3\], number 0 of those"):
        rows[0].pow(3).sum().backward()


def test_torch_func_and_forward_mode_follow_R() -> None:
    module = moved(8, 3, dtype=torch.float64)
    (want,) = torch.autograd.grad(module.weight.pow(3).sum(), module.X)
    X = {"X": module.X.detach()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return (
            torch.func.functional_call(_Weight(module), {f"module.{k}": v for k, v in parameters.items()}).pow(3).sum()
        )

    torch.testing.assert_close(torch.func.grad(loss)(X)["X"], want)
    tangent = torch.randn(8, 3, dtype=torch.float64)
    _, directional = torch.func.jvp(loss, (X,), ({"X": tangent},))
    torch.testing.assert_close(directional, (want * tangent).sum())
    batched = torch.func.vmap(lambda x: loss({"X": x}))(torch.stack([X["X"], X["X"]]))
    torch.testing.assert_close(batched, loss(X).expand(2))


class _Weight(nn.Module):
    def __init__(self, module: OrthonormalRows) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> Tensor:
        return self.module.weight


def test_compiled_modules_of_different_dtypes() -> None:
    torch._dynamo.reset()
    modules = [moved(8, 3), moved(9, 2, dtype=torch.float64), moved(8, 3)]
    compiled = torch.compile(lambda: orthonormal_rows(modules), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(), orthonormal_rows(modules), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("X", "reflectors", "signs", "words"),
    [
        ([], [], [], "expected as many of each and at least one, got 0, 0 and 0"),
        ([(8, 3)], [(8, 3)], [], "expected as many of each and at least one, got 1, 1 and 0"),
        (
            [(8, 3)],
            [(8, 2)],
            [(3,)],
            r"number 0: expected \[d, r\], \[d, r\] and \[r\] .*got \[8, 3\], \[8, 2\] and \[3\]",
        ),
        ([(3, 8)], [(3, 8)], [(8,)], "number 0: expected .* with r <= d"),
    ],
)
def test_operands_of_the_op_that_do_not_fit(X, reflectors, signs, words: str) -> None:
    operands = ([torch.zeros(shape) for shape in shapes] for shapes in (X, reflectors, signs))
    with pytest.raises(ValueError, match=words):
        torch.ops.reft_kernels.orthonormalize_forward(*operands, "auto")
