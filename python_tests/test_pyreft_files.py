"""Adapters in pyreft's folders: every layout it wrote, ours in it and back, and weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hand_edits import strengthen
from pyreft_folders import (
    CLOSE,
    KEY,
    NAMES,
    STYLES,
    assert_holds,
    file_name,
    logits,
    make,
    pyreft_warns,
    state_of,
    train_a_little,
    write_folder,
)
from pyreft_states import CLASSES, pyreft_state
from tiny_models import WIDTH, random_batch, tiny_model
from torch import Tensor, nn

from reft_kernels.config import ReftConfig, Representation
from reft_kernels.interventions import METHODS, LoreftIntervention
from reft_kernels.model import ReftModel, get_reft_model

# What pyreft wrote


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("name", ["LoreftIntervention", "DireftIntervention"])
def test_every_layout_is_read(name: str, names: str, style: str, tmp_path: Path) -> None:
    places = [(0, "block_output"), (2, "mlp_output"), (0, "block_output"), (0, "model.layers[1].mlp.output")]
    theirs = write_folder(tmp_path / "a", places, name, dot=NAMES[names], style=style)
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"))
    assert list(loaded.interventions) == [
        KEY.format(0, 0),
        KEY.format(2, 0).replace("block", "mlp"),
        KEY.format(0, 1),
        "comp_model_layers[1]_mlp_output_unit_pos_nunit_1#0",
    ]
    assert_holds(loaded, theirs, name)
    assert not loaded.training
    assert [item.positions for item in loaded.representations] == [None] * 4
    other = ReftModel.load(tmp_path / "a", tiny_model("llama"))
    for module in other.interventions.values():
        nn.init.zeros_(module.learned_source.weight)
    other.load_adapter(tmp_path / "a")
    assert_holds(other, theirs, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CLASSES)
def test_what_the_weights_say(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Sizes, dtype and add_bias, which pyreft's own load does not know: it cannot load NoReFT and NodiReFT at all."""
    add_bias = name in ("NoreftIntervention", "NodireftIntervention")
    theirs = write_folder(tmp_path / "a", [(1, "block_output")], name, r=3, dtype=dtype, add_bias=add_bias)
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama").to(dtype))
    assert_holds(loaded, theirs, name)
    (module,) = loaded.interventions.values()
    settings = module.settings()
    assert (settings["embed_dim"], settings["low_rank_dimension"]) == (WIDTH, 3)
    assert settings["add_bias"] == add_bias
    assert settings["act_fn"] == "linear"
    assert settings["dtype"] == (str(dtype).removeprefix("torch.") if module.has_W else "float32")
    assert loaded.representations[0].low_rank_dimension == 3


def test_the_activation_is_the_callers_to_say(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", [(1, "block_output")], "LoreftIntervention")
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"), act_fn="gelu")
    assert loaded.interventions[KEY.format(1, 0)].activation == "gelu"
    with pytest.raises(ValueError, match=r"act_fn: expected one of .*, got 'cosine'"):
        ReftModel.load(tmp_path / "a", tiny_model("llama"), act_fn="cosine")


def test_the_positions_are_the_callers_to_say(tmp_path: Path) -> None:
    """Untied, pyreft lists every place twice: those of the prefix first."""
    layers = [(layer, "block_output") for layer in range(3)]
    batch = random_batch([8, 6])
    for tied, places in ((True, layers), (False, layers * 2)):
        write_folder(tmp_path / str(tied), places, "LoreftIntervention")
        loaded = ReftModel.load(tmp_path / str(tied), tiny_model("llama"), positions="f2+l1")
        found = [item.positions for item in loaded.representations]
        assert found == (["f2+l1"] * 3 if tied else ["f2"] * 3 + ["l1"] * 3)
        ends = [[[0, 1], [0, 1]]] * 3 + [[[7, 7], [5, 5]]] * 3
        where = [[[0, 1, 7], [0, 1, 5]]] * 3 if tied else ends
        everywhere = ReftModel.load(tmp_path / str(tied), tiny_model("llama"))
        with torch.no_grad():
            expected = everywhere(batch, unit_locations={"sources->base": (None, where)})[1].logits
        torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**batch, positions="f2+l1").logits, expected, rtol=0, atol=1e-5)
    one_end = ReftModel.load(tmp_path / "False", tiny_model("llama"), positions="l2")
    assert {item.positions for item in one_end.representations} == {"l2"}
    with pytest.raises(ValueError, match="positions"):
        ReftModel.load(tmp_path / "True", tiny_model("llama"), positions="x3")


@pytest.mark.parametrize(
    ("package", "saved_as", "name"),
    [
        ("interventions", "LoreftIntervention", "LoreftIntervention"),
        ("__main__", "NoreftIntervention", "NoreftIntervention"),
        ("reft_kernels.interventions", "DireftIntervention", "DireftIntervention"),
        ("a.b.<locals>", "ConsreftIntervention", "ConsreftIntervention"),
        ("pyreft.interventions", "ConditionedSourceLowRankRotatedSpaceIntervention", "LoreftIntervention"),
        ("interventions", "ConditionedSourceLowRankIntervention", "NoreftIntervention"),
    ],
)
def test_classes_are_known_by_their_names(package: str, saved_as: str, name: str, tmp_path: Path) -> None:
    theirs = write_folder(tmp_path / "a", [(1, "block_output")], name, package=package, saved_as=saved_as)
    assert_holds(ReftModel.load(tmp_path / "a", tiny_model("llama")), theirs, name)


def test_loreft_of_the_first_days(tmp_path: Path) -> None:
    """Nested keys, with the d x d base."""
    theirs = write_folder(tmp_path / "a", [(1, "block_output")], "LoreftIntervention", dot=".", nested=True)
    assert_holds(ReftModel.load(tmp_path / "a", tiny_model("llama")), theirs, "LoreftIntervention")


class OwnLoreft(LoreftIntervention):
    """As users write them: another forward, the constructor of pyreft's."""


class Shift(nn.Module):
    """h + a vector; what pyvene hands to a constructor is taken."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.embed_dim = kwargs["embed_dim"]
        self.by = nn.Parameter(torch.zeros(kwargs["embed_dim"]))

    def settings(self) -> dict[str, Any]:
        return {"embed_dim": self.embed_dim}

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        return base + self.by


def test_own_classes(tmp_path: Path) -> None:
    theirs = write_folder(tmp_path / "a", [(1, "block_output")], "LoreftIntervention", saved_as="OwnLoreft")
    with pytest.raises(ValueError, match=r"config.json: layer_1.*#0 is a OwnLoreft.*classes=\{'OwnLoreft': ...\}"):
        ReftModel.load(tmp_path / "a", tiny_model("llama"))
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"), classes={"OwnLoreft": OwnLoreft})
    assert_holds(loaded, theirs, "OwnLoreft")

    write_folder(tmp_path / "b", [(1, "block_output")], "LoreftIntervention", package="__main__", saved_as="Shift")
    by = torch.randn(WIDTH)
    torch.save({"by": by}, tmp_path / "b" / file_name(1, "block_output", 0, "_"))
    loaded = ReftModel.load(tmp_path / "b", tiny_model("llama"), classes={"Shift": Shift})
    assert loaded.interventions[KEY.format(1, 0)].by.equal(by)
    loaded.save(tmp_path / "c", format="pyreft")
    again = ReftModel.load(tmp_path / "c", tiny_model("llama"), classes={"Shift": Shift})
    assert again.interventions[KEY.format(1, 0)].by.equal(by)


class Scaled(LoreftIntervention):
    """With a parameter of its own, of any name."""

    def __init__(self, name: str = "scale", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_parameter(name, nn.Parameter(torch.randn(3)))


@pyreft_warns
def test_own_parameters_beside_those_of_the_edit(tmp_path: Path) -> None:
    module = Scaled(embed_dim=WIDTH, low_rank_dimension=2)
    reft_model = get_reft_model(tiny_model("llama"), ReftConfig({"layer": 1, "intervention": module}))
    reft_model.save(tmp_path / "a", format="pyreft")
    (loaded,) = ReftModel.load(tmp_path / "a", tiny_model("llama"), classes={"Scaled": Scaled}).interventions.values()
    assert loaded.scale.equal(module.scale)
    assert loaded.edit_weights().W.equal(module.edit_weights().W)
    module = Scaled("bias", embed_dim=WIDTH, low_rank_dimension=2)
    reft_model = get_reft_model(tiny_model("llama"), ReftConfig({"layer": 1, "intervention": module}))
    with pytest.raises(ValueError, match="cannot save its 'bias' in pyreft's layout, which has another of that name"):
        reft_model.save(tmp_path / "a", format="pyreft")


def test_an_adapter_whose_rows_training_moved_apart(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", [(1, "block_output")], "LoreftIntervention")
    path = tmp_path / "a" / file_name(1, "block_output", 0, "_")
    state = torch.load(path)
    state["rotate_layer"] *= 1.2
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"#0.bin does not fit: .* expected orthonormal rows.*orthogonality='none'"):
        ReftModel.load(tmp_path / "a", tiny_model("llama"))
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"), orthogonality="none")
    assert loaded.interventions[KEY.format(1, 0)].edit_weights().R.T.equal(state["rotate_layer"])


# Ours in pyreft's layout


@pyreft_warns
@pytest.mark.parametrize("method", METHODS)
def test_there_and_back(method: str, tmp_path: Path) -> None:
    reft_model = make(method=method, act_fn=None if method in ("consreft", "lobireft") else "tanh", add_bias=True)
    train_a_little(reft_model)
    reft_model.save(tmp_path / "a", format="pyreft")
    names = {f"intkey_{key}.bin" for key in reft_model.keys}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"config.json", "reft_kernels.json", *names}
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"))
    assert loaded.config.to_dict() == reft_model.config.to_dict()
    assert loaded.keys == reft_model.keys
    for one, other in zip(reft_model.representations, loaded.representations, strict=True):
        assert (one.layer, one.component, one.positions, one.low_rank_dimension) == (
            other.layer, other.component, other.positions, other.low_rank_dimension,
        )  # fmt: skip
        assert one.intervention.settings() == other.intervention.settings()  # type: ignore[operator,union-attr]
        mine, back = one.intervention.edit_weights(), other.intervention.edit_weights()  # type: ignore[operator,union-attr]
        torch.testing.assert_close(mine.R, back.R, **CLOSE)
        for ours, theirs in zip(mine[1:4], back[1:4], strict=True):
            assert (ours is None and theirs is None) or ours.equal(theirs)
    batch = random_batch([8, 5])
    torch.testing.assert_close(logits(loaded, batch), logits(reft_model, batch), rtol=0, atol=2e-4)


@pyreft_warns
def test_every_setting_comes_back(tmp_path: Path) -> None:
    settings = {
        "method": "direft", "layers": "0;2", "rank": 3, "positions": "f1+l4", "tied": False, "component": "mlp_output",
        "dropout": 0.25, "act_fn": "gelu", "add_bias": False, "dtype": "bfloat16", "rebuild": False,
        "orthogonality": "none",
    }  # fmt: skip
    reft_model = make(**settings)
    reft_model.save(tmp_path / "a", format="pyreft")
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"))
    assert loaded.config.to_dict() == {**settings, "layers": [0, 2]}
    for one, other in zip(reft_model.interventions.values(), loaded.interventions.values(), strict=True):
        assert one.settings() == other.settings()
        assert all(p.equal(q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    polar = make(orthogonality="polar")
    polar.save(tmp_path / "b", format="pyreft")
    assert ReftModel.load(tmp_path / "b", tiny_model("llama")).config.orthogonality == "polar"


@pyreft_warns
def test_shared_and_placed_by_path(tmp_path: Path) -> None:
    shared, other = (LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2) for _ in range(2))
    places = [
        Representation(layer=0, intervention=shared, positions="f1"),
        Representation(component="model.layers[1].mlp.output", intervention=other),
        Representation(layer=2, intervention=shared, positions="l1"),
    ]
    strengthen(nn.ModuleList([shared, other]))
    reft_model = get_reft_model(tiny_model("llama"), ReftConfig(places)).eval()
    reft_model.save(tmp_path / "a", format="pyreft")
    assert len(list((tmp_path / "a").glob("intkey_*.bin"))) == 3
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"))
    first, second, third = loaded.interventions.values()
    assert first is third
    assert first is not second
    assert loaded.count_parameters() == reft_model.count_parameters()
    (tmp_path / "a" / "reft_kernels.json").unlink()  # then they are as many as pyreft's files are
    apart = ReftModel.load(tmp_path / "a", tiny_model("llama"))
    first, _, third = apart.interventions.values()
    assert first is not third
    batch = random_batch([7])
    where = {"sources->base": (None, [[[0, 6]]] * 3)}
    with torch.no_grad():
        one, other = (model(batch, unit_locations=where)[1].logits for model in (loaded, apart))
    torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


def test_pyreft_is_told_what_it_will_not_read(tmp_path: Path) -> None:
    for reft_model, message in (
        (make(dtype="float32"), "rounds W and b from float32 to bfloat16"),
        (make(method="noreft", dtype="bfloat16"), "cannot load a NoreftIntervention; its load_intervention takes"),
        (make(act_fn="relu", dtype="bfloat16"), "takes act_fn='relu' as linear"),
    ):
        with pytest.warns(UserWarning, match=f"pyreft's ReftModel.load, unlike this library's, {message}") as caught:
            reft_model.save(tmp_path / "a", format="pyreft")
        assert caught[0].filename == __file__
    make(dtype="bfloat16").save(tmp_path / "a", format="pyreft")  # nothing to tell
    make(method="lobireft").save(tmp_path / "a", format="pyreft")


@pyreft_warns
def test_rows_beside_given_ones_are_saved_without_them(tmp_path: Path) -> None:
    first = LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2)
    second = LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2, orthogonal_to=first)
    reft_model = get_reft_model(tiny_model("llama"), ReftConfig([{"layer": 1, "intervention": second}]))
    with pytest.warns(UserWarning, match="do not hold the rows of orthogonal_to"):
        reft_model.save(tmp_path / "a", format="pyreft")
    (module,) = ReftModel.load(tmp_path / "a", tiny_model("llama")).interventions.values()
    torch.testing.assert_close(module.edit_weights().R, second.edit_weights().R, **CLOSE)
    reft_model.load_adapter(tmp_path / "a")
    assert float((second.edit_weights().R @ first.edit_weights().R.T).detach().abs().max()) < 1e-6


@pyreft_warns
def test_a_sidecar_of_another_adapter(tmp_path: Path) -> None:
    make(act_fn="relu").save(tmp_path / "a", format="pyreft")
    with pytest.raises(ValueError, match=r"act_fn: .*reft_kernels.json says relu, the argument is 'tanh'"):
        ReftModel.load(tmp_path / "a", tiny_model("llama"), act_fn="tanh")
    with pytest.raises(ValueError, match=r"positions: .*reft_kernels.json says f2, l1, the argument is 'f7'"):
        ReftModel.load(tmp_path / "a", tiny_model("llama"), positions="f7")
    (tmp_path / "a" / "config.json").unlink()
    write_folder(tmp_path / "a", [(1, "block_output")], "LoreftIntervention")  # as pyreft saves into an old folder
    with pytest.raises(ValueError, match=r"reft_kernels.json is of another adapter than the config.json beside it"):
        ReftModel.load(tmp_path / "a", tiny_model("llama"))


# Weights alone


def test_weights_are_saved_and_loaded_alone(tmp_path: Path) -> None:
    reft_model = make(method="consreft")
    folder = tmp_path / "checkpoint-7" / "intervenable_model"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    for _ in range(2):
        train_a_little(reft_model)
        reft_model.save_intervention(folder)
    names = {f"intkey_{key}.bin" for key in reft_model.keys}
    assert {path.name for path in folder.iterdir()} == {*names, "pytorch_model.bin", "notes.txt"}
    batch = random_batch([8, 5])
    for place in (folder, folder.parent):
        other = make(method="consreft")
        other.load_intervention(place)
        torch.testing.assert_close(logits(other, batch), logits(reft_model, batch), rtol=0, atol=2e-4)
        other = make(method="consreft")
        other.load_adapter(place)
        torch.testing.assert_close(logits(other, batch), logits(reft_model, batch), rtol=0, atol=2e-4)
        with pytest.raises(FileNotFoundError, match=r"without its config.json.*get_reft_model and use its load_interv"):
            ReftModel.load(place, tiny_model("llama"))
    with pytest.raises(FileExistsError, match="not a folder"):
        reft_model.save_intervention(folder / "notes.txt")


@pytest.mark.parametrize("names", NAMES)
def test_a_checkpoint_of_pyrefts_trainer(names: str, tmp_path: Path) -> None:
    """Files without a config.json, which say nothing of r, f or dtype."""
    (tmp_path / "checkpoint-2").mkdir()
    folder = tmp_path / "checkpoint-2" / "intervenable_model"
    theirs = write_folder(folder, [(i, "block_output") for i in range(3)], "LoreftIntervention", dot=NAMES[names])
    (folder / "config.json").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    reft_model = make(positions="f2", act_fn="gelu", orthogonality="polar")
    reft_model.load_intervention(tmp_path / "checkpoint-2")
    assert_holds(reft_model, theirs, "LoreftIntervention")
    assert {module.activation for module in reft_model.interventions.values()} == {"gelu"}


@pyreft_warns
def test_the_bases_own_parameters(tmp_path: Path) -> None:
    reft_model = make(dtype="bfloat16").float()
    head = reft_model.model.lm_head
    head.requires_grad_(True)
    with torch.no_grad():
        head.weight.normal_()
    batch = random_batch([6])
    reft_model.save(tmp_path / "a", include_model=True, format="pyreft")
    reft_model.save_intervention(tmp_path / "b")
    wanted = logits(reft_model, batch)
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"), include_model=True)
    assert loaded.model.lm_head.weight.equal(head.weight)
    loaded.interventions.float()
    torch.testing.assert_close(logits(loaded, batch), wanted, rtol=0, atol=2e-4)
    for folder in ("a", "b"):
        other = make()
        other.load_intervention(tmp_path / folder, include_model=False)
        assert not other.model.lm_head.weight.equal(head.weight)
        other.load_intervention(tmp_path / folder)
        assert other.model.lm_head.weight.equal(head.weight)
    (tmp_path / "b" / "pytorch_model.bin").unlink()
    other = make()
    other.load_intervention(tmp_path / "b")  # nothing of this base is trained
    other.model.lm_head.requires_grad_(True)
    before = state_of(other)
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin is missing"):
        other.load_intervention(tmp_path / "b")
    for wrong, message in (
        ({"lm_head.bias": torch.zeros(1)}, "has no parameter lm_head.bias"),
        ({"lm_head.weight": torch.zeros(1)}, r"lm_head.weight must be \[50, 16\], got \[1\]"),
    ):
        torch.save(wrong, tmp_path / "b" / "pytorch_model.bin")
        with pytest.raises(ValueError, match=message):
            other.load_intervention(tmp_path / "b")
    assert all(value.equal(before[name]) for name, value in state_of(other).items())


@pytest.mark.gpu
def test_weights_go_to_and_from_another_device(tmp_path: Path) -> None:
    there, here = make(), make()
    there.set_device("cuda")
    there.save_intervention(tmp_path / "a")
    here.load_intervention(tmp_path / "a")
    batch = random_batch([8, 5])
    on_device = {name: value.cuda() for name, value in batch.items()}
    torch.testing.assert_close(logits(there, on_device).cpu(), logits(here, batch), rtol=0, atol=1e-3)
    train_a_little(here)
    here.save_intervention(tmp_path / "a")
    there.load_intervention(tmp_path / "a")
    assert {p.device.type for p in there.parameters()} == {"cuda"}
    torch.testing.assert_close(logits(there, on_device).cpu(), logits(here, batch), rtol=0, atol=1e-3)


def test_load_intervention_reads_our_own_folders(tmp_path: Path) -> None:
    reft_model = make()
    reft_model.save(tmp_path / "a")
    other = make()
    other.load_intervention(tmp_path / "a")
    batch = random_batch([6])
    assert logits(other, batch).equal(logits(reft_model, batch))


@pyreft_warns
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"layers": [0]}, "is another one: layer_1_.* is not in both"),
        ({"rank": 3}, r"low_rank_dimension=2, this model has 3|low_rank_dimension=2 and embed_dim=16, this module has"),
        ({"method": "direft"}, r"has a LoreftIntervention at layer_0.*, this model a DireftIntervention"),
        ({"act_fn": "relu"}, r"has act_fn='linear', this model has 'relu'"),
    ],
)
@pytest.mark.parametrize("sidecar", [True, False])
def test_another_adapter_changes_nothing(other: dict[str, Any], message: str, sidecar: bool, tmp_path: Path) -> None:
    make().save(tmp_path / "a", format="pyreft")
    reft_model = make(**other)
    if not sidecar:
        (tmp_path / "a" / "reft_kernels.json").unlink()
        if "act_fn" in other:
            reft_model.load_adapter(tmp_path / "a")  # the folder does not say which it is
            return
    before = state_of(reft_model)
    for load in (reft_model.load_adapter, reft_model.load_intervention):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "a")
    assert all(value.equal(before[name]) for name, value in state_of(reft_model).items())


def test_weights_alone_of_another_adapter(tmp_path: Path) -> None:
    make().save_intervention(tmp_path / "a")
    with pytest.raises(ValueError, match=r"is of another adapter: intkey_.* belongs to no intervention of this model"):
        make(layers=[0]).load_intervention(tmp_path / "a")
    missing = tmp_path / "a" / f"intkey_{KEY.format(1, 0)}.bin"
    missing.unlink()
    reft_model = make()
    before = state_of(reft_model)
    with pytest.raises(FileNotFoundError, match=r"intkey_layer_1_.*bin is missing, and so is intkey_layer\.1\."):
        reft_model.load_intervention(tmp_path / "a")
    torch.save(pyreft_state("DireftIntervention", WIDTH, 2).state, missing)
    torch.save(pyreft_state("NoreftIntervention", WIDTH, 2).state, tmp_path / "a" / f"intkey_{KEY.format(2, 1)}.bin")
    with pytest.raises(ValueError, match=r"(?s)layer_2_.*#1.bin does not fit.*proj_layer"):
        reft_model.load_intervention(tmp_path / "a")
    assert all(value.equal(before[name]) for name, value in state_of(reft_model).items())
