"""Faults of stock pyreft's files, each shown on stock and then not found here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyreft
import pytest
import torch
from peer import representations, stock
from test_pyreft_stock_files import (
    LAYERS,
    RANK,
    base,
    logits,
    no_stock_limits,
    our_model,
    rows,
    stock_eval,
    stock_model,
)
from tiny_models import WIDTH, random_batch
from torch import Tensor, nn

from reft_kernels import ReftConfig, ReftModel, get_reft_model

METHODS_WITH_PROJ = {"NoreftIntervention": "noreft", "NodireftIntervention": "nodireft"}


@no_stock_limits
@pytest.mark.parametrize("name", METHODS_WITH_PROJ)
def test_adapters_that_cannot_be_loaded(name: str, tmp_path: Path) -> None:
    """config.json has no place for add_bias, which two constructors demand."""
    stock_model(name).save(str(tmp_path / "theirs"))
    with pytest.raises(KeyError, match="add_bias"):
        pyreft.ReftModel.load(str(tmp_path / "theirs"), base())

    ours, batch = our_model(METHODS_WITH_PROJ[name], add_bias=True), random_batch([7, 6])
    for name in ("reft_kernels", "pyreft"):
        ours.save(tmp_path / name, format=name)
        assert logits(ReftModel.load(tmp_path / name, base()), batch).equal(logits(ours, batch))
    ReftModel.load(tmp_path / "theirs", base())


@no_stock_limits
def test_an_activation_that_is_lost(tmp_path: Path) -> None:
    theirs, batch = stock_model("LoreftIntervention", torch.bfloat16, act_fn="relu"), random_batch([7, 6])
    theirs.save(str(tmp_path / "theirs"))
    loaded = stock_eval(pyreft.ReftModel.load(str(tmp_path / "theirs"), base(torch.bfloat16)))
    assert not torch.allclose(logits(loaded, batch), logits(theirs, batch), rtol=0.05, atol=0.05)

    ours = our_model("loreft", act_fn="relu")
    for name in ("reft_kernels", "pyreft"):
        ours.save(tmp_path / name, format=name)
        torch.testing.assert_close(logits(ReftModel.load(tmp_path / name, base()), batch), logits(ours, batch))


@no_stock_limits
def test_a_dtype_that_is_lost(tmp_path: Path) -> None:
    """fp32 weights are rounded to bf16 on the way, and then do not fit the fp32 model that they were trained on."""
    theirs, batch = stock_model("LoreftIntervention"), random_batch([7, 6])
    logits(theirs, batch)
    theirs.save(str(tmp_path / "theirs"))
    loaded = pyreft.ReftModel.load(str(tmp_path / "theirs"), base())
    before, after = (next(iter(model.interventions.values())).learned_source.weight for model in (theirs, loaded))
    assert after.dtype == torch.bfloat16
    assert not after.float().equal(before)
    with pytest.raises(RuntimeError, match="same dtype"):
        logits(loaded, batch)

    ours = our_model("loreft")
    for name in ("reft_kernels", "pyreft"):
        ours.save(tmp_path / name, format=name)
        loaded = ReftModel.load(tmp_path / name, base())
        for one, other in zip(ours.interventions.values(), loaded.interventions.values(), strict=True):
            assert one.learned_source.weight.equal(other.learned_source.weight)


def train(module: nn.Module, steps: int = 200) -> float:
    """|R^T R - I| after some steps towards random targets."""
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        h = torch.randn(16, WIDTH)
        optimizer.zero_grad()
        (module(h) - h.roll(1, -1)).square().mean().backward()
        optimizer.step()
    R = rows(module)
    return float((R @ R.T - torch.eye(RANK)).abs().max())


def test_rows_that_do_not_stay_orthonormal_after_loading() -> None:
    """Loading overwrites the first columns of the base alone; training then leaves the constraint."""
    theirs = stock("LoreftIntervention", WIDTH, RANK)
    loaded = stock("LoreftIntervention", WIDTH, RANK)
    loaded.load_state_dict(theirs.state_dict())
    base_matrix = loaded.rotate_layer.parametrizations.weight[0].base
    assert float((base_matrix.T @ base_matrix - torch.eye(WIDTH)).abs().max()) > 0.1
    assert train(theirs) < 1e-5
    assert train(loaded) > 0.01

    ours = next(iter(our_model("loreft").interventions.values()))
    ours.load_state_dict(stock("LoreftIntervention", WIDTH, RANK).state_dict())
    assert train(ours) < 1e-6


def test_a_rank_that_is_replaced_in_silence() -> None:
    """A file of another rank rebuilds R and not W: what fails is the next forward pass."""
    smaller = stock("LoreftIntervention", WIDTH, 2).state_dict()
    theirs = stock("LoreftIntervention", WIDTH, RANK)
    theirs.load_state_dict({"rotate_layer": smaller["rotate_layer"]})
    with pytest.raises(RuntimeError):
        theirs(torch.randn(1, 3, WIDTH))

    ours = next(iter(our_model("loreft").interventions.values()))
    with pytest.raises(ValueError, match=r"has low_rank_dimension=2 .*, this module has low_rank_dimension=4"):
        ours.load_state_dict(smaller)


@pytest.mark.skipif(torch.cuda.is_available(), reason="pyvene loads to cuda:0, which is there")
def test_weights_that_load_on_one_device_alone(tmp_path: Path) -> None:
    theirs, batch = stock_model("LoreftIntervention"), random_batch([7, 6])
    theirs.save_intervention(str(tmp_path / "a"))
    with pytest.raises(RuntimeError, match="CUDA"):
        theirs.load_intervention(str(tmp_path / "a"))

    ours = our_model("loreft")
    ours.load_intervention(tmp_path / "a")
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), rtol=0, atol=1e-4)


@no_stock_limits
def test_module_paths_that_cannot_be_loaded(tmp_path: Path) -> None:
    """Their width is not in pyvene's table, so that none is given to the constructor."""
    paths = ["model.layers[0].output", "model.layers[2].mlp.output"]
    theirs, batch = stock_model("LoreftIntervention", components=paths), random_batch([7, 6])
    theirs.save(str(tmp_path / "theirs"))
    with pytest.raises(TypeError):
        pyreft.ReftModel.load(str(tmp_path / "theirs"), base())

    loaded = ReftModel.load(tmp_path / "theirs", base())
    torch.testing.assert_close(logits(loaded, batch), logits(theirs, batch), rtol=0, atol=1e-4)
    loaded.save(tmp_path / "ours", format="pyreft")
    again = ReftModel.load(tmp_path / "ours", base())
    torch.testing.assert_close(logits(again, batch), logits(theirs, batch), rtol=0, atol=1e-4)


def test_names_of_2024_that_are_not_found(tmp_path: Path) -> None:
    """pyvene before 0.1.7 put dots into the names of its files."""
    theirs, batch = stock_model("LoreftIntervention"), random_batch([7, 6])
    theirs.save(str(tmp_path / "a"))
    for path in list((tmp_path / "a").glob("intkey_*.bin")):
        layer = path.name.split("_")[2]
        path.rename(path.with_name(f"intkey_layer.{layer}.comp.block_output.unit.pos.nunit.1#0.bin"))
    with pytest.raises(FileNotFoundError):
        pyreft.ReftModel.load(str(tmp_path / "a"), base())

    loaded = ReftModel.load(tmp_path / "a", base())
    torch.testing.assert_close(logits(loaded, batch), logits(theirs, batch), rtol=0, atol=1e-4)


class _Trainer(pyreft.ReftTrainer):
    """Stock's trainer as far as its ``save_model`` needs one: its __init__ fails on later versions of transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model


def test_checkpoints_of_the_trainer_that_cannot_be_loaded(tmp_path: Path) -> None:
    """They have no config.json; and into a folder that is not empty nothing is saved at all."""
    theirs, batch = stock_model("LoreftIntervention"), random_batch([7, 6])
    folder = tmp_path / "checkpoint-2"
    _Trainer(theirs).save_model(str(folder))
    with pytest.raises((OSError, TypeError)):  # by the version of transformers
        pyreft.ReftModel.load(str(folder / "intervenable_model"), base())
    other = stock_model("LoreftIntervention")
    _Trainer(other).save_model(str(folder))  # says so in the log, and keeps the old weights

    ours = our_model("loreft")
    ours.load_intervention(folder)
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), rtol=0, atol=1e-4)
    ours.save(tmp_path / "ours")
    newer = our_model("loreft")
    newer.save(tmp_path / "ours")
    assert logits(ReftModel.load(tmp_path / "ours", base()), batch).equal(logits(newer, batch))


def test_a_state_dict_without_the_weights() -> None:
    """LoReFT's own state_dict does not take the arguments that nn.Module passes."""
    theirs = stock_model("LoreftIntervention")
    assert not any("intervention" in name for name in theirs.state_dict())
    assert not theirs.interventions.state_dict()

    ours = our_model("loreft")
    names = ours.state_dict()
    for key in ours.keys:
        assert f"interventions.{key}.learned_source.weight" in names
        assert f"interventions.{key}.rotate_layer.rows.X" in names
    fresh = our_model("loreft")
    fresh.load_state_dict(names)
    batch = random_batch([7, 6])
    assert logits(fresh, batch).equal(logits(ours, batch))


def test_a_sign_that_weight_decay_takes(tmp_path: Path) -> None:
    """R is zero after one step of AdamW with weight decay, and is saved so."""
    theirs = stock("LobireftIntervention", WIDTH, RANK)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    theirs(torch.randn(2, WIDTH)).sum().backward()
    optimizer.step()
    assert not rows(theirs).any()

    ours = next(iter(our_model("lobireft").interventions.values()))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01, weight_decay=0.1)
    ours(torch.randn(2, WIDTH)).sum().backward()
    optimizer.step()
    R = ours.edit_weights().R.detach()
    assert float((R @ R.T - torch.eye(RANK)).abs().max()) < 1e-6
    with pytest.raises(ValueError, match=r"R: expected orthonormal rows"):
        ours.load_state_dict(theirs.state_dict())


def imported(calls: list[str]) -> Callable[[str], Any]:
    def import_module(name: str) -> Any:
        calls.append(name)
        raise ImportError(name)

    return import_module


def test_code_that_a_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A string in config.json decides which module is imported, which runs it."""
    theirs: Any = stock_model("LobireftIntervention")
    theirs.save(str(tmp_path / "a"))
    path = tmp_path / "a" / "config.json"
    path.write_text(path.read_text().replace("pyreft.interventions", "a_module_of_the_file"))
    calls: list[str] = []
    monkeypatch.setattr("importlib.import_module", imported(calls))
    with pytest.raises(ImportError):
        pyreft.ReftModel.load(str(tmp_path / "a"), base())
    assert "a_module_of_the_file" in calls

    calls.clear()
    loaded = ReftModel.load(tmp_path / "a", base())
    assert "a_module_of_the_file" not in calls
    assert len(loaded.interventions) == len(LAYERS)


def test_representations_without_a_rank(tmp_path: Path) -> None:
    """The rank is in the weights; stock needs it in the dict of the representation too."""
    modules: list[nn.Module] = [stock("LobireftIntervention", WIDTH, RANK) for _ in LAYERS]
    places = representations(LAYERS, modules, RANK)
    for place in places:
        del place["low_rank_dimension"]
    theirs = stock_eval(pyreft.get_reft_model(base(), pyreft.ReftConfig(representations=places)))
    theirs.save(str(tmp_path / "a"))
    with pytest.raises(TypeError):
        pyreft.ReftModel.load(str(tmp_path / "a"), base())

    batch: dict[str, Tensor] = random_batch([7, 6])
    loaded = ReftModel.load(tmp_path / "a", base())
    torch.testing.assert_close(logits(loaded, batch), logits(theirs, batch), rtol=0, atol=1e-4)
    ours = get_reft_model(base(), ReftConfig([{"layer": 1, "intervention": m} for m in loaded.interventions.values()]))
    ours.save(tmp_path / "b")
    assert len(ReftModel.load(tmp_path / "b", base()).interventions) == len(LAYERS)
