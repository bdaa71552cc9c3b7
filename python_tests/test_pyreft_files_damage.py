"""Damaged and malicious folders of pyreft's, and folders that must not be written."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_edits import strengthen
from pyreft_folders import file_name, logits, make, pyreft_warns, write_folder
from tiny_models import random_batch, tiny_model

from reft_kernels import folders
from reft_kernels.model import ReftModel


def change_config(folder: Path, change: Callable[[Any], Any]) -> None:
    path = folder / "config.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def cut(path: Path, part: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


class Malicious:
    """A pickle that runs a command when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


BIN = file_name(1, "block_output", 0, "_")


@pytest.mark.parametrize(
    ("error", "damage", "message"),
    [
        (ValueError, lambda f: cut(f / BIN, 0.9), f"{BIN} is truncated or not a file of torch.save"),
        (ValueError, lambda f: cut(f / BIN, 0.1), f"{BIN} is truncated"),
        (ValueError, lambda f: cut(f / BIN, 0), f"{BIN} is truncated"),
        (ValueError, lambda f: (f / BIN).write_text("no weights"), f"{BIN} is refused|truncated"),
        (ValueError, lambda f: torch.save([torch.zeros(1)], f / BIN), "must hold a dict of tensors, got list"),
        (ValueError, lambda f: torch.save({"weight": 1}, f / BIN), "got a int at 'weight'"),
        (ValueError, lambda f: torch.save({"weight": torch.zeros(2, 16)}, f / BIN), "there is no R of a LoreftInt"),
        (ValueError, lambda f: torch.save({"rotate_layer": torch.zeros(2)}, f / BIN), "does not fit together"),
        (FileNotFoundError, lambda f: (f / BIN).unlink(), "#0.bin is missing"),
        (ValueError, lambda f: cut(f / "config.json", 0.5), "config.json is not readable JSON"),
        (ValueError, lambda f: (f / "config.json").write_text("{}"), "representations must be a list"),
        (ValueError, lambda f: change_config(f, lambda c: c.update(representations=[])), "list of at least one"),
        (ValueError, lambda f: change_config(f, lambda c: c["representations"].append([3])), "types must be one for e"),
        (ValueError, lambda f: change_config(f, lambda c: c.update(representations=[7])), "a list or an object"),
        (ValueError, lambda f: change_config(f, lambda c: c["representations"][0].append(1)), "a list or an object"),
        (ValueError, lambda f: change_config(f, lambda c: c.update(representations=[{"depth": 1}])), "'depth'"),
        (ValueError, lambda f: change_config(f, lambda c: c["representations"][0].__setitem__(0, "1")), "its place"),
        (ValueError, lambda f: change_config(f, lambda c: c["representations"][0].__setitem__(1, "a/../b")), "place"),
        (ValueError, lambda f: change_config(f, lambda c: c["representations"][0].__setitem__(2, "h")), "unit='h'"),
        (ValueError, lambda f: change_config(f, lambda c: c["representations"][0].__setitem__(3, 4)), "units=4"),
        (ValueError, lambda f: change_config(f, lambda c: c["representations"][0].__setitem__(7, [[0, 1]])), "partit"),
        (ValueError, lambda f: change_config(f, lambda c: c["representations"][0].__setitem__(9, 0)), "link_key=0"),
        (ValueError, lambda f: change_config(f, lambda c: c.update(intervention_types=[1])), "must name classes"),
        (
            ValueError,
            lambda f: change_config(f, lambda c: c.update(intervention_types=["<class 'os.system'>"])),
            "is a system, which is none of",
        ),
    ],
)  # fmt: skip
def test_damaged_folders(error: type[Exception], damage: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_folder(folder, [(1, "block_output")], "LoreftIntervention")
    damage(folder)
    with pytest.raises(error, match=message):
        ReftModel.load(folder, tiny_model("llama"))


def test_a_place_that_the_model_does_not_have(tmp_path: Path) -> None:
    for number, (place, message) in enumerate(
        [
            ((1, "head_attention_value_output"), r"does not fit: unknown component 'head_attention_value_output'"),
            ((7, "block_output"), r"does not fit: layer 7 does not exist"),
            (
                (0, "model.blocks[1].output"),
                r"does not fit: component 'model\.blocks\[1\]\.output': there is no module",
            ),
        ]
    ):
        folder = tmp_path / str(number)
        write_folder(folder, [place], "LoreftIntervention")
        with pytest.raises(ValueError, match=message):
            ReftModel.load(folder, tiny_model("llama"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_folder(folder, [(1, "block_output")], "LoreftIntervention")
    torch.save({"weight": Malicious(tmp_path / "harm")}, folder / BIN)
    reft_model = make(layers=[1], positions=None)
    for load in (lambda: ReftModel.load(folder, tiny_model("llama")), lambda: reft_model.load_intervention(folder)):
        with pytest.raises(ValueError, match=r"#0.bin is refused: it is not a file of tensors alone"):
            load()
    torch.save({"weight": torch.zeros(1)}, folder / BIN)
    write_folder(folder, [(1, "block_output")], "LoreftIntervention")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "harm")))
    with pytest.raises(ValueError, match=r"pytorch_model.bin is refused|pytorch_model.bin is truncated"):
        ReftModel.load(folder, tiny_model("llama"), include_model=True)
    assert not (tmp_path / "harm").exists()


@pyreft_warns
@pytest.mark.parametrize("first", ["reft_kernels", "pyreft", "adapterhub"])
@pytest.mark.parametrize("second", ["reft_kernels", "pyreft", "adapterhub"])
def test_an_adapter_is_replaced_by_one_of_any_format(first: str, second: str, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    make().save(folder, format=first)
    reft_model = make()
    reft_model.save(tmp_path / "alone", format=second)
    reft_model.save(folder, format=second)
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "alone").iterdir()}
    batch = random_batch([8])
    loaded = ReftModel.load(folder, tiny_model("llama"))
    torch.testing.assert_close(logits(loaded, batch), logits(reft_model, batch), rtol=0, atol=2e-4)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"it holds files that are not an adapter's \(notes.txt\)"):
        reft_model.save(folder, format=first)


@pyreft_warns
def test_a_models_folder_is_not_replaced(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "pytorch_model.bin").write_text("weights")
    for name in ("reft_kernels", "pyreft", "adapterhub"):
        with pytest.raises(FileExistsError, match="cannot save to"):
            make().save(tmp_path / "a", format=name)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for name in ("reft_kernels", "pyreft", "adapterhub"):
        with pytest.raises(FileExistsError, match=r"cannot save to .*: what it holds is no adapter of ReFT"):
            make().save(tmp_path / "b", format=name)
    with pytest.raises(
        ValueError, match=r"adapter_config.json is not of a ReFT adapter of AdapterHub's, but of .*LORA"
    ):
        ReftModel.load(tmp_path / "b", tiny_model("llama"))


@pyreft_warns
def test_a_save_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"
    reft_model = make()
    reft_model.save(folder, format="pyreft")
    reft_model.save_intervention(tmp_path / "b")
    before = {path: path.read_bytes() for path in [*folder.iterdir(), *(tmp_path / "b").iterdir()]}
    strengthen(reft_model.interventions)

    def fail(path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(folders, "_flush", fail)
    with pytest.raises(OSError, match="no space left"):
        reft_model.save(folder, format="pyreft")
    with pytest.raises(OSError, match="no space left"):
        reft_model.save_intervention(tmp_path / "b")
    assert {path: path.read_bytes() for path in [*folder.iterdir(), *(tmp_path / "b").iterdir()]} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format must be one of reft_kernels, pyreft, adapterhub, got 'peft'"):
        make().save(tmp_path / "a", format="peft")
    assert not list(tmp_path.iterdir())


def test_arguments_that_the_folder_answers_itself(tmp_path: Path) -> None:
    make().save(tmp_path / "a")
    for name, value in (("act_fn", "relu"), ("method", "noreft"), ("orthogonality", "none"), ("positions", "f1")):
        with pytest.raises(ValueError, match=f"{name}: .* says it itself, got '{value}'"):
            ReftModel.load(tmp_path / "a", tiny_model("llama"), **{name: value})
