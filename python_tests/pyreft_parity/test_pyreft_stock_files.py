"""Folders between stock pyreft and this library, both ways: the same edits on the other side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyreft
import pytest
import torch
from peer import CLASSES, CONSTRAINED, WITH_PROJ, WITH_W, assert_equal_within, representations, stock
from tiny_models import WIDTH, random_batch, tiny_model
from torch import Tensor, nn

from reft_kernels import ReftConfig, ReftModel, get_reft_model

LAYERS, RANK = [0, 2], 4
POSITIONS: list[list[list[int]]] = [[[0, 1, 5], [0, 1, 4]]] * len(LAYERS)
WHERE = {"sources->base": (None, POSITIONS)}

# Relative to the largest logit: two fp32 evaluations of one network; seen 1e-6.
LOGITS = 5e-6
# Three blocks whose sums bf16 rounds in another order; seen 3 of its steps at the largest logit.
BF16_LOGITS = 6 * 2**-8
ATOL_R = 2e-6

no_stock_limits = pytest.mark.filterwarnings("ignore:pyreft's ReftModel.load, unlike")


def base(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_model("llama").to(dtype)


def stock_model(
    name: str, dtype: torch.dtype = torch.float32, components: list[str] | None = None, **others: Any
) -> Any:
    if name in WITH_PROJ:
        others.setdefault("add_bias", True)
    modules = [stock(name, WIDTH, RANK, dtype=dtype, **others) for _ in LAYERS]
    places = representations(LAYERS, modules, RANK)
    for place, component in zip(places, components or [], strict=False):
        place["component"] = component
    return stock_eval(pyreft.get_reft_model(base(dtype), pyreft.ReftConfig(representations=places)))


def stock_eval(model: Any) -> Any:
    """pyvene's own eval does not reach the interventions."""
    for module in model.interventions.values():
        module.eval()
    return model


def our_model(method: str, dtype: torch.dtype = torch.float32, **others: Any) -> ReftModel:
    config = ReftConfig(method=method, layers=LAYERS, rank=RANK, dtype=dtype, **others)
    reft_model = get_reft_model(base(dtype), config)
    with torch.no_grad():
        for name, parameter in reft_model.interventions.named_parameters():
            change = 0.3 * torch.randn_like(parameter)
            parameter.add_(change.tril(-1) if name.endswith("rows.X") else change)
    return reft_model.eval()


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(batch, unit_locations=WHERE)[1].logits
    return found


@torch.no_grad()
def unedited(model: Any, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model.model(**batch).logits
    return found


def rows(module: nn.Module) -> Tensor:
    """R [r, d]."""
    R = module.proj_layer.weight if hasattr(module, "proj_layer") else module.rotate_layer.weight.T
    return R.detach()


# Theirs, read here


@pytest.mark.parametrize("name", CLASSES)
def test_a_folder_of_pyreft(name: str, tmp_path: Path) -> None:
    theirs, batch = stock_model(name), random_batch([7, 6])
    expected = logits(theirs, batch)
    theirs.save(str(tmp_path / "a"))
    ours = ReftModel.load(tmp_path / "a", base())
    assert_equal_within(logits(ours, batch), expected, LOGITS, "logits")
    assert float((unedited(ours, batch) - expected).abs().max()) > 0.01 * float(expected.abs().max())
    theirs.save_intervention(str(tmp_path / "b"))
    other = our_model(name.removesuffix("Intervention").lower(), add_bias=name in WITH_PROJ)
    other.load_intervention(tmp_path / "b")
    assert_equal_within(logits(other, batch), expected, LOGITS, "logits")


@pytest.mark.parametrize("name", CLASSES)
def test_a_folder_of_pyreft_in_bfloat16(name: str, tmp_path: Path) -> None:
    theirs, batch = stock_model(name, torch.bfloat16), random_batch([7, 6])
    theirs.save(str(tmp_path / "a"))
    ours = ReftModel.load(tmp_path / "a", base(torch.bfloat16))
    for mine, other in zip(ours.interventions.values(), theirs.interventions.values(), strict=True):
        torch.testing.assert_close(mine.edit_weights().R, rows(other), rtol=0, atol=ATOL_R)
        if name in WITH_W:
            assert mine.learned_source.weight.equal(other.learned_source.weight)
            assert mine.learned_source.bias.equal(other.learned_source.bias)
    expected = logits(theirs, batch)
    assert_equal_within(logits(ours, batch), expected, BF16_LOGITS, "logits")


def test_the_activation_and_module_paths(tmp_path: Path) -> None:
    """What stock's own load takes for linear, and what it cannot load at all."""
    paths = ["model.layers[0].output", "model.layers[2].mlp.output"]
    theirs, batch = stock_model("LoreftIntervention", act_fn="gelu", components=paths), random_batch([7, 6])
    theirs.save(str(tmp_path / "a"))
    ours = ReftModel.load(tmp_path / "a", base(), act_fn="gelu")
    assert_equal_within(logits(ours, batch), logits(theirs, batch), LOGITS, "logits")


def test_a_folder_with_the_bases_parameters(tmp_path: Path) -> None:
    theirs, batch = stock_model("LoreftIntervention"), random_batch([7, 6])
    head = theirs.model.lm_head
    head.requires_grad_(True)
    with torch.no_grad():
        head.weight.normal_()
    theirs.save(str(tmp_path / "a"), include_model=True)
    ours = ReftModel.load(tmp_path / "a", base(), include_model=True)
    assert_equal_within(logits(ours, batch), logits(theirs, batch), LOGITS, "logits")


def test_their_state_dicts_under_a_prefix() -> None:
    theirs, batch = stock_model("DireftIntervention"), random_batch([7, 6])
    ours = our_model("direft")
    ours.interventions.load_state_dict(theirs.interventions.state_dict())
    assert_equal_within(logits(ours, batch), logits(theirs, batch), LOGITS, "logits")


# Ours, read there


@pytest.mark.parametrize("method", ["loreft", "consreft", "lobireft", "direft"])
def test_stock_loads_ours_with_identical_outputs(method: str, tmp_path: Path) -> None:
    """Bit for bit those of stock modules that were given our weights one by one."""
    dtype, batch = torch.bfloat16, random_batch([7, 6])
    ours = our_model(method, dtype)
    ours.save(tmp_path / "a", format="pyreft")
    loaded = stock_eval(pyreft.ReftModel.load(str(tmp_path / "a"), base(dtype)))
    assert list(loaded.interventions) == ours.keys
    given = stock_model(f"{method.capitalize()}Intervention", dtype)
    for mine, theirs, other in zip(
        ours.interventions.values(), loaded.interventions.values(), given.interventions.values(), strict=True
    ):
        w = mine.edit_weights()
        assert rows(theirs).equal(w.R)
        with torch.no_grad():
            other.rotate_layer.parametrizations.weight.original.copy_(-torch.eye(WIDTH, RANK))
            other.rotate_layer.parametrizations.weight[0].base[:, :RANK] = w.R.T
            if w.W is None:
                other.learned_source.copy_(w.b)
            else:
                other.learned_source.weight.copy_(w.W)
                other.learned_source.bias.copy_(w.b)
    assert logits(loaded, batch).equal(logits(given, batch))
    assert_equal_within(logits(loaded, batch), logits(ours, batch), BF16_LOGITS, "logits")


@no_stock_limits
@pytest.mark.parametrize("method", ["loreft", "consreft", "lobireft", "direft"])
def test_stock_and_ours_agree_in_float32(method: str, tmp_path: Path) -> None:
    """Weights that bf16 holds exactly, as stock's load makes them bf16; then both in fp32."""
    ours, batch = our_model(method), random_batch([7, 6])
    with torch.no_grad():
        for module in ours.interventions.values():
            if module.has_W:
                for parameter in module.learned_source.parameters():
                    parameter.copy_(parameter.bfloat16())
    ours.save(tmp_path / "a", format="pyreft")
    loaded = stock_eval(pyreft.ReftModel.load(str(tmp_path / "a"), base()))
    for module in loaded.interventions.values():
        module.float()
    expected = logits(loaded, batch)
    assert_equal_within(logits(ours, batch), expected, LOGITS, "logits")
    assert float((unedited(ours, batch) - expected).abs().max()) > 0.01 * float(expected.abs().max())


@no_stock_limits
@pytest.mark.parametrize("add_bias", [False, True])
@pytest.mark.parametrize("method", ["noreft", "nodireft"])
def test_stock_takes_the_weights_of_what_its_load_cannot_make(method: str, add_bias: bool, tmp_path: Path) -> None:
    ours, batch = our_model(method, add_bias=add_bias, act_fn="tanh"), random_batch([7, 6])
    ours.save(tmp_path / "a", format="pyreft")
    with pytest.raises(KeyError, match="add_bias"):
        pyreft.ReftModel.load(str(tmp_path / "a"), base())
    theirs = stock_model(f"{method.capitalize()}Intervention", add_bias=add_bias, act_fn="tanh")
    for key, module in theirs.interventions.items():
        module.load_state_dict(torch.load(tmp_path / "a" / f"intkey_{key}.bin"))
    assert_equal_within(logits(ours, batch), logits(theirs, batch), LOGITS, "logits")


@no_stock_limits
@pytest.mark.parametrize("name", CLASSES)
def test_the_folder_is_like_stocks(name: str, tmp_path: Path) -> None:
    """Same files, same config.json, same keys, shapes and dtypes; and the sidecar."""
    paths = ["block_output", "model.layers[2].mlp.output"]
    theirs = stock_model(name, components=paths)
    theirs.save(str(tmp_path / "theirs"), include_model=True)
    modules = ReftModel.load(tmp_path / "theirs", base()).interventions.values()
    places = [
        {"layer": layer, "component": component, "intervention": module}
        for layer, component, module in zip(LAYERS, paths, modules, strict=True)
    ]
    get_reft_model(base(), ReftConfig(places)).save(tmp_path / "ours", include_model=True, format="pyreft")
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {*names, "reft_kernels.json"}
    written, saved = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs"))
    saved.pop("transformers_version")
    saved["representations"][1][0] = 0  # of a module path, where stock keeps any number
    assert written == saved
    for path in (tmp_path / "theirs").glob("intkey_*.bin"):
        written, saved = (torch.load(tmp_path / who / path.name) for who in ("ours", "theirs"))
        assert {key: (t.shape, t.dtype) for key, t in written.items()} == {
            key: (t.shape, t.dtype) for key, t in saved.items()
        }


def test_stock_loads_the_bases_parameters(tmp_path: Path) -> None:
    ours, batch = our_model("lobireft"), random_batch([7, 6])
    head = ours.model.lm_head
    head.requires_grad_(True)
    with torch.no_grad():
        head.weight.normal_()
    ours.save(tmp_path / "a", include_model=True, format="pyreft")
    loaded = stock_eval(pyreft.ReftModel.load(str(tmp_path / "a"), base(), include_model=True))
    assert loaded.model.lm_head.weight.equal(head.weight)
    assert_equal_within(logits(ours, batch), logits(loaded, batch), LOGITS, "logits")


def test_stock_loads_what_is_shared(tmp_path: Path) -> None:
    """As modules of their own: pyvene's links are another edit."""
    module = our_model("lobireft").interventions[our_model("lobireft").keys[0]]
    ours = get_reft_model(base(), ReftConfig([{"layer": layer, "intervention": module} for layer in LAYERS])).eval()
    ours.save(tmp_path / "a", format="pyreft")
    loaded = stock_eval(pyreft.ReftModel.load(str(tmp_path / "a"), base()))
    batch = random_batch([7, 6])
    assert_equal_within(logits(ours, batch), logits(loaded, batch), LOGITS, "logits")


@pytest.mark.parametrize("name", CONSTRAINED)
def test_training_goes_on_in_stock_with_orthonormal_rows(name: str, tmp_path: Path) -> None:
    """But for LoReFT, where stock's own loading loses them (test_pyreft_file_faults.py)."""
    ours = our_model(name.removesuffix("Intervention").lower(), torch.bfloat16)
    ours.save(tmp_path / "a", format="pyreft")
    loaded = pyreft.ReftModel.load(str(tmp_path / "a"), base(torch.bfloat16))
    module = next(iter(loaded.interventions.values()))
    optimizer = torch.optim.SGD(module.rotate_layer.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (module.rotate_layer.weight * torch.randn(WIDTH, RANK)).sum().backward()
        optimizer.step()
    R = rows(module)
    error = float((R @ R.T - torch.eye(RANK)).abs().max())
    assert (error > 1e-3) if name == "LoreftIntervention" else (error < 1e-5)
    assert not R.equal(next(iter(ours.interventions.values())).edit_weights().R)


@no_stock_limits
@pytest.mark.parametrize("name", CONSTRAINED)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """Ours, loaded and saved again by stock, read here."""
    ours, batch = our_model(name.removesuffix("Intervention").lower(), torch.bfloat16), random_batch([7, 6])
    ours.save(tmp_path / "a", format="pyreft")
    pyreft.ReftModel.load(str(tmp_path / "a"), base(torch.bfloat16)).save(str(tmp_path / "b"))
    back = ReftModel.load(tmp_path / "b", base(torch.bfloat16))
    for one, other in zip(ours.interventions.values(), back.interventions.values(), strict=True):
        torch.testing.assert_close(one.edit_weights().R, other.edit_weights().R, rtol=0, atol=ATOL_R)
        assert one.edit_weights().b.equal(other.edit_weights().b)
    assert_equal_within(logits(back, batch), logits(ours, batch), BF16_LOGITS, "logits")
