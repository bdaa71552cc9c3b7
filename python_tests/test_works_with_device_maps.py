"""Base models that accelerate spreads over devices, memory and disk; here all of them compute on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_edits import strengthen
from tiny_models import LAYERS, random_batch, tiny_model
from torch import Tensor

from reft_kernels.config import ReftConfig
from reft_kernels.locations import NamedLocations, Places
from reft_kernels.model import ReftModel, get_reft_model
from reft_kernels.modules import module_device
from reft_kernels.plan import Plan
from reft_kernels.positions import GivenLocations

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")

PARTS = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
MAPS: dict[str, dict[str, Any]] = {
    "one device": {"": "cpu"},
    "disk": {**dict.fromkeys(PARTS, "cpu"), "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"},
    "all of the layers on disk": {**dict.fromkeys(PARTS, "cpu"), "model.layers": "disk"},
}


def reft(model: Any, **settings: Any) -> ReftModel:
    torch.manual_seed(0)
    defaults = {"method": "loreft", "layers": "all", "rank": 2, "positions": "f1+l2", "tied": False}
    reft_model = get_reft_model(model, ReftConfig(**{**defaults, **settings}))
    strengthen(reft_model.interventions)
    return reft_model.eval()


def spread(model: Any, device_map: dict[str, Any], folder: Path) -> Any:
    return accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True, state_dict=None
    )


def batch_of(lengths: list[int]) -> dict[str, Tensor]:
    batch = random_batch(lengths, side="left")
    return {**batch, "labels": batch["input_ids"]}


@pytest.mark.parametrize("dispatched", ["before", "after"])
@pytest.mark.parametrize("component", ["block_output", "block_input", "mlp_output"])
@pytest.mark.parametrize("name", MAPS)
def test_spread_models_train_and_generate(name: str, component: str, dispatched: str, tmp_path: Path) -> None:
    wanted = reft(tiny_model("llama"), component=component)
    model = tiny_model("llama")
    if dispatched == "before":
        model = spread(model, MAPS[name], tmp_path)
    reft_model = reft(model, component=component)
    if dispatched == "after":
        spread(model, MAPS[name], tmp_path)
    batch = batch_of([6, 4])
    where = {parameter.device.type for parameter in model.parameters()}
    assert where == ({"cpu"} if name == "one device" else {"cpu", "meta"})
    for _ in range(2):
        found = reft_model(**batch)
        torch.testing.assert_close(found.logits, wanted(**batch).logits, rtol=0, atol=0)
    grads = torch.autograd.grad(found.loss, list(reft_model.interventions.parameters()))
    expected = torch.autograd.grad(wanted(**batch).loss, list(wanted.interventions.parameters()))
    assert all(one.equal(other) for one, other in zip(grads, expected, strict=True))
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 4, "do_sample": False}
    assert reft_model.generate(**prompt, **options).equal(wanted.generate(**prompt, **options))
    assert {parameter.device.type for parameter in model.parameters()} == where


@pytest.mark.parametrize("name", MAPS)
def test_set_device_leaves_a_spread_model_alone(name: str, tmp_path: Path) -> None:
    model = spread(tiny_model("llama"), MAPS[name], tmp_path)
    assert model.hf_device_map == MAPS[name]
    before = [parameter.device for parameter in model.parameters()]
    reft_model = get_reft_model(model, ReftConfig(method="loreft", layers="all", rank=2))
    reft_model.set_device("meta")
    assert [parameter.device for parameter in model.parameters()] == before
    assert {parameter.device.type for parameter in reft_model.interventions.parameters()} == {"cpu"}
    assert module_device(model, model.model.layers[1]) == torch.device("cpu")


def test_hooks_are_added_and_removed_around_ours() -> None:
    model = tiny_model("llama")
    reft_model = reft(model)
    batch = batch_of([6, 4])
    wanted = reft_model(**batch).logits
    seen: list[str] = []

    class Note(hooks.ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append("before")
            return args, kwargs

    hooks.add_hook_to_module(model.model.layers[1], Note())
    assert reft_model(**batch).logits.equal(wanted)
    assert seen == ["before"]
    copied = copy.deepcopy(reft_model)
    assert copied(**batch).logits.equal(wanted)
    hooks.remove_hook_from_submodules(model)
    assert reft_model(**batch).logits.equal(wanted)
    assert seen == ["before"] * 2


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
def test_checkpointing_of_a_spread_model(tmp_path: Path) -> None:
    model = spread(tiny_model("llama"), MAPS["disk"], tmp_path)
    reft_model = reft(model, component="mlp_output", rebuild=False).train()
    batch = batch_of([6, 4])
    parameters = list(reft_model.interventions.parameters())
    wanted = torch.autograd.grad(reft_model(**batch, use_cache=False).loss, parameters)
    reft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = torch.autograd.grad(reft_model(**batch, use_cache=False).loss, parameters)
    assert all(one.equal(other) for one, other in zip(found, wanted, strict=True))


def test_indices_move_to_the_device_of_the_hidden_state() -> None:
    """Each is copied once for each device of a call; what is there already stays itself."""
    places = Places(((0,),), (True,))
    table = torch.tensor([[[0, 3]]])
    locations = NamedLocations(GivenLocations(table, frozenset(), None, None), 1, 4)
    plan = Plan(object(), places, [], locations, None, True)
    index = torch.tensor([[0, 3]])
    assert plan.on(torch.device("cpu"), index) is index
    moved = plan.on(torch.device("meta"), index)
    assert moved.device.type == "meta"
    assert moved.shape == index.shape
    assert plan.on(torch.device("meta"), index) is moved
    other = torch.tensor([[1, 2]])
    assert plan.on(torch.device("meta"), other) is not moved


def test_every_site_asks_for_its_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made on the device of the input, and used on those of the layers."""
    reft_model = reft(tiny_model("llama"))
    asked: list[torch.device] = []
    on = Plan.on

    def noted(self: Plan, device: torch.device, index: Tensor) -> Tensor:
        asked.append(device)
        return on(self, device, index)

    monkeypatch.setattr(Plan, "on", noted)
    reft_model(**batch_of([6, 4]))
    assert len(asked) == 2 * LAYERS  # positions and group
