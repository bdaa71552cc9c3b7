"""The Trainers under pyreft's names: what reaches the model, evaluation, saving over what is there, LoRA alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import VOCABULARY, tiny_model
from torch import Tensor, nn
from training_support import make_llama, make_tokenizer, rows
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed

import reft_kernels as pyreft

SUPERVISED = {"instruction_field": "instruction", "input_field": "input", "output_field": "output"}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
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


def loreft_model(base: nn.Module | None = None, **options: Any) -> pyreft.ReftModel:
    set_seed(1)
    config = {"method": "loreft", "layers": "all", "rank": 2, **options}
    return pyreft.get_reft_model(make_llama() if base is None else base, pyreft.ReftConfig(**config))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.interventions.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Calls:
    """Records the keywords that a module is called with."""

    def __init__(self, module: nn.Module) -> None:
        self.keywords: list[dict[str, Any]] = []
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.keywords.append(kwargs)


@pytest.mark.parametrize("keyword", ["tokenizer", "processing_class"])
@pytest.mark.parametrize("kind", ["last", "multiple"])
def test_a_notebook_of_pyreft(tmp_path: Path, kind: str, keyword: str) -> None:
    """As its README does it: representations, a data module, the Trainer with keywords alone, generation, saving."""
    pytest.importorskip("datasets")
    set_seed(0)
    tokenizer = make_tokenizer(pad=True, bos=True)
    model = make_llama()
    layers = (0,) if kind == "last" else (0, 0)
    config = pyreft.ReftConfig(
        representations=[
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": 4,
                "intervention": pyreft.LoreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=4),
            }
            for layer in layers
        ]
    )
    reft_model = pyreft.get_reft_model(model, config)
    prompts, outputs = [row["instruction"] for row in rows(6)], [row["output"] for row in rows(6)]
    make = {
        "last": pyreft.make_last_position_supervised_data_module,
        "multiple": pyreft.make_multiple_position_supervised_data_module,
    }[kind]
    data_module = make(tokenizer, model, prompts, outputs, num_interventions=len(layers))
    options = arguments(tmp_path, num_train_epochs=6, learning_rate=2e-2, logging_steps=1)
    trainer = pyreft.ReftTrainerForCausalLM(model=reft_model, args=options, **{keyword: tokenizer}, **data_module)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    prompt = tokenizer(prompts[0], return_tensors="pt", return_token_type_ids=False)
    last = prompt["input_ids"].shape[-1] - 1
    places = {"last": [[[last]]], "multiple": [[[0]], [[last]]]}[kind]
    _, response = reft_model.generate(
        prompt,
        unit_locations={"sources->base": (None, places)},
        intervene_on_prompt=True,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    assert response.shape[1] > last + 1
    trainer.save_model(str(tmp_path / "saved"))
    assert same(state(pyreft.ReftModel.load(tmp_path / "saved", make_llama())), state(reft_model))


def supervised(model: pyreft.ReftModel, tokenizer: Any, given: Any = None, **options: Any) -> Any:
    settings = {"position": "f2+l2", "num_interventions": len(model.interventions), "share_weights": True, **options}
    given = rows(6) if given is None else given
    return pyreft.ReftSupervisedDataset("task", None, tokenizer, dataset=given, **SUPERVISED, **settings)


def seq2seq(tokenizer: Any) -> pyreft.ReftDataCollator:
    return pyreft.ReftDataCollator(data_collator=DataCollatorForSeq2Seq(tokenizer, padding="longest"))


@pytest.mark.parametrize("remove_unused_columns", [True, False])
@pytest.mark.parametrize("kind", ["ReftTrainer", "ReftTrainerForCausalLM", "ReftTrainerForCausalLMDistributed"])
def test_evaluation_loss_and_metrics(tmp_path: Path, kind: str, remove_unused_columns: bool) -> None:
    model, tokenizer = loreft_model(), make_tokenizer(pad=True, bos=True)
    data, collate = supervised(model, tokenizer), seq2seq(tokenizer)
    seen: dict[str, Any] = {}

    def metrics(prediction: Any) -> dict[str, float]:
        seen["logits"], seen["labels"] = prediction.predictions, prediction.label_ids
        kept = prediction.label_ids[:, 1:] != -100
        hits = (prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:])[kept]
        return {"hits": float(hits.mean())}

    options = arguments(tmp_path, remove_unused_columns=remove_unused_columns, per_device_eval_batch_size=6)
    trainer = getattr(pyreft, kind)(model, options, collate, eval_dataset=data, compute_metrics=metrics)
    calls = Calls(model.model)
    found = trainer.evaluate()
    assert len(calls.keywords) == 1
    assert not {"id", "intervention_locations", "target_columns"} & set(calls.keywords[0])
    batch = collate([data[index] for index in range(6)])
    del batch["id"]
    with torch.no_grad():
        output = model.eval()(**batch)
    assert found["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert 0 <= found["eval_hits"] <= 1
    torch.testing.assert_close(torch.tensor(seen["logits"]), output.logits, rtol=1e-4, atol=1e-5)
    assert seen["labels"].tolist() == batch["labels"].tolist()
    predictions = trainer.predict(data)
    assert predictions.metrics["test_loss"] == pytest.approx(found["eval_loss"])


def test_the_default_collator_takes_pairs_of_answers(tmp_path: Path) -> None:
    """Their padding is masked, though the tokenizer has no other token for it than the end token."""
    model, tokenizer = loreft_model(), make_tokenizer()
    fields = {"instruction_field": "name", "input_field": "input"}
    answers = {"chosen_output_field": "good", "rejected_output_field": "bad"}
    options = {"position": "l1", "num_interventions": 2, **fields, **answers}
    given = [{"name": "a colour", "good": "the longer answer of both", "bad": "b"}] * 2
    data = pyreft.ReftPreferenceDataset(None, None, tokenizer, dataset=given, **options)
    trainer = pyreft.ReftTrainerForCausalLM(
        model, arguments(tmp_path), tokenizer=tokenizer, train_dataset=data, eval_dataset=data
    )
    batch = trainer.data_collator([data[0], data[1]])
    assert batch["attention_mask"].tolist() == [data[0]["attention_mask"].tolist()] * 2
    assert not batch["attention_mask"].all()
    assert trainer.evaluate()["eval_loss"] > 0


def test_rows_without_labels_are_predicted(tmp_path: Path) -> None:
    model, tokenizer = loreft_model(), make_tokenizer(pad=True, bos=True)
    options = {"position": "l1", "num_interventions": 2}
    data = pyreft.ReftRawDataset(None, None, tokenizer, data_split="test", dataset=rows(3), **options)
    trainer = pyreft.ReftTrainerForCausalLM(model, arguments(tmp_path, remove_unused_columns=False), seq2seq(tokenizer))
    predictions = trainer.predict(data).predictions
    with torch.no_grad():
        ids = data[0]["input_ids"][None]
        wanted = model.eval()(
            input_ids=ids, intervention_locations=torch.tensor([data[0]["intervention_locations"]])
        ).logits
    torch.testing.assert_close(torch.tensor(predictions[0, : ids.shape[1]]), wanted[0], rtol=1e-4, atol=1e-5)


def test_the_trainer_of_transformers_itself_evaluates_a_reft_model(tmp_path: Path) -> None:
    model, tokenizer = loreft_model(), make_tokenizer(pad=True, bos=True)
    data = supervised(model, tokenizer)
    mine = pyreft.ReftTrainerForCausalLM(model, arguments(tmp_path), seq2seq(tokenizer), eval_dataset=data)
    plain = Trainer(model, arguments(tmp_path), seq2seq(tokenizer), eval_dataset=data)
    assert plain.evaluate()["eval_loss"] == pytest.approx(mine.evaluate()["eval_loss"], rel=1e-2)


class Sub(nn.Module):
    """Edits the coordinates that `subspaces` names for each example, as pyreft's own subclasses do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))
        self.seen: list[Any] = []

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        self.seen.append(subspaces)
        shift = torch.zeros_like(base)
        for index in range(len(subspaces)):
            shift[index, :, subspaces[index]] = self.shift[subspaces[index]]
        return base + shift


def sub_model() -> pyreft.ReftModel:
    listed = [{"layer": layer, "component": "block_output", "intervention": Sub(32)} for layer in (0, 1)]
    return pyreft.get_reft_model(make_llama(), pyreft.ReftConfig(representations=listed))


@pytest.mark.parametrize("collator", ["seq2seq", "default"])
def test_subspaces_of_the_rows_reach_the_interventions(tmp_path: Path, collator: str) -> None:
    model, tokenizer = sub_model(), make_tokenizer(pad=True, bos=True)
    given = [{**row, "subspaces": [2 * (index % 2), 2 * (index % 2) + 1]} for index, row in enumerate(rows(6))]
    data = supervised(model, tokenizer, given)
    collate = seq2seq(tokenizer) if collator == "seq2seq" else None
    options = arguments(tmp_path, max_steps=3)
    trainer = pyreft.ReftTrainerForCausalLM(model, options, collate, tokenizer=tokenizer, train_dataset=data)
    trainer.train()
    for intervention in model.interventions.values():
        assert len(intervention.seen) == 3
        assert {tuple(row) for rows_ in intervention.seen for row in torch.as_tensor(rows_).tolist()} == {
            (0, 1),
            (2, 3),
        }
        moved = intervention.shift.detach().abs() > 0
        assert moved.tolist() == [True] * 4 + [False] * 28
    trainer.eval_dataset = data
    assert trainer.evaluate()["eval_loss"] > 0


def test_subspaces_as_a_tensor() -> None:
    """[B, I, k] beside intervention_locations, [I, B, k] otherwise, as the lists are."""
    model = sub_model()
    for intervention in model.interventions.values():
        nn.init.normal_(intervention.shift, std=3)
    ids = torch.randint(3, 300, (2, 5))
    places = torch.randint(0, 5, (2, 2, 1))
    subspaces = torch.tensor([[[0], [1]], [[2], [3]]])
    listed = {"unit_locations": places.transpose(0, 1).tolist(), "subspaces": subspaces.transpose(0, 1).tolist()}
    wanted = model(input_ids=ids, **listed).logits
    assert torch.equal(model(input_ids=ids, intervention_locations=places, subspaces=subspaces).logits, wanted)
    listed["subspaces"] = subspaces.transpose(0, 1)
    assert torch.equal(model(input_ids=ids, **listed).logits, wanted)
    assert not torch.equal(model(input_ids=ids, **{**listed, "subspaces": subspaces}).logits, wanted)
    with pytest.raises(ValueError, match=r"\[num_interventions, B, k\] = \[2, 2, k\]"):
        model(input_ids=ids, intervention_locations=places, subspaces=subspaces[0])


@pytest.mark.parametrize("step", ["train", "evaluate"])
def test_a_loss_of_a_subclass_gets_the_batch_as_pyreft_hands_it_over(tmp_path: Path, step: str) -> None:
    """Tensors, which the subclass permutes and makes lists of, as pyreft's own losses do."""

    class Own(pyreft.ReftTrainerForCausalLM):
        def compute_loss(
            self, intervenable: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            locations = inputs["intervention_locations"].permute(1, 0, 2).tolist()
            _, outputs = intervenable(
                {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]},
                unit_locations={"sources->base": (None, locations)},
                labels=inputs["labels"],
                subspaces=inputs["subspaces"].permute(1, 0, 2).tolist(),
            )
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    model, tokenizer = sub_model(), make_tokenizer(pad=True, bos=True)
    data = supervised(model, tokenizer, [{**row, "subspaces": [1]} for row in rows(6)])
    options = arguments(tmp_path, max_steps=2, remove_unused_columns=False)
    trainer = Own(model, options, seq2seq(tokenizer), train_dataset=data, eval_dataset=data)
    getattr(trainer, step)()
    assert all(len(intervention.seen) == 2 for intervention in model.interventions.values())
    assert all(rows_ in ([[1]] * 2, [[1]] * 4) for rows_ in model.interventions[model.keys[0]].seen)


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_other_inputs_reach_the_base_model(tmp_path: Path, remove_unused_columns: bool) -> None:
    ids = torch.randint(3, VOCABULARY, (8, 5))
    extra = {
        "llama": ("position_ids", torch.arange(5) + 7),
        "bert": ("token_type_ids", torch.tensor([0, 0, 1, 1, 1])),
    }
    for architecture, (name, value) in extra.items():
        base = tiny_model(architecture, num_labels=2) if architecture == "bert" else tiny_model(architecture)
        model = loreft_model(base, positions="l1")
        labels = ids if architecture == "llama" else ids[:, 0] % 2
        data = Rows([{"input_ids": ids[k], "labels": labels[k], name: value} for k in range(8)])
        options = arguments(tmp_path, max_steps=1, remove_unused_columns=remove_unused_columns)
        trainer = pyreft.ReftTrainer(model, options, train_dataset=data, eval_dataset=data)
        calls = Calls(model.model)
        trainer.train()
        trainer.evaluate()
        assert len(calls.keywords) == 3
        assert all(torch.equal(kwargs[name], value.expand(len(kwargs[name]), -1)) for kwargs in calls.keywords)


def test_pixels_reach_a_vision_model(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    base = transformers.ViTForImageClassification(config)
    path = next(name for name, module in base.named_modules() if type(module).__name__ == "ViTLayer")
    place = {
        "component": f"{path}.output",
        "intervention": pyreft.LoreftIntervention(embed_dim=16, low_rank_dimension=2, dtype=torch.float32),
    }
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=[place]))
    data = Rows([{"pixel_values": torch.randn(1, 8, 8), "labels": k % 3} for k in range(6)])
    for kind in (pyreft.ReftTrainer, pyreft.ReftTrainerForSequenceClassification):
        before = state(model)
        trainer = kind(model, arguments(tmp_path, max_steps=2), train_dataset=data, eval_dataset=data)
        trainer.train()
        assert not same(before, state(model))
        output = torch.nn.functional.cross_entropy(
            model(pixel_values=torch.stack([item["pixel_values"] for item in data.items])).logits,
            torch.tensor([item["labels"] for item in data.items]),
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(output.item(), rel=1e-2)


def test_start_and_end_are_labels_of_a_question_answering_model(tmp_path: Path) -> None:
    config = tiny_model("bert").config
    model = loreft_model(transformers.BertForQuestionAnswering(config), positions="f1")
    ids = torch.randint(3, VOCABULARY, (4, 6))
    data = Rows([{"input_ids": ids[k], "start_positions": 1, "end_positions": 3} for k in range(4)])
    trainer = pyreft.ReftTrainer(model, arguments(tmp_path), eval_dataset=data)
    assert trainer.label_names == ["start_positions", "end_positions"]
    with torch.no_grad():
        wanted = model.eval()(
            input_ids=ids, start_positions=torch.full((4,), 1), end_positions=torch.full((4,), 3)
        ).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["ReftTrainer", "ReftTrainerForCausalLM", "ReftTrainerForSequenceClassification"])
def test_no_parameter_decays_with_pyreft_compat(tmp_path: Path, kind: str) -> None:
    model = loreft_model()
    options = arguments(tmp_path, weight_decay=0.1)
    ours = getattr(pyreft, kind)(model, options).create_optimizer()
    assert [group["weight_decay"] for group in ours.param_groups if group["params"]] == [0.1, 0.0]
    compat = getattr(pyreft, kind)(model, options, pyreft_compat=True).create_optimizer()
    assert [group["weight_decay"] for group in compat.param_groups if group["params"]] == [0.0]


def saving(folder: Path, **options: Any) -> pyreft.ReftTrainerForCausalLM:
    model, tokenizer = loreft_model(), make_tokenizer(pad=True, bos=True)
    settings = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2, **options)
    data = supervised(model, tokenizer)
    return pyreft.ReftTrainerForCausalLM(model, settings, seq2seq(tokenizer), train_dataset=data, eval_dataset=data)


def test_a_second_run_replaces_the_checkpoints_of_the_first(tmp_path: Path) -> None:
    first, second = saving(tmp_path), saving(tmp_path, learning_rate=1e-3)
    first.train()
    first.save_model()
    second.train()
    assert not same(state(first.model), state(second.model))
    assert same(state(pyreft.ReftModel.load(tmp_path, make_llama())), state(first.model))
    second.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        assert same(state(pyreft.ReftModel.load(folder, make_llama())), state(second.model)), folder


def test_resuming_and_the_best_model(tmp_path: Path) -> None:
    whole = saving(tmp_path)
    whole.train()
    resumed = saving(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(state(resumed.model), state(whole.model))
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    best = saving(tmp_path / "best", metric_for_best_model="loss", **options)
    seen: dict[int, Any] = {}

    class Keep(TrainerCallback):
        def on_save(self, args: Any, trainer_state: Any, control: Any, **kwargs: Any) -> None:
            seen[trainer_state.global_step] = state(best.model)

    best.add_callback(Keep())
    best.train()
    assert same(state(best.model), seen[2])  # the greater loss is the earlier one
    assert not same(seen[4], seen[2])


class LoRA(nn.Module):
    """W h + B A h over a frozen linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.randn(2, linear.in_features) / 8)
        self.B = nn.Parameter(torch.zeros(linear.out_features, 2))

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h) + h @ self.A.T @ self.B.T


def lora_alone() -> pyreft.ReftModel:
    set_seed(3)
    base = make_llama()
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=[]))
    for block in base.model.layers:
        block.self_attn.o_proj = LoRA(block.self_attn.o_proj)
    return model


@pytest.mark.parametrize("dummy", ["locations of no intervention", "two-dimensional", "none"])
def test_lora_alone(tmp_path: Path, dummy: str) -> None:
    """pyreft's LoRA baseline: a ReftModel without interventions, whose batches have dummy locations."""
    model, tokenizer = lora_alone(), make_tokenizer(pad=True, bos=True)
    data = supervised(model, tokenizer)
    for item in data.result:
        if dummy == "two-dimensional":
            item["intervention_locations"] = [0]
        if dummy == "none":
            del item["intervention_locations"]
    if dummy != "none":
        batch = seq2seq(tokenizer)([data[0], data[1]])
        assert batch["intervention_locations"].shape == (2, 1 if dummy == "two-dimensional" else 0)
    options = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    trainer = pyreft.ReftTrainerForCausalLM(model, options, seq2seq(tokenizer), train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    again = lora_alone()
    fresh = pyreft.ReftTrainerForCausalLM(again, options, seq2seq(tokenizer), train_dataset=data, eval_dataset=data)
    assert fresh.evaluate()["eval_loss"] == pytest.approx(before)
    fresh.train(resume_from_checkpoint=True)
    assert fresh.evaluate()["eval_loss"] == pytest.approx(after)
