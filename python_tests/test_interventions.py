"""The six modules: pyreft's names, one edit each, and many at once."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reft_kernels
from reft_kernels import reference
from reft_kernels.interventions import INTERVENTIONS, METHODS, Intervention, edit_rows
from reft_kernels.reference import ACTIVATIONS
from reft_kernels.testing import assert_bitwise_equal

methods = pytest.mark.parametrize("method", METHODS)
WITH_W = ("loreft", "noreft", "direft", "nodireft")
FREE = ("noreft", "nodireft")
GAMMA = ("loreft", "noreft", "consreft")


def make(method: str, d: int = 12, r: int = 3, **settings: Any) -> Intervention:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = METHODS[method](embed_dim=d, low_rank_dimension=r, **settings)
    with torch.no_grad():  # biases start at zero in some of them
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
    return module


def by_attributes(module: Intervention, base: Tensor) -> Tensor:
    """pyreft's formulas, from the attributes that pyreft has, in float64."""
    h = base.double()
    function = {"linear": lambda s: s, **{n: getattr(nn.functional, n) for n in ACTIVATIONS if n != "linear"}}
    if isinstance(module.learned_source, nn.Linear):
        s = h @ module.learned_source.weight.double().T + module.learned_source.bias.double()
        source = function[module.activation](s)
    else:
        source = module.learned_source.double()
    name = type(module).__name__
    if name in ("NoreftIntervention", "NodireftIntervention"):
        down = module.proj_layer.weight.double()  # [r, d]
        rotated = h @ down.T + (0 if module.proj_layer.bias is None else module.proj_layer.bias.double())
    else:
        down = module.rotate_layer.weight.double().T
        rotated = h @ down.T
    if name in ("LoreftIntervention", "NoreftIntervention", "ConsreftIntervention"):
        source = source - rotated
    return h + source @ down


def settings_of(method: str) -> list[dict[str, Any]]:
    settings = [{}, {"dtype": torch.bfloat16}]
    if method in WITH_W:
        settings += [{"act_fn": name} for name in ACTIVATIONS if name != "linear"]
    if method in FREE:
        settings += [{"add_bias": True}]
    return settings


@pytest.mark.parametrize(
    ("method", "settings"), [(m, s) for m in METHODS for s in settings_of(m)], ids=lambda v: str(v).replace(" ", "")
)
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (2, 1, 3, 12), (0, 12)])
def test_each_is_its_formula(shape: tuple[int, ...], method: str, settings: dict[str, Any]) -> None:
    module = make(method, **settings)
    base = torch.randn(shape)
    y = module(base)
    assert y.shape == base.shape
    assert y.dtype == base.dtype
    expected = by_attributes(module, base)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert y.numel() <= 12 or not torch.equal(y, base)
    w = module.edit_weights()
    oracle = reference.edit(
        base.double(), *(None if t is None else t.double() for t in (w.R, w.W, w.b)),
        c=None if w.c is None else w.c.double(), subtract=w.subtract, activation=w.activation,
    )  # fmt: skip
    torch.testing.assert_close(oracle, expected, rtol=1e-10, atol=1e-10)


@methods
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_result_has_the_dtype_of_its_base(dtype: torch.dtype, method: str) -> None:
    module = make(method)
    base = torch.randn(3, 12).to(dtype)
    y = module(base)
    assert y.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(y.double(), by_attributes(module, base), rtol=tolerance, atol=tolerance)


@methods
def test_every_parameter_has_a_gradient(method: str) -> None:
    module = make(method, add_bias=method == "noreft", act_fn="gelu" if method in WITH_W else None)
    base = torch.randn(2, 3, 12, requires_grad=True)
    module(base).pow(2).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name
    leaf = base.detach().double().requires_grad_()
    by_attributes(module, leaf).pow(2).sum().backward()
    torch.testing.assert_close(base.grad, leaf.grad.float(), rtol=1e-4, atol=1e-4)


@methods
def test_names_and_shapes_are_pyrefts(method: str) -> None:
    module = make(method, d=12, r=3, dropout=0.1, add_bias=True)
    assert type(module).__name__ == method.capitalize() + "Intervention"
    assert getattr(reft_kernels, type(module).__name__) is type(module)
    assert INTERVENTIONS[type(module).__name__] is type(module)
    assert (module.embed_dim, module.low_rank_dimension) == (12, 3)
    assert type(module.embed_dim) is type(module.low_rank_dimension) is int
    assert isinstance(module.dropout, nn.Dropout)
    assert module.activation == "linear"
    if method in WITH_W:
        assert isinstance(module.learned_source, nn.Linear)
        assert module.learned_source.weight.shape == (3, 12)
        assert module.learned_source.bias.shape == (3,)
    else:
        assert isinstance(module.learned_source, nn.Parameter)
        assert module.learned_source.shape == (3,)
    if method in FREE:
        assert isinstance(module.proj_layer, nn.Linear)
        assert module.proj_layer.weight.shape == (3, 12)
        assert (module.proj_layer.bias is not None) == (method == "noreft")
        assert not hasattr(module, "rotate_layer")
    else:
        assert module.rotate_layer.weight.shape == (12, 3)
        R = module.rotate_layer.weight.detach().T
        torch.testing.assert_close(R @ R.T, torch.eye(3), rtol=0, atol=2e-6)
        assert not hasattr(module, "proj_layer")


@methods
def test_edit_weights(method: str) -> None:
    module = make(method, dropout=0.25, add_bias=True, act_fn="relu")
    w = module.edit_weights()
    assert w.R.shape == (3, 12)
    assert (w.W is not None) == (method in WITH_W)
    assert w.b.shape == (3,)
    assert (w.c is not None) == (method == "noreft")
    assert w.subtract == (method in GAMMA)
    assert w.activation == ("relu" if method in WITH_W else "linear")
    assert w.dropout == (0.0 if method == "consreft" else 0.25)
    assert module.eval().edit_weights().dropout == 0.0


def test_rotate_layer_can_be_read_assigned_and_called() -> None:
    module = make("loreft")
    new = torch.linalg.qr(torch.randn(12, 3)).Q
    module.rotate_layer.weight = new
    torch.testing.assert_close(module.rotate_layer.weight.detach(), new, rtol=0, atol=2e-6)
    module.rotate_layer.weight = nn.Parameter(new.flip(0))
    torch.testing.assert_close(module.rotate_layer.weight.detach(), new.flip(0), rtol=0, atol=2e-6)
    assert [n for n, _ in module.named_parameters()] == [
        "rotate_layer.rows.X",
        "learned_source.weight",
        "learned_source.bias",
    ]
    x = torch.randn(4, 12)
    torch.testing.assert_close(module.rotate_layer(x), x @ module.rotate_layer.weight)
    torch.testing.assert_close(module.rotate_layer(x.double()).double(), x.double() @ new.flip(0).double(), rtol=1e-5,
                               atol=1e-5)  # fmt: skip
    torch.testing.assert_close(module(x).double(), by_attributes(module, x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="orthonormal"):
        module.rotate_layer.weight = torch.ones(12, 3)
    with pytest.raises(ValueError, match=r"\[3, 12\]"):
        module.rotate_layer.weight = new.T


def test_source_and_subspaces_have_no_effect() -> None:
    module = make("loreft")
    base = torch.randn(2, 12)
    assert_bitwise_equal(module(base, source=torch.randn(2, 12), subspaces=[[0]]), module(base))


@methods
def test_base_is_not_written(method: str) -> None:
    base = torch.randn(2, 3, 12)
    before = base.clone()
    make(method)(base)
    assert_bitwise_equal(base, before)


@methods
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("act_fn", [None, "gelu"])
def test_settings_rebuild_the_module(act_fn, dtype: str, method: str) -> None:
    module = make(method, d=10, r=2, dtype=dtype, dropout=0.125, act_fn=act_fn, add_bias=True)
    settings = json.loads(json.dumps(module.settings()))
    names = {"embed_dim", "low_rank_dimension", "dtype", "dropout", "act_fn", "add_bias"}
    assert set(settings) == names | ({"orthogonality"} if module.orthonormal else set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what it says of itself has an effect
        twin = type(module)(**settings)
    assert twin.settings() == module.settings()
    assert settings["add_bias"] is True
    twin.load_state_dict(module.state_dict())
    base = torch.randn(4, 10)
    assert_bitwise_equal(twin.eval()(base), module.eval()(base))


@methods
def test_state_dict_is_exact(method: str) -> None:
    module = make(method, add_bias=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    base = torch.randn(5, 12)
    for _ in range(3):
        optimizer.zero_grad()
        module(base).pow(2).sum().backward()
        optimizer.step()
    y = module(base)
    for assign in (False, True):
        twin = make(method, add_bias=True)
        assert not torch.equal(twin(base), y)
        twin.load_state_dict({n: t.clone() for n, t in module.state_dict().items()}, assign=assign)
        assert_bitwise_equal(twin(base).detach(), y.detach())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_bitwise_equal(twin(base).detach(), y.detach())


def test_dtypes() -> None:
    module = make("loreft", dtype="bfloat16")
    assert module.learned_source.weight.dtype == torch.bfloat16
    assert module.rotate_layer.weight.dtype == torch.float32
    assert make("nodireft", dtype=torch.float16).proj_layer.weight.dtype == torch.float16
    assert make("loreft", dtype="torch.float16").settings()["dtype"] == "float16"
    for bad in ("int32", torch.int64, "nonsense", 3):
        with pytest.raises((ValueError, TypeError), match="dtype: expected a floating torch dtype"):
            METHODS["loreft"](embed_dim=4, low_rank_dimension=2, dtype=bad)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, TypeError, "embed_dim: expected an integer, got None"),
        ({"embed_dim": 8}, TypeError, "low_rank_dimension: expected an integer, got None"),
        ({"embed_dim": "8", "low_rank_dimension": 2}, TypeError, "embed_dim: expected an integer, got '8'"),
        ({"embed_dim": 8, "low_rank_dimension": True}, TypeError, "low_rank_dimension: expected an integer"),
        ({"embed_dim": 8, "low_rank_dimension": 9}, ValueError, "low_rank_dimension: expected 1 <= r <= embed_dim=8"),
        ({"embed_dim": 8, "low_rank_dimension": 0}, ValueError, "got 0"),
        (
            {"embed_dim": 8, "low_rank_dimension": 2, "act_fn": "swoosh"},
            ValueError,
            "act_fn: expected one of .*'swoosh'",
        ),
        ({"embed_dim": 8, "low_rank_dimension": 2, "dropout": 1.0}, ValueError, "dropout: expected a probability"),
        ({"embed_dim": 8, "low_rank_dimension": 2, "dropout": -1}, ValueError, "dropout: expected a probability"),
    ],
)
@methods
def test_constructor_errors(method: str, settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        METHODS[method](**settings)


@methods
def test_unknown_keywords_are_warned_of_and_pyvenes_are_not(method: str) -> None:
    sizes = {"embed_dim": 8, "low_rank_dimension": 2}
    with pytest.warns(UserWarning, match="no effect of another, learning_rate"):
        METHODS[method](**sizes, learning_rate=1.0, another=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        METHODS[method](**sizes, layer=3, component="block_output", keep_last_dim=True, use_fast=False, unit="pos",
                        max_number_of_units=1, source_representation=None, device="cpu", latent_dim=8)  # fmt: skip


def test_settings_without_an_effect_are_warned_of() -> None:
    sizes = {"embed_dim": 8, "low_rank_dimension": 2}
    for method in ("consreft", "lobireft"):
        with pytest.warns(UserWarning, match="no effect of act_fn"):
            assert METHODS[method](**sizes, act_fn="relu").activation == "linear"
    with pytest.warns(UserWarning, match="no effect of dropout"):
        assert METHODS["consreft"](**sizes, dropout=0.5).dropout.p == 0.0


@methods
def test_dropout_in_training_alone(method: str) -> None:
    module = make(method, d=64, r=2, dropout=0.5)
    base = torch.randn(1, 16, 64)
    torch.manual_seed(0)
    first, second = module(base), module(base)
    if method == "consreft":
        assert_bitwise_equal(first, second)
        assert bool(first.all())
        return
    assert not torch.equal(first, second)
    assert 0.4 < float((first == 0).double().mean()) < 0.6
    module.eval()
    whole = module(base)
    assert_bitwise_equal(module(base), whole)
    assert not bool((whole == 0).any())
    kept = first != 0
    torch.testing.assert_close(first[kept], 2 * whole[kept], rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    assert_bitwise_equal(module.train()(base), first)


# Many at once.


def mixed(seed: int) -> list[Intervention]:
    torch.manual_seed(seed)
    return [
        make("loreft", r=3), make("loreft", r=5), make("noreft", r=2, add_bias=True), make("noreft", r=4),
        make("consreft", r=1), make("lobireft", r=12), make("direft", r=2, act_fn="gelu"),
        make("nodireft", r=3, dtype=torch.bfloat16), make("loreft", r=2, act_fn="relu"),
    ]  # fmt: skip


def one_by_one(interventions, h, positions, group, scale=None) -> Tensor:
    y = h.clone()
    for i in range(positions.shape[0]):
        for j in range(positions.shape[1]):
            p, g = int(positions[i, j]), int(group[i, j])
            if p >= 0 and g >= 0:
                strength = 1.0 if scale is None else scale[i, j]
                y[i, p] = h[i, p] + strength * (interventions[g](h[i, p]) - h[i, p])
    return y


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mixed_classes_and_ranks_at_once(seed: int, scaled: bool, inplace: bool) -> None:
    interventions = mixed(seed)
    h = torch.randn(3, 8, 12)
    positions = torch.rand(3, 8).argsort(1)[:, :6]
    positions[0, 2] = -1
    group = torch.randint(-1, len(interventions), (3, 6))
    scale = torch.rand(3, 6) * 2 if scaled else None
    expected = one_by_one(interventions, h, positions, group, scale)
    own = h.clone()
    y = edit_rows(interventions, own, positions, group, scale, inplace=inplace)
    assert (y is own) == inplace
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(y, h)
    if not inplace:
        assert_bitwise_equal(own, h)
    untouched = torch.ones(3, 8, dtype=torch.bool)
    for i, j in ((positions >= 0) & (group >= 0)).nonzero().tolist():
        untouched[i, positions[i, j]] = False
    assert_bitwise_equal(y[untouched], h[untouched])


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_of_many_at_once(inplace: bool) -> None:
    interventions = nn.ModuleList(mixed(3))
    h = torch.randn(2, 9, 12, requires_grad=True)
    positions = torch.arange(9).expand(2, 9)
    group = torch.stack((torch.arange(9), torch.arange(9).flip(0)))
    results = []
    for together in (True, False):
        interventions.zero_grad()
        h.grad = None
        x = h * 1
        if together:
            y = edit_rows(list(interventions), x, positions, group, inplace=inplace)
        else:
            y = torch.stack([torch.stack([interventions[group[i, j]](x[i, j]) for j in range(9)]) for i in range(2)])
        y.square().sum().backward()
        results.append({"h": h.grad, **{n: p.grad.clone() for n, p in interventions.named_parameters()}})
    for name, expected in results[1].items():
        tolerance = 0.1 if expected.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(results[0][name], expected, rtol=tolerance, atol=tolerance, msg=name)
        assert bool(expected.any()), name


def test_group_without_positions_and_any_shape() -> None:
    interventions = mixed(4)
    h = torch.randn(2, 1, 5, 12)
    group = torch.randint(-1, len(interventions), (2, 1, 5))
    y = edit_rows(interventions, h, None, group)
    for index in group.new_ones(group.shape).nonzero().tolist():
        i = tuple(index)
        expected = h[i] if group[i] < 0 else interventions[int(group[i])](h[i])
        torch.testing.assert_close(y[i], expected, rtol=1e-5, atol=1e-5)


def test_one_intervention_needs_no_group() -> None:
    (module,) = mixed(5)[:1]
    h, positions = torch.randn(2, 4, 12), torch.tensor([[0, -1], [3, 1]])
    y = edit_rows([module], h, positions)
    torch.testing.assert_close(y, one_by_one([module], h, positions, torch.zeros_like(positions)))
    with_group = edit_rows([module], h, positions, torch.zeros_like(positions))
    torch.testing.assert_close(with_group, y)


def test_one_call_for_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    from reft_kernels import interventions as under_test

    calls = []
    inner = under_test.edit
    monkeypatch.setattr(under_test, "edit", lambda *a, **k: calls.append(a[1].shape) or inner(*a, **k))
    same = [make("loreft", r=r) for r in (1, 4, 2)]
    edit_rows(same, torch.randn(1, 3, 12), None, torch.tensor([[0, 1, 2]]))
    assert calls == [(3, 4, 12)]
    calls.clear()
    edit_rows([*same, make("direft", r=2)], torch.randn(1, 3, 12), None, torch.tensor([[0, 1, 2]]))
    assert calls == [(3, 4, 12), (1, 2, 12)]


def test_dropout_settings_keep_apart() -> None:
    always, never = make("loreft", d=64, dropout=0.9), make("loreft", d=64)
    h = torch.randn(1, 2, 64)
    y = edit_rows([always, never], h, None, torch.tensor([[0, 1]]))
    assert float((y[0, 0] == 0).double().mean()) > 0.7
    torch.testing.assert_close(y[0, 1], never(h[0, 1]), rtol=1e-5, atol=1e-5)


def test_errors_of_many_at_once() -> None:
    h = torch.randn(2, 3, 12)
    with pytest.raises(ValueError, match="interventions: expected at least one"):
        edit_rows([], h)
    with pytest.raises(ValueError, match="group: expected integers that pick one of the 2 interventions"):
        edit_rows(mixed(0)[:2], h)
    with pytest.raises(ValueError, match=r"R: expected .*d=12"):
        edit_rows([make("loreft", d=10)], h)


def test_repr_shows_the_settings() -> None:
    assert "embed_dim=12, low_rank_dimension=3, act_fn=gelu" in repr(make("loreft", act_fn="gelu"))
