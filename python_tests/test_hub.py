"""Adapters from the hub and to it, with the hub's client replaced: there is no network."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from hand_edits import strengthen
from tiny_models import random_batch, tiny_model

from reft_kernels.config import ReftConfig
from reft_kernels.model import ReftModel, get_reft_model


class Hub:
    """Repositories as folders; keeps what was asked of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[dict[str, Any]] = []

    def snapshot_download(self, **asked: Any) -> str:
        self.calls.append(asked)
        if not (self.root / asked["repo_id"]).is_dir():
            raise OSError("404: no such repository")
        if asked["local_dir"] is None:
            return str(self.root / asked["repo_id"])
        return str(shutil.copytree(self.root / asked["repo_id"], asked["local_dir"]))

    def create_repo(self, name: str, **asked: Any) -> Any:
        self.calls.append({"create_repo": name, **asked})
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def upload_folder(self, **asked: Any) -> None:
        self.calls.append(asked)
        shutil.copytree(asked["folder_path"], self.root / asked["repo_id"], dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (tmp_path / "hub").mkdir()
    replaced = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", replaced.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: replaced)
    return replaced


def make() -> ReftModel:
    config = ReftConfig(method="loreft", layers="all", rank=2, positions="f2", dtype="bfloat16")
    reft_model = get_reft_model(tiny_model("llama").bfloat16(), config)
    strengthen(reft_model.interventions)
    return reft_model.eval()


@pytest.mark.parametrize("name", ["reft_kernels", "pyreft"])
def test_there_and_back(hub: Hub, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reft_model = make()
    reft_model.save(tmp_path / "a", save_to_hf_hub=True, hf_repo_name="mine", format=name)
    made, uploaded = hub.calls
    assert made == {"create_repo": "mine", "exist_ok": True}
    assert uploaded["repo_id"] == "me/mine"
    assert "reft_config.json" in uploaded["delete_patterns"]
    assert "config.json" not in uploaded["delete_patterns"]
    monkeypatch.chdir(tmp_path)
    batch = random_batch([6])
    for options in ({}, {"local_directory": tmp_path / "local"}):
        loaded = ReftModel.load("me/mine", tiny_model("llama").bfloat16(), **options)
        torch.testing.assert_close(loaded(**batch).logits, reft_model(**batch).logits, rtol=0, atol=0.1)
        assert hub.calls[-1]["repo_id"] == "me/mine"
    assert (tmp_path / "local").is_dir()


def test_a_folder_goes_before_a_repository_of_its_name(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make().save(tmp_path / "me" / "mine")
    make().save(hub.root / "me" / "mine")
    monkeypatch.chdir(tmp_path)
    ReftModel.load("me/mine", tiny_model("llama").bfloat16())
    assert not hub.calls
    ReftModel.load("me/mine", tiny_model("llama").bfloat16(), from_huggingface_hub=True)
    assert len(hub.calls) == 1


def test_what_is_nowhere(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "nowhere", "./nowhere/here", "nowhere", "a/b/c", "~/nowhere"):
        with pytest.raises(
            FileNotFoundError, match=r"(nowhere|here|a/b/c): no such folder, nor the name of a repository"
        ):
            ReftModel.load(name, tiny_model("llama"))
    assert not hub.calls
    with pytest.raises(FileNotFoundError, match="me/none: no such folder, and not to be had from the hub: 404"):
        ReftModel.load("me/none", tiny_model("llama"))
    with pytest.raises(FileNotFoundError, match="none: not to be had from the hub: 404"):
        ReftModel.load("none", tiny_model("llama"), from_huggingface_hub=True)


def test_nothing_is_uploaded_without_being_asked(hub: Hub, tmp_path: Path) -> None:
    make().save(tmp_path / "a")
    with pytest.raises(FileExistsError):
        make().save(Path(__file__).parent, save_to_hf_hub=True)
    assert not hub.calls
