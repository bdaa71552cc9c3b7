"""How R is parametrised: householder, polar, none; one converted into another; rows orthogonal to given ones."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_models import random_batch, tiny_model
from torch import Tensor, nn

from reft_kernels import (
    LoreftIntervention,
    NodireftIntervention,
    ReftConfig,
    ReftModel,
    StiefelAdamW,
    edit,
    get_reft_model,
    loreft,
)
from reft_kernels import orthonormal_reference as reference
from reft_kernels.complement import ComplementRows
from reft_kernels.interventions import METHODS
from reft_kernels.stiefel import ORTHOGONALITIES, FreeRows, StiefelParameter, StiefelRows, make_rows
from reft_kernels.testing import assert_bitwise_equal


def orthonormality(R: Tensor) -> float:
    R = R.detach().double()
    return float((R @ R.T - torch.eye(len(R), dtype=torch.float64)).abs().max())


def random_R(d: int, r: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, r)).Q.T.contiguous()


@pytest.mark.parametrize("orthogonality", ORTHOGONALITIES)
@pytest.mark.parametrize(("d", "r"), [(12, 4), (5, 5), (7, 1), (64, 8)])
def test_every_kind_starts_orthonormal_and_is_assignable(d: int, r: int, orthogonality: str) -> None:
    rows = make_rows(d, r, orthogonality)
    assert rows.orthogonality == orthogonality
    assert rows.weight.shape == (r, d)
    assert rows.weight.requires_grad
    assert orthonormality(rows.weight) < 1e-6
    R = random_R(d, r)
    rows.assign(R)
    torch.testing.assert_close(rows.weight.detach(), R, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=rf"R: expected \[{r}, {d}\], got \[{d + 1}, {r}\]"):
        rows.assign(torch.zeros(d + 1, r))
    assert f"d={d}, r={r}" in repr(rows)
    assert rows.to(torch.bfloat16).weight.dtype == torch.float32


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"orthogonality: expected one of householder, polar, none, got 'cayley'"):
        make_rows(8, 2, "cayley")
    with pytest.raises(ValueError, match=r"orthogonality: expected one of .*, got 'cayley'"):
        LoreftIntervention(embed_dim=8, low_rank_dimension=2, orthogonality="cayley")
    with pytest.raises(ValueError, match=r"orthogonality must be one of .*, got 'cayley'"):
        ReftConfig(method="loreft", layers="all", rank=2, orthogonality="cayley")
    with pytest.raises(ValueError, match="orthogonality: expected 'none', as R of NodireftIntervention is free"):
        NodireftIntervention(embed_dim=8, low_rank_dimension=2, orthogonality="polar")
    with pytest.raises(ValueError, match="R: expected orthonormal rows"):
        make_rows(8, 2, "polar").assign(2 * random_R(8, 2))
    for orthogonality in ORTHOGONALITIES:
        with pytest.raises(ValueError, match="r: expected 1 <= r <= d=3, got 4"):
            make_rows(3, 4, orthogonality)


def test_free_rows_take_anything() -> None:
    rows = FreeRows(6, 2)
    R = torch.randn(2, 6)
    rows.assign(R)
    assert_bitwise_equal(rows.weight.detach(), R)


# Conversion.


@pytest.mark.parametrize("to", ORTHOGONALITIES)
@pytest.mark.parametrize("start", ORTHOGONALITIES)
@pytest.mark.parametrize("fixed", [None, 3])
def test_conversion_keeps_R(start: str, to: str, fixed: int | None) -> None:
    given = None if fixed is None else random_R(40, fixed)
    module = LoreftIntervention(embed_dim=40, low_rank_dimension=6, orthogonality=start, orthogonal_to=given)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    if start != "none":
        for _ in range(5):
            optimizer.zero_grad()
            module.rotate_layer.weight.pow(3).sum().backward()
            optimizer.step()
    before = module.rotate_layer.weight.detach().clone()
    module.rotate_layer.set_orthogonality(to)
    assert module.settings()["orthogonality"] == to
    torch.testing.assert_close(module.rotate_layer.weight.detach(), before, rtol=0, atol=1e-6)
    if given is not None:
        assert (given @ module.rotate_layer.weight).abs().max() < 1e-6


def test_conversion_of_rows_that_are_not_orthonormal() -> None:
    module = LoreftIntervention(embed_dim=10, low_rank_dimension=3, orthogonality="none")
    with torch.no_grad():
        module.rotate_layer.rows.R.mul_(3).add_(torch.randn(3, 10))
    R = module.rotate_layer.rows.weight.detach().clone()
    with pytest.raises(ValueError, match="R: expected orthonormal rows"):
        module.rotate_layer.set_orthogonality("polar")
    assert_bitwise_equal(module.rotate_layer.rows.weight.detach(), R)
    module.rotate_layer.set_orthogonality("householder", project=True)
    nearest = reference.polar(R.double()).float()
    torch.testing.assert_close(module.rotate_layer.rows.weight.detach(), nearest, rtol=0, atol=1e-6)


# Under an optimiser.


class WritesData(torch.optim.Optimizer):
    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-group["lr"])


OPTIMISERS = {
    "StiefelAdamW": StiefelAdamW,
    "AdamW": torch.optim.AdamW,
    "AdamW fused": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, fused=True),
    "SGD": torch.optim.SGD,
    "Adafactor": torch.optim.Adafactor,
    "writes .data": WritesData,
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("orthogonality", ["householder", "polar"])
def test_rows_stay_orthonormal_under_any_optimiser(orthogonality: str, name: str) -> None:
    rows = make_rows(24, 4, orthogonality)
    target = random_R(24, 4)
    optimizer = OPTIMISERS[name](rows.parameters(), lr=1e-2)
    first = float((rows.weight - target).square().sum().detach())
    for _ in range(300):
        optimizer.zero_grad()
        loss = (rows.weight - target).square().sum()
        loss.backward()
        optimizer.step()
        assert orthonormality(rows.weight) < 1e-6
    assert float(loss) < (0.9 if name in ("SGD", "writes .data") else 0.5) * first


def test_what_no_step_reached_is_not_retracted() -> None:
    moved, still = StiefelRows(12, 3), StiefelRows(12, 3)
    kept = still.R.detach().clone()
    optimizer = torch.optim.SGD([*moved.parameters(), *still.parameters()], lr=0.1)
    moved.weight.pow(3).sum().backward()
    optimizer.step()
    assert_bitwise_equal(still.R.detach(), kept)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("orthogonality", ["householder", "polar"])
def test_save_load_and_on(orthogonality: str, weight_decay: float) -> None:
    """10,000 steps, then what was saved, then 1,000 more: |R R^T - I| <= 1e-6 all the way."""
    rows = make_rows(32, 4, orthogonality)
    target = random_R(32, 4)

    def train(rows: nn.Module, steps: int) -> None:
        optimizer = StiefelAdamW(rows.parameters(), lr=3e-3, weight_decay=weight_decay)
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=False)
            (rows.weight - target + 0.1 * torch.randn(4, 32)).square().sum().backward()
            optimizer.step()

    train(rows, 10_000)
    assert orthonormality(rows.weight) < 1e-6
    again = make_rows(32, 4, orthogonality)
    again.load_state_dict({name: value.clone() for name, value in rows.state_dict().items()}, assign=True)
    assert_bitwise_equal(again.weight.detach(), rows.weight.detach())
    train(again, 1_000)
    assert orthonormality(again.weight) < 1e-6


@pytest.mark.parametrize("orthogonality", ["householder", "polar"])
@pytest.mark.parametrize(("d", "r"), [(4096, 8), (8192, 64)])
def test_large_rows_stay_orthonormal(d: int, r: int, orthogonality: str) -> None:
    rows = make_rows(d, r, orthogonality)
    assert orthonormality(rows.weight) < 1e-6
    optimizer = StiefelAdamW(rows.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        (rows.weight * torch.randn(r, d)).sum().backward()
        optimizer.step()
        assert orthonormality(rows.weight) < 1e-6


def test_copies_and_loaded_parameters_are_still_points_of_the_manifold() -> None:
    rows = StiefelRows(12, 3)
    loaded = StiefelRows(12, 3)
    loaded.load_state_dict(rows.state_dict(), assign=True)
    for twin in (copy.deepcopy(rows), loaded, copy.deepcopy(rows).double()):
        assert isinstance(twin.R, StiefelParameter)
        assert isinstance(next(twin.parameters()), StiefelParameter)


# In a model.


@pytest.mark.parametrize("orthogonality", ORTHOGONALITIES)
def test_a_model_trains_saves_and_loads(orthogonality: str, tmp_path: Path) -> None:
    reft_model = get_reft_model(
        tiny_model("llama"), ReftConfig(method="loreft", layers="all", rank=2, orthogonality=orthogonality)
    )
    batch = random_batch([8, 5])
    optimizer = StiefelAdamW([p for p in reft_model.parameters() if p.requires_grad], lr=1e-2, max_norm=1.0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = reft_model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert optimizer.grad_norm is not None
    errors = [orthonormality(m.rotate_layer.rows.weight) for m in reft_model.interventions.values()]
    assert (max(errors) < 1e-6) == (orthogonality != "none")
    reft_model.eval()
    wanted = reft_model(**batch).logits
    reft_model.save(tmp_path / "adapter")
    loaded = ReftModel.load(tmp_path / "adapter", tiny_model("llama"))
    assert loaded.config.orthogonality == orthogonality
    assert loaded(**batch).logits.equal(wanted)
    assert {m.settings()["orthogonality"] for m in loaded.interventions.values()} == {orthogonality}


def test_an_adapter_of_another_parametrisation_is_loaded_into_the_models_own(tmp_path: Path) -> None:
    def make(orthogonality: str) -> ReftModel:
        config = ReftConfig(method="loreft", layers="all", rank=2, orthogonality=orthogonality)
        return get_reft_model(tiny_model("llama"), config).eval()

    one, other = make("householder"), make("polar")
    batch = random_batch([8, 5])
    one.save(tmp_path / "adapter")
    other.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(other(**batch).logits, one(**batch).logits, rtol=1e-4, atol=1e-4)
    assert all(isinstance(m.rotate_layer.rows, StiefelRows) for m in other.interventions.values())


@pytest.mark.parametrize("to", ORTHOGONALITIES)
def test_a_model_converts(to: str) -> None:
    reft_model = get_reft_model(tiny_model("llama"), ReftConfig(method="loreft", layers="all", rank=2)).eval()
    batch = random_batch([8, 5])
    wanted = reft_model(**batch).logits
    reft_model.set_orthogonality(to)
    assert reft_model.config.orthogonality == to
    torch.testing.assert_close(reft_model(**batch).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_model_of_which_one_R_cannot_be_converted_stays_as_it_is() -> None:
    config = ReftConfig(method="loreft", layers="all", rank=2, orthogonality="none")
    reft_model = get_reft_model(tiny_model("llama"), config)
    with torch.no_grad():
        [*reft_model.interventions.values()][-1].rotate_layer.rows.R.mul_(2)
    before = [m.rotate_layer.rows for m in reft_model.interventions.values()]
    with pytest.raises(ValueError, match="R: expected orthonormal rows"):
        reft_model.set_orthogonality("polar")
    assert all(m.rotate_layer.rows is one for m, one in zip(reft_model.interventions.values(), before, strict=True))
    assert reft_model.config.orthogonality == "none"


def test_listed_representations_keep_their_own() -> None:
    own = {"component": "block_output", "low_rank_dimension": 2, "intervention_type": LoreftIntervention}
    config = ReftConfig(
        representations=[{**own, "layer": 0}, {**own, "layer": 1, "orthogonality": "none"}], orthogonality="polar"
    )
    model = get_reft_model(tiny_model("llama"), config)
    assert [m.settings()["orthogonality"] for m in model.interventions.values()] == ["polar", "none"]


# Composition.


@pytest.mark.parametrize("orthogonality", ORTHOGONALITIES)
@pytest.mark.parametrize(("d", "k", "r"), [(12, 4, 3), (12, 4, 8), (64, 1, 8), (3, 2, 1), (512, 8, 8)])
def test_rows_orthogonal_to_given_ones(d: int, k: int, r: int, orthogonality: str) -> None:
    fixed = random_R(d, k)
    rows = ComplementRows(d, r, orthogonality, fixed)
    optimizer = StiefelAdamW(rows.parameters(), lr=1e-2)
    target = torch.randn(r, d)
    for _ in range(20):
        optimizer.zero_grad()
        (rows.weight - target).square().sum().backward()
        optimizer.step()
        if orthogonality != "none":
            assert orthonormality(rows.weight) < 1e-6
        assert (rows.weight @ fixed.T).abs().max() < 1e-6
    R = rows.weight.detach().clone()
    torch.testing.assert_close(rows.fixed.T @ rows.fixed, fixed.T @ fixed, rtol=0, atol=1e-6)
    other = ComplementRows(d, r, orthogonality, k)
    other.load_state_dict(rows.state_dict())
    assert_bitwise_equal(other.weight.detach(), R)


def test_gradient_of_rows_orthogonal_to_given_ones() -> None:
    rows = ComplementRows(9, 3, "householder", random_R(9, 2)).double()

    def function(X: Tensor) -> Tensor:
        problem = ([X], [rows.inner.reflectors], [rows.inner.signs])
        inner = torch.ops.reft_kernels.orthonormalize_forward(*problem, "auto")[0][0]
        return rows._turned(torch.cat((inner.new_zeros(3, 2), inner), 1), transposed=False)

    X = (rows.inner.X + torch.randn(7, 3).double().tril(-1)).detach().requires_grad_()
    assert torch.autograd.gradcheck(function, X, atol=1e-7)


def test_what_a_complement_refuses() -> None:
    with pytest.raises(ValueError, match=r"r: expected 1 <= r <= d - k = 2, as 6 rows are given .* got 3"):
        ComplementRows(8, 3, "householder", random_R(8, 6))
    with pytest.raises(ValueError, match="R: expected orthonormal rows"):
        ComplementRows(8, 2, "householder", 2 * random_R(8, 2))
    fixed = random_R(8, 2)
    with pytest.raises(ValueError, match="R: expected rows orthogonal to the given ones, got a product of"):
        ComplementRows(8, 2, "householder", fixed).assign(fixed)
    with pytest.raises(ValueError, match="orthogonal_to: expected an intervention with orthonormal rows"):
        LoreftIntervention(
            embed_dim=8, low_rank_dimension=2, orthogonal_to=NodireftIntervention(embed_dim=8, low_rank_dimension=2)
        )
    with pytest.raises(ValueError, match="orthogonal_to: expected None, as R of NodireftIntervention is free"):
        NodireftIntervention(embed_dim=8, low_rank_dimension=2, orthogonal_to=fixed)


def test_interventions_with_orthogonal_subspaces_compose() -> None:
    """Edits one after the other equal both at once, in any order, and survive the settings."""
    first = LoreftIntervention(embed_dim=20, low_rank_dimension=3)
    second = LoreftIntervention(embed_dim=20, low_rank_dimension=4, orthogonal_to=first, orthogonality="polar")
    h = torch.randn(5, 20)
    forth, back = second(first(h)), first(second(h))
    # What the first writes lies in its own subspace, which the second's R does not read; W does.
    together = first(h) + second(h) - h
    R = torch.cat((first.rotate_layer.rows.weight, second.rotate_layer.rows.weight))
    assert orthonormality(R) < 1e-6
    for edited, intervention in ((forth, second), (back, first)):
        rows = intervention.rotate_layer.rows.weight
        read = first(h) if intervention is second else second(h)
        torch.testing.assert_close(edited @ rows.T, intervention.learned_source(read), rtol=1e-4, atol=1e-5)
    rest = torch.eye(20) - R.T @ R
    for edited in (forth, back, together):
        torch.testing.assert_close(edited @ rest, h @ rest, rtol=1e-4, atol=1e-5)
    twin = LoreftIntervention(**second.settings())
    twin.load_state_dict(second.state_dict())
    assert twin.settings() == second.settings()
    assert_bitwise_equal(twin(h), second(h))


def test_one_edit_with_both_is_the_two_one_after_the_other() -> None:
    """LoReFT whose W reads only its own subspace: the stacked R and W edit both at once."""
    first, second = random_R(16, 2), None
    second = ComplementRows(16, 3, "householder", first).weight.detach()
    W1, W2 = torch.randn(2, 2) @ first, torch.randn(3, 3) @ second
    b1, b2 = torch.randn(2), torch.randn(3)
    h = torch.randn(7, 16)
    apart = loreft(loreft(h, first, W1, b1), second, W2, b2)
    at_once = loreft(h, torch.cat((first, second)), torch.cat((W1, W2)), torch.cat((b1, b2)))
    torch.testing.assert_close(apart, at_once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("orthogonality", ["householder", "polar"])
def test_slices_of_ranks_and_groups_stay_orthonormal(orthogonality: str) -> None:
    """Subspaces of one R edit as interventions of their own; R of each group is orthonormal."""
    modules = [
        LoreftIntervention(embed_dim=12, low_rank_dimension=4, orthogonality=orthogonality).double() for _ in range(2)
    ]
    optimizer = StiefelAdamW([p for m in modules for p in m.parameters()], lr=1e-2)
    h = torch.randn(2, 6, 12, dtype=torch.float64)
    group = torch.tensor([[0, 1, 0, 1, 1, 0]] * 2)
    for _ in range(10):
        optimizer.zero_grad()
        weights = [m.edit_weights() for m in modules]
        R, W, b = (torch.stack([w[i] for w in weights]) for i in range(3))
        edit(h, R, W, b, group=group).pow(2).sum().backward()
        optimizer.step()
    for module in modules:
        w = module.edit_weights()
        assert orthonormality(w.R) < 1e-6
        for part in ([0, 2], [1], [1, 3]):
            assert orthonormality(w.R[part]) < 1e-6
            edited = loreft(h, w.R[part], w.W[part], w.b[part])
            torch.testing.assert_close(edited @ w.R[part].T, h @ w.W[part].T + w.b[part], rtol=1e-6, atol=1e-6)


def test_a_frozen_R_stays_frozen_when_it_is_converted() -> None:
    module = LoreftIntervention(embed_dim=12, low_rank_dimension=3).requires_grad_(False)
    module.rotate_layer.set_orthogonality("polar")
    assert not any(p.requires_grad for p in module.parameters())


def test_an_adapter_that_cannot_be_converted_changes_nothing(tmp_path: Path) -> None:
    def make(orthogonality: str) -> ReftModel:
        config = ReftConfig(method="loreft", layers="all", rank=2, orthogonality=orthogonality)
        return get_reft_model(tiny_model("llama"), config).eval()

    free, mine = make("none"), make("householder")
    with torch.no_grad():
        [*free.interventions.values()][-1].rotate_layer.rows.R.mul_(2)
    free.save(tmp_path / "adapter")
    before = {name: value.clone() for name, value in mine.interventions.state_dict().items()}
    with pytest.raises(ValueError, match="cannot be made householder: R: expected orthonormal rows"):
        mine.load_adapter(tmp_path / "adapter")
    for name, value in mine.interventions.state_dict().items():
        assert_bitwise_equal(value, before[name])


@pytest.mark.parametrize("orthogonality", ORTHOGONALITIES)
def test_narrow_states_are_read_wide(orthogonality: str) -> None:
    for rows in (make_rows(12, 3, orthogonality), ComplementRows(12, 3, orthogonality, random_R(12, 2))):
        rows.load_state_dict({name: value.bfloat16() for name, value in rows.state_dict().items()}, assign=True)
        assert rows.weight.dtype == torch.float32


def test_shards_of_polar_rows_are_an_error() -> None:
    class DTensor(nn.Parameter):
        """Stands for the shards that FSDP2 puts in place of parameters."""

    with pytest.raises(TypeError, match="R: expected a whole tensor, got a shard"):
        StiefelRows(12, 3).R = DTensor(torch.zeros(1, 12))


def test_methods_without_orthonormal_rows_take_none() -> None:
    for name, kind in METHODS.items():
        module = kind(embed_dim=8, low_rank_dimension=2, orthogonality="none")
        assert module.orthonormal == (name not in ("noreft", "nodireft"))
