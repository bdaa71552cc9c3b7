"""Two processes (gloo) with streamed, packed and length-grouped data see what one process sees."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import make_llama, make_tokenizer, rows, write_rows
from transformers import TrainingArguments, set_seed
from two_processes import WORLD, as_launched, free_port, in_processes

from reft_kernels import ReftConfig, get_reft_model
from reft_kernels.training import ReftTrainerForCausalLM, SupervisedCollator, SupervisedDataset
from reft_kernels.training.length_groups import length_grouping
from reft_kernels.training.orthonormality import Orthonormality
from reft_kernels.training.packing import PackedCollator
from reft_kernels.training.streaming import StreamedDataset
from reft_kernels.training.throughput import Throughput

pytestmark = pytest.mark.slow
KINDS = ("streamed", "packed", "grouped")
EXAMPLES, BATCH, STEPS = 24, 4, 9


class Seen(Throughput):
    """Also keeps the examples' tokens."""

    def __init__(self) -> None:
        super().__init__(peak_flops=1e12, show=False)
        self.examples: list[tuple[int, ...]] = []

    def see_batch(self, inputs: Any) -> None:
        super().see_batch(inputs)
        if "attention_mask" in inputs:
            for row, length in zip(inputs["input_ids"], inputs["attention_mask"].sum(1), strict=True):
                self.examples.append(tuple(row[:length].tolist()))


def run(kind: str, folder: Path, batch: int) -> dict[str, Any]:
    set_seed(1)
    config = ReftConfig(method="loreft", layers="all", rank=2, positions="f2+l2")
    reft_model = get_reft_model(make_llama(), config)
    made = [{**row, "output": row["output"] + " box" * (k % 5)} for k, row in enumerate(rows(EXAMPLES))]
    dataset: Any
    if kind == "streamed":
        dataset = StreamedDataset(make_tokenizer(), reft_model, folder / "rows.jsonl", shuffle=8, seed=4)
    else:
        dataset = SupervisedDataset(
            make_tokenizer(), reft_model, [row["instruction"] for row in made], [row["output"] for row in made]
        )
    seen = Seen()
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch, max_steps=STEPS, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        **(length_grouping() if kind == "grouped" else {}),
    )  # fmt: skip
    collator = PackedCollator(row_length=64) if kind == "packed" else SupervisedCollator()
    trainer = ReftTrainerForCausalLM(
        reft_model, arguments, collator, train_dataset=dataset, callbacks=[seen, Orthonormality()]
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    totals = seen.totals()
    return {
        "losses": [entry["loss"] for entry in logs],
        "errors": [entry["orthonormality_error"] for entry in logs],
        "examples": seen.examples,
        "tokens": totals["tokens_per_second"] * totals["step_ms"] * STEPS / 1000,
        "rows": totals["examples_per_second"] * totals["step_ms"] * STEPS / 1000,
    }


def worker(rank: int, folder: str, port: int) -> None:
    as_launched(rank, port)
    found = {kind: run(kind, Path(folder), BATCH) for kind in KINDS}
    torch.save(found, Path(folder) / f"rank-{rank}.pt")


def test_two_processes_see_what_one_sees(tmp_path: Path) -> None:
    made = [{**row, "output": row["output"] + " box" * (k % 5)} for k, row in enumerate(rows(EXAMPLES))]
    write_rows(tmp_path / "rows.jsonl", made)
    in_processes(worker, str(tmp_path), free_port())
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(WORLD)]
    for kind in KINDS:
        alone = run(kind, tmp_path, WORLD * BATCH)
        for found in ranks:
            losses, wanted = (torch.tensor(part["losses"]) for part in (found[kind], alone))
            torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-4)
            # Counted over both processes.
            assert found[kind]["tokens"] == pytest.approx(alone["tokens"], rel=1e-6)
            assert found[kind]["rows"] == pytest.approx(STEPS * WORLD * BATCH, rel=1e-6)
        together = Counter(example for found in ranks for example in found[kind]["examples"])
        assert together == Counter(alone["examples"])
        assert sum(together.values()) == (0 if kind == "packed" else STEPS * WORLD * BATCH)
    assert all(error < 1e-5 for found in ranks for kind in KINDS for error in found[kind]["errors"])
