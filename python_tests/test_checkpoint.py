"""Saving and loading: exact, whole or not at all, and errors that name file and key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_edits import strengthen
from safetensors.torch import load_file, save_file
from tiny_models import WIDTH, random_batch, tiny_model
from torch import Tensor, nn

from reft_kernels import checkpoint, folders
from reft_kernels.config import ReftConfig, Representation
from reft_kernels.interventions import METHODS, LoreftIntervention
from reft_kernels.model import ReftModel, get_reft_model

FILES = {"reft_config.json", "adapter.safetensors"}


def make(**settings: Any) -> ReftModel:
    defaults = {"method": "loreft", "layers": "all", "rank": 2, "positions": "f2+l1", "tied": False}
    reft_model = get_reft_model(tiny_model("llama"), ReftConfig(**{**defaults, **settings}))
    strengthen(reft_model.interventions)
    return reft_model.eval()


def logits(reft_model: ReftModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = reft_model(**batch).logits
    return found


def train_a_little(reft_model: ReftModel, batch: dict[str, Tensor]) -> None:
    optimizer = torch.optim.AdamW([p for p in reft_model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        reft_model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_loading_gives_the_same_bits(method: str, tmp_path: Path) -> None:
    reft_model = make(method=method)
    batch = random_batch([8, 5])
    train_a_little(reft_model, batch)
    wanted = logits(reft_model, batch)
    reft_model.save(tmp_path / "new" / "adapter")
    assert {path.name for path in (tmp_path / "new" / "adapter").iterdir()} == FILES
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["adapter"]
    loaded = ReftModel.load(tmp_path / "new" / "adapter", tiny_model("llama"))
    assert logits(loaded, batch).equal(wanted)
    assert not loaded.training
    assert [p.requires_grad for p in loaded.interventions.parameters()] == [
        p.requires_grad for p in reft_model.interventions.parameters()
    ]
    loaded.save(tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "new" / "adapter" / name).read_bytes()


def test_every_setting_is_kept(tmp_path: Path) -> None:
    settings = {
        "method": "noreft", "layers": "0;2", "rank": 3, "positions": "f1+l4", "tied": False, "component": "mlp_output",
        "dropout": 0.25, "act_fn": "gelu", "add_bias": True, "dtype": "bfloat16",
        "rebuild": False, "orthogonality": "none",
    }  # fmt: skip
    reft_model = make(**settings)
    reft_model.save(tmp_path / "a")
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"))
    assert loaded.config.to_dict() == {**settings, "layers": [0, 2]}
    assert list(loaded.interventions) == list(reft_model.interventions)
    for one, other in zip(reft_model.representations, loaded.representations, strict=True):
        assert (one.layer, one.component, one.positions, one.low_rank_dimension) == (
            other.layer, other.component, other.positions, other.low_rank_dimension,
        )  # fmt: skip
        assert type(one.intervention) is type(other.intervention)
        assert one.intervention.settings() == other.intervention.settings()  # type: ignore[operator,union-attr]
    text = json.loads((tmp_path / "a" / "reft_config.json").read_text())
    assert text["base_model"]["class"] == "LlamaForCausalLM"
    assert text["base_model"]["hidden_size"] == WIDTH


def test_listed_places_and_shared_interventions(tmp_path: Path) -> None:
    shared = LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2)
    wide = LoreftIntervention(embed_dim=24, low_rank_dimension=4, dtype=torch.bfloat16)
    places = [
        Representation(layer=0, intervention=shared, positions="f1"),
        Representation(layer=2, intervention=shared, positions="l1"),
        Representation(component="model.layers[1].mlp.down_proj.input", intervention=wide),
    ]
    strengthen(nn.ModuleList([shared, wide]))
    reft_model = get_reft_model(tiny_model("llama"), ReftConfig(places)).eval()
    reft_model.save(tmp_path / "a")
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"))
    batch = random_batch([7])
    assert logits(loaded, batch).equal(logits(reft_model, batch))
    first, second, _ = loaded.interventions.values()
    assert first is second
    assert loaded.count_parameters() == reft_model.count_parameters()


def test_an_adapter_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    reft_model = make()
    batch = random_batch([6])
    folder = tmp_path / "adapter"
    folder.mkdir()  # empty: taken
    reft_model.save(folder)
    strengthen(reft_model.interventions)
    reft_model.save(folder)
    assert logits(ReftModel.load(folder, tiny_model("llama")), batch).equal(logits(reft_model, batch))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"adapter: it holds files that are not an adapter's \(notes.txt\)"):
        reft_model.save(folder)
    (folder / "notes.txt").unlink()
    (folder / "reft_config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="no adapter of ours"):
        reft_model.save(folder)
    (folder / "reft_config.json").unlink()
    with pytest.raises(FileExistsError, match="no adapter of ours"):
        reft_model.save(folder)
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    for _ in range(2):
        reft_model.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in (tmp_path / "linked").iterdir()} == FILES
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="not a folder"):
        reft_model.save(file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("fails", ["write_safetensors", "_flush", "_replace", "second rename"])
def test_a_save_that_fails_changes_nothing(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reft_model = make()
    batch = random_batch([6])
    folder = tmp_path / "adapter"
    reft_model.save(folder)
    wanted = logits(reft_model, batch)
    strengthen(reft_model.interventions)
    with monkeypatch.context() as patch:
        if fails == "second rename":
            patch.setattr(folders, "_exchange", lambda one, other: False)
            renames: list[Any] = []
            replace = folders.os.replace

            def rename(one: Any, other: Any) -> None:
                renames.append(one)
                if len(renames) == 2:
                    raise OSError("no space left")
                replace(one, other)

            patch.setattr(folders.os, "replace", rename)
        else:

            def fail(*_: Any, **__: Any) -> None:
                raise OSError("no space left")

            patch.setattr(checkpoint if fails == "write_safetensors" else folders, fails, fail)
        with pytest.raises(OSError, match="no space left"):
            reft_model.save(folder)
        if fails != "second rename":
            with pytest.raises(OSError, match="no space left"):
                reft_model.save(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert logits(ReftModel.load(folder, tiny_model("llama")), batch).equal(wanted)


def test_folders_are_swapped_without_the_systems_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    reft_model = make()
    for _ in range(2):
        strengthen(reft_model.interventions)
        reft_model.save(tmp_path / "a")
    batch = random_batch([6])
    assert logits(ReftModel.load(tmp_path / "a", tiny_model("llama")), batch).equal(logits(reft_model, batch))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


_KILLED = """
import os, sys
import torch
from torch import nn
from reft_kernels import checkpoint, folders
flush = folders._flush
flushed = []
def stop(path):
    flush(path)
    flushed.append(path)
    if len(flushed) == int(sys.argv[2]):
        os._exit(9)
folders._flush = stop
from reft_kernels.interventions import LoreftIntervention
torch.manual_seed(1)
checkpoint.save_adapter(sys.argv[1], {"base_model": {}, "config": {}, "representations": []},
                        {"a": LoreftIntervention(embed_dim=8, low_rank_dimension=2)})
"""


@pytest.mark.parametrize(("flushes", "saved"), [(1, "old"), (3, "old"), (4, "new")])
def test_a_killed_save_leaves_the_old_or_the_new(flushes: int, saved: str, tmp_path: Path) -> None:
    """The process ends after so many writes to the disk; the fourth comes after the folders were swapped."""
    reft_model = make()
    folder = tmp_path / "adapter"
    reft_model.save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(folder), str(flushes)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 9, done.stderr.decode()
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(after) == FILES
    assert all((after[name] == before[name]) == (saved == "old") for name in FILES)


def test_own_interventions_are_loaded_by_their_class(tmp_path: Path) -> None:
    reft_model = get_reft_model(tiny_model("llama"), ReftConfig({"layer": 1, "intervention": Shift(WIDTH)})).eval()
    with torch.no_grad():
        reft_model.interventions[reft_model.keys[0]].by.normal_()
    reft_model.save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"reft_config.json: layer_1.*#0 is a Shift.*classes=\{'Shift': ...\}"):
        ReftModel.load(tmp_path / "a", tiny_model("llama"))
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"), classes={"Shift": Shift})
    batch = random_batch([6])
    assert logits(loaded, batch).equal(logits(reft_model, batch))


class Shift(nn.Module):
    """h + a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(width))

    def settings(self) -> dict[str, Any]:
        return {"width": len(self.by)}

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        return base + self.by


def test_the_bases_own_parameters(tmp_path: Path) -> None:
    reft_model = make()
    head = reft_model.model.lm_head
    head.requires_grad_(True)
    with torch.no_grad():
        head.weight.normal_()
    reft_model.save(tmp_path / "a", include_model=True)
    batch = random_batch([6])
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama"), include_model=True)
    assert logits(loaded, batch).equal(logits(reft_model, batch))
    assert not logits(ReftModel.load(tmp_path / "a", tiny_model("llama")), batch).equal(logits(reft_model, batch))
    reft_model.save(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"base_trainable.safetensors is missing"):
        ReftModel.load(tmp_path / "a", tiny_model("llama"), include_model=True)


def test_load_adapter_puts_weights_back(tmp_path: Path) -> None:
    reft_model = make()
    batch = random_batch([6])
    wanted = logits(reft_model, batch)
    reft_model.save(tmp_path / "a")
    parameters = list(reft_model.interventions.parameters())
    train_a_little(reft_model, batch)
    assert not logits(reft_model, batch).equal(wanted)
    reft_model.load_adapter(tmp_path / "a")
    assert logits(reft_model, batch).equal(wanted)
    assert all(one is other for one, other in zip(parameters, reft_model.interventions.parameters(), strict=True))
    with pytest.raises(ValueError, match="is another one: layer_"):
        make(layers=[0]).load_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match=r"has a LoreftIntervention at layer_0.*a NodireftIntervention"):
        make(method="nodireft").load_adapter(tmp_path / "a")
    other = make(rank=3)
    before = [p.clone() for p in other.interventions.parameters()]
    with pytest.raises(ValueError, match=r"low_rank_dimension=\d, this model has 3"):
        other.load_adapter(tmp_path / "a")
    assert all(p.equal(q) for p, q in zip(before, other.interventions.parameters(), strict=True))


def test_files_are_as_readable_as_any_new_file(tmp_path: Path) -> None:
    make().save(tmp_path / "a")
    (tmp_path / "plain").write_text("")
    for path in (tmp_path / "a").iterdir():
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, path.name


def test_another_base_model(tmp_path: Path) -> None:
    make().save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"hidden size 16.*LlamaForCausalLM has 32"):
        ReftModel.load(tmp_path / "a", tiny_model("llama", hidden_size=32))
    with pytest.raises(ValueError, match="layer 2 does not exist"):
        ReftModel.load(tmp_path / "a", tiny_model("llama", num_hidden_layers=2))
    with pytest.warns(UserWarning, match="made for a llama model, this one is a qwen2"):
        ReftModel.load(tmp_path / "a", tiny_model("qwen2"))


KEY = "layer_1_comp_block_output_unit_pos_nunit_1#0"


def change_tensors(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "adapter.safetensors"
    tensors: dict[str, Any] = {**load_file(path)}
    for name, value in changes.items():
        full = f"{KEY}.learned_source.{name}"
        if value is None:
            del tensors[full]
        else:
            tensors[full] = value
    save_file(tensors, path)


def cut(folder: Path, name: str, part: float) -> None:
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


def change_json(folder: Path, change: Any) -> None:
    path = folder / "reft_config.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("error", "damage", "message"),
    [
        (ValueError, lambda f: cut(f, "adapter.safetensors", 0.9), "adapter.safetensors is truncated or"),
        (ValueError, lambda f: cut(f, "adapter.safetensors", 0.1), "adapter.safetensors is truncated"),
        (ValueError, lambda f: cut(f, "adapter.safetensors", 0.0), "adapter.safetensors is truncated"),
        (ValueError, lambda f: cut(f, "reft_config.json", 0.5), "reft_config.json is not readable JSON"),
        (FileNotFoundError, lambda f: (f / "adapter.safetensors").unlink(), "adapter.safetensors is missing"),
        (FileNotFoundError, lambda f: (f / "reft_config.json").unlink(), "there is no reft_config.json"),
        (ValueError, lambda f: change_tensors(f, bias=None), rf"the key {KEY}.learned_source.bias is missing"),
        (
            ValueError,
            lambda f: change_tensors(f, bias=torch.zeros(3)),
            rf"{KEY}.learned_source.bias must be torch.float32 \[2\], got torch.float32 \[3\]",
        ),
        (
            ValueError,
            lambda f: change_tensors(f, bias=torch.zeros(2, dtype=torch.int64)),
            r"bias must be torch.float32 \[2\], got torch.int64 \[2\]",
        ),
        (ValueError, lambda f: change_tensors(f, extra=torch.zeros(1)), r"extra is not one of LoreftInt"),
        (ValueError, lambda f: change_json(f, lambda d: d["representations"].pop()), "belongs to no representation"),
        (ValueError, lambda f: change_json(f, lambda d: d.pop("format")), 'lacks "format": "reft_kernels"'),
        (ValueError, lambda f: change_json(f, lambda d: d.update(format_version=2)), "format_version 2, .* reads 1"),
        (ValueError, lambda f: change_json(f, lambda d: d.pop("config")), "the key config is missing"),
        (ValueError, lambda f: change_json(f, lambda d: d["config"].pop("tied")), "the key config.tied is missing"),
        (ValueError, lambda f: change_json(f, lambda d: d.update(representations={})), "must be a list, got dict"),
        (
            ValueError,
            lambda f: change_json(f, lambda d: d["representations"][1].pop("settings")),
            r"the key representations\[1\].settings is missing",
        ),
        (
            ValueError,
            lambda f: change_json(f, lambda d: d["representations"][1].update(intervention="os.system")),
            "is a os.system, which is none of",
        ),
        (
            ValueError,
            lambda f: change_json(f, lambda d: d["representations"][1]["settings"].update(low_rank_dimension=99)),
            "cannot make the LoreftIntervention of layer_1.*99",
        ),
        (
            ValueError,
            lambda f: change_json(f, lambda d: d["representations"][1].update(same_as="x")),
            r"representations\[1\].same_as names 'x'",
        ),
    ],
)  # fmt: skip
def test_damaged_adapters(error: type[Exception], damage: Any, message: str, tmp_path: Path) -> None:
    make().save(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(error, match=message):
        ReftModel.load(tmp_path / "a", tiny_model("llama"))


def test_only_tensors_are_saved(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def get_extra_state(self) -> Any:
            return object()

    with pytest.raises(TypeError, match="a: cannot save '_extra_state', a object"):
        checkpoint.save_adapter(tmp_path / "a", {}, {"a": Odd()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["loreft", "consreft", "nodireft"])
def test_an_adapter_of_a_cast_model_loads_as_it_was(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reft_model = make(method=method).to(dtype)
    batch = random_batch([6])
    wanted = logits(reft_model, batch)
    reft_model.save(tmp_path / "a")
    loaded = ReftModel.load(tmp_path / "a", tiny_model("llama").to(dtype))
    assert logits(loaded, batch).equal(wanted)
    assert all(p.requires_grad for p in loaded.interventions.parameters())
    reft_model.load_adapter(tmp_path / "a")
    assert logits(reft_model, batch).equal(wanted)


def test_loading_and_generating_in_inference_mode(tmp_path: Path) -> None:
    reft_model = make()
    batch = random_batch([6])
    wanted = logits(reft_model, batch)
    reft_model.save(tmp_path / "a")
    with torch.inference_mode():
        assert logits(ReftModel.load(tmp_path / "a", tiny_model("llama")), batch).equal(wanted)
