"""pyreft_compat=True does what stock pyreft does, where the default does not."""

from __future__ import annotations

import copy
from typing import Any

import pyreft
import pytest
import torch
from peer import assert_equal_within, build_models
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import reft_kernels

LAYERS, WIDTH, RANK = (0, 2), 32, 3
WHERE = {"sources->base": (None, [[[0, 4], [1, 2]], [[3, 5], [2, 6]]])}


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(3)
    return LlamaForCausalLM(config).eval()


def three(name: str = "LoreftIntervention", **others: Any) -> tuple[Any, Any, Any]:
    """(stock, ours, ours with pyreft_compat), with the same weights."""
    both = build_models(llama, name, LAYERS, RANK, positions="all", tied=True, **others)
    config = reft_kernels.ReftConfig(
        representations=[
            {"layer": layer, "component": "block_output", "intervention": copy.deepcopy(module)}
            for layer, module in zip(LAYERS, both.ours.interventions.values(), strict=True)
        ]
    )
    return both.theirs, both.ours, reft_kernels.get_reft_model(llama(), config, pyreft_compat=True)


def inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 64, (2, 8))}


@pytest.mark.parametrize("first", [{"sources->base": (None, 3)}, {"base": 3}, {"base": [1, 3]}])
@torch.no_grad()
def test_positions_for_all_stick(first: Any) -> None:
    stock, ours, compat = three()
    base = inputs()
    right = stock(base, unit_locations=WHERE)[1].logits
    for model in (stock, ours, compat):
        model(base, unit_locations=first)
    wrong = stock(base, unit_locations=WHERE)[1].logits
    assert (wrong - right).abs().max() > 1e-2
    assert_equal_within(compat(base, unit_locations=WHERE)[1].logits, wrong, 5e-6, "logits")
    assert_equal_within(ours(base, unit_locations=WHERE)[1].logits, right, 5e-6, "logits")


@torch.no_grad()
def test_eval_does_not_reach_the_interventions() -> None:
    stock, ours, compat = three(dropout=0.5)
    base = inputs()
    steady = []
    for model in (stock, ours, compat):
        model.eval()
        one, other = (model(base, unit_locations=WHERE)[1].logits for _ in range(2))
        steady.append(torch.equal(one, other))
    assert steady == [False, True, False]


@pytest.mark.parametrize("where", [None, WHERE])
@torch.no_grad()
def test_generation_without_being_told(where: Any) -> None:
    """Stock edits every decoded token and none of the prompt, and cannot do that with positions of the prompt."""
    stock, ours, compat = three()
    base, options = inputs(), {"max_new_tokens": 6, "do_sample": False}
    if where is not None:
        with pytest.raises(RuntimeError, match="out of bounds"):
            stock.generate(base, unit_locations=where, **options)
        with pytest.raises(ValueError, match="unit_locations can only name position 0"):
            compat.generate(base, unit_locations=where, **options)
        expected = stock.generate(base, unit_locations=where, intervene_on_prompt=True, **options)[1]
        assert torch.equal(ours.generate(base, unit_locations=where, **options)[1], expected)
        return
    expected = stock.generate(base, **options)[1]
    assert torch.equal(compat.generate(base, **options)[1], expected)
    assert not torch.equal(expected, stock.model.generate(**base, **options))


def test_names_of_parameters() -> None:
    stock, _, compat = three("NoreftIntervention", add_bias=True)
    assert [name for name, _ in compat.named_parameters()] == sorted(
        (name for name, _ in stock.named_parameters()), key=[n for n, _ in compat.named_parameters()].index
    )
    assert all(isinstance(parameter, nn.Parameter) for _, parameter in compat.named_parameters())


def test_signatures() -> None:
    """Every parameter of pyreft's public callables has the same name here, in the same order where it has one."""
    import inspect

    for name in ("get_reft_model",):
        theirs, ours = (list(inspect.signature(getattr(m, name)).parameters) for m in (pyreft, reft_kernels))
        assert ours[: len(theirs)] == theirs
    for method in ("forward", "generate", "set_device", "count_parameters", "print_trainable_parameters"):
        theirs = list(inspect.signature(getattr(pyreft.ReftModel, method)).parameters)
        ours = list(inspect.signature(getattr(reft_kernels.ReftModel, method)).parameters)
        theirs = [parameter for parameter in theirs if parameter != "kwargs"]
        assert ours[: len(theirs)] == theirs, method
