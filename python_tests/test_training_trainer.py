"""The Trainer: its loss, accumulation, checkpoints, exact resuming, the best model, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_support import make_llama, make_tokenizer, rows
from transformers import TrainerCallback, TrainingArguments, set_seed

from reft_kernels.checkpoint import BASE_FILE
from reft_kernels.config import ReftConfig
from reft_kernels.model import ReftModel, get_reft_model
from reft_kernels.stiefel_adamw import StiefelAdamW
from reft_kernels.training import (
    ReftTrainerForCausalLM,
    SupervisedCollator,
    build_prompt,
    last_complete_checkpoint,
    make_supervised_data_module,
    split_models,
)
from reft_kernels.training.checkpoints import FILES, save_beside


def make_model(seed: int = 1, **options: Any) -> ReftModel:
    set_seed(seed)
    config: dict[str, Any] = {"method": "loreft", "layers": "all", "rank": 2, "positions": "f2+l2", **options}
    return get_reft_model(make_llama(), ReftConfig(**config))


def make_data(model: ReftModel, count: int = 12) -> dict[str, Any]:
    made = rows(count)
    outputs = [row["output"] + " box" * (index % 3) for index, row in enumerate(made)]
    prompts = [build_prompt(row["instruction"]) for row in made]
    return make_supervised_data_module(make_tokenizer(), model, prompts, outputs)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
            **options,
        }
    )


def state(model: ReftModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.interventions.state_dict().items()}


def assert_same_state(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def losses(trainer: ReftTrainerForCausalLM) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def test_loss_is_that_of_the_edited_model_over_labelled_tokens(tmp_path: Path) -> None:
    model = make_model()
    data = make_data(model)
    trainer = ReftTrainerForCausalLM(model, arguments(tmp_path), **data)
    batch = data["data_collator"]([data["train_dataset"][index] for index in range(4)])
    with torch.no_grad():
        loss, output = trainer.compute_loss(model, dict(batch), return_outputs=True)
        located = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            intervention_locations=batch["intervention_locations"],
        ).logits
        plain = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(output.logits, located)
    assert not torch.equal(output.logits, plain)
    wanted = torch.nn.functional.cross_entropy(
        located[:, :-1].flatten(0, 1).double(), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    tokens = int((batch["labels"] != -100).sum())
    with torch.no_grad():
        halved = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(2 * tokens))
    assert halved.item() == pytest.approx(wanted.item() / 2, rel=1e-6)


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    finished = []
    for batch_size, accumulation in ((6, 1), (2, 3)):
        model = make_model()
        options = arguments(
            tmp_path / f"{batch_size}",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
            lr_scheduler_type="constant",
            learning_rate=0.1,
        )
        trainer = ReftTrainerForCausalLM(model, options, **make_data(model))
        before = state(model)
        trainer.train()
        finished.append((state(model), losses(trainer)))
    (large, large_losses), (small, small_losses) = finished
    assert [step for step, _ in small_losses] == [1, 2]
    for (_, a), (_, b) in zip(large_losses, small_losses, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    moved = max((large[name] - before[name]).abs().max().item() for name in large)
    apart = max((large[name] - small[name]).abs().max().item() for name in large)
    assert moved > 1e-3
    assert apart < 1e-3 * moved


def test_logits_are_computed_where_there_are_targets_and_nowhere_else(tmp_path: Path) -> None:
    finished = []
    for whole in (False, True):
        model = make_model()
        trainer = ReftTrainerForCausalLM(model, arguments(tmp_path, max_steps=3), **make_data(model))
        if whole:
            trainer.data_collator = trainer.data_collator.collator
        widths: list[tuple[int, int]] = []

        def look(module: Any, args: Any, keywords: Any, output: Any, widths: list[tuple[int, int]] = widths) -> None:
            widths.append((output.logits.shape[1], int((keywords["labels"][:, 1:] != -100).any(0).sum())))

        handle = model.model.register_forward_hook(look, with_kwargs=True)
        trainer.train()
        handle.remove()
        assert [width == targets for width, targets in widths] == [not whole] * 3
        finished.append((losses(trainer), state(model)))
    for (_, a), (_, b) in zip(finished[0][0], finished[1][0], strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    for name, value in finished[0][1].items():
        torch.testing.assert_close(value, finished[1][1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "orthogonality"), [("loreft", None), ("loreft", "polar"), ("loreft", "none"), ("nodireft", None)]
)
def test_resuming_continues_as_if_never_interrupted(tmp_path: Path, method: str, orthogonality: str | None) -> None:
    options = {
        "max_steps": 7,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 4,
        "warmup_steps": 2,
    }

    def trainer(folder: Path) -> ReftTrainerForCausalLM:
        model = make_model(method=method, dropout=0.1, orthogonality=orthogonality)
        return ReftTrainerForCausalLM(model, arguments(folder, **options), **make_data(model))

    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    started = state(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert [step for step, _ in losses(whole)] == [1, 2, 3, 4, 5, 6, 7]
    assert losses(resumed) == losses(whole)
    assert_same_state(state(resumed.model), state(whole.model))
    assert any(not torch.equal(started[name], value) for name, value in state(whole.model).items())


@pytest.mark.parametrize("orthogonality", ["householder", "polar"])
def test_the_learned_rows_stay_orthonormal_after_resuming(tmp_path: Path, orthogonality: str) -> None:
    model = make_model(orthogonality=orthogonality)
    options = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=2, weight_decay=0.5)
    ReftTrainerForCausalLM(model, options, **make_data(model)).train()
    again = make_model(seed=9, orthogonality=orthogonality)
    trainer = ReftTrainerForCausalLM(again, arguments(tmp_path, max_steps=30, weight_decay=0.5), **make_data(again))
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer)[-1][0] == 30
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    assert isinstance(optimizer, StiefelAdamW) == (orthogonality == "polar")
    for intervention in again.interventions.values():
        basis = intervention.rotate_layer.weight.detach()
        torch.testing.assert_close(basis.T @ basis, torch.eye(2), atol=1e-6, rtol=0)


def test_an_optimiser_of_the_callers_own_is_taken(tmp_path: Path) -> None:
    model = make_model(orthogonality="polar")
    mine = StiefelAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, riemannian=True)
    trainer = ReftTrainerForCausalLM(
        model, arguments(tmp_path, max_steps=3), optimizers=(mine, None), **make_data(model)
    )
    before = state(model)
    trainer.train()
    assert getattr(trainer.optimizer, "optimizer", trainer.optimizer) is mine
    assert any(not torch.equal(before[name], value) for name, value in state(model).items())
    for intervention in model.interventions.values():
        basis = intervention.rotate_layer.weight.detach()
        torch.testing.assert_close(basis.T @ basis, torch.eye(2), atol=1e-6, rtol=0)


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base_model(tmp_path: Path) -> None:
    model = make_model()
    options = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer = ReftTrainerForCausalLM(model, options, tokenizer=make_tokenizer(), **make_data(model))
    trainer.train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"reft_config.json", "adapter.safetensors", "optimizer.pt", "trainer_state.json"} <= names
    assert not {"model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json"} & names
    stored = load_file(tmp_path / "checkpoint-2" / "adapter.safetensors")
    assert sum(value.numel() for value in stored.values()) < 5000 < sum(p.numel() for p in model.model.parameters())
    fresh = ReftModel.load(str(tmp_path / "checkpoint-2"), make_llama())
    assert_same_state(state(fresh), state(model))


def test_save_model_keeps_the_checkpoints_beside_it(tmp_path: Path) -> None:
    model = make_model()
    trainer = ReftTrainerForCausalLM(
        model, arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1), **make_data(model)
    )
    trainer.train()
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    trainer.save_model()
    trainer.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-1", "checkpoint-2", "notes.txt", "reft_config.json", "adapter.safetensors"}
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").is_file()
    assert_same_state(state(ReftModel.load(str(tmp_path), make_llama())), state(model))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = make_model()
    data = make_data(model)
    data["eval_dataset"] = data["train_dataset"]
    options = arguments(
        tmp_path,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the loss falls, so the "best" is the first and not the last
    )
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Keep(TrainerCallback):
        def on_save(self, args: Any, trainer_state: Any, control: Any, **kwargs: Any) -> None:
            seen[trainer_state.global_step] = state(model)

    trainer = ReftTrainerForCausalLM(model, options, callbacks=[Keep()], **data)
    trainer.train()
    assert sorted(seen) == [2, 4, 6]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert_same_state(state(model), seen[2])
    assert any(not torch.equal(seen[2][name], value) for name, value in seen[6].items())


def test_evaluation_loss_is_the_mean_over_the_data(tmp_path: Path) -> None:
    model = make_model(dropout=0.3)
    data = make_data(model, 4)
    options = arguments(tmp_path, per_device_eval_batch_size=4)
    trainer = ReftTrainerForCausalLM(
        model, options, eval_dataset=data["train_dataset"], data_collator=data["data_collator"]
    )
    batch = data["data_collator"]([data["train_dataset"][index] for index in range(4)])
    model.eval()
    with torch.no_grad():
        wanted = model(**batch).loss.item()
    model.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_locations_of_the_batch_reach_the_model(tmp_path: Path, remove_unused_columns: bool) -> None:
    model = make_model()
    data = make_data(model, 4)
    options = arguments(tmp_path, remove_unused_columns=remove_unused_columns, per_device_train_batch_size=4)
    trainer = ReftTrainerForCausalLM(model, options, **data)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["intervention_locations"].shape == (4, 2, 4)
    nowhere = {**batch, "intervention_locations": torch.full((4, 2, 4), -1)}
    with torch.no_grad():
        edited, unedited = (trainer.compute_loss(model, dict(inputs)) for inputs in (batch, nowhere))
        names = ("input_ids", "attention_mask", "labels")
        plain = model.model(**{name: batch[name] for name in names}).loss
    assert unedited.item() == pytest.approx(plain.item(), rel=1e-6)
    assert abs(edited.item() - plain.item()) > 1e-3


def test_label_smoothing_looks_at_the_next_token(tmp_path: Path) -> None:
    model = make_model()
    data = make_data(model, 4)
    trainer = ReftTrainerForCausalLM(model, arguments(tmp_path, label_smoothing_factor=0.2), **data)
    batch = data["data_collator"]([data["train_dataset"][index] for index in range(4)])
    tokens = int((batch["labels"] != -100).sum())
    with torch.no_grad():
        loss, output = trainer.compute_loss(model, dict(batch), return_outputs=True)
        accumulated = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(2 * tokens))
    wanted = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.2
    )
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert accumulated.item() == pytest.approx(wanted.item() / 2, rel=1e-5)


def test_weight_decay_reaches_the_learned_matrices_and_not_the_rotations(tmp_path: Path) -> None:
    for method, decayed in (
        ("loreft", {"learned_source.weight"}),
        ("noreft", {"learned_source.weight", "proj_layer.weight"}),
        ("consreft", set()),
    ):
        model = make_model(method=method)
        trainer = ReftTrainerForCausalLM(model, arguments(tmp_path, weight_decay=0.1), **make_data(model))
        optimizer = trainer.create_optimizer()
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = {group["weight_decay"]: {named[id(p)] for p in group["params"]} for group in optimizer.param_groups}
        assert {".".join(name.split(".")[-2:]) for name in groups[0.1]} == decayed
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert groups[0.1] | groups[0.0] == trained


def test_the_base_model_keeps_its_settings(tmp_path: Path) -> None:
    model = make_model()
    before = model.model.config.to_dict()
    trainer = ReftTrainerForCausalLM(
        model, arguments(tmp_path, max_steps=1), processing_class=make_tokenizer(pad=True), **make_data(model)
    )
    trainer.train()
    assert model.model.config.to_dict() == before
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_last_complete_checkpoint(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    for step in (2, 10, 30, 40):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({}), encoding="utf-8")
    (tmp_path / "checkpoint-30" / "trainer_state.json").write_text('{"half', encoding="utf-8")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_what_the_trainer_refuses(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model must be a ReftModel .* got LlamaForCausalLM"):
        ReftTrainerForCausalLM(make_llama(), arguments(tmp_path))
    model = make_model()
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="two names of one argument"):
        ReftTrainerForCausalLM(model, arguments(tmp_path), tokenizer=tokenizer, processing_class=tokenizer)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        ReftTrainerForCausalLM(model, arguments(tmp_path), **make_data(model)).train(resume_from_checkpoint=True)
    trainer = ReftTrainerForCausalLM(model, arguments(tmp_path), tokenizer=tokenizer)
    assert trainer.data_collator.collator == SupervisedCollator(1)


def test_a_file_of_another_process_may_appear_while_the_adapter_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    save = model.save

    def save_as_the_other_writes(folder: Path, **options: Any) -> None:
        (tmp_path / "checkpoint-1" / "rng_state_1.pth").write_text("another process's")
        save(folder, **options)

    monkeypatch.setattr(model, "save", save_as_the_other_writes)
    save_beside(model, tmp_path / "checkpoint-1")
    assert ReftModel.load(tmp_path / "checkpoint-1", make_llama()).keys == model.keys
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert names == {"rng_state_1.pth", *FILES} - {BASE_FILE}


def test_the_loss_of_a_split_model_is_no_multiple(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer that multiplies the loss by all processes, as that of transformers 4.57, though they share a batch."""
    model = make_model()
    trainer = ReftTrainerForCausalLM(model, arguments(tmp_path), **make_data(model))
    batch = trainer.data_collator([trainer.train_dataset[k] for k in range(2)])
    count = (batch["labels"][:, 1:] != -100).sum()
    wanted = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    monkeypatch.setattr(split_models, "_COUNTS_SHARING", False)
    assert torch.equal(trainer.compute_loss(model, dict(batch), num_items_in_batch=count), wanted)
    trainer.args.parallelism_config = SimpleNamespace(tp_size=2)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch), num_items_in_batch=count), wanted / 2)
    mean, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True, num_items_in_batch=count)
    torch.testing.assert_close(mean, wanted / 2)
    assert "logits" in outputs
    whole = trainer.compute_loss(model, dict(batch))
    trainer.args.average_tokens_across_devices = False
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch), num_items_in_batch=count), wanted)
    assert torch.equal(trainer.compute_loss(model, dict(batch)), whole)
