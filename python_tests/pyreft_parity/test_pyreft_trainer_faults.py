"""The faults of pyreft's trainers: each is shown on pyreft, and that ours has none of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyreft
import pytest
import torch
import torch.distributed as dist
from data_peer import rows, tokenizer
from peer import Models, build_models, ours_like
from peer import stock as intervention
from pyreft import reft_trainer as stock
from tiny_models import VOCABULARY, WIDTH, tiny_model
from torch import Tensor
from training_support import make_llama
from transformers import DataCollatorWithPadding, TrainingArguments

import reft_kernels
from reft_kernels.training import classification
from reft_kernels.training.data_modules import make_last_position_supervised_data_module


def models() -> Models:
    torch.manual_seed(0)
    return build_models(make_llama, "LoreftIntervention", [0, 1], 2, positions="l1", tied=True)


def data_module(made: Any = None) -> dict[str, Any]:
    prompts, outputs = [row["instruction"] for row in rows()], [row["output"] for row in rows()]
    made = made if made is not None else tokenizer()
    return make_last_position_supervised_data_module(made, None, prompts, outputs, num_interventions=2)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        }
    )


def batch_of(module: dict[str, Any]) -> dict[str, Tensor]:
    return dict(module["data_collator"]([module["train_dataset"][index] for index in range(4)]))


def test_the_losses_agree(tmp_path: Path) -> None:
    both, module = models(), data_module()
    theirs = stock.ReftTrainerForCausalLM(model=both.theirs, args=arguments(tmp_path), **module)
    ours = reft_kernels.ReftTrainerForCausalLM(model=both.ours, args=arguments(tmp_path), **module)
    wanted = theirs.compute_loss(both.theirs, batch_of(module))
    found = ours.compute_loss(both.ours, batch_of(module))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_tokenizer_of_the_readme(tmp_path: Path) -> None:
    both, module, made = models(), data_module(), tokenizer()
    with pytest.raises(TypeError, match="tokenizer"):
        stock.ReftTrainerForCausalLM(model=both.theirs, tokenizer=made, args=arguments(tmp_path), **module)
    reft_kernels.ReftTrainerForCausalLM(model=both.ours, tokenizer=made, args=arguments(tmp_path), **module).train()


@pytest.mark.parametrize("kind", ["ReftTrainer", "ReftTrainerForCausalLM"])
def test_the_number_of_items_in_a_batch(tmp_path: Path, kind: str) -> None:
    both, module = models(), data_module()
    theirs = getattr(stock, kind)(model=both.theirs, args=arguments(tmp_path, remove_unused_columns=False), **module)
    with pytest.raises(TypeError, match="num_items_in_batch"):
        theirs.train()
    options = arguments(tmp_path, remove_unused_columns=False, logging_steps=1)
    ours = getattr(reft_kernels, kind)(model=both.ours, args=options, **module)
    ours.train()
    assert [entry["step"] for entry in ours.state.log_history if "loss" in entry] == [1, 2]


def test_evaluation_needs_a_loss_beside_the_outputs(tmp_path: Path) -> None:
    both, module = models(), data_module()
    module["eval_dataset"] = module["train_dataset"]

    class Accepting(stock.ReftTrainerForCausalLM):  # type: ignore[misc]
        """As pyreft's latest source, which takes and ignores the number of items."""

        def compute_loss(self, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    options = arguments(tmp_path, remove_unused_columns=False)
    theirs = Accepting(model=both.theirs, args=options, **module)
    first, _ = theirs.compute_loss(both.theirs, batch_of(module), return_outputs=True)
    assert not isinstance(first, Tensor)
    with pytest.raises(AttributeError):
        theirs.evaluate()
    ours = reft_kernels.ReftTrainerForCausalLM(model=both.ours, args=options, **module)
    assert ours.evaluate()["eval_loss"] > 0


def test_saving_over_what_is_there(tmp_path: Path) -> None:
    """pyreft keeps the stale weights with a warning, and nobody can make a model of what it saved."""
    both, module = models(), data_module()
    theirs = stock.ReftTrainerForCausalLM(model=both.theirs, args=arguments(tmp_path), **module)
    ours = reft_kernels.ReftTrainerForCausalLM(model=both.ours, args=arguments(tmp_path), **module)
    folders = {"theirs": tmp_path / "theirs", "ours": tmp_path / "ours"}
    contents = []
    for _ in range(2):
        theirs.save_model(str(folders["theirs"]))
        ours.save_model(str(folders["ours"]))
        files = sorted((folders["theirs"] / "intervenable_model").glob("intkey_*.bin"))
        contents.append((files[0].read_bytes(), (folders["ours"] / "adapter.safetensors").read_bytes()))
        for model in (both.theirs, both.ours):
            with torch.no_grad():
                next(iter(model.interventions.values())).learned_source.weight.add_(1)
    (old, our_old), (new, our_new) = contents
    assert old == new
    assert our_old != our_new
    assert not (folders["theirs"] / "intervenable_model" / "config.json").exists()
    with pytest.raises(TypeError, match="not iterable"):
        pyreft.ReftModel.load(str(folders["theirs"] / "intervenable_model"), make_llama())
    loaded = reft_kernels.ReftModel.load(folders["ours"], make_llama())
    saved = next(iter(both.ours.interventions.values())).learned_source.weight - 1
    torch.testing.assert_close(next(iter(loaded.interventions.values())).learned_source.weight, saved)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_loading_the_best_model_without_a_gpu(tmp_path: Path) -> None:
    both, module = models(), data_module()
    theirs = stock.ReftTrainerForCausalLM(model=both.theirs, args=arguments(tmp_path), **module)
    ours = reft_kernels.ReftTrainerForCausalLM(model=both.ours, args=arguments(tmp_path), **module)
    for trainer, name in ((theirs, "theirs"), (ours, "ours")):
        trainer.save_model(str(tmp_path / name))
        trainer.state.best_model_checkpoint = str(tmp_path / name)
    with pytest.raises(RuntimeError, match="CUDA"):
        theirs._load_best_model()
    with torch.no_grad():
        next(iter(both.ours.interventions.values())).learned_source.weight.zero_()
    ours._load_best_model()
    assert next(iter(both.ours.interventions.values())).learned_source.weight.abs().max() > 0


def decayed(trainer: Any) -> int:
    groups = trainer.create_optimizer().param_groups
    return sum(len(group["params"]) for group in groups if group["weight_decay"] > 0)


def test_weight_decay_reaches_no_parameter(tmp_path: Path) -> None:
    both, module = models(), data_module()
    options = arguments(tmp_path, weight_decay=0.1)
    assert decayed(stock.ReftTrainerForCausalLM(model=both.theirs, args=options, **module)) == 0
    assert decayed(reft_kernels.ReftTrainerForCausalLM(model=both.ours, args=options, **module)) == 2
    compat = reft_kernels.ReftTrainerForCausalLM(model=both.ours, args=options, pyreft_compat=True, **module)
    assert decayed(compat) == 0


def test_other_inputs_are_dropped(tmp_path: Path) -> None:
    both, module = models(), data_module()
    batch = batch_of(module)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None] * 3
    plain = {name: value for name, value in batch.items() if name != "position_ids"}
    theirs = stock.ReftTrainer(model=both.theirs, args=arguments(tmp_path), **module)
    ours = reft_kernels.ReftTrainer(model=both.ours, args=arguments(tmp_path), **module)
    assert theirs.compute_loss(both.theirs, dict(batch)) == theirs.compute_loss(both.theirs, dict(plain))
    assert ours.compute_loss(both.ours, dict(batch)) != ours.compute_loss(both.ours, dict(plain))


def test_the_order_of_distributed_data_is_the_same_in_every_epoch(tmp_path: Path) -> None:
    both, module = models(), data_module()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        theirs = stock.ReftTrainerForCausalLMDistributed(model=both.theirs, args=arguments(tmp_path), **module)
        loader = theirs.get_train_dataloader()
        epochs = [[batch["input_ids"].tolist() for batch in loader] for _ in range(2)]
        assert epochs[0] == epochs[1]
    finally:
        dist.destroy_process_group()
    seen = []
    ours = reft_kernels.ReftTrainerForCausalLMDistributed(
        model=both.ours, args=arguments(tmp_path, max_steps=-1, num_train_epochs=2), **module
    )
    both.ours.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    ours.train()
    assert len(seen) == 4
    assert seen[:2] != seen[2:]


# Sequence classification


def classifiers(**options: Any) -> Models:
    """pyvene knows RoBERTa's layers by their paths alone."""
    torch.manual_seed(0)
    modules = [intervention("LoreftIntervention", WIDTH, 2) for _ in range(2)]
    places = [f"roberta.encoder.layer[{layer}].output" for layer in range(2)]

    def config(kind: Any, ours: bool) -> Any:
        listed = [
            {"component": place, "low_rank_dimension": 2, "intervention": ours_like(module) if ours else module}
            for place, module in zip(places, modules, strict=True)
        ]
        return kind(representations=listed)

    def base() -> Any:
        return tiny_model("roberta", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options)

    theirs = pyreft.get_reft_model(base(), config(pyreft.ReftConfig, False))
    return Models(theirs, reft_kernels.get_reft_model(base(), config(reft_kernels.ReftConfig, True)))


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, labels: list[Any]) -> None:
        self.items = [
            {
                "input_ids": torch.randint(3, VOCABULARY, (5,)),
                "attention_mask": torch.ones(5, dtype=torch.long),
                "labels": label,
                "intervention_locations": [[0], [0]],
            }
            for label in labels
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def trainers(both: Models, folder: Path, labels: list[Any]) -> tuple[Any, Any, dict[str, Tensor]]:
    data = Texts(labels)
    collate = reft_kernels.ReftDataCollator(DataCollatorWithPadding(tokenizer()))
    options = {
        "args": arguments(folder, remove_unused_columns=False),
        "train_dataset": data,
        "eval_dataset": data,
        "data_collator": collate,
        "compute_metrics": lambda prediction: {"mean": float(prediction.predictions.mean())},
    }
    theirs = stock.ReftTrainerForSequenceClassification(model=both.theirs, **options)
    ours = reft_kernels.ReftTrainerForSequenceClassification(model=both.ours, **options)
    return theirs, ours, dict(collate(data.items))


@pytest.mark.parametrize(
    ("options", "labels"),
    [({"num_labels": 3}, [0, 2, 1, 1]), ({"num_labels": 2}, [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])],
    ids=["single label", "several labels"],
)
def test_the_losses_of_classifiers_agree(tmp_path: Path, options: dict[str, Any], labels: list[Any]) -> None:
    both = classifiers(**options)
    theirs, ours, batch = trainers(both, tmp_path, labels)
    wanted, output = theirs.compute_loss(both.theirs, dict(batch), return_outputs=True)
    found, ours_output = ours.compute_loss(both.ours, dict(batch), return_outputs=True)
    torch.testing.assert_close(ours_output.logits, output.logits)
    torch.testing.assert_close(found, wanted)


def test_scores_are_rounded_to_bfloat16(tmp_path: Path) -> None:
    both = classifiers(num_labels=1)
    scores = [0.301, 1.003, 2.007, -3.013]
    theirs, ours, batch = trainers(both, tmp_path, scores)
    wanted, output = theirs.compute_loss(both.theirs, dict(batch), return_outputs=True)
    logits = output.logits.flatten().double()
    exact = (logits - torch.tensor(scores).double()).square().mean()
    rounded = (logits - torch.tensor(scores).bfloat16().double()).square().mean()
    assert wanted.item() == pytest.approx(rounded.item(), rel=1e-6)
    assert abs(rounded - exact) > 1e-4 * exact
    found = ours.compute_loss(both.ours, dict(batch))
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)
    losses, _ = classification.target_losses(output.logits, torch.tensor(scores), "regression")
    assert losses.mean().item() == pytest.approx(exact.item(), rel=1e-6)


def test_classifiers_train_and_evaluate(tmp_path: Path) -> None:
    both = classifiers(num_labels=3)
    theirs, ours, _ = trainers(both, tmp_path, [0, 2, 1, 1])
    with pytest.raises(TypeError, match="num_items_in_batch"):
        theirs.train()
    with pytest.raises(TypeError, match="not subscriptable"):
        theirs.evaluate(None)
    ours.train()
    found = ours.evaluate()
    assert {"eval_loss", "eval_mean"} <= set(found)
