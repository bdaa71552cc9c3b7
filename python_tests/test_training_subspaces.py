"""Composition: each row trains its own dimensions of a subspace, and leaves the others as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_support import make_llama, make_tokenizer, rows
from transformers import TrainingArguments

from reft_kernels import (
    LoreftIntervention,
    ReftConfig,
    ReftModel,
    ReftTrainerForCausalLM,
    get_reft_model,
    make_supervised_data_module,
)
from reft_kernels.training.data import SupervisedDataset, build_prompt, read_jsonl

FIRST, SECOND = (0, 1), (2, 3)
LAYERS = (0, 1)


class SubloreftIntervention(LoreftIntervention):
    """LoReFT by those dimensions of its subspace that each example names, as in pyreft's notebook compreft."""

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        difference = self.learned_source(base) - self.rotate_layer(base)
        chosen = torch.stack([difference[k, :, dimensions] for k, dimensions in enumerate(subspaces)])
        back = torch.stack([self.rotate_layer.weight[:, dimensions].T for dimensions in subspaces])
        return base + torch.bmm(chosen, back)


def model_of(orthogonality: str = "none") -> ReftModel:
    torch.manual_seed(0)
    options = {"embed_dim": 32, "low_rank_dimension": 4, "dtype": torch.float32, "orthogonality": orthogonality}
    entries = [
        {"layer": layer, "component": "block_output", "intervention": SubloreftIntervention(**options)}
        for layer in LAYERS
    ]
    for entry in entries:
        entry["positions"] = "l1"
    return get_reft_model(make_llama(), ReftConfig(representations=entries))


def data_of(model: ReftModel, subspaces: Any, **options: Any) -> dict[str, Any]:
    given = rows(len(subspaces))
    prompts = [build_prompt(row["instruction"]) for row in given]
    outputs = [row["output"] for row in given]
    return make_supervised_data_module(make_tokenizer(), model, prompts, outputs, subspaces=subspaces, **options)


def state(model: ReftModel) -> list[tuple[Tensor, Tensor, Tensor]]:
    """W [r, d], b [r] and R [d, r] of every intervention."""
    return [
        (module.learned_source.weight.detach().clone(), module.learned_source.bias.detach().clone(), R.detach().clone())
        for module in model.interventions.values()
        for R in (module.rotate_layer.weight,)
    ]


def test_items_and_batches() -> None:
    model = model_of()
    module = data_of(model, [FIRST, SECOND, FIRST])
    assert [item["subspaces"].tolist() for item in module["train_dataset"]] == [
        [list(chosen)] * 2 for chosen in (FIRST, SECOND, FIRST)
    ]
    batch = module["data_collator"]([module["train_dataset"][k] for k in (1, 2)])
    assert batch["subspaces"].tolist() == [[[2, 3]] * 2, [[0, 1]] * 2]
    assert "subspaces" not in SupervisedDataset(make_tokenizer(), model, ["a"], ["b"])[0]


def test_an_example_left_out_takes_its_subspaces_along() -> None:
    model = model_of()
    with pytest.warns(UserWarning, match="1 of 3 examples left out"):
        data = SupervisedDataset(
            make_tokenizer(), model, ["a", "b " * 40, "c"], ["red"] * 3, max_length=20, subspaces=[[0], [1], [2]]
        )
    assert [item["subspaces"].tolist() for item in data] == [[[0]] * 2, [[2]] * 2]


@pytest.mark.parametrize("trained", [FIRST, SECOND])
def test_the_other_subspace_gets_no_gradient(trained: tuple[int, ...], tmp_path: Path) -> None:
    """Of W, b and R, whose columns are parameters of their own here; and a step of training leaves it where it was."""
    model = model_of()
    module = data_of(model, [trained] * 4)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = ReftTrainerForCausalLM(model, args, **module)
    batch = module["data_collator"]([module["train_dataset"][k] for k in range(4)])
    trainer.compute_loss(model.train(), batch).backward()
    other = [k for k in range(4) if k not in trained]
    for intervention in model.interventions.values():
        gradients = [parameter.grad for parameter in intervention.parameters()]
        assert len(gradients) == 3
        for gradient in gradients:
            assert gradient is not None
            columns = gradient.T if gradient.shape == (32, 4) else gradient
            assert columns.shape[0] == 4
            assert not columns[other].any()
            assert columns[list(trained)].any()
    model.zero_grad()

    before = state(model)
    trainer.train()
    for old, new in zip(before, state(model), strict=True):
        for was, now in zip(old, new, strict=True):
            was, now = (value.T if value.shape == (32, 4) else value for value in (was, now))
            assert torch.equal(was[other], now[other])
            assert not torch.equal(was[list(trained)], now[list(trained)])


def test_rows_of_one_batch_train_their_own() -> None:
    """The gradient of a mixed batch is that of its parts, each in its own dimensions of W."""
    model = model_of("householder")
    mixed = data_of(model, [FIRST, SECOND])
    items = [mixed["train_dataset"][k] for k in range(2)]

    def gradient(chosen: list[dict[str, Tensor]]) -> Tensor:
        model.zero_grad()
        batch = mixed["data_collator"](chosen)
        batch["subspaces"] = list(batch["subspaces"].unbind(1))
        output = model(**batch)
        (output.loss * (batch["labels"] != -100).sum()).backward()
        return next(iter(model.interventions.values())).learned_source.weight.grad.clone()

    together, one, other = gradient(items), gradient(items[:1]), gradient(items[1:])
    torch.testing.assert_close(together[:2], one[:2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together[2:], other[2:], rtol=1e-3, atol=1e-4)
    assert not one[2:].any()
    assert not other[:2].any()


def test_rows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    given = [{"instruction": "a", "output": "b", "subspaces": [0, 3]}, {"instruction": "a", "output": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    assert [row.subspaces for row in read_jsonl(path)] == [(0, 3), None]
    for bad in ("0", [], [0.5], [True], 3):
        path.write_text(json.dumps({**given[0], "subspaces": bad}))
        with pytest.raises(ValueError, match=r"rows.jsonl, line 1: field 'subspaces' must be a list of ints, got "):
            read_jsonl(path)


@pytest.mark.parametrize(
    ("subspaces", "message"),
    [
        ([[0]], "expected subspaces for each of 2 prompts, got 1"),
        ([[0], [1, 2]], r"example 1: subspaces must be different dimensions, as many as the first example's 1, got \["),
        ([[], []], r"example 0: subspaces must be different dimensions"),
        ([[0, 1], [2, 2]], r"example 1: subspaces must be different dimensions.*got \[2, 2\]"),
        ([[0], [4]], r"example 1: subspaces must be from 0 to r - 1 with the rank r = 4, got \[4\]"),
        ([[0], [-1]], r"example 1: subspaces must be from 0 to r - 1.*got \[-1\]"),
    ],
)
def test_bad_subspaces_are_named(subspaces: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SupervisedDataset(make_tokenizer(), model_of(), ["a", "b"], ["c", "d"], subspaces=subspaces)
