"""Fifty optimiser steps and the generation after them, beside stock pyreft from the same parametrisation of R.

In float64, so that two programs which differ by rounding stay together for fifty steps of Adam.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peer import CLASSES, WITH_PROJ, Models, build_models, prompt_columns, unit_locations, weights
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from reft_kernels import patch_pyreft, unpatch_pyreft
from reft_kernels.orthonormal_reference import orthonormalize

PAD, VOCABULARY, LAYERS, WIDTH, RANK = 0, 96, 2, 32, 4
POSITIONS = "f3+l3"
LENGTHS, ANSWER, STEPS = [6, 9, 7], 4, 50

# Seen: equal losses (which transformers computes in float32), and weights within 1.4e-15.
LOSS, WEIGHT = 2e-7, 1e-12


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, pad_token_id=PAD, bos_token_id=1,
        eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(5)
    return LlamaForCausalLM(config).double().eval()


@torch.no_grad()
def share_base(theirs: nn.Module, ours: nn.Module) -> None:
    """Both start from X = -I over one base, which torch keeps as a d x d matrix and we as r reflectors."""
    for module in (theirs, ours):
        module.double()
    if not hasattr(theirs, "rotate_layer"):
        return
    rows = ours.rotate_layer.rows
    d, r = rows.X.shape
    parametrization = theirs.rotate_layer.parametrizations.weight
    signs = torch.cat([rows.signs, rows.signs.new_ones(d - r)])
    base = orthonormalize(-torch.eye(d, dtype=torch.float64), rows.reflectors, signs).T  # all d columns
    parametrization[0].base.copy_(base)
    parametrization.original.copy_(-torch.eye(d, r, dtype=torch.float64))
    rows.X.copy_(-torch.eye(d, r, dtype=torch.float64))


def prepared(name: str, tied: bool) -> tuple[Models, dict[str, Any], dict[str, Tensor], Tensor]:
    others: dict[str, Any] = {"add_bias": True} if name in WITH_PROJ else {}
    torch.manual_seed(11)
    both = build_models(llama, name, range(LAYERS), RANK, positions=POSITIONS, tied=tied, moved=False, **others)
    for theirs, ours in both.pairs:
        share_base(theirs, ours)
        for key, value in weights(theirs).items():
            assert torch.allclose(weights(ours)[key], value, atol=1e-6)
    width = max(LENGTHS) + ANSWER
    ids = torch.randint(2, VOCABULARY, (len(LENGTHS), width))
    column, length = torch.arange(width), torch.tensor(LENGTHS)[:, None]
    mask = (column < length + ANSWER).long()
    inputs = {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}
    labels = inputs["input_ids"].masked_fill((column < length) | ~mask.bool(), -100)
    count = len(both.pairs)
    where = unit_locations([prompt_columns(n, POSITIONS, count, tied, 0) for n in LENGTHS])
    return both, inputs, where, labels


def train(model: Any, inputs: dict[str, Tensor], where: Any, labels: Tensor) -> list[float]:
    trained = [p for module in model.interventions.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(inputs, unit_locations=where, labels=labels)[1].loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_training(both: Models, theirs: list[float], ours: list[float]) -> None:
    assert theirs[-1] < theirs[0] - 0.05
    for step, (expected, actual) in enumerate(zip(theirs, ours, strict=True)):
        assert abs(actual - expected) <= LOSS * abs(expected), f"loss of step {step}: {actual}, stock {expected}"
    for index, (stock, mine) in enumerate(both.pairs):
        for key, expected in weights(stock).items():
            difference = float((weights(mine)[key] - expected).abs().max())
            assert difference <= WEIGHT, f"{key} of intervention {index} differs by {difference:.2e}"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", CLASSES)
def test_fifty_steps_of_adamw(name: str, tied: bool) -> None:
    both, inputs, where, labels = prepared(name, tied)
    theirs = train(both.theirs, inputs, where, labels)
    assert_same_training(both, theirs, train(both.ours, inputs, where, labels))
    prompts = {"input_ids": torch.randint(2, VOCABULARY, (3, 8))}
    located = unit_locations([prompt_columns(8, POSITIONS, len(both.pairs), tied, 0)] * 3)
    options = {"max_new_tokens": 8, "do_sample": False, "intervene_on_prompt": True}
    expected = both.theirs.generate(prompts, unit_locations=located, **options)[1]
    assert torch.equal(both.ours.generate(prompts, unit_locations=located, **options)[1], expected)


@pytest.mark.parametrize("name", CLASSES)
def test_fifty_steps_of_a_patched_pyreft(name: str) -> None:
    both, inputs, where, labels = prepared(name, tied=True)
    patched = copy.deepcopy(both.theirs)
    theirs = train(both.theirs, inputs, where, labels)
    patch_pyreft()
    try:
        found = train(patched, inputs, where, labels)
    finally:
        unpatch_pyreft()
    assert_same_training(Models(both.theirs, patched), theirs, found)
