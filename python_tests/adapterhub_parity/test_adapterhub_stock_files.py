"""Adapters between AdapterHub's ``adapters`` and this library, both ways: the same outputs on the other side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
from tiny_models import random_batch, tiny_model
from torch import Tensor

from reft_kernels import ReftConfig, ReftModel, get_reft_model

CONFIGS = {
    "loreft": adapters.LoReftConfig,
    "noreft": adapters.NoReftConfig,
    "nodireft": adapters.DiReftConfig,  # the paper's DiReFT
}

# Relative to the largest logit: two fp32 evaluations of one network; seen 1e-6.
LOGITS = 5e-6


def theirs_with(architecture: str, method: str, **settings: Any) -> Any:
    """A model of theirs with an active adapter whose edits show."""
    model = tiny_model(architecture)
    adapters.init(model)
    model.add_adapter("mine", config=CONFIGS[method](**settings))
    model.set_active_adapters("mine")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "refts" in name and "original" in name:
                parameter.add_(torch.randn_like(parameter).triu(1), alpha=0.3)  # theirs is the transpose
            elif "refts" in name:
                parameter.normal_(std=0.4)
    return model.eval()


def reloaded(architecture: str, folder: Path, config: Any = None) -> Any:
    """A model of theirs with the adapter of a folder; ``config`` to add it with, where theirs would be another."""
    model = tiny_model(architecture)
    adapters.init(model)
    if config is not None:
        model.add_adapter("reft", config=config)
    model.load_adapter(str(folder), load_as="reft")
    model.set_active_adapters("reft")
    return model.eval()


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch).logits
    return found


def assert_same(ours: Tensor, theirs: Tensor, mask: Tensor) -> None:
    rows = mask.bool() if ours.dim() == 3 else slice(None)
    difference = float((ours - theirs)[rows].abs().max())
    assert difference <= LOGITS * float(theirs[rows].abs().max()), difference


SETTINGS = [
    {"r": 2, "prefix_positions": 3},
    {"r": 4, "prefix_positions": 2, "suffix_positions": 3, "non_linearity": "gelu"},
    {"r": 4, "prefix_positions": 2, "suffix_positions": 1, "tied_weights": True, "layers": [0, 2]},
    {"r": 1, "prefix_positions": 0, "suffix_positions": 2, "non_linearity": "swish"},
]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "roberta"])
def test_an_adapter_of_theirs(
    architecture: str, method: str, settings: dict[str, Any], side: str, tmp_path: Path
) -> None:
    theirs, batch = theirs_with(architecture, method, **settings), random_batch([9, 7, 6], side=side)
    expected = logits(theirs, batch)
    for safetensors in (False, True):
        folder = tmp_path / str(safetensors)
        theirs.save_adapter(str(folder), "mine", use_safetensors=safetensors)
        ours = ReftModel.load(folder, tiny_model(architecture), method=None if method == "loreft" else method)
        assert_same(logits(ours, batch), expected, batch["attention_mask"])
    plain = logits(tiny_model(architecture), batch)
    assert float((plain - expected).abs().max()) > 0.01 * float(expected.abs().max())


@pytest.mark.parametrize("positions", ["f3", "f2+l3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:load_adapter of adapters takes this DiReFT")
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "roberta"])
def test_an_adapter_of_ours(architecture: str, method: str, tied: bool, positions: str, tmp_path: Path) -> None:
    config = ReftConfig(method=method, layers="all", rank=3, positions=positions, tied=tied, act_fn="tanh")
    ours = get_reft_model(tiny_model(architecture), config)
    with torch.no_grad():
        for name, parameter in ours.interventions.named_parameters():
            if "rotate_layer" not in name:
                parameter.normal_(std=0.4)
    ours.eval()
    ours.save(tmp_path / "a", format="adapterhub")
    batch = random_batch([9, 7, 6])
    prefix, suffix = (3, 0) if positions == "f3" else (2, 3)
    direft = adapters.DiReftConfig(
        r=3, prefix_positions=prefix, suffix_positions=suffix, non_linearity="tanh", tied_weights=tied or suffix == 0
    )
    theirs = reloaded(architecture, tmp_path / "a", direft if method == "nodireft" else None)
    assert_same(logits(ours, batch), logits(theirs, batch), batch["attention_mask"])


def test_training_goes_on_there_with_orthonormal_rows(tmp_path: Path) -> None:
    ours = get_reft_model(tiny_model("llama"), ReftConfig(method="loreft", layers=[1], rank=3, positions="f2"))
    ours.save(tmp_path / "a", format="adapterhub")
    theirs = reloaded("llama", tmp_path / "a")
    projection = theirs.model.layers[1].reft_layer.refts["reft"].units[0].projection
    (module,) = ours.interventions.values()
    R = module.edit_weights().R.detach()
    assert projection.weight.equal(R)
    optimizer = torch.optim.SGD(projection.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (projection.weight * torch.randn_like(R)).sum().backward()
        optimizer.step()
    moved = projection.weight.detach()
    assert float((moved @ moved.T - torch.eye(3)).abs().max()) < 1e-5
    assert float((moved - R).abs().max()) > 0.1


# Faults of theirs


def test_direft_that_is_read_back_as_noreft(tmp_path: Path) -> None:
    theirs, batch = theirs_with("llama", "nodireft", r=2), random_batch([8, 6])
    expected = logits(theirs, batch)
    theirs.save_adapter(str(tmp_path / "a"), "mine")
    found = logits(reloaded("llama", tmp_path / "a"), batch)
    assert float((found - expected).abs().max()) > 0.05 * float(expected.abs().max())

    with pytest.raises(ValueError, match="saves NoReFT and DiReFT alike"):
        ReftModel.load(tmp_path / "a", tiny_model("llama"))
    ours = ReftModel.load(tmp_path / "a", tiny_model("llama"), method="nodireft")
    assert_same(logits(ours, batch), expected, batch["attention_mask"])
    ours.save(tmp_path / "b")
    assert_same(logits(ReftModel.load(tmp_path / "b", tiny_model("llama")), batch), expected, batch["attention_mask"])
    for folder in ("a", "c"):  # theirs, and ours, which says which it is
        if folder == "c":
            with pytest.warns(UserWarning, match="add an adapter with DiReftConfig first"):
                ours.save(tmp_path / folder, format="adapterhub")
        again = reloaded("llama", tmp_path / folder, adapters.DiReftConfig(r=2, tied_weights=folder == "c"))
        assert_same(logits(again, batch), expected, batch["attention_mask"])
    assert_same(logits(ReftModel.load(tmp_path / "c", tiny_model("llama")), batch), expected, batch["attention_mask"])


def test_short_sequences_are_edited_at_other_positions(tmp_path: Path) -> None:
    """Theirs takes the whole prefix, ours at most half of the tokens, as pyreft does; the caller can say which."""
    theirs, batch = theirs_with("llama", "loreft", r=2, prefix_positions=3), random_batch([4])
    theirs.save_adapter(str(tmp_path / "a"), "mine")
    ours = ReftModel.load(tmp_path / "a", tiny_model("llama"))
    expected = logits(theirs, batch)
    assert float((logits(ours, batch) - expected).abs().max()) > 0.01 * float(expected.abs().max())
    with torch.no_grad():
        given = ours(batch, unit_locations={"sources->base": (None, [[[0, 1, 2]]] * 3)})[1].logits
    assert_same(given, expected, batch["attention_mask"])
