"""Dropout of edited rows: one mask for a seed on every backend, forward and backward."""

from __future__ import annotations

import pytest
import torch

from reft_kernels import edit
from reft_kernels.philox import keep_mask
from reft_kernels.testing import EditCase, assert_bitwise_equal, gradients, random_edit

BACKENDS = ("eager", "cpu", "triton")
backends = pytest.mark.parametrize("backend", BACKENDS)


def mask_of(backend: str, seed, shape: tuple[int, ...], dropout: float, **keywords) -> torch.Tensor:
    """The mask that a backend applies, read off an edit that adds nothing to ones. All True where not edited."""
    y = edit(torch.ones(shape), torch.zeros(1, shape[-1]), dropout=dropout, seed=seed, backend=backend, **keywords)
    kept = y != 0
    edited = (y != 1).any(-1, keepdim=True)
    torch.testing.assert_close(y, torch.where(edited, kept / (1 - dropout), 1.0))
    return kept


@backends
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345])
@pytest.mark.parametrize("d", [1, 3, 4, 60, 130])
def test_mask_is_the_philox_stream(d: int, seed: int, backend: str) -> None:
    shape = (2, 3, d)
    expected = keep_mask(torch.tensor([seed]), torch.arange(6), d, 0.4).view(shape)
    assert_bitwise_equal(mask_of(backend, seed, shape, 0.4), expected)


@backends
@pytest.mark.parametrize("dropout", [1e-6, 0.1, 0.5, 0.9, 0.9999])
def test_mask_of_every_probability(dropout: float, backend: str) -> None:
    shape = (1, 4, 1100)
    expected = keep_mask(torch.tensor([7]), torch.arange(4), 1100, dropout).view(shape)
    h = torch.ones(shape)
    y = edit(h, torch.zeros(1, 1100), dropout=dropout, seed=7, backend=backend)
    torch.testing.assert_close(y, expected / (1 - dropout), rtol=1e-6, atol=0)


@backends
def test_statistics(backend: str) -> None:
    kept = mask_of(backend, 3, (1, 40, 1000), 0.3).double()
    assert abs(float(kept.mean()) - 0.7) < 5 * (0.21 / kept.numel()) ** 0.5
    assert 0.7 < float(kept.mean(1).var() / (0.21 / 40)) < 1.3


@backends
def test_seed_may_be_a_tensor(backend: str) -> None:
    by_number = mask_of(backend, 99, (1, 2, 64), 0.5)
    for seed in (torch.tensor([99]), torch.tensor(99), torch.tensor([[99]])):
        assert_bitwise_equal(mask_of(backend, seed, (1, 2, 64), 0.5), by_number)
    assert not torch.equal(mask_of(backend, 98, (1, 2, 64), 0.5), by_number)


@backends
def test_without_a_seed_torchs_generator_decides(backend: str) -> None:
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append([mask_of(backend, None, (1, 2, 256), 0.5) for _ in range(2)])
    for one, other in zip(masks[0], masks[1], strict=True):
        assert_bitwise_equal(one, other)
    assert not torch.equal(masks[0][0], masks[0][1])
    assert not torch.equal(masks[0][0], masks[2][0])


@backends
def test_no_dropout_draws_nothing(backend: str) -> None:
    h, R = torch.randn(2, 8), torch.randn(2, 8)
    state = torch.get_rng_state()
    plain = edit(h, R, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)
    assert_bitwise_equal(edit(h, R, backend=backend, seed=5), plain)


@backends
def test_rows_not_named_are_not_dropped(backend: str) -> None:
    o = random_edit(EditCase(positions="padded", groups=2, shape=(3, 5), dropout=0.9), seed=1)
    y = o.edit(backend=backend)
    assert_bitwise_equal(y[~o.named], o.h[~o.named])
    assert 0.8 < float((y[o.named] == 0).double().mean()) < 0.97


@backends
def test_mask_belongs_to_the_row_of_h_not_to_the_slot(backend: str) -> None:
    whole = mask_of(backend, 11, (2, 4, 64), 0.5)
    positions = torch.tensor([[3, -1], [1, 0]])
    some = mask_of(backend, 11, (2, 4, 64), 0.5, positions=positions)
    for batch, position in ((0, 3), (1, 1), (1, 0)):
        assert_bitwise_equal(some[batch, position], whole[batch, position])
    assert bool(some[0, :3].all())
    assert_bitwise_equal(mask_of(backend, 11, (8, 64), 0.5), whole.view(8, 64))
    assert_bitwise_equal(mask_of(backend, 11, (2, 2, 2, 64), 0.5), whole.view(2, 2, 2, 64))


@backends
@pytest.mark.parametrize("activation", ["linear", "gelu"])
@pytest.mark.parametrize("positions", ["none", "some"])
def test_backward_drops_what_forward_dropped(positions: str, activation: str, backend: str) -> None:
    """y is zero where dropped, and so is every gradient through it."""
    case = EditCase("loreft", activation, positions=positions, shape=(2, 3), slots=2, d=70, r=3, dropout=0.5)
    o = random_edit(case, seed=2)
    dropped = (o.edit(backend=backend) == 0) & o.named[..., None]
    assert bool(dropped.any())
    grad = torch.randn(o.h.shape)
    found = gradients(lambda **t: o.edit(**t, backend=backend), o, grad).grads
    elsewhere = gradients(lambda **t: o.edit(**t, backend=backend), o, grad.where(~dropped, 1e6)).grads
    for name, value in found.items():
        torch.testing.assert_close(elsewhere[name], value, msg=name, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_backends_agree(inplace: bool) -> None:
    o = random_edit(EditCase("nodireft", "silu", "float64", positions="padded", shape=(3, 4), dropout=0.6), seed=3)
    grad = torch.randn(o.h.shape)
    results = []
    for backend in BACKENDS:
        options = {"backend": backend, "inplace": inplace}
        results.append(gradients(lambda h, opt=options, **t: o.edit(h=h.clone(), **t, **opt), o, grad))
    one, *others = results
    for other in others:
        assert_bitwise_equal(one.y == 0, other.y == 0)
        torch.testing.assert_close(one.y, other.y, rtol=1e-6, atol=1e-6, equal_nan=True)
        for name, value in one.grads.items():
            torch.testing.assert_close(value, other.grads[name], rtol=1e-6, atol=1e-6, equal_nan=True)


@backends
def test_expectation_is_the_edit_without_dropout(backend: str) -> None:
    o = random_edit(EditCase("loreft", shape=(1, 1), d=16, r=2), seed=4)
    many = o.h.expand(1, 100, 16)
    dropped = o.edit(h=many, dropout=0.25, backend=backend, seed=5)
    mean = dropped.mean(1)
    plain = o.edit(backend=backend)[0]
    deviation = plain.abs() * (0.25 / 0.75 / 100) ** 0.5
    assert bool(((mean - plain).abs() < 5 * deviation + 1e-5).all())
