"""Our interventions inside of a stock pyvene.IntervenableModel, against pyreft's own inside of another."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import pyvene
import torch
from peer import CLASSES, WITH_PROJ, assert_equal_within, ours_like, representations, stock
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import reft_kernels
from reft_kernels.hooks import is_fusable

LAYERS, WIDTH, RANK = (0, 2), 32, 3
LOCATIONS = [[[0, 4], [1, 2]], [[3, 5], [2, 6]]]  # [num_interventions][B][P]


@pytest.fixture
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def both(llama: nn.Module, name: str, **others: Any) -> tuple[Any, Any]:
    """(pyreft's, ours) inside of pyvene."""
    if name in WITH_PROJ:
        others.setdefault("add_bias", True)
    theirs = [stock(name, WIDTH, RANK, **others) for _ in LAYERS]
    ours = [ours_like(module, **others) for module in theirs]
    made = []
    for modules in (theirs, ours):
        model = pyvene.IntervenableModel(
            {"representations": representations(LAYERS, modules, RANK)}["representations"], copy.deepcopy(llama)
        )
        made.append(model)
    return made[0], made[1]


def inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 64, (2, 8))}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("where", [LOCATIONS, None, 3], ids=["lists", "all", "int"])
@torch.no_grad()
def test_outputs(llama: nn.Module, name: str, where: Any) -> None:
    theirs, ours = both(llama, name)
    base = inputs()
    locations = None if where is None else {"sources->base": (None, where)}
    expected = theirs(base, unit_locations=locations)[1].logits
    actual = ours(base, unit_locations=locations)[1].logits
    assert_equal_within(actual, expected, 5e-6, name)
    assert not torch.equal(expected, llama(**base).logits)


@pytest.mark.parametrize("name", CLASSES)
def test_pyvene_trains_and_counts_them(llama: nn.Module, name: str) -> None:
    theirs, ours = both(llama, name)
    unused = RANK * len(LAYERS) if name == "NodireftIntervention" else 0  # the bias that pyreft never uses
    assert ours.count_parameters() == theirs.count_parameters() - unused > 0
    named = dict(ours.named_parameters())
    assert {key.split(".")[0] for key in named} == set(ours.interventions)
    assert [id(p) for p in ours.get_trainable_parameters()] == [id(p) for p in named.values()]
    optimizer = torch.optim.SGD(ours.get_trainable_parameters(), lr=0.1)
    base = inputs()
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = ours(base, unit_locations={"sources->base": (None, LOCATIONS)}, labels=base["input_ids"])[1].loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in named.values())


@torch.no_grad()
def test_generation(llama: nn.Module) -> None:
    theirs, ours = both(llama, "LoreftIntervention")
    base = inputs()
    options = {"max_new_tokens": 6, "do_sample": False, "intervene_on_prompt": True}
    locations = {"sources->base": (None, LOCATIONS)}
    expected = theirs.generate(base, unit_locations=locations, **options)[1]
    assert torch.equal(ours.generate(base, unit_locations=locations, **options)[1], expected)


@torch.no_grad()
def test_pyvene_builds_them_from_their_class(llama: nn.Module) -> None:
    entry = {"layer": 1, "component": "block_output", "low_rank_dimension": RANK}
    config = pyvene.IntervenableConfig(
        representations=[{**entry, "intervention_type": reft_kernels.LoreftIntervention}]
    )
    model = pyvene.IntervenableModel(config, llama)
    (module,) = model.interventions.values()
    assert isinstance(module, pyvene.TrainableIntervention)
    assert isinstance(module, reft_kernels.LoreftIntervention)
    assert model.count_parameters() == 2 * RANK * WIDTH + RANK


@torch.no_grad()
def test_pyvene_saves_and_loads_them(llama: nn.Module, tmp_path: Path) -> None:
    entry = {"layer": 1, "component": "block_output", "low_rank_dimension": RANK}
    config = pyvene.IntervenableConfig(
        representations=[{**entry, "intervention_type": reft_kernels.LoreftIntervention}]
    )
    model = pyvene.IntervenableModel(config, copy.deepcopy(llama))
    model.save(str(tmp_path / "saved"))
    again = pyvene.IntervenableModel.load(str(tmp_path / "saved"), copy.deepcopy(llama))
    base = inputs()
    locations = {"sources->base": (None, LOCATIONS[:1])}
    expected = model(base, unit_locations=locations)[1].logits
    assert torch.equal(again(base, unit_locations=locations)[1].logits, expected)


def test_an_intervention_joins_pyvene_when_that_takes_it(llama: nn.Module) -> None:
    module = reft_kernels.LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=RANK)
    assert type(module) is reft_kernels.LoreftIntervention
    model = pyvene.IntervenableModel([{"layer": 1, "component": "block_output", "intervention": module}], llama)
    assert isinstance(module, pyvene.SourcelessIntervention)
    assert type(module).__name__ == "LoreftIntervention"
    assert is_fusable(module)
    assert len(model.get_trainable_parameters()) == len(list(module.parameters())) == 3
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(copied, pyvene.TrainableIntervention)
        assert torch.equal(copied.rotate_layer.weight, module.rotate_layer.weight)
    with pytest.raises(ValueError, match="interchange_dim: expected embed_dim=32, got 31"):
        module.set_interchange_dim(31)


class Halved(reft_kernels.LoreftIntervention):
    """An own subclass, with a constructor of its own and ``act_fn`` called as pyreft's notebooks do."""

    def __init__(self, factor: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.factor = factor

    def forward(self, base: torch.Tensor, source: Any = None, subspaces: Any = None) -> torch.Tensor:
        delta = self.act_fn(self.learned_source(base)) - self.rotate_layer(base)
        return self.dropout(base + self.factor * delta @ self.rotate_layer.weight.T)


@torch.no_grad()
def test_a_subclass_in_pyvene(llama: nn.Module) -> None:
    module = Halved(0.5, embed_dim=WIDTH, low_rank_dimension=RANK, act_fn="relu")
    model = pyvene.IntervenableModel([{"layer": 1, "component": "block_output", "intervention": module}], llama)
    assert isinstance(copy.deepcopy(module), Halved)
    assert model.count_parameters() == 2 * RANK * WIDTH + RANK
    mine = reft_kernels.ReftModel(
        [{"layer": 1, "component": "block_output", "intervention": copy.deepcopy(module)}], copy.deepcopy(llama)
    )
    base = inputs()
    locations = {"sources->base": (None, LOCATIONS[:1])}
    expected = model(base, unit_locations=locations)[1].logits
    assert_equal_within(mine(base, unit_locations=locations)[1].logits, expected, 5e-6, "logits")
