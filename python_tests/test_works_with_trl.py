"""A ReftModel in the form of its base model, and TRL's trainers with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from datasets import Dataset
from hand_edits import strengthen
from tiny_models import VOCABULARY, random_batch, tiny_model
from torch import Tensor
from training_support import make_llama, make_tokenizer, rows

import reft_kernels.hooks
from reft_kernels import as_pretrained_model
from reft_kernels.config import ReftConfig
from reft_kernels.model import ReftModel, get_reft_model

LAYERS = 2


def make(**settings: Any) -> ReftModel:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    defaults = {"method": "loreft", "layers": "all", "rank": 2, "positions": "f1+l1"}
    reft_model = get_reft_model(model, ReftConfig(**{**defaults, **settings}))
    strengthen(reft_model.interventions)
    return reft_model.eval()


def batch_of(lengths: list[int]) -> dict[str, Tensor]:
    batch = random_batch(lengths)
    labels = batch["input_ids"].masked_fill(torch.arange(max(lengths)) < 2, -100)
    return {**batch, "labels": labels}


@pytest.fixture
def edits_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each edit that is made."""
    made: list[int] = []
    edit_rows = reft_kernels.hooks.edit_rows

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        made.append(len(args[0]))
        return edit_rows(*args, **kwargs)

    monkeypatch.setattr(reft_kernels.hooks, "edit_rows", counted)
    return made


def test_it_is_the_base_model_with_edits() -> None:
    reft_model = make()
    base = reft_model.model
    model = as_pretrained_model(reft_model)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert type(model).__name__ == type(base).__name__
    assert model.config is base.config
    assert model.get_input_embeddings() is base.get_input_embeddings()
    ours = {f"interventions.{name}" for name, _ in reft_model.interventions.named_parameters()}
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in base.named_parameters()} | ours
    assert "interventions" not in dict(base.named_children())
    batch = batch_of([6, 4])
    wanted = reft_model(**batch)
    plain = base(**batch)
    assert model(**batch).logits.equal(wanted.logits)
    assert model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss.equal(wanted.loss)
    assert model.forward(**batch).logits.equal(wanted.logits)
    assert base(**batch).logits.equal(plain.logits)
    where = {"unit_locations": [[[1], [2]]] * 3}
    assert model(**batch, **where).logits.equal(reft_model(**batch, **where).logits)
    with reft_model.disable_edits():
        assert model(**batch).logits.equal(plain.logits)
    with pytest.raises(TypeError, match="reft_model must be a ReftModel, got Llama"):
        as_pretrained_model(base)


def test_it_generates_as_the_reft_model() -> None:
    reft_model = make()
    model = as_pretrained_model(reft_model)
    prompt = random_batch([6, 4], side="left")
    options = {"max_new_tokens": 4, "do_sample": False}
    wanted = reft_model.generate(**prompt, **options)
    assert model.generate(**prompt, **options).equal(wanted)
    assert model.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"], **options).equal(wanted)
    assert not reft_model.model.generate(**prompt, **options).equal(wanted)


def test_it_trains_the_interventions() -> None:
    reft_model = make()
    model = as_pretrained_model(reft_model).train()
    assert model.training
    assert reft_model.training
    assert all(module.training for module in reft_model.modules())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.startswith("interventions.") for name in trained)
    batch = batch_of([6, 4])
    model(**batch).loss.backward()
    expected = torch.autograd.grad(reft_model(**batch).loss, list(reft_model.interventions.parameters()))
    for p, grad in zip(reft_model.interventions.parameters(), expected, strict=True):
        assert p.grad is not None
        assert p.grad.equal(grad)
    assert not any(module.training for module in model.eval().modules())


def test_copies_are_apart() -> None:
    reft_model = make()
    model = as_pretrained_model(reft_model)
    copied = copy.deepcopy(model)
    batch = batch_of([6, 4])
    wanted = model(**batch).logits
    assert copied(**batch).logits.equal(wanted)
    with torch.no_grad():
        for p in copied.interventions.parameters():
            p.add_(0.1)
    assert not copied(**batch).logits.equal(wanted)
    assert model(**batch).logits.equal(wanted)


def test_its_vocabulary_grows_with_the_base_model() -> None:
    reft_model = make()
    model = as_pretrained_model(reft_model)
    model.resize_token_embeddings(VOCABULARY + 3)
    assert reft_model.model.lm_head is model.lm_head
    ids = torch.tensor([[VOCABULARY + 2, 4]])
    assert reft_model(input_ids=ids).logits.shape == (1, 2, VOCABULARY + 3)
    assert model(input_ids=ids).logits.equal(reft_model(input_ids=ids).logits)


def test_what_it_saves(tmp_path: Path) -> None:
    reft_model = make()
    model = as_pretrained_model(reft_model)
    (tmp_path / "other").write_text("stays")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"other", "model.safetensors"}
    batch = batch_of([6, 4])
    wanted = reft_model(**batch).logits
    assert ReftModel.load(tmp_path, tiny_model("llama"))(**batch).logits.equal(wanted)
    other = make()
    with torch.no_grad():
        for p in other.interventions.parameters():
            p.add_(0.1)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(name.startswith("interventions.") for name in state)
    result = as_pretrained_model(other).load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert other(**batch).logits.equal(wanted)


def test_compiled() -> None:
    reft_model = make()
    model = as_pretrained_model(reft_model)
    batch = batch_of([6, 4])
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, reft_model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_trainer_resumes_and_loads_its_best_model(tmp_path: Path) -> None:
    """The plain Trainer, which knows how to load what a PreTrainedModel saves."""
    pytest.importorskip("accelerate")
    items = [{name: value[0] for name, value in batch_of([6]).items()} for _ in range(8)]

    def trainer_of(reft_model: ReftModel, **options: Any) -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            str(tmp_path), learning_rate=0.05, report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
            per_device_train_batch_size=4, logging_strategy="no", **options,
        )  # fmt: skip
        return transformers.Trainer(as_pretrained_model(reft_model), arguments, train_dataset=items, eval_dataset=items)

    reft_model = make()
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2, "max_steps": 6}
    trainer = trainer_of(reft_model, **steps, load_best_model_at_end=True)
    trainer.train()
    wanted = {name: p.detach().clone() for name, p in reft_model.interventions.named_parameters()}
    assert trainer.state.best_model_checkpoint
    best = ReftModel.load(trainer.state.best_model_checkpoint, tiny_model("llama"))
    assert all(p.equal(wanted[name]) for name, p in best.interventions.named_parameters())
    resumed = make()
    trainer_of(resumed, **steps).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    last = ReftModel.load(tmp_path / "checkpoint-6", tiny_model("llama"))
    for one, other in zip(resumed.interventions.parameters(), last.interventions.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# TRL's own trainers


def make_trl(**settings: Any) -> tuple[ReftModel, Any]:
    tokenizer = make_tokenizer(pad=True)
    model = make_llama(len(tokenizer) + 10)
    model.config.pad_token_id = tokenizer.pad_token_id
    defaults = {"method": "loreft", "layers": "all", "rank": 4, "positions": "f1+l2"}
    return get_reft_model(model, ReftConfig(**{**defaults, **settings})), tokenizer


def arguments_of(kind: Any, folder: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {"learning_rate": 0.02, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    defaults |= {"per_device_train_batch_size": 8, "save_strategy": "no", "logging_steps": 1, "bf16": False, "seed": 0}
    defaults["gradient_checkpointing"] = False  # TRL's default is True, and edits are counted
    return kind(str(folder), **{**defaults, **options})


def completions() -> Dataset:
    return Dataset.from_list([{"prompt": row["instruction"], "completion": " " + row["output"]} for row in rows(16)])


trl_warnings = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@trl_warnings
@pytest.mark.parametrize("settings", [{}, {"component": "mlp_output", "positions": None}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_supervised_finetuning(
    checkpointing: bool, settings: dict[str, Any], tmp_path: Path, edits_made: list[int]
) -> None:
    trl = pytest.importorskip("trl")
    reft_model, tokenizer = make_trl(**settings)
    frozen = {name: value.clone() for name, value in reft_model.model.state_dict().items()}
    arguments = arguments_of(
        trl.SFTConfig, tmp_path, max_steps=12, gradient_checkpointing=checkpointing, save_strategy="steps", save_steps=6
    )
    trainer = trl.SFTTrainer(
        model=as_pretrained_model(reft_model), args=arguments, train_dataset=completions(), eval_dataset=completions(),
        processing_class=tokenizer,
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        expected = reft_model.eval()(**batch, use_cache=False).loss
        found = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    before = trainer.evaluate()["eval_loss"]
    edits_made.clear()
    trainer.train()
    assert len(edits_made) >= 12 * LAYERS
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    assert all(value.equal(frozen[name]) for name, value in reft_model.model.state_dict().items())
    trainer.save_model()
    loaded = ReftModel.load(tmp_path, make_trl(**settings)[0].model)
    with torch.no_grad():
        batch["use_cache"] = False
        torch.testing.assert_close(loaded(**batch).loss, reft_model.eval()(**batch).loss, rtol=0, atol=0)


@trl_warnings
def test_preferences(tmp_path: Path, edits_made: list[int]) -> None:
    """The reference is the base model itself, which is not edited."""
    trl = pytest.importorskip("trl")
    reft_model, tokenizer = make_trl()
    pairs = [{"prompt": row["instruction"], "chosen": " " + row["output"], "rejected": " no"} for row in rows(16)]
    trainer = trl.DPOTrainer(
        model=as_pretrained_model(reft_model), ref_model=reft_model.model,
        args=arguments_of(trl.DPOConfig, tmp_path, max_steps=10, per_device_train_batch_size=4),
        train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with reft_model.disable_edits(), torch.no_grad():
        wanted = trainer.compute_ref_log_probs(trainer.model, batch)
    edits_made.clear()
    with torch.no_grad():
        found = trainer.compute_ref_log_probs(trainer.ref_model, batch)
        assert not edits_made
        edited = trainer.compute_ref_log_probs(trainer.model, batch)
        assert len(edits_made) == LAYERS
    for one, other, changed in zip(found, wanted, edited, strict=True):
        assert one.equal(other)
        assert not one.equal(changed)
    edits_made.clear()
    trainer.train()
    assert len(edits_made) == 10 * LAYERS  # of the policy's forwards alone
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@trl_warnings
def test_lora_beside_the_edits(tmp_path: Path, edits_made: list[int]) -> None:
    """A base model with LoRA, both trained; and LoRA that the trainer adds, whose edits stay as they are."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    plain, tokenizer = make_trl()
    reft_model = get_reft_model(
        peft.get_peft_model(plain.model, config), ReftConfig(method="loreft", layers="all", rank=4)
    )
    reft_model.model.enable_adapter_layers()
    model = as_pretrained_model(reft_model)
    trainer = trl.SFTTrainer(
        model=model, args=arguments_of(trl.SFTConfig, tmp_path, max_steps=6), train_dataset=completions(),
        processing_class=tokenizer,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in reft_model.named_parameters()}
    edits_made.clear()
    trainer.train()
    assert len(edits_made) >= 6 * LAYERS
    moved = {name for name, p in reft_model.named_parameters() if not p.equal(before[name])}
    assert moved == {name for name in before if "lora_" in name or name.startswith("interventions.")}
    ids = torch.tensor([trainer.train_dataset[0]["input_ids"]])
    with torch.no_grad(), reft_model.disable_edits(), reft_model.model.disable_adapter():
        wanted = reft_model(input_ids=ids).logits
    with torch.no_grad(), model.disable_adapter():
        assert model(input_ids=ids).logits.equal(wanted)
    with pytest.raises(ValueError, match="an adapter as the reference would have the edits too"):
        trl.DPOTrainer(
            model=model, args=arguments_of(trl.DPOConfig, tmp_path), processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": "which", "chosen": " a", "rejected": " b"}]),
        )  # fmt: skip


@trl_warnings
def test_lora_added_by_the_trainer(tmp_path: Path, edits_made: list[int]) -> None:
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    reft_model, tokenizer = make_trl()
    trainer = trl.SFTTrainer(
        model=as_pretrained_model(reft_model), args=arguments_of(trl.SFTConfig, tmp_path, max_steps=3),
        train_dataset=completions(), processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in reft_model.interventions.named_parameters()}
    edits_made.clear()
    trainer.train()
    assert len(edits_made) >= 3 * LAYERS
    assert all(p.equal(before[name]) for name, p in reft_model.interventions.named_parameters())


@trl_warnings
def test_a_reft_model_itself_is_refused(tmp_path: Path) -> None:
    """Rather than trained without its edits: the trainers replace a model's forward."""
    trl = pytest.importorskip("trl")
    reft_model, tokenizer = make_trl()
    with pytest.raises((AttributeError, TypeError)):
        trl.SFTTrainer(
            model=reft_model, args=arguments_of(trl.SFTConfig, tmp_path), train_dataset=completions(),
            processing_class=tokenizer,
        )  # fmt: skip
