"""GLUE: the tasks, texts with labels and positions, and training with the best epoch by its metric."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from training_support import COLOURS, make_encoder_tokenizer, make_tokenizer
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

from reft_kernels import ReftConfig, ReftModel, ReftTrainerForSequenceClassification, get_reft_model
from reft_kernels.training.glue import GLUE_TASKS, GlueDataset, GlueTask, glue_collator, glue_task, train_head
from reft_kernels.training.metrics import METRICS
from reft_kernels.training.splits import glue_split, take


def single(count: int) -> list[dict[str, Any]]:
    """Sentences about two colours, labelled with which it is."""
    return [
        {"sentence": f"the {COLOURS[k % 2]} box{' please' * (k % 4)}{' now' * (k % 3)}", "label": k % 2}
        for k in range(count)
    ]


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {
            "sentence1": f"the {COLOURS[k % 6]} box",
            "sentence2": f"which colour is the {COLOURS[k % 6]} box{' please' * (k % 5)} ?",
            "label": float(k % 6),
        }
        for k in range(count)
    ]


def model_of(positions: str = "f3", tied: bool = True, num_labels: int = 2, **options: Any) -> ReftModel:
    base = tiny_model(
        "roberta",
        vocab_size=320,
        max_position_embeddings=130,
        pad_token_id=2,
        num_labels=num_labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )
    set_seed(2)
    return get_reft_model(base, ReftConfig(method="loreft", layers="all", rank=1, positions=positions, tied=tied))


# The tasks


def test_the_tasks() -> None:
    found = {name: (task.num_labels, task.best_metric, len(task.fields)) for name, task in GLUE_TASKS.items()}
    assert found == {
        "cola": (2, "matthews_correlation", 1),
        "mnli": (3, "accuracy", 2),
        "mrpc": (2, "accuracy", 2),
        "qnli": (2, "accuracy", 2),
        "qqp": (2, "accuracy", 2),
        "rte": (2, "accuracy", 2),
        "sst2": (2, "accuracy", 1),
        "stsb": (1, "pearson", 2),
        "wnli": (2, "accuracy", 2),
    }
    for task in GLUE_TASKS.values():
        assert task.best_metric in task.metrics
        assert set(task.metrics) <= set(METRICS)
        assert (task.problem_type == "regression") == (task.name == "stsb")
    assert glue_task("rte").labels == ("entailment", "not_entailment")
    with pytest.raises(ValueError, match=r"task must be one of cola, .*, got 'snli'"):
        glue_task("snli")


# The data set


@pytest.mark.parametrize(("positions", "tied"), [("f1", True), ("f3", True), ("f2+l3", True), ("f2+l3", False)])
def test_positions_are_those_of_the_mask(positions: str, tied: bool) -> None:
    """What the data set names is what the model itself finds in the mask, whatever the length of the text."""
    model = model_of(positions, tied)
    given = [{"sentence": "a"}, {"sentence": "the red box please"}, {"sentence": "r e"}]
    tokenizer = make_encoder_tokenizer()
    data = GlueDataset(tokenizer, model, given, "sst2", labelled=False)
    batch = glue_collator(tokenizer)([data[k] for k in range(3)])
    locations = batch.pop("intervention_locations")
    assert locations.shape[:2] == (3, len(model.representations))
    assert (locations < batch["attention_mask"].sum(1)[:, None, None]).all()
    assert locations.amax() >= 0
    with torch.no_grad():
        named = model.eval()(**batch, intervention_locations=locations).logits
        assert torch.equal(named, model(**batch).logits)
        assert not torch.equal(named, model.model(**batch).logits)


def test_few_lengths() -> None:
    """Columns that are padded further change no logits."""
    model = model_of("f2+l3")
    tokenizer = make_encoder_tokenizer()
    data = GlueDataset(tokenizer, model, single(5), "sst2")
    items = [data[k] for k in range(5)]
    plain = glue_collator(tokenizer)(items)
    longest = plain["input_ids"].shape[1]
    for pad_to, width in ((16, -(-longest // 16) * 16), ((4, longest + 3, 60), longest + 3)):
        batch = glue_collator(tokenizer, pad_to)(items)
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, width)
        assert batch["labels"].equal(plain["labels"])
        names = ("input_ids", "attention_mask", "intervention_locations")
        with torch.no_grad():
            logits = [model.eval()(**{name: one[name] for name in names}).logits for one in (plain, batch)]
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=f"a batch of length {longest} is longer than the longest length, 3"):
        glue_collator(tokenizer, [3])(items)


def test_single_sentences() -> None:
    tokenizer = make_encoder_tokenizer()
    data = GlueDataset(tokenizer, model_of("f3"), single(5), "sst2")
    assert len(data) == 5
    for item, row in zip(data, single(5), strict=True):
        assert item["input_ids"].tolist() == tokenizer(row["sentence"])["input_ids"]
        assert item["labels"] == row["label"]
        assert item["intervention_locations"].tolist() == [[0, 1, 2]] * 3
        assert set(item) == {"input_ids", "labels", "intervention_locations"}
    assert data.lengths == [len(item["input_ids"]) for item in data]


def test_pairs_with_segments() -> None:
    tokenizer = make_encoder_tokenizer(segments=True)
    data = GlueDataset(tokenizer, model_of("f1", num_labels=1), pairs(4), "stsb")
    batch = glue_collator(tokenizer)([data[k] for k in range(4)])
    for item, row in zip(data, pairs(4), strict=True):
        wanted = tokenizer(row["sentence1"], row["sentence2"])
        assert item["input_ids"].tolist() == wanted["input_ids"]
        assert item["token_type_ids"].tolist() == wanted["token_type_ids"]
    assert batch["token_type_ids"].amax() == 1
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("fields", [("premise", "hypothesis"), ("sentence1", "sentence2")])
def test_names_of_fields_and_of_classes(fields: tuple[str, str]) -> None:
    given = [{**dict(zip(fields, ("a", "b"), strict=True)), "label": name} for name in ("contradiction", "entailment")]
    data = GlueDataset(make_encoder_tokenizer(), model_of("f1", num_labels=3), given, "mnli")
    assert [item["labels"] for item in data] == [2, 0]


@pytest.mark.parametrize("positions", ["f3", "f2+l2"])
def test_a_long_text_is_cut_and_its_positions_are_not(positions: str) -> None:
    tokenizer = make_encoder_tokenizer()
    long = "the red box please " * 20
    given = [{"sentence1": long, "sentence2": "red", "label": 0}, {"sentence1": "red", "sentence2": long, "label": 1}]
    data = GlueDataset(tokenizer, model_of(positions), given, "rte", max_length=12)
    short = tokenizer("red")["input_ids"][1:-1]
    for item, first in zip(data, (False, True), strict=True):
        ids = item["input_ids"].tolist()
        assert len(ids) == 12
        assert ids[0] == 0
        assert ids[-1] == 1
        assert (ids[1 : 1 + len(short)] if first else ids[-1 - len(short) : -1]) == short
        wanted = [0, 1, 2] if positions == "f3" else [0, 1, 10, 11]
        assert item["intervention_locations"].tolist() == [wanted] * 3
    with pytest.raises(ValueError, match="max_length must be more than the 4 special tokens of a text, got 4"):
        GlueDataset(tokenizer, model_of(), given, "rte", max_length=4)


def test_all_positions_are_left_to_the_model() -> None:
    data = GlueDataset(make_encoder_tokenizer(), model_of("all"), single(2), "sst2")
    assert set(data[0]) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("sst2", {"sentence": "a"}, r"sst2, row 1: field 'label' is missing \(fields there: sentence\)"),
        ("sst2", {"sentence": "a", "label": None}, "field 'label' is missing"),
        ("sst2", {"sentence": "a", "label": 2}, "sst2, row 1: label must be from 0 to 1, got 2"),
        ("sst2", {"sentence": "a", "label": -1}, "sst2, row 1: label must be from 0 to 1, got -1"),
        (
            "sst2",
            {"sentence": "a", "label": 1.0},
            "label must be the number of a class, from 0 to 1, or one of negative, positive, got 1.0",
        ),
        ("sst2", {"sentence": "a", "label": True}, "label must be the number of a class.*got True"),
        ("sst2", {"sentence": "a", "label": "good"}, "label must be the number of a class.*got 'good'"),
        ("sst2", {"text": "a", "label": 1}, "expected the fields sentence or sentence1, got text, label"),
        ("sst2", {}, "expected the fields sentence or sentence1, got none"),
        ("sst2", {"sentence": " ", "label": 1}, "sst2, row 1: field 'sentence' is empty"),
        ("sst2", {"sentence": 3, "label": 1}, "field 'sentence' must be text, got int"),
        ("qnli", {"question": "a", "label": 1}, "expected the fields question and sentence or sentence1 and sentence2"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": "4.0"}, "label must be a score.*got '4.0'"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": math.nan}, "label must be a score.*got nan"),
    ],
)
def test_bad_rows_are_named(task: str, row: dict[str, Any], message: str) -> None:
    good = {
        "sst2": {"sentence": "a", "label": 1},
        "qnli": {"question": "a", "sentence": "b", "label": 1},
        "stsb": {"sentence1": "a", "sentence2": "b", "label": 3},
    }[task]
    with pytest.raises(ValueError, match=message):
        GlueDataset(make_encoder_tokenizer(), model_of(), [good, row], task)


def test_no_rows_no_padding_token_no_head() -> None:
    with pytest.raises(ValueError, match="no rows of sst2"):
        GlueDataset(make_encoder_tokenizer(), model_of(), [], "sst2")
    with pytest.raises(ValueError, match="has no pad_token"):
        glue_collator(make_tokenizer())
    with pytest.raises(ValueError, match="LlamaForCausalLM has no head named classifier or score"):
        train_head(tiny_model("llama"))


# Training


def head_of(model: ReftModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.model.classifier.state_dict().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def trainer_of(
    model: ReftModel, task: GlueTask, data: GlueDataset, chosen_by: GlueDataset, folder: Path, epochs: int
) -> ReftTrainerForSequenceClassification:
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        num_train_epochs=epochs,
        learning_rate=2e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=task.best_metric,
        greater_is_better=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    return ReftTrainerForSequenceClassification(
        model,
        args,
        glue_collator(make_encoder_tokenizer()),
        train_dataset=data,
        eval_dataset=chosen_by,
        compute_metrics=task.compute_metrics(),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )


@pytest.mark.parametrize("task", ["cola", "stsb"])
def test_training_stops_early_and_returns_to_the_best_epoch(task: str, tmp_path: Path) -> None:
    """The paper's protocol: the best epoch on one half of the validation rows, reported on the other."""
    pytest.importorskip("sklearn")
    pytest.importorskip("scipy")
    chosen = glue_task(task)
    make = single if task == "cola" else pairs
    model = model_of("f3", num_labels=chosen.num_labels, problem_type=chosen.problem_type)
    assert train_head(model.model) == [f"classifier.{name}" for name, _ in model.model.classifier.named_parameters()]
    validation = make(20)
    split = glue_split(len(validation))
    tokenizer = make_encoder_tokenizer()
    data, chosen_by, reported = (
        GlueDataset(tokenizer, model, rows, chosen)
        for rows in (make(24), take(validation, split.held_out), take(validation, split.kept))
    )
    before = head_of(model)
    trainer = trainer_of(model, chosen, data, chosen_by, tmp_path, epochs=30)
    trainer.train()

    key = f"eval_{chosen.best_metric}"
    history = [entry[key] for entry in trainer.state.log_history if key in entry]
    best = max(history)
    assert best > 0.5
    assert history.index(best) == len(history) - 3  # the two epochs of patience were no better
    assert len(history) < 30
    assert trainer.state.best_metric == best
    assert trainer.evaluate()[key] == pytest.approx(best)
    assert trainer.evaluate(reported)[key] > 0.5

    trainer.save_model(tmp_path / "saved")
    base = tiny_model(
        "roberta", vocab_size=320, max_position_embeddings=130, pad_token_id=2, num_labels=chosen.num_labels
    )
    loaded = ReftModel.load(tmp_path / "saved", base, include_model=True)
    assert equal(head_of(loaded), head_of(model))
    assert not equal(head_of(loaded), before)
    batch = glue_collator(tokenizer)([reported[k] for k in range(len(reported))])
    batch.pop("labels")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
