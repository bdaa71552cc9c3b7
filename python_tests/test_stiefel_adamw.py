"""StiefelAdamW as an optimiser of torch: groups, state, schedulers, scalers, clipping over groups, captured rates."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from reft_kernels import LoreftIntervention, StiefelAdamW
from reft_kernels.stiefel import StiefelRows
from reft_kernels.testing import assert_bitwise_equal

STEPS = 10


def linear_pair() -> tuple[nn.Module, nn.Module]:
    one = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    return one, copy.deepcopy(one)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, clip: float | None = None, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(16, 12, generator=generator)
        (model(x) - x[:, :3]).square().mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def assert_close(one: nn.Module, other: nn.Module) -> None:
    for (name, got), want in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-7, msg=name)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}, {"betas": (0.8, 0.9), "eps": 1e-3}])
def test_it_is_adamw_where_nothing_is_constrained(options: dict[str, Any]) -> None:
    one, other = linear_pair()
    train(one, StiefelAdamW(one.parameters(), lr=1e-2, **options))
    train(other, torch.optim.AdamW(other.parameters(), lr=1e-2, **options))
    assert_close(one, other)


def test_groups_have_settings_of_their_own_and_are_clipped_together() -> None:
    one, other = linear_pair()

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return [
            {"params": model[0].parameters(), "lr": 1e-2, "weight_decay": 0.1},
            {"params": model[2].parameters(), "lr": 3e-3, "weight_decay": 0.0},
        ]

    train(one, StiefelAdamW(groups(one), max_norm=0.1))
    train(other, torch.optim.AdamW(groups(other)), clip=0.1)
    assert_close(one, other)


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_half_precision_beside_float32(max_norm: float | None) -> None:
    one, other = linear_pair()

    def halved(model: nn.Module) -> nn.Module:
        model[0].to(torch.bfloat16)
        return nn.Sequential(_Cast(torch.bfloat16), model[0], _Cast(torch.float32), model[1], model[2])

    one, other = halved(one), halved(other)
    train(one, StiefelAdamW(one.parameters(), lr=1e-2, max_norm=max_norm))
    train(other, torch.optim.AdamW(other.parameters(), lr=1e-2, fused=True), clip=max_norm)
    for got, want in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2 if got.dtype == torch.bfloat16 else 1e-3, atol=1e-3)


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def intervention() -> LoreftIntervention:
    return LoreftIntervention(embed_dim=12, low_rank_dimension=3, orthogonality="polar")


def test_constrained_parameters_are_found_or_named() -> None:
    found = intervention()
    named = copy.deepcopy(found)
    R = nn.Parameter(named.rotate_layer.rows.R.detach().clone())  # a plain parameter
    one = StiefelAdamW(found.parameters(), lr=1e-2)
    other = StiefelAdamW(
        [{"params": [R], "orthonormal": True}, {"params": list(named.learned_source.parameters())}], lr=1e-2
    )
    gradient = torch.randn(3, 12)
    for _ in range(5):
        found.rotate_layer.rows.R.grad, R.grad = gradient.clone(), gradient.clone()
        one.step()
        other.step()
    assert_bitwise_equal(found.rotate_layer.rows.R.detach(), R.detach())
    assert (R @ R.T - torch.eye(3)).abs().max() < 1e-6


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_state_goes_on_where_it_was(max_norm: float | None) -> None:
    def run(optimizer: StiefelAdamW, module: LoreftIntervention, steps: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            module(torch.randn(4, 12, generator=generator)).pow(2).sum().backward()
            optimizer.step()

    module = intervention()
    optimizer = StiefelAdamW(module.parameters(), lr=1e-2, max_norm=max_norm)
    run(optimizer, module, 5, 0)
    buffer = io.BytesIO()
    torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    run(optimizer, module, 5, 1)
    buffer.seek(0)
    saved = torch.load(buffer)
    again = intervention()
    again.load_state_dict(saved["module"])
    resumed = StiefelAdamW(again.parameters(), lr=5.0, max_norm=max_norm)
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, again, 5, 1)
    for got, want in zip(again.parameters(), module.parameters(), strict=True):
        assert_bitwise_equal(got.detach(), want.detach())


@pytest.mark.parametrize("fused", [False, True])
def test_state_of_adamw_is_read(fused: bool) -> None:
    one, other = linear_pair()
    adamw = torch.optim.AdamW(one.parameters(), lr=1e-2, fused=fused)
    train(one, adamw)
    other.load_state_dict(one.state_dict())
    ours = StiefelAdamW(other.parameters(), lr=1e-2)
    ours.load_state_dict(copy.deepcopy(adamw.state_dict()))
    train(one, adamw, seed=1)
    train(other, ours, seed=1)
    assert_close(other, one)


def test_schedulers() -> None:
    one, other = linear_pair()
    for model, kind in ((one, StiefelAdamW), (other, torch.optim.AdamW)):
        optimizer = kind(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS)
        for i in range(STEPS):
            optimizer.zero_grad()
            model(torch.full((1, 12), float(i))).square().mean().backward()
            optimizer.step()
            scheduler.step()
    assert_close(one, other)


def test_a_rate_that_is_a_tensor() -> None:
    one, other = linear_pair()
    rate = torch.tensor(1e-2)
    train(one, StiefelAdamW(one.parameters(), lr=rate))
    train(other, torch.optim.AdamW(other.parameters(), lr=1e-2))
    assert_close(one, other)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_grad_scaler(unscale: bool, max_norm: float | None) -> None:
    one, other = linear_pair()
    x = torch.randn(16, 12)
    optimizer = StiefelAdamW(one.parameters(), lr=1e-2, max_norm=max_norm)
    plain = StiefelAdamW(other.parameters(), lr=1e-2, max_norm=max_norm)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for step in range(STEPS):
        optimizer.zero_grad()
        plain.zero_grad()
        scaler.scale((one(x) - x[:, :3]).square().mean()).backward()
        (other(x) - x[:, :3]).square().mean().backward()
        if step == 4:
            one[0].weight.grad[0, 0] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
        before = copy.deepcopy(one)
        scaler.step(optimizer)
        scaler.update()
        if step == 4:
            for got, want in zip(one.parameters(), before.parameters(), strict=True):
                assert_bitwise_equal(got.detach(), want.detach())
        else:
            plain.step()
    assert_close(one, other)


def test_a_closure_and_parameters_without_gradients() -> None:
    model = nn.Linear(4, 2)
    unused = nn.Parameter(torch.randn(3))
    kept = unused.detach().clone()
    optimizer = StiefelAdamW([*model.parameters(), unused], lr=1e-2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 4)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).detach() > 0
    assert_bitwise_equal(unused.detach(), kept)
    assert unused not in optimizer.state


def test_riemannian_steps_train() -> None:
    for riemannian in (False, True):
        rows = StiefelRows(24, 4)
        target = torch.linalg.qr(torch.randn(24, 4)).Q.T
        optimizer = StiefelAdamW(rows.parameters(), lr=1e-2, riemannian=riemannian)
        first = None
        for _ in range(300):
            optimizer.zero_grad()
            loss = (rows.weight - target).square().sum()
            loss.backward()
            optimizer.step()
            first = first or float(loss.detach())
        assert first is not None
        assert float(loss.detach()) < 0.05 * first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr: expected a number of at least 0, got -1.0"),
        ({"lr": torch.ones(2)}, r"lr: expected a number or a tensor of one element, got \[2\]"),
        ({"betas": (1.0, 0.9)}, "betas: expected two numbers in"),
        ({"eps": -1e-8}, "eps: expected a number of at least 0"),
        ({"weight_decay": -1.0}, "weight_decay: expected a number of at least 0"),
        ({"max_norm": 0.0}, "max_norm: expected a positive number or None, got 0.0"),
        ({"backend": "metal"}, "backend: expected one of auto, .*got 'metal'"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StiefelAdamW(nn.Linear(2, 2).parameters(), **options)


def test_parameters_that_cannot_be_constrained() -> None:
    for parameter, words in (
        (torch.zeros(5), r"expected \[r, d\] with r <= d .* got \[5\]"),
        (torch.zeros(5, 4), r"expected \[r, d\] with r <= d .* got \[5, 4\]"),
        (torch.zeros(2, 4).half(), "expected contiguous float32 or float64"),
        (torch.zeros(4, 2).T, "expected contiguous float32 or float64"),
    ):
        with pytest.raises(ValueError, match=words):
            StiefelAdamW([{"params": [nn.Parameter(parameter)], "orthonormal": True}])
    sparse = nn.Parameter(torch.zeros(3))
    sparse.grad = torch.zeros(3).to_sparse()
    optimizer = StiefelAdamW([sparse])
    with pytest.raises(TypeError, match="expected dense real gradients"):
        optimizer.step()


def test_a_loaded_state_leaves_the_constraints_as_they_are() -> None:
    R = nn.Parameter(torch.linalg.qr(torch.randn(12, 3)).Q.T.contiguous())
    adamw = torch.optim.AdamW([R], lr=1e-2)
    R.grad = torch.randn(3, 12)
    adamw.step()
    with torch.no_grad():
        R.copy_(torch.linalg.qr(torch.randn(12, 3)).Q.T)
    optimizer = StiefelAdamW([{"params": [R], "orthonormal": True}], lr=1e-2)
    optimizer.load_state_dict(adamw.state_dict())
    for _ in range(3):
        optimizer.step()
    assert (R @ R.T - torch.eye(3)).abs().max() < 1e-6


def test_what_can_no_longer_be_constrained_is_an_error() -> None:
    for change in (
        lambda rows: rows.load_state_dict({"R": rows.R.detach().bfloat16()}, assign=True),
        lambda rows: setattr(rows.R, "data", rows.R.data.T.contiguous().T),
    ):
        rows = StiefelRows(12, 3)
        change(rows)
        optimizer = None
        rows.R.grad = torch.randn_like(rows.R)
        with pytest.raises(
            ValueError, match="expected contiguous float32 or float64 where rows are to stay orthonormal"
        ):
            optimizer = StiefelAdamW(rows.parameters())
        assert optimizer is None
    rows = StiefelRows(12, 3)
    optimizer = StiefelAdamW(rows.parameters())
    rows.R.data = rows.R.data.T.contiguous().T
    rows.R.grad = torch.randn(3, 12)
    with pytest.raises(ValueError, match="float32 that is not contiguous"):
        optimizer.step()


def test_copies_and_pickles_go_on() -> None:
    module = nn.Linear(4, 2)
    optimizer = StiefelAdamW(module.parameters(), lr=1e-2, max_norm=0.5, riemannian=True)
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (twin.max_norm, twin.riemannian, twin.backend) == (0.5, True, "auto")
        twin.step()
        assert twin.grad_norm is None or twin.grad_norm.isfinite()


def test_a_rate_on_another_device_is_an_error() -> None:
    module = nn.Linear(4, 2)
    optimizer = StiefelAdamW(module.parameters(), lr=torch.tensor(1e-2, device="meta"), backend="cpu")
    module(torch.ones(1, 4)).sum().backward()
    with pytest.raises(ValueError, match="backend='cpu' cannot take these matrices"):
        optimizer.step()


def test_state_that_stayed_on_another_device_is_an_error() -> None:
    module = nn.Linear(4, 2)
    optimizer = StiefelAdamW(module.parameters())
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.state[module.bias]["exp_avg"] = torch.zeros(2, device="meta")
    with pytest.raises(RuntimeError, match="expected parameters where their state is, on meta, got one on cpu"):
        optimizer.step()
