"""pyreft's state dicts: read into the interventions, nested too, written for pyreft, refused where they do not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pyreft_states import CLASSES, FREE, WITHOUT_W, Rotation, pyreft_state, rotation
from tiny_models import WIDTH, tiny_model
from torch import Tensor, nn

from reft_kernels.config import ReftConfig
from reft_kernels.interventions import INTERVENTIONS, Intervention, LoreftIntervention, NoreftIntervention
from reft_kernels.model import get_reft_model
from reft_kernels.orthogonal import row_error
from reft_kernels.pyreft_layout import Operands, read_operands, write_state
from reft_kernels.torch_orthogonal import parametrization_of, parametrized_matrix

ORTHONORMAL = tuple(name for name in CLASSES if name not in FREE)
SHAPES = [(16, 4), (16, 1), (9, 9), (1, 1), (7, 6)]

# Entries of R are below 1: what torch's own map in float32 is off by.
CLOSE = {"rtol": 0, "atol": 2e-6}


def make(name: str, d: int, r: int, **settings: Any) -> Intervention:
    return INTERVENTIONS[name](embed_dim=d, low_rank_dimension=r, **settings)


def assert_holds(intervention: Intervention, theirs: Any) -> None:
    """R to rounding, W, b and c exactly."""
    w = intervention.edit_weights()
    if intervention.orthonormal:
        torch.testing.assert_close(w.R, theirs.R, **CLOSE)
    else:
        assert w.R.equal(theirs.R)
    for ours, other in ((w.W, theirs.W), (w.b, theirs.b)):
        assert (ours is None and other is None) or ours.equal(other.to(ours.dtype))
    if intervention.has_c:
        assert (w.c is None and theirs.c is None) or w.c.equal(theirs.c)


@pytest.mark.parametrize("trivialized", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_matrix_of_torchs_parametrization(shape: tuple[int, int], trivialized: bool) -> None:
    layer = rotation(*shape, trivialized=trivialized)
    part = layer.parametrizations.weight
    found = parametrized_matrix(part.original, part[0].base if trivialized else None)
    torch.testing.assert_close(found.float(), layer.weight.detach(), **CLOSE)


@pytest.mark.parametrize("shape", [(4, 16), (1, 8), (5, 5)])
def test_the_matrix_of_a_wide_parametrization(shape: tuple[int, int]) -> None:
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(shape[1], shape[0], bias=False))
    part = layer.parametrizations.weight
    with torch.no_grad():
        part.original.add_(torch.randn(shape))
        part.original.copy_(part.original + torch.randn(shape))
    found = parametrized_matrix(part.original, part[0].base)
    torch.testing.assert_close(found.float(), layer.weight.detach(), **CLOSE)


@pytest.mark.parametrize("shape", [*SHAPES, (4, 16), (1, 8)])
def test_a_parametrization_that_gives_a_matrix_exactly(shape: tuple[int, int]) -> None:
    wide = shape[0] < shape[1]
    tall = torch.linalg.qr(torch.randn(max(shape), min(shape))).Q
    matrix = (tall.T if wide else tall).contiguous()
    original, base = parametrization_of(matrix)
    layer = Rotation(*shape)
    nn.utils.parametrizations.orthogonal(layer)
    layer.load_state_dict({"parametrizations.weight.original": original, "parametrizations.weight.0.base": base})
    assert layer.weight.equal(matrix)
    assert row_error(base) < 1e-6
    assert all(one.equal(other) for one, other in zip((original, base), parametrization_of(matrix), strict=True))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (layer.weight * torch.randn(shape)).sum().backward()
        optimizer.step()
    R = layer.weight.detach()
    assert row_error(R if wide else R.T) < 1e-5
    assert max(shape) == 1 or not layer.weight.equal(matrix)


def test_shapes_of_a_parametrization_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match=r"base: expected \[8, 8\] with an original of \[8, 2\], got \[7, 7\]"):
        parametrized_matrix(torch.zeros(8, 2), torch.eye(7))
    with pytest.raises(ValueError, match=r"original: expected a matrix, got \[2, 8, 2\]"):
        parametrized_matrix(torch.zeros(2, 8, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [1, 4, 12])
@pytest.mark.parametrize("name", CLASSES)
def test_an_intervention_loads_pyrefts_state_dict(name: str, r: int, dtype: torch.dtype) -> None:
    theirs = pyreft_state(name, 12, r, dtype=dtype)
    before = {key: value.clone() for key, value in theirs.state.items()}
    intervention = make(name, 12, r, dtype=dtype)
    parameters = list(intervention.parameters())
    state = torch.random.get_rng_state()
    intervention.load_state_dict(theirs.state)
    assert torch.random.get_rng_state().equal(state)
    assert_holds(intervention, theirs)
    assert all(one is other for one, other in zip(parameters, intervention.parameters(), strict=True))
    assert theirs.state.keys() == before.keys()
    assert all(value.equal(before[key]) for key, value in theirs.state.items())
    # A state dict of our own still is one.
    copied = make(name, 12, r, dtype=dtype)
    copied.load_state_dict(intervention.state_dict())
    assert copied.edit_weights().R.equal(intervention.edit_weights().R)


@pytest.mark.parametrize("orthogonality", ["householder", "polar", "none"])
@pytest.mark.parametrize("name", ORTHONORMAL)
def test_into_every_way_to_keep_rows_orthonormal(name: str, orthogonality: str) -> None:
    theirs = pyreft_state(name, 10, 3)
    intervention = make(name, 10, 3, orthogonality=orthogonality)
    intervention.load_state_dict(theirs.state)
    assert_holds(intervention, theirs)
    assert intervention.rotate_layer.rows.orthogonality == orthogonality
    for value in (intervention.double(), intervention.to("meta").to_empty(device="cpu")):
        value.load_state_dict(theirs.state)
        assert_holds(value.float(), theirs)


def test_loreft_without_its_own_state_dict_and_without_its_parametrization() -> None:
    theirs = pyreft_state("LoreftIntervention", 9, 2, nested=True)
    plain = {"learned_source.weight": theirs.W, "learned_source.bias": theirs.b, "rotate_layer.weight": theirs.R.T}
    for state in (theirs.state, plain):
        intervention = make("LoreftIntervention", 9, 2)
        intervention.load_state_dict(state)
        assert_holds(intervention, theirs)


@pytest.mark.parametrize("add_bias", [False, True])
@pytest.mark.parametrize("name", FREE)
def test_the_bias_of_the_free_classes(name: str, add_bias: bool) -> None:
    theirs = pyreft_state(name, 6, 2, add_bias=add_bias)
    bare = {key: value for key, value in theirs.state.items() if not key.endswith("_dim")}  # before they were buffers
    for state in (theirs.state, bare):
        intervention = make(name, 6, 2, add_bias=add_bias)
        intervention.load_state_dict(state)
        assert_holds(intervention, theirs)


def test_a_model_loads_state_dicts_under_its_own_prefixes() -> None:
    """As a trainer of another kind saves a model of pyreft's: one dict for all."""
    model = get_reft_model(tiny_model("llama"), ReftConfig(method="direft", layers=[0, 2], rank=2))
    theirs = {key: pyreft_state("DireftIntervention", WIDTH, 2) for key in model.keys}
    state = {f"interventions.{key}.{name}": value for key in theirs for name, value in theirs[key].state.items()}
    base = {name: value for name, value in model.state_dict().items() if name.startswith("model.")}
    model.load_state_dict({**base, **state})
    for key in model.keys:
        assert_holds(model.interventions[key], theirs[key])
    flat = get_reft_model(tiny_model("llama"), ReftConfig(method="loreft", layers=[0, 2], rank=2))
    theirs = {key: pyreft_state("LoreftIntervention", WIDTH, 2) for key in flat.keys}
    state = {f"{key}.{name}": value for key in theirs for name, value in theirs[key].state.items()}
    flat.interventions.load_state_dict(state)
    for key in flat.keys:
        assert_holds(flat.interventions[key], theirs[key])
    prefixed = flat.interventions.state_dict(prefix="again.")
    assert list(prefixed) == [f"again.{name}" for name in flat.interventions.state_dict()]
    assert any(name.endswith("rotate_layer.rows.X") for name in prefixed)


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_written_loads_into_torchs_own_modules(name: str) -> None:
    """The rotation by torch's parametrization, the linear layers by nn.Linear; and back into ours."""
    intervention = make(name, 11, 3, add_bias=True, dtype=torch.bfloat16)
    w = intervention.edit_weights()
    state = write_state(
        Operands(*w[:4]), orthonormal=intervention.orthonormal, subtract=intervention.subtract, add_bias=True
    )
    expected = pyreft_state(name, 11, 3, dtype=torch.bfloat16, add_bias=True).state
    assert {key: (value.shape, value.dtype) for key, value in state.items()} == {
        key: (value.shape, value.dtype) for key, value in expected.items()
    }
    rotated = {key.removeprefix("rotate_layer."): value for key, value in state.items() if "parametriz" in key}
    if rotated:
        layer = rotation(11, 3)
        layer.load_state_dict(rotated)
        assert layer.weight.T.equal(w.R)
    found = read_operands(state)
    assert found.R is not None
    assert found.R.to(w.R.dtype).equal(w.R)
    assert (found.W is None) == (name in WITHOUT_W)
    copied = make(name, 11, 3, add_bias=True, dtype=torch.bfloat16)
    copied.load_state_dict(state)
    assert_holds(copied, w)


def test_rows_that_were_rounded_are_projected_with_a_warning() -> None:
    theirs = pyreft_state("LoreftIntervention", 64, 4)
    state = {**theirs.state, "rotate_layer": theirs.state["rotate_layer"].bfloat16()}
    intervention = make("LoreftIntervention", 64, 4)
    with pytest.warns(UserWarning, match=r"R was saved with \|R R\^T - I\| = .*: the nearest orthonormal rows"):
        intervention.load_state_dict(state)
    R = intervention.edit_weights().R.detach()
    assert row_error(R) < 1e-6
    U, _, V = torch.linalg.svd(state["rotate_layer"].T.double(), full_matrices=False)
    torch.testing.assert_close(R, (U @ V).float(), rtol=0, atol=1e-6)


def test_finding_the_state_changes_nothing() -> None:
    intervention = make("LoreftIntervention", 16, 4)
    before = {name: value.clone() for name, value in intervention.state_dict().items()}
    state = intervention.rotate_layer.state_of(pyreft_state("LoreftIntervention", 16, 4).R)
    assert not state["rows.reflectors"].equal(before["rotate_layer.rows.reflectors"])
    assert all(value.equal(before[name]) for name, value in intervention.state_dict().items())


@pytest.mark.parametrize("orthogonality", ["householder", "polar"])
def test_rows_that_training_has_moved_apart_are_refused(orthogonality: str) -> None:
    """A resumed pyreft run leaves such an R."""
    theirs = pyreft_state("LoreftIntervention", 16, 4)
    moved = theirs.state["rotate_layer"] + 0.1 * torch.randn(16, 4)
    intervention = make("LoreftIntervention", 16, 4, orthogonality=orthogonality)
    before = {name: value.clone() for name, value in intervention.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"LoreftIntervention: R: expected orthonormal rows.*; orthogonality='none' takes them as"
    ):
        intervention.load_state_dict({**theirs.state, "rotate_layer": moved})
    assert all(value.equal(before[name]) for name, value in intervention.state_dict().items())
    with pytest.raises(ValueError, match=r"\|R R\^T - I\| = nan"):
        intervention.load_state_dict({**theirs.state, "rotate_layer": moved * torch.nan})
    free = make("LoreftIntervention", 16, 4, orthogonality="none")
    free.load_state_dict({**theirs.state, "rotate_layer": moved})
    assert free.edit_weights().R.equal(moved.T)


def test_a_sign_that_weight_decay_has_shrunk() -> None:
    """int() of -0.99 is 0: the rows of R are zeros, as they are in pyreft, and here they are refused."""
    theirs = pyreft_state("ConsreftIntervention", 8, 2)
    original = theirs.state["rotate_layer.parametrizations.weight.original"]
    original.diagonal().mul_(0.99)
    assert not parametrized_matrix(original).any()
    with pytest.raises(ValueError, match=r"\|R R\^T - I\| = 1; "):
        make("ConsreftIntervention", 8, 2).load_state_dict(theirs.state)


@pytest.mark.parametrize("name", CLASSES)
def test_another_rank_or_width_is_named(name: str) -> None:
    for d, r in ((12, 3), (11, 2)):
        theirs = pyreft_state(name, d, r)
        intervention = make(name, 12, 2)
        before = {key: value.clone() for key, value in intervention.state_dict().items()}
        expected = f"{name}: the state dict has low_rank_dimension={r} and embed_dim={d}, this module has low_rank"
        with pytest.raises(ValueError, match=f"{expected}_dimension=2 and embed_dim=12"):
            intervention.load_state_dict(theirs.state)
        assert all(value.equal(before[key]) for key, value in intervention.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("bias"), r"Missing key\(s\) in state_dict: \"learned_source.bias\""),
        (lambda s: s.pop("rotate_layer"), r"Missing key\(s\) in state_dict: \"rotate_layer.rows.X\""),
        (lambda s: s.update(extra=torch.zeros(1)), r"Unexpected key\(s\) in state_dict: \"extra\""),
        (lambda s: s.update({"learned_source.weight": s["weight"]}), "twice, as weight and as learned_source.weight"),
        (lambda s: s.update(embed_dim=torch.tensor(7)), "the width differs: 8 of R, 8 of W, 7 of embed_dim"),
        (lambda s: s.update(bias=torch.zeros(3)), "the rank differs: 2 of R, 2 of W, 3 of b"),
        (lambda s: s.update(bias=torch.zeros(2, 2)), r"b: expected a vector, got \[2, 2\]"),
        (lambda s: s.update(weight=torch.zeros(2)), r"W: expected a matrix, got \[2\]"),
        (
            lambda s: s.update({"rotate_layer.parametrizations.weight.0.base": torch.eye(8)}),
            "base is there without rotate_layer.parametrizations.weight.original",
        ),
    ],
)
def test_state_dicts_that_do_not_fit(change: Any, message: str) -> None:
    state = dict(pyreft_state("LoreftIntervention", 8, 2).state)
    change(state)
    with pytest.raises((ValueError, RuntimeError), match=message):
        make("LoreftIntervention", 8, 2).load_state_dict(state)


def test_another_class_is_refused() -> None:
    with pytest.raises(RuntimeError, match="proj_layer"):
        make("LoreftIntervention", 8, 2).load_state_dict(pyreft_state("NoreftIntervention", 8, 2).state)
    with pytest.raises(RuntimeError, match="rotate_layer"):
        make("NoreftIntervention", 8, 2).load_state_dict(pyreft_state("LoreftIntervention", 8, 2).state)
    with pytest.raises(RuntimeError, match="learned_source"):
        make("LobireftIntervention", 8, 2).load_state_dict(pyreft_state("DireftIntervention", 8, 2).state)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"proj_layer.bias\""):
        make("NoreftIntervention", 8, 2).load_state_dict(pyreft_state("NoreftIntervention", 8, 2, add_bias=True).state)
    with pytest.raises(ValueError, match=r"R is there twice, as rotate_layer and as proj_layer\.weight"):
        read_operands({"rotate_layer": torch.eye(2), "proj_layer.weight": torch.eye(2)})


def test_an_own_parameter_of_pyrefts_name_stays_its_own() -> None:
    class Scaled(LoreftIntervention):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.weight = nn.Parameter(torch.randn(3))

    one, other = (Scaled(embed_dim=8, low_rank_dimension=2) for _ in range(2))
    other.load_state_dict(one.state_dict())
    assert other.weight.equal(one.weight)
    assert other.edit_weights().R.equal(one.edit_weights().R)


def test_rows_beside_given_ones() -> None:
    first = make("LoreftIntervention", 12, 2)
    second = make("LoreftIntervention", 12, 3, orthogonal_to=first)
    state = write_state(Operands(*second.edit_weights()[:4]), orthonormal=True, subtract=True)
    third = copy.deepcopy(second)
    third.rotate_layer.rows.reset_parameters()
    third.load_state_dict(state)
    torch.testing.assert_close(third.edit_weights().R, second.edit_weights().R, **CLOSE)
    assert float((third.edit_weights().R @ first.edit_weights().R.T).detach().abs().max()) < 1e-6
    with pytest.raises(ValueError, match="R: expected rows orthogonal to the given ones"):
        third.load_state_dict(pyreft_state("LoreftIntervention", 12, 3).state)
    with pytest.raises(ValueError, match="orthogonal_to: expected the given rows, got rows on the meta device"):
        third.to("meta").load_state_dict(state, assign=True)


def test_training_goes_on_with_orthonormal_rows() -> None:
    """In pyreft the constraint is gone after loading: its base is no longer orthogonal."""
    theirs = pyreft_state("LoreftIntervention", 16, 4)
    intervention = make("LoreftIntervention", 16, 4)
    intervention.load_state_dict(theirs.state)
    optimizer = torch.optim.Adam(intervention.parameters(), lr=0.05)
    h, target = torch.randn(32, 16), torch.randn(32, 16)
    for _ in range(50):
        optimizer.zero_grad()
        (intervention(h) - target).square().mean().backward()
        optimizer.step()
    R = intervention.edit_weights().R.detach()
    assert float((R - theirs.R).abs().max()) > 0.1
    assert row_error(R) < 1e-6


def test_loading_in_inference_mode_and_with_assign() -> None:
    theirs = pyreft_state("NoreftIntervention", 8, 2)
    with torch.inference_mode():
        intervention = make("LoreftIntervention", 8, 2)
        flat = pyreft_state("LoreftIntervention", 8, 2)
        intervention.load_state_dict(flat.state)
        assert_holds(intervention, flat)
    free = NoreftIntervention(embed_dim=8, low_rank_dimension=2).to("meta")
    free.load_state_dict(theirs.state, assign=True)
    assert_holds(free, theirs)
    kept = LoreftIntervention(embed_dim=8, low_rank_dimension=2).to("meta")
    state: dict[str, Tensor] = pyreft_state("LoreftIntervention", 8, 2).state
    kept.load_state_dict(state, assign=True)
    torch.testing.assert_close(kept.edit_weights().R.T, state["rotate_layer"], **CLOSE)
