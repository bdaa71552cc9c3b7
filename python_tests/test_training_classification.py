"""Sequence classification: its three losses, accumulation, evaluation, the head, and the best model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from torch import Tensor
from torch.nn import functional as F
from training_support import make_tokenizer, rows
from transformers import TrainingArguments, set_seed

import reft_kernels as pyreft
from reft_kernels.training.classification import target_losses

LABELS = 3


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """Random token ids of different lengths, with labels."""

    def __init__(self, labels: list[Any]) -> None:
        generator = torch.Generator().manual_seed(5)
        self.items = [
            {"input_ids": torch.randint(3, VOCABULARY, (4 + k % 4,), generator=generator), "labels": label}
            for k, label in enumerate(labels)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def single(count: int = 10) -> list[Any]:
    return [k % LABELS for k in range(count)]


def scores(count: int = 10) -> list[Any]:
    return [float(k % 4) - 1.5 for k in range(count)]


def several(count: int = 10) -> list[Any]:
    return [[float(k % 2), float(k % 3 == 0), 1.0] for k in range(count)]


PROBLEMS = {
    "single_label_classification": (single, {"num_labels": LABELS}),
    "regression": (scores, {"num_labels": 1}),
    "multi_label_classification": (several, {"num_labels": LABELS}),
}


def collate(items: Any) -> dict[str, Tensor]:
    tokenizer = make_tokenizer(pad=True)
    tokenizer.pad_token_id = 0
    from transformers import DataCollatorWithPadding

    return pyreft.ReftDataCollator(DataCollatorWithPadding(tokenizer))(items)


def model_of(architecture: str = "roberta", head: bool = False, dtype: Any = None, **options: Any) -> pyreft.ReftModel:
    base = tiny_model(architecture, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options)
    if dtype is not None:
        base = base.to(dtype)
    set_seed(2)
    config = pyreft.ReftConfig(method="loreft", layers="all", rank=2, positions="f1", dtype=dtype)
    model = pyreft.get_reft_model(base, config)
    if head:
        for parameter in base.classifier.parameters():
            parameter.requires_grad_(True)
    return model


def trainer_of(model: pyreft.ReftModel, folder: Path, labels: list[Any], **options: Any) -> Any:
    more = {name: options.pop(name) for name in ("compute_metrics", "compute_loss_func") if name in options}
    args = TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        }
    )
    data = Texts(labels)
    return pyreft.ReftTrainerForSequenceClassification(
        model, args, collate, train_dataset=data, eval_dataset=data, **more
    )


def plain_loss(problem: str, logits: Tensor, labels: Tensor) -> Tensor:
    if problem == "single_label_classification":
        return F.cross_entropy(logits, labels)
    if problem == "regression":
        return F.mse_loss(logits.reshape(labels.shape), labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "inferred"])
@pytest.mark.parametrize("architecture", ["roberta", "bert"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_loss_of_each_problem(tmp_path: Path, problem: str, architecture: str, stated: bool) -> None:
    labels, options = PROBLEMS[problem]
    model = model_of(architecture, **options, **({"problem_type": problem} if stated else {}))
    trainer = trainer_of(model, tmp_path, labels())
    batch = collate(trainer.train_dataset.items)
    assert batch["labels"].is_floating_point() == (problem != "single_label_classification")
    with torch.no_grad():
        loss, output = trainer.compute_loss(model.eval(), dict(batch), return_outputs=True)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        edited, plain = model(**inputs).logits, model.model(**inputs).logits
    assert torch.equal(output.logits, edited)
    assert not torch.equal(edited, plain)
    torch.testing.assert_close(loss, plain_loss(problem, edited, batch["labels"]))
    assert model.model.config.problem_type == (problem if stated else None)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_accumulated_batches_equal_one_large_batch(tmp_path: Path, problem: str) -> None:
    """With a last batch that is smaller than the others, and a target that looks like the mark of ignored labels."""
    labels, options = PROBLEMS[problem]
    given = labels(5)
    if problem == "regression":
        given[2] = -100.0
    finished = []
    for size, accumulation in ((5, 1), (2, 3)):
        model = model_of(**options)
        trainer = trainer_of(
            model,
            tmp_path,
            given,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            logging_steps=1,
            max_grad_norm=0.0,
            learning_rate=1e-3,
        )
        batch = collate(trainer.train_dataset.items)
        with torch.no_grad():
            wanted = plain_loss(problem, trainer.compute_loss(model, dict(batch), True)[1].logits, batch["labels"])
        before = {name: p.detach().clone() for name, p in model.interventions.named_parameters()}
        trainer.train()
        moved = {name: p.detach() - before[name] for name, p in model.interventions.named_parameters()}
        finished.append((moved, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    (large, large_loss), (small, small_loss) = finished
    assert small_loss == pytest.approx(large_loss, rel=1e-3)
    assert large_loss == pytest.approx([wanted.item()], rel=1e-3)
    scale = max(value.abs().max().item() for value in large.values())
    assert scale > 0
    for name, value in large.items():
        torch.testing.assert_close(small[name], value, rtol=1e-3, atol=1e-3 * scale)


def test_left_out_labels_do_not_count(tmp_path: Path) -> None:
    model = model_of(num_labels=LABELS).eval()
    trainer = trainer_of(model, tmp_path, [0, -100, 2, -100])
    batch = collate(trainer.train_dataset.items)
    kept = collate([trainer.train_dataset.items[k] for k in (0, 2)])
    with torch.no_grad():
        assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(
            trainer.compute_loss(model, dict(kept)).item(), rel=1e-5
        )
    assert int(trainer._get_num_items_in_batch([batch], torch.device("cpu"))) == 2


def test_losses_are_in_float32_whatever_the_model_is_in(tmp_path: Path) -> None:
    """0.30078125 and 0.3: the target is not rounded to the model's bfloat16."""
    logits = torch.tensor([[0.30078125]], dtype=torch.bfloat16)
    losses, count = target_losses(logits, torch.tensor([0.3]), "regression")
    assert losses.dtype == torch.float32
    assert count == 1
    assert losses.item() == pytest.approx((0.30078125 - 0.3) ** 2, rel=1e-3)
    model = model_of(dtype=torch.bfloat16, num_labels=1)
    trainer = trainer_of(model, tmp_path, scores(), max_steps=1)
    batch = collate(trainer.train_dataset.items)
    assert trainer.compute_loss(model, dict(batch)).dtype == torch.float32
    trainer.train()


def test_label_smoothing(tmp_path: Path) -> None:
    model = model_of(num_labels=LABELS).eval()
    trainer = trainer_of(model, tmp_path, single(), label_smoothing_factor=0.2)
    batch = collate(trainer.train_dataset.items)
    with torch.no_grad():
        loss, output = trainer.compute_loss(model, dict(batch), return_outputs=True)
    wanted = F.cross_entropy(output.logits, batch["labels"], label_smoothing=0.2)
    torch.testing.assert_close(loss, wanted)


def test_a_loss_of_the_callers_own(tmp_path: Path) -> None:
    model = model_of(num_labels=LABELS)
    seen: list[Any] = []

    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        seen.append((outputs.logits.shape, labels.shape, num_items_in_batch))
        return outputs.logits.square().sum()

    trainer = trainer_of(model, tmp_path, single(4), compute_loss_func=own, max_steps=1)
    trainer.train()
    assert seen == [((2, LABELS), (2,), torch.tensor(2))]


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_metrics_get_all_logits_and_labels(tmp_path: Path, remove_unused_columns: bool) -> None:
    model = model_of("bert", num_labels=LABELS)
    seen: dict[str, Any] = {}

    def metrics(prediction: Any) -> dict[str, float]:
        logits, labels = prediction
        seen["logits"], seen["labels"] = logits, labels
        return {"accuracy": float((logits.argmax(1) == labels).mean())}

    trainer = trainer_of(
        model, tmp_path, single(), compute_metrics=metrics, remove_unused_columns=remove_unused_columns
    )
    found = trainer.evaluate()
    batch = collate(trainer.train_dataset.items)
    labels = batch.pop("labels")
    with torch.no_grad():
        wanted = model.eval()(**batch).logits
    torch.testing.assert_close(torch.tensor(seen["logits"]), wanted, rtol=1e-4, atol=1e-5)
    assert seen["labels"].tolist() == labels.tolist()
    assert found["eval_accuracy"] == pytest.approx((wanted.argmax(1) == labels).float().mean().item())


def head_of(model: pyreft.ReftModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.model.classifier.state_dict().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("head", [True, False], ids=["head trained", "head frozen"])
def test_the_head_is_trained_saved_and_loaded_where_it_requires_gradients(tmp_path: Path, head: bool) -> None:
    model = model_of(head=head, num_labels=LABELS)
    before = head_of(model)
    trainer = trainer_of(model, tmp_path, single(), max_steps=3, save_strategy="steps", save_steps=3)
    trainer.train()
    assert equal(before, head_of(model)) == (not head)
    saved = tmp_path / "checkpoint-3"
    assert (saved / "base_trainable.safetensors").is_file() == head
    fresh = pyreft.ReftModel.load(saved, tiny_model("roberta", num_labels=LABELS), include_model=head)
    assert equal(head_of(fresh), head_of(model))
    batch = collate(trainer.train_dataset.items)
    del batch["labels"]
    with torch.no_grad():
        assert torch.equal(fresh(**batch).logits, model.eval()(**batch).logits)


def test_the_best_model_by_a_metric_comes_back_with_its_head(tmp_path: Path) -> None:
    model = model_of(head=True, num_labels=LABELS)
    heads: list[dict[str, Tensor]] = []

    def metrics(prediction: Any) -> dict[str, float]:
        heads.append(head_of(model))
        return {"matthews_correlation": [0.1, 0.9, 0.4][len(heads) - 1]}

    trainer = trainer_of(
        model,
        tmp_path,
        single(),
        compute_metrics=metrics,
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="matthews_correlation",
        greater_is_better=True,
    )
    trainer.train()
    assert len(heads) == 3
    assert equal(head_of(model), heads[1])
    assert not equal(heads[1], heads[2])
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-10")


def test_texts_and_labels_of_a_data_set(tmp_path: Path) -> None:
    """As pyreft's GLUE runs: a data set of texts, the Trainer with a tokenizer, learning."""
    tokenizer = make_tokenizer(pad=True, bos=True)
    given = [{"text": row["instruction"], "label": k % 2} for k, row in enumerate(rows(8))]
    model = model_of(head=True, num_labels=2, vocab_size=320, max_position_embeddings=130, pad_token_id=2)
    fields = {"input_field": "text", "label_field": "label"}
    options = {"position": "f3", "num_interventions": 3, "dataset": given}
    data = pyreft.ReftClassificationDataset("glue", None, tokenizer, **fields, **options)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=15,
        learning_rate=2e-2,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = pyreft.ReftTrainerForSequenceClassification(
        model=model, args=args, tokenizer=tokenizer, train_dataset=data, eval_dataset=data
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 2


def test_a_batch_without_labels(tmp_path: Path) -> None:
    model = model_of(num_labels=LABELS)
    trainer = trainer_of(model, tmp_path, single(2))
    batch = collate(trainer.train_dataset.items)
    del batch["labels"]
    with pytest.raises(ValueError, match=r"needs labels, got \['attention_mask', 'input_ids'\]"):
        trainer.compute_loss(model, batch)
    for item in trainer.train_dataset.items:
        del item["labels"]
    assert trainer.predict(trainer.train_dataset).predictions.shape == (2, LABELS)


@pytest.mark.parametrize(
    ("problem", "labels", "message"),
    [
        ("single_label_classification", torch.zeros(2, 3), r"int labels \[B\] = \[2\], got torch.float32 \[2, 3\]"),
        ("multi_label_classification", torch.zeros(2), r"with 3 labels needs labels \[2, 3\], got \[2\]"),
        ("regression", torch.zeros(2), r"regression with 3 labels needs labels \[2, 3\], got \[2\]"),
        ("ranking", torch.zeros(2), "problem_type must be one of regression, .*got 'ranking'"),
    ],
)
def test_labels_that_do_not_fit(problem: Any, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target_losses(torch.zeros(2, 3), labels, problem)
