"""Two processes (gloo, DistributedDataParallel) train as one does with batches of twice the size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import VOCABULARY, tiny_model
from torch import Tensor
from training_support import make_llama, make_tokenizer, rows
from transformers import TrainingArguments, set_seed
from two_processes import WORLD, in_processes

import reft_kernels as pyreft
from reft_kernels.training import SupervisedCollator

pytestmark = pytest.mark.slow
EXAMPLES, BATCH, EPOCHS = 12, 4, 2


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        ids = [torch.randint(3, VOCABULARY, (6,), generator=generator) for _ in range(EXAMPLES)]
        self.items = [{"input_ids": row, "labels": k % 3 if k % 4 else -100} for k, row in enumerate(ids)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def trainer_of(kind: str, folder: Path, batch: int) -> Any:
    set_seed(1)
    config = pyreft.ReftConfig(method="loreft", layers="all", rank=2)
    if kind == "ReftTrainerForSequenceClassification":
        base = tiny_model("roberta", num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model, data, collate = pyreft.get_reft_model(base, config), Texts(), None
    else:
        model = pyreft.get_reft_model(make_llama(), config)
        # Outputs of different lengths: a mean of the processes' means is not the mean over tokens.
        given = [{**row, "output": row["output"] + " box" * (k % 5)} for k, row in enumerate(rows(EXAMPLES))]
        fields = {"instruction_field": "instruction", "input_field": "input", "output_field": "output"}
        options = {"position": "f2+l2", "num_interventions": 2, "dataset": given, **fields}
        data, collate = pyreft.ReftSupervisedDataset(None, None, make_tokenizer(), **options), SupervisedCollator()
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        num_train_epochs=EPOCHS,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return getattr(pyreft, kind)(model, args, collate, train_dataset=data)


def run(kind: str, folder: Path, batch: int) -> dict[str, Any]:
    """Losses, final weights, and the first token ids of every sequence that the model was trained on, by step."""
    trainer = trainer_of(kind, folder, batch)
    seen: list[list[tuple[int, ...]]] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        kept = kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        lengths = [kept.shape[1]] * len(kept) if mask is None else mask.sum(1).tolist()
        seen.append([tuple(row[:length].tolist()) for row, length in zip(kept, lengths, strict=True)])

    trainer.model.model.register_forward_pre_hook(look, with_kwargs=True)
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": {name: p.detach().clone() for name, p in trainer.model.interventions.named_parameters()},
        "seen": seen,
    }


def work(rank: int, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.save(run(kind, Path(folder) / "run", BATCH // WORLD), f"{folder}/rank{rank}.pt")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize(
    "kind", ["ReftTrainerForCausalLM", "ReftTrainerForCausalLMDistributed", "ReftTrainerForSequenceClassification"]
)
def test_two_processes_train_as_one(tmp_path: Path, kind: str) -> None:
    in_processes(work, kind, str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD))
    whole = run(kind, tmp_path / "whole", BATCH)

    steps = EXAMPLES // BATCH * EPOCHS
    assert len(first["seen"]) == len(second["seen"]) == len(whole["seen"]) == steps
    for ours, theirs, joined in zip(first["seen"], second["seen"], whole["seen"], strict=True):
        assert len(ours) == len(theirs) == BATCH // WORLD
        assert not set(ours) & set(theirs)
        assert sorted(ours + theirs) == sorted(joined)
    each = steps // EPOCHS
    epochs = [[row for step in whole["seen"][k : k + each] for row in step] for k in (0, each)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]

    assert len(first["losses"]) == steps
    assert first["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    started = trainer_of(kind, tmp_path / "start", BATCH).model.interventions
    before = {name: p.detach().clone() for name, p in started.named_parameters()}
    for name, value in whole["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-3, atol=1e-4)
    assert max(largest(value - before[name]) for name, value in whole["weights"].items()) > 1e-2
    loaded = pyreft.ReftModel.load(tmp_path / "run" / f"checkpoint-{steps}", started_base(kind))
    for name, value in loaded.interventions.named_parameters():
        assert torch.equal(value, first["weights"][name]), name


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def started_base(kind: str) -> Any:
    return tiny_model("roberta", num_labels=3) if "Classification" in kind else make_llama()
