"""Batches of few shapes and of several examples a row: the loss and the gradients of the plainly padded batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import DECODERS, tiny_model
from torch.nn.functional import cross_entropy
from training_support import make_llama, make_tokenizer, rows
from transformers import TrainingArguments

from reft_kernels import LoreftIntervention, ReftConfig, get_reft_model
from reft_kernels.training import ReftTrainerForCausalLM, make_supervised_data_module
from reft_kernels.training.buckets import Buckets
from reft_kernels.training.data import SupervisedCollator
from reft_kernels.training.item_layout import ItemLayout
from reft_kernels.training.packing import PackedCollator, check_packing, pack
from reft_kernels.training.target_columns import COLUMNS, TargetColumns


def items(positions: list[str | None], lengths: tuple[tuple[int, int], ...]) -> list[dict[str, torch.Tensor]]:
    """Items of random tokens; a length is (prompt, output)."""
    layout = ItemLayout(positions)
    return [layout.item(torch.randint(3, 50, (prompt + output,)), prompt) for prompt, output in lengths]


LENGTHS = ((5, 3), (1, 4), (9, 1), (3, 3), (6, 5), (2, 2))


def edited(architecture: str, positions: str, *, tied: bool = True, **changes: Any) -> Any:
    model = tiny_model(architecture, **changes).double()
    torch.manual_seed(1)
    config = ReftConfig(method="loreft", layers="all", rank=2, positions=positions, tied=tied)
    reft_model = get_reft_model(model, config).double()
    for parameter in reft_model.interventions.parameters():
        torch.nn.init.normal_(parameter)
    return reft_model


def loss_and_gradients(reft_model: Any, *batches: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Mean over all labelled tokens of the batches, in float64 (the models' own loss is in float32)."""
    losses, count = [], 0
    for batch in batches:
        labels = batch["labels"][:, 1:]
        logits = reft_model(**{name: batch[name] for name in batch if name != "labels"}, use_cache=False).logits
        losses.append(cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    loss = sum(losses) / count
    parameters = [p for p in reft_model.parameters() if p.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, parameters))


def assert_same(reft_model: Any, batches: list[dict[str, torch.Tensor]], other: dict[str, torch.Tensor]) -> None:
    # Gemma 2 has no other attention than the eager one, whose softmax is in float32.
    exact = reft_model.model.config.model_type != "gemma2"
    loss, gradients = loss_and_gradients(reft_model, *batches)
    same_loss, same_gradients = loss_and_gradients(reft_model, other)
    torch.testing.assert_close(same_loss, loss, rtol=1e-10 if exact else 1e-7, atol=0)
    # What is edited at the start of a prompt by the last layer reaches no target.
    assert sum(bool(gradient.abs().max() > 0) for gradient in gradients) >= len(gradients) // 2
    for gradient, same in zip(gradients, same_gradients, strict=True):
        tolerance = 1e-9 if exact else 1e-5
        torch.testing.assert_close(same, gradient, rtol=tolerance, atol=tolerance * float(gradient.abs().max()))


@pytest.mark.parametrize(("positions", "tied"), [("f2+l2", True), ("f2+l1", False), ("l3", True), ("all", True)])
@pytest.mark.parametrize("architecture", DECODERS)
def test_packed_examples_have_the_loss_and_gradients_of_padded_ones(
    architecture: str, positions: str, tied: bool
) -> None:
    reft_model = edited(architecture, positions, tied=tied)
    torch.manual_seed(2)
    features = items([item.positions for item in reft_model.representations], LENGTHS)
    padded = SupervisedCollator()(features)
    for row_length in (None, 11, 16):
        assert_same(reft_model, [padded], PackedCollator(row_length=row_length, pad_to=4)(features))


def test_no_example_predicts_the_first_token_of_the_next() -> None:
    reft_model = edited("llama", "all")
    torch.manual_seed(2)
    features = [{**item, "labels": item["input_ids"]} for item in items(["all"] * 3, LENGTHS)]
    assert_same(reft_model, [SupervisedCollator()(features)], PackedCollator(row_length=12)(features))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_windows_of_attention_stay_within_an_example(attention: str) -> None:
    reft_model = edited("mistral", "f1+l1", attn_implementation=attention, sliding_window=3)
    torch.manual_seed(2)
    features = items(["f1+l1"] * 3, LENGTHS)
    single = [SupervisedCollator()([feature]) for feature in features]
    assert_same(reft_model, single, PackedCollator(row_length=12)(features))


def test_the_comparison_sees_examples_that_attend_to_their_neighbours() -> None:
    reft_model = edited("llama", "f1+l1")
    torch.manual_seed(2)
    features = items(["f1+l1"] * 3, LENGTHS)
    packed = PackedCollator()(features)
    packed["position_ids"] = torch.arange(packed["input_ids"].shape[1])[None]
    with pytest.raises(AssertionError):
        assert_same(reft_model, [SupervisedCollator()(features)], packed)


def test_what_a_packed_batch_holds() -> None:
    layout = ItemLayout(["f1+l1", "f1+l1"])
    features = [layout.item(torch.arange(10 * n, 10 * n + n), n - 2) for n in (3, 5, 4)]
    batch = PackedCollator(pad_token_id=9, row_length=7, num_positions=6, pad_to=8)(features)
    assert batch["input_ids"].tolist() == [[50, 51, 52, 53, 54, 9, 9, 9], [40, 41, 42, 43, 30, 31, 32, 9]]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, 53, 54, -100, -100, -100],
        [-100, -100, 42, 43, -100, 31, 32, -100],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 0, 0], [0, 1, 2, 3, 0, 1, 2, 0]]
    # A prompt of one token is too short for an end of its own (n // 2 is 0).
    assert batch["intervention_locations"].tolist() == [[[0, 2, -1, -1, -1, -1]] * 2, [[0, 1, -1, -1, -1, -1]] * 2]
    assert "attention_mask" not in batch


def test_rows_are_filled() -> None:
    lengths = [5, 9, 2, 7, 3, 3, 1]
    rows_made = pack(lengths, 10)
    assert sorted(itertools.chain(*rows_made)) == list(range(7))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows_made)
    assert len(rows_made) == 3
    assert pack(lengths, None) == [list(range(7))]
    with pytest.raises(ValueError, match="an item of 9 tokens does not fit into row_length=8"):
        pack(lengths, 8)


def test_items_that_cannot_be_packed() -> None:
    (item,) = items(["f1"], ((2, 2),))
    with pytest.raises(ValueError, match="subspaces cannot be packed"):
        PackedCollator()([item, {**item, "subspaces": torch.zeros(1, 2)}])
    with pytest.raises(ValueError, match="attention_mask that hides tokens"):
        PackedCollator()([{**item, "attention_mask": torch.tensor([1, 1, 1, 0])}])
    with pytest.raises(ValueError, match="1 of 2 items"):
        PackedCollator()([item, {name: item[name] for name in ("input_ids", "labels")}])
    with pytest.raises(ValueError, match="num_positions=1: a batch has 2 positions"):
        PackedCollator(num_positions=1)([item, item])
    with pytest.raises(ValueError, match="row_length must be at least 2"):
        PackedCollator(row_length=1)


@pytest.mark.parametrize("architecture", DECODERS)
def test_models_that_keep_examples_apart_pass(architecture: str) -> None:
    model = edited(architecture, "f1+l1").train()
    check_packing(model)
    assert model.model.training


def test_models_that_do_not_are_refused() -> None:
    sizes = {
        "vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0,
        "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    config = ReftConfig(method="loreft", layers=[0], rank=2, positions="f1+l1")
    opt = get_reft_model(transformers.OPTForCausalLM(transformers.OPTConfig(**sizes)), config)
    with pytest.raises(ValueError, match=r"OPTForCausalLM with attn_implementation=.* does not keep the examples"):
        check_packing(opt)
    bloom = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)
    with pytest.raises(ValueError, match="BloomForCausalLM takes no position_ids"):
        check_packing(get_reft_model(transformers.BloomForCausalLM(bloom), config))
    with pytest.raises(ValueError, match="BertForSequenceClassification is no causal language model"):
        check_packing(get_reft_model(tiny_model("bert"), config))
    listed = [
        {"layer": layer, "component": "block_output", "low_rank_dimension": 2, "positions": positions,
         "intervention": LoreftIntervention(16, 2)} for layer, positions in ((0, "f1"), (1, None))
    ]  # fmt: skip
    with pytest.raises(ValueError, match="some interventions edit all positions and some do not"):
        check_packing(get_reft_model(tiny_model("llama"), ReftConfig(listed)))


def test_buckets() -> None:
    assert [Buckets(8).next(n) for n in (0, 1, 8, 9, 17)] == [8, 8, 8, 16, 24]
    assert [Buckets([32, 8, 16]).next(n) for n in (1, 8, 9, 32)] == [8, 8, 16, 32]
    with pytest.raises(ValueError, match="a batch of length 33 is longer than the longest length, 32"):
        Buckets([8, 32]).next(33)
    for sizes in (0, [], [0, 4]):
        with pytest.raises(ValueError, match="pad_to must be"):
            Buckets(sizes)


def test_batches_have_few_shapes_and_the_same_loss() -> None:
    reft_model = edited("llama", "f2+l2")
    torch.manual_seed(4)
    made = items(["f2+l2"] * 3, tuple((p, o) for p in range(1, 10) for o in range(1, 5)))
    plain, static = SupervisedCollator(), SupervisedCollator(pad_to=[8, 16], num_positions=6)
    shapes = set()
    for start in range(0, len(made), 6):
        features = made[start : start + 6]
        one, other = plain(features), static(features)
        shapes.add((tuple(other["input_ids"].shape), tuple(other["intervention_locations"].shape)))
        assert_same(reft_model, [one], other)
    assert shapes == {((6, 8), (6, 3, 6)), ((6, 16), (6, 3, 6))}
    with pytest.raises(ValueError, match="num_positions=3: a batch has 4 positions"):
        SupervisedCollator(num_positions=3)(made[:2])


def test_target_columns_have_few_numbers_and_cover_every_label() -> None:
    torch.manual_seed(5)
    columns = TargetColumns(SupervisedCollator(pad_to=8))
    numbers = set()
    for prompt, output in itertools.product(range(1, 9), range(1, 9)):
        batch = columns(items(["f1"], ((prompt, output), (prompt, 1))))
        chosen, shifted = batch[COLUMNS].tolist(), batch["labels"][:, 1:]
        numbers.add(len(chosen))
        assert chosen == sorted(set(chosen))
        wanted = (shifted != -100).any(0).nonzero()[:, 0].tolist()
        assert set(wanted) <= set(chosen)
        assert max(chosen) < shifted.shape[1]
    assert numbers <= {7, 8, 15, 16}


@pytest.mark.parametrize("packed", [False, True])
def test_a_trained_adapter_is_the_same(tmp_path: Path, packed: bool) -> None:
    weights = []
    for collator in (None, PackedCollator(row_length=48, pad_to=16) if packed else SupervisedCollator(0, 16, 14)):
        torch.manual_seed(6)
        reft_model = get_reft_model(
            make_llama().double(), ReftConfig(method="loreft", layers="all", rank=2, positions="f2+l2")
        ).double()
        made = rows(24)
        data = make_supervised_data_module(
            make_tokenizer(), reft_model, [row["instruction"] for row in made], [row["output"] for row in made]
        )
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=3, gradient_accumulation_steps=2, report_to="none",
            use_cpu=True, disable_tqdm=True, learning_rate=0.02, save_strategy="no", logging_steps=1,
        )  # fmt: skip
        trainer = ReftTrainerForCausalLM(
            reft_model,
            arguments,
            data_collator=collator or data.pop("data_collator"),
            train_dataset=data["train_dataset"],
        )
        trainer.train()
        losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append([losses, *(p.detach().clone() for p in reft_model.interventions.parameters())])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-6)


def test_the_trainer_refuses_models_that_cannot_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reft_kernels.training.packing._try", lambda *_: torch.tensor(False))
    model = get_reft_model(make_llama(), ReftConfig(method="loreft", layers=[0], rank=2, positions="f1+l1"))
    with pytest.raises(ValueError, match="does not keep the examples of a row apart"):
        ReftTrainerForCausalLM(
            model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True), data_collator=PackedCollator()
        )


@pytest.mark.slow
@torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64)  # monkeypatch would delete the entries
def test_few_shapes_are_few_graphs(tmp_path: Path) -> None:
    made = [{**row, "output": row["output"] + " box" * (k * 3 % 13)} for k, row in enumerate(rows(64))]
    found = []
    for pad_to in (None, 16):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = get_reft_model(make_llama(), ReftConfig(method="loreft", layers="all", rank=2, positions="f2+l2"))
        data = make_supervised_data_module(
            make_tokenizer(), model, [row["instruction"] for row in made], [row["output"] for row in made]
        )
        graphs: list[Any] = []
        model.model.forward = torch.compile(
            model.model.forward, backend=lambda graph, _, graphs=graphs: graphs.append(graph) or graph
        )
        arguments = TrainingArguments(
            str(tmp_path), max_steps=12, per_device_train_batch_size=4, logging_steps=4, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = ReftTrainerForCausalLM(
            model, arguments, SupervisedCollator(0, pad_to), train_dataset=data["train_dataset"]
        )
        trainer.train()
        found.append((len(graphs), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    (many, losses), (few, same) = found
    assert few <= 4 < 8 <= many
    assert same == pytest.approx(losses, rel=1e-5)
