"""AdapterHub's ReFT adapters, read and written, and what has no counterpart on the other side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapterhub_folders import unit_matrix, write_folder
from hand_edits import strengthen
from pyreft_folders import CLOSE, logits, make, state_of
from tiny_models import WIDTH, random_batch, tiny_model
from torch import Tensor, nn

from reft_kernels.config import ReftConfig, Representation
from reft_kernels.interventions import LoreftIntervention
from reft_kernels.model import ReftModel, get_reft_model

KEY = "layer_{}_comp_block_output_unit_pos_nunit_1#{}"


def assert_holds(module: Any, state: dict[str, Tensor]) -> None:
    R, W, b, c = module.edit_weights()[:4]
    torch.testing.assert_close(R.float(), unit_matrix(state).float(), **CLOSE)
    assert W.equal(state["learned_source.weight"])
    assert b.equal(state["learned_source.bias"])
    assert c is None


@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("orthogonality", [True, False])
def test_an_adapter_is_read(orthogonality: bool, tied: bool, safetensors: bool, tmp_path: Path) -> None:
    units = write_folder(
        tmp_path / "a", tied=tied, orthogonality=orthogonality, safetensors=safetensors, non_linearity="swish"
    )
    method = None if orthogonality else "noreft"
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"), method=method)
    places = [(layer, unit) for unit in range(1 if tied else 2) for layer in range(3)]
    assert loaded.keys == [KEY.format(*place) for place in places]
    assert [item.positions for item in loaded.representations] == (["f2+l1"] * 3 if tied else ["f2"] * 3 + ["l1"] * 3)
    for place, module in zip(places, loaded.interventions.values(), strict=True):
        assert type(module).__name__ == ("LoreftIntervention" if orthogonality else "NoreftIntervention")
        assert_holds(module, units[place])
        settings = module.settings()
        assert (settings["act_fn"], settings["dropout"], settings["dtype"]) == ("silu", 0.05, "float32")
    assert loaded.config.tied == tied
    again = ReftModel.load(tmp_path / "a", tiny_model("llama"), method=method)
    strengthen(again.interventions)
    again.load_adapter(tmp_path / "a")
    batch = random_batch([8, 6])
    assert logits(again, batch).equal(logits(loaded, batch))


@pytest.mark.parametrize(("prefix", "suffix", "positions", "unit"), [(3, 0, "f3", 0), (0, 2, "l2", 1)])
def test_one_end_alone(prefix: int, suffix: int, positions: str, unit: int, tmp_path: Path) -> None:
    """Untied, the unit of the other end is in the file all the same."""
    units = write_folder(tmp_path / "a", prefix=prefix, suffix=suffix, layers=[0, 2])
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"))
    assert loaded.keys == [KEY.format(0, 0), KEY.format(2, 0)]
    assert {item.positions for item in loaded.representations} == {positions}
    for layer, module in zip((0, 2), loaded.interventions.values(), strict=True):
        assert_holds(module, units[layer, unit])
    units = write_folder(tmp_path / "b", prefix=prefix, suffix=suffix, tied=True)
    assert_holds(next(iter(ReftModel.load(tmp_path / "b", tiny_model("llama")).interventions.values())), units[0, 0])


@pytest.mark.parametrize(
    ("orthogonality", "subtract", "method", "name"),
    [
        (True, None, None, "LoreftIntervention"),
        (True, False, None, "DireftIntervention"),
        (False, None, "noreft", "NoreftIntervention"),
        (False, None, "nodireft", "NodireftIntervention"),
        (False, False, None, "NodireftIntervention"),
        (False, True, "noreft", "NoreftIntervention"),
        (True, True, "loreft", "LoreftIntervention"),
    ],
)
def test_which_class_it_is(
    orthogonality: bool, subtract: bool | None, method: str | None, name: str, tmp_path: Path
) -> None:
    others = {} if subtract is None else {"subtract_projection": subtract}
    write_folder(tmp_path / "a", orthogonality=orthogonality, **others)
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"), method=method)
    assert {type(module).__name__ for module in loaded.interventions.values()} == {name}


def test_noreft_and_direft_are_not_guessed(tmp_path: Path) -> None:
    """Their files do not differ, and read as the other the outputs would be wrong."""
    write_folder(tmp_path / "a", orthogonality=False)
    for method in (None, "loreft"):
        with pytest.raises(ValueError, match="saves NoReFT and DiReFT alike; pass method='noreft' or, for DiReFT"):
            ReftModel.load(tmp_path / "a", tiny_model("llama"), method=method)
    write_folder(tmp_path / "b")
    with pytest.raises(ValueError, match=r"method: .* is of a LoreftIntervention, the argument is 'noreft'"):
        ReftModel.load(tmp_path / "b", tiny_model("llama"), method="noreft")
    with pytest.raises(ValueError, match=r"act_fn: .* says it itself"):
        ReftModel.load(tmp_path / "b", tiny_model("llama"), act_fn="relu")


def test_the_blocks_of_other_models(tmp_path: Path) -> None:
    """Saved of a model with another head, of an encoder, and of one whose blocks are named by path here."""
    write_folder(tmp_path / "a", blocks="layers")
    assert ReftModel.load(tmp_path / "a", tiny_model("llama")).keys[0] == KEY.format(0, 0)
    write_folder(tmp_path / "b")
    assert ReftModel.load(tmp_path / "b", tiny_model("llama").model).keys[0] == KEY.format(0, 0)
    write_folder(tmp_path / "c", blocks="roberta.encoder.layer")
    with pytest.warns(UserWarning, match="was made for a llama model, this one is a roberta"):
        assert ReftModel.load(tmp_path / "c", tiny_model("roberta")).keys[0] == KEY.format(0, 0)
    write_folder(tmp_path / "d", blocks="model.layers.0.mlp.parts")
    with pytest.raises(ValueError, match=r"component 'model\.layers\.0\.mlp\.parts\[0\]\.output': there is no module"):
        ReftModel.load(tmp_path / "d", tiny_model("llama"))


@pytest.mark.filterwarnings("ignore:load_adapter of adapters takes this DiReFT")
@pytest.mark.parametrize("method", ["loreft", "noreft", "nodireft"])
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back(method: str, tied: bool, tmp_path: Path) -> None:
    reft_model = make(method=method, tied=tied, act_fn="gelu", dropout=0.1, layers=[0, 2])
    reft_model.save(tmp_path / "a", format="adapterhub")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"adapter_config.json", "pytorch_adapter.bin"}
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"))
    assert loaded.keys == reft_model.keys
    for one, other in zip(reft_model.representations, loaded.representations, strict=True):
        assert one.positions == other.positions
        assert one.intervention.settings() == other.intervention.settings()  # type: ignore[operator,union-attr]
        mine, back = one.intervention.edit_weights(), other.intervention.edit_weights()  # type: ignore[operator,union-attr]
        torch.testing.assert_close(mine.R, back.R, **CLOSE)
        assert mine.W.equal(back.W)
        assert mine.b.equal(back.b)
    batch = random_batch([8, 5])
    torch.testing.assert_close(logits(loaded, batch), logits(reft_model, batch), rtol=0, atol=2e-4)
    reft_model.load_adapter(tmp_path / "a")


def test_what_is_written(tmp_path: Path) -> None:
    make(dtype="bfloat16").save(tmp_path / "a", format="adapterhub")
    expected = tmp_path / "expected"
    write_folder(expected, dtype=torch.bfloat16)
    ours, theirs = (torch.load(folder / "pytorch_adapter.bin") for folder in (tmp_path / "a", expected))
    assert {name.replace("refts.reft.", "refts.mine."): (t.shape, t.dtype) for name, t in ours.items()} == {
        name: (t.shape, t.dtype) for name, t in theirs.items()
    }
    written, saved = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "a", expected))
    assert written["config"].pop("subtract_projection") is True
    saved["config"].pop("init_weights_seed")
    saved["config"]["dropout"] = 0.0
    assert written["config"] == saved["config"]
    assert {name: written[name] for name in ("hidden_size", "model_class", "model_type")} == {
        name: saved[name] for name in ("hidden_size", "model_class", "model_type")
    }
    with pytest.raises(ValueError, match="include_model: AdapterHub's format has no place"):
        make().save(tmp_path / "b", include_model=True, format="adapterhub")


def listed(*places: dict[str, Any], rank: int = 2, **settings: Any) -> ReftModel:
    made = [
        Representation(
            **{"intervention": LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=rank, **settings), **place}
        )
        for place in places
    ]
    return get_reft_model(tiny_model("llama"), ReftConfig(made))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: make(method="consreft"), "AdapterHub has LoreftInt.*, but no ConsreftIntervention"),
        (lambda: make(method="direft"), "AdapterHub has LoreftInt.*, but no DireftIntervention"),
        (lambda: make(method="noreft", add_bias=True), "AdapterHub's NoReFT has no bias c"),
        (lambda: make(component="mlp_output"), "AdapterHub edits block_output, not mlp_output"),
        (lambda: make(positions=None), "a prefix and a suffix such as 'f7.l7', not None"),
        (lambda: make(positions="all"), "a prefix and a suffix such as 'f7.l7', not 'all'"),
        (lambda: listed({"layer": 0, "positions": "f1"}, {"layer": 1, "positions": "f2"}), "the same prefix and suff"),
        (lambda: listed({"layer": 0, "positions": "f1"}, {"layer": 0, "positions": "f2"}), "the same prefix and suff"),
        (
            lambda: listed(
                {"layer": 0, "positions": "f1"},
                {"layer": 1, "positions": "f1", "intervention": LoreftIntervention(WIDTH, 3)},
            ),
            "one low_rank_dimension for all interventions, got 2 and 3",
        ),
        (
            lambda: listed(
                {"layer": 0, "positions": "f1"},
                {"layer": 1, "positions": "f1", "intervention": LoreftIntervention(WIDTH, 2, act_fn="relu")},
            ),
            "one act_fn for all interventions, got 'linear' and 'relu'",
        ),
    ],
)
def test_what_adapterhub_does_not_have(model: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        model().save(tmp_path / "a", format="adapterhub")
    assert not list(tmp_path.iterdir())


def test_adapterhub_is_told_what_it_will_not_read(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"takes this DiReFT for a NoReFT: .* add_adapter\('reft', config=DiReftC"
    ) as seen:
        make(method="nodireft").save(tmp_path / "a", format="adapterhub")
    assert seen[0].filename == __file__


def test_one_end_alone_is_written_as_tied(tmp_path: Path) -> None:
    """Of two units one would have no weights to save."""
    make(positions="l2").save(tmp_path / "a", format="adapterhub")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["config"]
    assert (config["prefix_positions"], config["suffix_positions"], config["tied_weights"]) == (0, 2, True)


def change(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    document = json.loads(path.read_text())
    document["config"].update(changes)
    path.write_text(json.dumps(document))


def change_weights(folder: Path, name: str, value: Tensor | None) -> None:
    path = folder / "pytorch_adapter.bin"
    tensors = torch.load(path)
    full = f"model.layers.1.reft_layer.refts.mine.units.0.{name}"
    if value is None:
        del tensors[full]
    else:
        tensors[full] = value
    torch.save(tensors, path)


BASE, ORIGINAL = (f"projection.parametrizations.weight.{name}" for name in ("0.base", "original"))


@pytest.mark.parametrize(
    ("error", "damage", "message"),
    [
        (ValueError, lambda f: change(f, architecture="union"), "but of architecture 'union'"),
        (ValueError, lambda f: change(f, tied_weights=None), "config.tied_weights must be a number or true or false"),
        (ValueError, lambda f: change(f, prefix_positions=0, suffix_positions=0), "both 0: nothing is edited"),
        (ValueError, lambda f: change(f, non_linearity="leakyrelu"), "act_fn: expected one of"),
        (ValueError, lambda f: change(f, orthogonality=False, subtract_projection=True), "weight is missing"),
        (FileNotFoundError, lambda f: (f / "pytorch_adapter.bin").unlink(), "pytorch_adapter.bin is missing"),
        (ValueError, lambda f: torch.save({}, f / "pytorch_adapter.bin"), "there are no weights of a ReFT adapter"),
        (ValueError, lambda f: torch.save({"a": torch.zeros(1)}, f / "pytorch_adapter.bin"), "the key a is not one of"),
        (ValueError, lambda f: change_weights(f, "learned_source.bias", None), "layer 1, unit 0: the key learned_so"),
        (ValueError, lambda f: change_weights(f, ORIGINAL, None), "layer 1, unit 0: the key projection.parametriz"),
        (ValueError, lambda f: change_weights(f, BASE, torch.eye(3)), r"layer 1, unit 0: base: expected \[16, 16\]"),
        (ValueError, lambda f: change_weights(f, "more", torch.eye(3)), r'Unexpected key\(s\) in state_dict: "more"'),
        (ValueError, lambda f: change_weights(f, "learned_source.bias", torch.zeros(5)), "the rank differs"),
    ],
)  # fmt: skip
def test_damaged_folders(error: type[Exception], damage: Any, message: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(error, match=message):
        ReftModel.load(tmp_path / "a", tiny_model("llama"))


def test_loading_another_adapter_changes_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    for other, message in (
        ({"rank": 3}, "low_rank_dimension=2, this model has 3"),
        ({"act_fn": "relu"}, "act_fn='linear', this model has 'relu'"),
        ({"tied": True}, "is another one: layer_0_.*#1 is not in both"),
        ({"method": "nodireft"}, "method: .* is of a LoreftIntervention, the argument is 'nodireft'"),
        ({"method": "direft"}, "has a LoreftIntervention at layer_0.*, this model a DireftIntervention"),
    ):
        reft_model = make(**other)
        before = state_of(reft_model)
        with pytest.raises(ValueError, match=message):
            reft_model.load_adapter(tmp_path / "a")
        assert all(value.equal(before[name]) for name, value in state_of(reft_model).items())


def test_rows_are_kept_as_asked(tmp_path: Path) -> None:
    units = write_folder(tmp_path / "a")
    for orthogonality in ("polar", "none"):
        loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"), orthogonality=orthogonality)
        module: nn.Module = loaded.interventions[KEY.format(1, 0)]
        assert module.settings()["orthogonality"] == orthogonality  # type: ignore[operator]
        assert_holds(module, units[1, 0])
