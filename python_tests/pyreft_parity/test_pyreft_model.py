"""A model with our interventions against the same model run by stock pyreft: logits, generation, training.

A small random Llama; test_pyreft_smollm2.py does the same with a real one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peer import (
    CLASSES,
    WITH_PROJ,
    Models,
    assert_equal_within,
    build_models,
    leaves,
    prompt_columns,
    unit_locations,
    weights,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

PAD, VOCABULARY, LAYERS, RANK = 0, 96, 3, 4
POSITIONS = "f3+l3"

# Relative to the largest entry: two fp32 evaluations of one network, whose edits sum in different orders.
# Seen: 2e-6 for logits, 4e-6 for gradients, 7e-5 for the sum of three updates.
LOGITS = 5e-6
GRADIENTS = 2e-5
UPDATES = 5e-4

GREEDY = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture
def llama() -> Callable[[], LlamaForCausalLM]:
    """Makes copies of one small random Llama."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.3,  # logits far enough apart that no two tokens tie
    )
    model = LlamaForCausalLM(config).eval()
    return lambda: copy.deepcopy(model)


def models(
    llama: Any, name: str = "LoreftIntervention", *, tied: bool = True, moved: bool = True, **others: Any
) -> Models:
    if name in WITH_PROJ:
        others.setdefault("add_bias", True)
    return build_models(llama, name, range(LAYERS), RANK, positions=POSITIONS, tied=tied, moved=moved, **others)


def batch(lengths: list[int], side: str) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, S] of random prompts of these lengths."""
    width = max(lengths)
    ids = torch.randint(2, VOCABULARY, (len(lengths), width))
    column, length = torch.arange(width), torch.tensor(lengths)[:, None]
    mask = (column >= width - length if side == "left" else column < length).long()
    return {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}


def locations(lengths: list[int], side: str, both: Models, tied: bool) -> dict[str, Any]:
    """Stock's locations, shifted to where each prompt begins."""
    starts = [max(lengths) - n if side == "left" else 0 for n in lengths]
    count = len(both.pairs)
    return unit_locations(
        [prompt_columns(n, POSITIONS, count, tied, start) for n, start in zip(lengths, starts, strict=True)]
    )


def assert_same_logits(ours: Tensor, theirs: Tensor, mask: Tensor) -> None:
    attended = mask.bool()
    assert_equal_within(ours[attended], theirs[attended], LOGITS, "logits")


@torch.no_grad()
def assert_edited(both: Models, inputs: dict[str, Tensor], logits: Tensor) -> None:
    """The edits matter: the base model alone gives other logits."""
    difference = both.theirs.model(**inputs).logits - logits
    assert float(difference.abs().max()) > 0.01 * float(logits.abs().max())


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_with_given_locations(llama: Any, name: str, tied: bool, side: str) -> None:
    """pyreft's call, for prompts of different lengths that have every position."""
    both, lengths = models(llama, name, tied=tied), [9, 14, 10]
    inputs, where = batch(lengths, side), locations(lengths, side, both, tied)
    none, expected = both.theirs(inputs, unit_locations=where)
    our_none, actual = both.ours(inputs, unit_locations=where)
    assert none is None
    assert our_none is None
    assert_same_logits(actual.logits, expected.logits, inputs["attention_mask"])
    assert_edited(both, inputs, expected.logits)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_with_positions_from_the_mask(llama: Any, tied: bool, side: str) -> None:
    """Our call with no locations: the configuration's positions and the mask name the same tokens."""
    both, lengths = models(llama, tied=tied), [9, 14, 10]
    inputs, where = batch(lengths, side), locations(lengths, side, both, tied)
    expected = both.theirs(inputs, unit_locations=where)[1].logits
    assert_same_logits(both.ours(**inputs).logits, expected, inputs["attention_mask"])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.no_grad()
def test_short_prompts_and_the_sink(llama: Any, tied: bool) -> None:
    """Prompts too short for every position. pyreft's datasets put a masked token, the sink, in front of each
    row and send the edits that have no token there. Given these locations, and with such edits left out
    (our -1), the logits of all tokens are the same.
    """
    both, lengths = models(llama, tied=tied), [1, 2, 3, 5, 12]
    inputs = {key: torch.nn.functional.pad(value, (1, 0)) for key, value in batch(lengths, "right").items()}
    per_example = [prompt_columns(n, POSITIONS, len(both.pairs), tied, start=1) for n in lengths]
    # Stock makes the rows of a one-token prompt wider than the others'; they hold nothing but the sink.
    width = len(per_example[-1][0])
    where = unit_locations([[row[:width] for row in rows] for rows in per_example])
    expected = both.theirs(inputs, unit_locations=where)[1].logits
    given = both.ours(inputs, unit_locations=where)[1].logits
    assert_same_logits(given, expected, inputs["attention_mask"])
    assert_same_logits(both.ours(**inputs).logits, expected, inputs["attention_mask"])


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_logits_with_every_token_edited(llama: Any, name: str) -> None:
    both, inputs = models(llama, name), batch([9, 14, 10], "right")
    expected = both.theirs(inputs, unit_locations=None)[1].logits
    actual = both.ours(inputs, unit_locations={"sources->base": (None, None)})[1].logits
    assert_equal_within(actual, expected, LOGITS, "logits")


@torch.no_grad()
def test_the_original_output_comes_along(llama: Any) -> None:
    both, lengths = models(llama), [8, 12]
    inputs, where = batch(lengths, "right"), locations(lengths, "right", both, True)
    plain, edited = both.theirs(inputs, unit_locations=where, output_original_output=True)
    our_plain, our_edited = both.ours(inputs, unit_locations=where, output_original_output=True)
    assert torch.equal(our_plain.logits, plain.logits)
    assert_same_logits(our_edited.logits, edited.logits, inputs["attention_mask"])


def assert_same_generation(ours: Any, theirs: Any) -> None:
    """Token for token, and the logits of every step."""
    expected = torch.stack(theirs.logits)
    best = expected.topk(2).values
    margin = float((best[..., 0] - best[..., 1]).min())
    assert margin > 2 * LOGITS * float(expected.abs().max()), "a tie: the tokens are not comparable"
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_equal_within(torch.stack(ours.logits), expected, LOGITS, "logits of the generated tokens")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("call", ["given", "from the mask"])
def test_batched_generation(llama: Any, tied: bool, call: str) -> None:
    """Left-padded prompts, edited once at prefill, greedy.

    Stock is right when it is given the locations of each row, moved by that row's padding. (pyreft's own
    evaluation loop looks for a BOS token to find the padding, which is wrong where there is none.) The short
    row sends its missing positions to the masked column in front of the prompt.
    """
    both, lengths = models(llama, tied=tied), [4, 13, 9]
    inputs, where = batch(lengths, "left"), locations(lengths, "left", both, tied)
    theirs = both.theirs.generate(inputs, unit_locations=where, intervene_on_prompt=True, **GREEDY)[1]
    if call == "given":
        none, ours = both.ours.generate(inputs, unit_locations=where, intervene_on_prompt=True, **GREEDY)
        assert none is None
    else:
        ours = both.ours.generate(**inputs, **GREEDY)
    assert_same_generation(ours, theirs)
    plain = both.theirs.model.generate(**inputs, **GREEDY)
    assert not torch.equal(plain.sequences, theirs.sequences)


def test_generation_with_every_token_edited(llama: Any) -> None:
    """unit_locations=None with intervene_on_prompt=True: the whole prompt and every decoded token."""
    both, inputs = models(llama), batch([11, 11], "left")
    theirs = both.theirs.generate(inputs, unit_locations=None, intervene_on_prompt=True, **GREEDY)[1]
    everywhere = {"sources->base": (None, None)}
    ours = both.ours.generate(inputs, unit_locations=everywhere, intervene_on_prompt=True, **GREEDY)[1]
    assert_same_generation(ours, theirs)


def test_generation_with_beams(llama: Any) -> None:
    """Stock is given the locations once for every beam; ours finds them."""
    both, lengths, beams = models(llama), [7, 13], 3
    inputs, where = batch(lengths, "left"), locations(lengths, "left", both, True)
    per_row = where["sources->base"][1]
    where = {"sources->base": (None, [[row for row in rows for _ in range(beams)] for rows in per_row])}
    options = {"num_beams": beams, "max_new_tokens": 6, "do_sample": False}
    theirs = both.theirs.generate(inputs, unit_locations=where, intervene_on_prompt=True, **options)[1]
    assert torch.equal(both.ours.generate(**inputs, **options), theirs)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", CLASSES)
def test_training(llama: Any, name: str, tied: bool) -> None:
    """Losses, gradients and weights of three SGD steps (test_sgd_moves_the_rotation_alike says why SGD)."""
    both, lengths, answer = models(llama, name, tied=tied, moved=False), [6, 9, 7], 4
    inputs, where = batch([n + answer for n in lengths], "right"), locations(lengths, "right", both, tied)
    prompt = torch.arange(max(lengths) + answer) < torch.tensor(lengths)[:, None]
    labels = inputs["input_ids"].masked_fill(prompt | ~inputs["attention_mask"].bool(), -100)
    start = [[weights(side) for side in sides] for sides in both.pairs]
    optimizers = [
        torch.optim.SGD([p for module in side for p in module.parameters() if p.requires_grad], lr=0.2)
        for side in zip(*both.pairs, strict=True)
    ]
    for step in range(3):
        losses = [
            both.theirs(inputs, unit_locations=where, labels=labels)[1].loss,
            both.ours(**inputs, labels=labels).loss,
        ]
        assert_equal_within(losses[1].detach(), losses[0].detach(), GRADIENTS, f"loss of step {step}")
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        if step == 0:
            for index, (theirs, ours) in enumerate(both.pairs):
                our_leaves = leaves(ours)
                for key, leaf in leaves(theirs).items():
                    what = f"gradient of {key} in intervention {index}"
                    assert_equal_within(our_leaves[key].grad, leaf.grad, GRADIENTS, what)
        for optimizer in optimizers:
            optimizer.step()
    for index, sides in enumerate(both.pairs):
        expected, actual = (weights(side) for side in sides)
        for key, before in start[index][0].items():
            # The prefix of the last layer reaches no loss: its weights stay what they were, on both sides.
            update, our_update = expected[key] - before, actual[key] - start[index][1][key]
            assert_equal_within(our_update, update, UPDATES, f"update of {key} in intervention {index}")
    assert all(p.grad is None for side in (both.theirs, both.ours) for p in side.model.parameters())


def test_trainable_parameters_are_counted_alike(llama: Any, capsys: pytest.CaptureFixture[str]) -> None:
    both = models(llama, tied=False)
    assert both.ours.count_parameters() == both.theirs.count_parameters()
    capsys.readouterr()
    both.theirs.print_trainable_parameters()
    expected = capsys.readouterr().out
    both.ours.print_trainable_parameters()
    assert capsys.readouterr().out.splitlines()[0] == expected.splitlines()[0]
