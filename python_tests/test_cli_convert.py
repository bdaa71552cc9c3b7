"""`convert`: adapters from each layout to each, with no more of the base model than its config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapterhub_folders import write_folder as write_adapterhub
from pyreft_folders import logits, make
from pyreft_folders import write_folder as write_pyreft
from tiny_models import random_batch, tiny_model

from reft_kernels import model_files
from reft_kernels.cli import convert as command
from reft_kernels.cli import main
from reft_kernels.model import ReftModel


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a config.json and nothing else."""
    base = tiny_model("llama")
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def convert(*argv: Any) -> int:
    return main(["convert", *(str(word) for word in argv)])


def test_every_format_can_be_asked_for() -> None:
    assert command.FORMATS == model_files.FORMATS


def test_around(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reft_model = make()
    reft_model.save(tmp_path / "start")
    source = "start"
    for step, name in enumerate(("pyreft", "adapterhub", "pyreft", "reft_kernels", "adapterhub", "reft_kernels")):
        assert convert(tmp_path / source, tmp_path / str(step), "--to", name, "--model", model) == 0
        source = str(step)
        said = capsys.readouterr()
        assert said.out == f"adapter  6 interventions in {tmp_path / source}\n"
        assert ("note     pyreft's ReftModel.load" in said.err) == (name == "pyreft")
        batch = random_batch([8, 6])
        loaded = ReftModel.load(tmp_path / source, tiny_model("llama"))
        assert loaded.keys == reft_model.keys
        torch.testing.assert_close(logits(loaded, batch), logits(reft_model, batch), rtol=0, atol=5e-4)


def test_what_the_source_does_not_say(model: Path, tmp_path: Path) -> None:
    write_pyreft(tmp_path / "a", [(0, "block_output")], "LoreftIntervention")
    options = ("--act-fn", "relu", "--positions", "f2+l2")
    assert convert(tmp_path / "a", tmp_path / "b", "--to", "reft_kernels", "--model", model, *options) == 0
    loaded = ReftModel.load(tmp_path / "b", tiny_model("llama"))
    assert loaded.representations[0].positions == "f2+l2"
    assert next(iter(loaded.interventions.values())).activation == "relu"
    write_adapterhub(tmp_path / "c", orthogonality=False)
    assert convert(tmp_path / "c", tmp_path / "d", "--to", "pyreft", "--model", model, "--method", "nodireft") == 0
    loaded = ReftModel.load(tmp_path / "d", tiny_model("llama"))
    assert {type(module).__name__ for module in loaded.interventions.values()} == {"NodireftIntervention"}


def test_what_the_user_gets_wrong(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(method="consreft").save(tmp_path / "a")
    write_adapterhub(tmp_path / "b", orthogonality=False)
    with_head = make()
    with_head.model.lm_head.requires_grad_(True)
    with_head.save(tmp_path / "c", include_model=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for source, destination, base, name, message in (
        ("a", "new", "model", "adapterhub", "new: .*but no ConsreftIntervention"),
        ("a", "full", "model", "pyreft", r"full: .*not an adapter's \(notes.txt\)"),
        ("b", "new", "model", "pyreft", "b: .*pass method='noreft'"),
        ("c", "new", "model", "pyreft", "c: holds parameters of the base model too"),
        ("nowhere", "new", "model", "pyreft", "nowhere: no such folder"),
        ("model", "new", "model", "pyreft", "model: .* is no adapter folder"),
        ("a", "new", "nowhere", "pyreft", "--model .*nowhere"),
    ):
        capsys.readouterr()
        assert convert(tmp_path / source, tmp_path / destination, "--to", name, "--model", tmp_path / base) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("reft_kernels convert: error: ")
        assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "new").exists()
