"""LoRA of PEFT and ReFT on one model: trained together, saved together, and either alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hand_edits import edited_by_hand, strengthen
from tiny_models import LAYERS, WIDTH, random_batch, tiny_model
from torch import Tensor

from reft_kernels.config import ReftConfig
from reft_kernels.interventions import LoreftIntervention
from reft_kernels.model import ReftModel, get_reft_model

peft = pytest.importorskip("peft")


def with_lora(model: Any, **settings: Any) -> Any:
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings})
    return peft.get_peft_model(model, config)


def randomise_lora(model: Any) -> None:
    """PEFT starts from a B of zeros, which edits nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


def string_config() -> ReftConfig:
    """As in pyreft's README."""
    return ReftConfig(
        representations=[
            {
                "component": f"base_model.model.model.layers[{layer}].output",
                "low_rank_dimension": 2,
                "intervention": LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2),
            }
            for layer in range(LAYERS)
        ]
    )


def named_config() -> ReftConfig:
    return ReftConfig(method="loreft", layers="all", rank=2)


def batch_of(lengths: list[int]) -> dict[str, Tensor]:
    batch = random_batch(lengths)
    return {**batch, "labels": batch["input_ids"]}


def train(reft_model: ReftModel, batch: dict[str, Tensor], steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in reft_model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        loss = reft_model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("config", [string_config, named_config])
def test_trained_and_saved_together(config: Any, tmp_path: Path) -> None:
    model = with_lora(tiny_model("llama"))
    reft_model = get_reft_model(model, config())
    strengthen(reft_model.interventions)
    assert not any(p.requires_grad for p in model.parameters())  # as in pyreft
    reft_model.model.enable_adapter_layers()
    trained = {name: p.detach().clone() for name, p in reft_model.named_parameters() if p.requires_grad}
    lora = {name for name in trained if "lora_" in name}
    assert len(lora) == 4 * LAYERS
    assert trained.keys() - lora == {f"interventions.{name}" for name, _ in reft_model.interventions.named_parameters()}
    frozen = {name: p.clone() for name, p in reft_model.named_parameters() if name not in trained}
    batch = batch_of([6, 4])
    losses = train(reft_model.train(), batch, 5)
    assert losses[-1] < losses[0]
    named = dict(reft_model.named_parameters())
    assert not any(named[name].equal(before) for name, before in trained.items())
    assert all(named[name].equal(before) for name, before in frozen.items())
    reft_model.eval()
    wanted = reft_model(**batch).logits
    reft_model.save(tmp_path / "both", include_model=True)
    loaded = ReftModel.load(tmp_path / "both", with_lora(tiny_model("llama")), include_model=True)
    assert loaded(**batch).logits.equal(wanted)
    ids = random_batch([5])["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False}
    assert loaded.generate(input_ids=ids, **options).equal(reft_model.generate(input_ids=ids, **options))
    without_lora = ReftModel.load(tmp_path / "both", with_lora(tiny_model("llama")))
    assert not without_lora(**batch).logits.equal(wanted)


@pytest.mark.parametrize("config", [string_config, named_config])
def test_each_does_its_own_part(config: Any) -> None:
    model = with_lora(tiny_model("llama"))
    randomise_lora(model)
    reft_model = get_reft_model(model, config()).eval()
    strengthen(reft_model.interventions)
    batch = random_batch([6, 4])
    blocks = model.base_model.model.model.layers
    edits: Any = [(blocks[i], "output", module, None) for i, module in enumerate(reft_model.interventions.values())]
    with edited_by_hand(edits):
        both = model(**batch).logits
        with model.disable_adapter():
            edits_alone = model(**batch).logits
    torch.testing.assert_close(reft_model(**batch).logits, both, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(reft_model(**batch).logits, edits_alone, rtol=1e-4, atol=1e-4)
    lora_alone = model(**batch).logits
    assert not lora_alone.equal(both)
    assert not edits_alone.equal(both)


@pytest.mark.parametrize("after", ["merge_adapter", "merge_and_unload", "unload"])
def test_lora_is_merged_or_removed(after: str) -> None:
    model = with_lora(tiny_model("llama"))
    randomise_lora(model)
    reft_model = get_reft_model(model, named_config()).eval()
    strengthen(reft_model.interventions)
    batch = random_batch([6, 4])
    wanted = reft_model(**batch).logits
    if after == "unload":
        with model.disable_adapter():
            wanted = reft_model(**batch).logits
    plain = getattr(model, after)()
    if plain is not None:
        reft_model.model = plain
        assert not any("lora" in name for name, _ in reft_model.named_parameters())
    torch.testing.assert_close(reft_model(**batch).logits, wanted, rtol=1e-4, atol=1e-4)
    ids = random_batch([5])["input_ids"]
    forced = reft_model(input_ids=ids).logits[:, -1].argmax(-1)
    assert reft_model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)[:, -1].equal(forced)


def test_lora_added_to_the_base_of_a_reft_model() -> None:
    model = tiny_model("llama")
    reft_model = get_reft_model(model, named_config())
    strengthen(reft_model.interventions)
    batch = batch_of([6, 4])
    before = reft_model.eval()(**batch).logits
    lora_model = with_lora(model)  # puts its layers into the model itself
    assert reft_model(**batch).logits.equal(before)  # a new LoRA changes nothing
    randomise_lora(lora_model)
    changed = reft_model(**batch).logits
    assert not changed.equal(before)
    assert not lora_model(**batch).logits.equal(changed)
    names = {name for name, p in reft_model.named_parameters() if p.requires_grad}
    assert {"lora_" in name for name in names} == {True, False}
    losses = train(reft_model.train(), batch, 5)
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(component: str, reentrant: bool) -> None:
    model = with_lora(tiny_model("llama"))
    randomise_lora(model)
    config = ReftConfig(method="loreft", layers="all", rank=2, component=component, rebuild=False)
    reft_model = get_reft_model(model, config).train()
    strengthen(reft_model.interventions)
    model.enable_adapter_layers()
    batch = batch_of([6, 4])

    def gradients() -> dict[str, Tensor]:
        named = {name: p for name, p in reft_model.named_parameters() if p.requires_grad}
        for p in named.values():
            p.grad = None
        reft_model(**batch, use_cache=False).loss.backward()
        return {name: p.grad for name, p in named.items() if p.grad is not None}

    wanted = gradients()
    reft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients()
    assert found.keys() == wanted.keys()
    assert all(grad.equal(wanted[name]) for name, grad in found.items())
