"""ReftConfig: the short form, pyreft's dicts, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from reft_kernels.config import ReftConfig, Representation
from reft_kernels.interventions import ConsreftIntervention, LoreftIntervention, NoreftIntervention


def loreft(rank: int = 2) -> LoreftIntervention:
    return LoreftIntervention(embed_dim=16, low_rank_dimension=rank)


def test_short_form_untied_lists_prefixes_then_suffixes() -> None:
    config = ReftConfig(method="noreft", layers="0;5;10", rank=3, positions="f7+l2", tied=False, add_bias=True)
    found = [(item.layer, item.positions) for item in config.expand(None)]
    assert found == [(0, "f7"), (5, "f7"), (10, "f7"), (0, "l2"), (5, "l2"), (10, "l2")]
    intervention = config.expand(None)[0].build(16)
    assert isinstance(intervention, NoreftIntervention)
    assert intervention.settings() == {
        "embed_dim": 16, "low_rank_dimension": 3, "dtype": "float32", "dropout": 0.0, "act_fn": "linear",
        "add_bias": True,
    }  # fmt: skip


@pytest.mark.parametrize(("positions", "tied"), [("f7+l2", True), ("f7", False), ("l1", False), (None, False)])
def test_short_form_with_one_intervention_a_layer(positions: str | None, tied: bool) -> None:
    config = ReftConfig(method="loreft", layers="all", rank=1, positions=positions, tied=tied)
    assert config.needs_layer_count
    assert config.representations is None
    assert [(item.layer, item.positions) for item in config.expand(2)] == [(0, positions), (1, positions)]


def test_settings_reach_the_interventions() -> None:
    config = ReftConfig(
        method="direft", layers=[1], rank=2, dropout=0.25, act_fn="gelu", dtype="bfloat16", component="mlp_output"
    )
    item = config.expand(None)[0]
    assert item.component == "mlp_output"
    built = item.build(8)
    assert isinstance(built, nn.Module)
    assert built.settings() | {"embed_dim": 0} == {  # type: ignore[operator]
        "embed_dim": 0, "low_rank_dimension": 2, "dtype": "bfloat16", "dropout": 0.25, "act_fn": "gelu",
        "add_bias": False, "orthogonality": "householder",
    }  # fmt: skip


def test_dicts_of_pyreft() -> None:
    config = ReftConfig(
        representations=[
            {"layer": 3, "component": "block_output", "low_rank_dimension": 2, "intervention": loreft(), "unit": "pos"},
            {"component": "model.layers[1].mlp.output", "intervention": loreft(), "max_number_of_units": 1},
            Representation(layer=0, low_rank_dimension=4, intervention_type=ConsreftIntervention, positions="l2"),
        ],
        positions="f1",
    )
    first, second, third = config.expand(None)
    assert (first.layer, first.positions, first.low_rank_dimension) == (3, "f1", 2)
    assert (second.layer, second.is_path, second.low_rank_dimension) == (None, True, 2)
    assert (third.positions, third.span) == ("l2", (0, 2))
    assert len(ReftConfig(representations={"layer": 0, "intervention": loreft()}).expand(None)) == 1
    typed = ReftConfig([{"layer": 0, "low_rank_dimension": 1}], intervention_types=LoreftIntervention)
    assert typed.expand(None)[0].intervention_type is LoreftIntervention


def test_restore_keeps_every_setting() -> None:
    config = ReftConfig(
        method="loreft", layers="all", rank=2, positions="f1+l1", tied=False, dropout=0.5, act_fn="relu", add_bias=True,
        dtype=torch.bfloat16, component="block_input", rebuild=False,
    )  # fmt: skip
    listed = [Representation(layer=0, intervention=loreft(), positions="f1")]
    assert ReftConfig.restore(config.to_dict(), listed).to_dict() == config.to_dict()
    older = {name: value for name, value in config.to_dict().items() if name != "rebuild"}
    assert ReftConfig.restore(older, listed).rebuild


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {}, "give representations, or a method"),
        (ValueError, {"method": "lora", "layers": [1], "rank": 1}, "method must be one of .*'loreft'.*got 'lora'"),
        (ValueError, {"method": "loreft", "rank": 1}, "method needs layers"),
        (ValueError, {"method": "loreft", "layers": [1]}, "method needs rank"),
        (ValueError, {"method": "loreft", "layers": [1], "rank": 0}, "rank, an int of at least 1, got 0"),
        (ValueError, {"method": "loreft", "layers": "0,1", "rank": 1}, "'0;5;10', got '0,1'"),
        (ValueError, {"method": "loreft", "layers": [1, 1], "rank": 1}, r"distinct ints.*got \[1, 1\]"),
        (ValueError, {"method": "loreft", "layers": [-1], "rank": 1}, r"got \[-1\]"),
        (ValueError, {"method": "loreft", "layers": [], "rank": 1}, r"got \[\]"),
        (TypeError, {"method": "loreft", "layers": [1.0], "rank": 1}, r"got \[1.0\]"),
        (TypeError, {"method": "loreft", "layers": 3, "rank": 1}, "got int"),
        (ValueError, {"method": "loreft", "layers": [1], "rank": 1, "positions": "7"}, "got '7'"),
        (ValueError, {"method": "loreft", "layers": [1], "rank": 1, "dropout": 1.0}, "dropout"),
        (ValueError, {"method": "loreft", "layers": [1], "rank": 1, "dtype": "int"}, "dtype"),
        (ValueError, {"method": "loreft", "layers": [1], "rank": 1, "component": "a.output"}, "in representations"),
        (TypeError, {"representations": "loreft"}, "dict or a list"),
        (ValueError, {"method": "loreft", "layers": [1], "rank": 1, "dropout": None}, "dropout must be a number"),
        (TypeError, {"method": "loreft", "layers": [1], "rank": 1, "tied": "no"}, "tied must be True or False"),
        (TypeError, {"representations": [3]}, "got int"),
        (ValueError, {"representations": {"layer": 0}, "method": "loreft"}, "not both"),
        (ValueError, {"representations": {"layer": 0}}, "block_output of layer 0: give intervention"),
        (ValueError, {"representations": {"layer": 0, "layre": 1, "intervention": loreft()}}, "'layre'"),
        (ValueError, {"representations": {"layer": 0, "unit": "h", "intervention": loreft()}}, "unit='h'"),
        (
            ValueError,
            {"representations": {"layer": 0, "low_rank_dimension": 4, "intervention": loreft()}},
            "low_rank_dimension is 4, but the intervention has 2",
        ),
        (
            ValueError,
            {"representations": {"layer": 0, "intervention_type": LoreftIntervention}},
            "low_rank_dimension must be an int of at least 1, got None",
        ),
        (TypeError, {"representations": {"layer": "0", "intervention": loreft()}}, "must be an int, got '0'"),
        (TypeError, {"representations": {"layer": 0, "intervention": LoreftIntervention}}, "torch.nn.Module"),
        (TypeError, {"representations": {"layer": 0, "intervention_type": loreft()}}, "must be a class"),
        (TypeError, {"representations": {"layer": 0, "component": 1, "intervention": loreft()}}, "component"),
    ],
)
def test_config_refuses(error: type[Exception], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        ReftConfig(**arguments)
