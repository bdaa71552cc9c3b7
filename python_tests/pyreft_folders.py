"""Folders as pyreft makes them, written by hand from its ``save``, and models of ours to put beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_edits import strengthen
from pyreft_states import Theirs, pyreft_state
from tiny_models import WIDTH, random_batch, tiny_model
from torch import Tensor

from reft_kernels.config import ReftConfig
from reft_kernels.model import ReftModel, get_reft_model

KEY = "layer_{}_comp_block_output_unit_pos_nunit_1#{}"
FIELDS = (
    "layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type", "intervention",
    "subspace_partition", "group_key", "intervention_link_key", "moe_key", "source_representation",
    "hidden_source_representation", "latent_dim",
)  # fmt: skip
CLOSE = {"rtol": 0, "atol": 2e-6}

# What differs between their layouts: how the files are named, and how a representation is written.
NAMES = {"underscores": "_", "dots": "."}
STYLES = ("list of 14", "list of 13", "list of 5", "dict")

pyreft_warns = pytest.mark.filterwarnings("ignore:pyreft's ReftModel.load, unlike")


def representation(layer: int, component: str, style: str, r: int, **others: Any) -> Any:
    fields: dict[str, Any] = {
        **dict.fromkeys(FIELDS), "layer": layer, "component": component, "unit": "pos", "max_number_of_units": 1,
        "low_rank_dimension": r, **others,
    }  # fmt: skip
    if style == "dict":
        return {name: value for name, value in fields.items() if value is not None}
    return list(fields.values())[: int(style.rpartition(" ")[2])]


def file_name(layer: int, component: str, number: int, dot: str) -> str:
    parts = ["comp", component] if "." in component else ["layer", str(layer), "comp", component]
    return "intkey_" + dot.join([*parts, "unit", "pos", "nunit", "1"]).replace(".", dot) + f"#{number}.bin"


def write_folder(
    folder: Path,
    places: Sequence[tuple[int, str]],
    name: str,
    *,
    r: int = 2,
    dot: str = "_",
    style: str = "list of 14",
    package: str = "pyreft.interventions",
    saved_as: str | None = None,
    **settings: Any,
) -> list[Theirs]:
    """A folder as pyreft's ReftModel.save makes it, and what the interventions in it hold."""
    folder.mkdir(exist_ok=True)
    theirs, seen = [], []
    for layer, component in places:
        theirs.append(pyreft_state(name, WIDTH, r, **settings))
        torch.save(theirs[-1].state, folder / file_name(layer, component, seen.count((layer, component)), dot))
        seen.append((layer, component))
    config = {
        "intervention_constant_sources": [True] * len(places),
        "intervention_dimensions": [WIDTH] * len(places),
        "intervention_types": [f"<class '{package}.{saved_as or name}'>"] * len(places),
        "mode": "parallel",
        "representations": [representation(*place, style, r) for place in places],
        "sorted_keys": [],
        "transformers_version": "4.45.1",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return theirs


def assert_holds(reft_model: ReftModel, theirs: Sequence[Theirs], name: str) -> None:
    for module, one in zip(reft_model.interventions.values(), theirs, strict=True):
        assert type(module).__name__ == name
        R, W, b, _ = module.edit_weights()[:4]
        torch.testing.assert_close(R.float(), one.R.float(), **CLOSE)
        assert W is None or W.equal(one.W)
        assert b.equal(one.b)


def logits(reft_model: ReftModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = reft_model(**batch).logits
    return found


def make(**settings: Any) -> ReftModel:
    defaults = {"method": "loreft", "layers": "all", "rank": 2, "positions": "f2+l1", "tied": False}
    reft_model = get_reft_model(tiny_model("llama"), ReftConfig(**{**defaults, **settings}))
    strengthen(reft_model.interventions)
    return reft_model.eval()


def train_a_little(reft_model: ReftModel) -> None:
    optimizer = torch.optim.AdamW([p for p in reft_model.parameters() if p.requires_grad], lr=0.1)
    batch = random_batch([8, 5])
    for _ in range(2):
        optimizer.zero_grad()
        reft_model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()


def state_of(reft_model: ReftModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in reft_model.state_dict().items()}
