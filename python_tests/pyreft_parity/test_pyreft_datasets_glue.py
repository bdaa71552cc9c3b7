"""GLUE rows as pyreft makes them: the same tokens, labels and positions, but for the token that it pads at the end."""

from __future__ import annotations

from typing import Any

import pytest
from data_peer import rows
from pyreft import dataset as stock
from tiny_models import tiny_model
from training_support import make_encoder_tokenizer
from transformers import PreTrainedTokenizerFast

from reft_kernels import ReftConfig, get_reft_model
from reft_kernels.training.glue import GLUE_TASKS, GlueDataset, GlueTask

POSITIONS = ["f1", "f3", "f11", "f2+l2", "f3+l1", "f40+l30"]


class StockGlue(stock.ReftDataset):
    """pyreft's base class, used as its examples/loreft does for GLUE: one padding token at the end, masked."""

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        self.glue: GlueTask = kwargs["glue"]
        self.pad_mode = "last"
        self.fields_to_pad = ["input_ids"]

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        texts = [data_item[name] for name in self.glue.fields]
        encoded = self.tokenizer(
            *texts, max_length=self.tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        ids = encoded["input_ids"][0]
        return {"input_ids": ids, "labels": data_item["label"]}, len(ids)


def encoder_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    made = make_encoder_tokenizer()
    made.model_max_length = max_length
    return made


def glue_rows(task: GlueTask) -> list[dict[str, Any]]:
    made = []
    for index, row in enumerate(rows(10)):
        texts = dict(zip(task.fields, (row["instruction"], row["output"]), strict=False))
        made.append({**texts, "label": index % task.num_labels if task.labels else index / 2})
    return made


@pytest.mark.parametrize("max_length", [256, 12])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ["cola", "mnli", "stsb"])
def test_glue(name: str, positions: str, tied: bool, max_length: int) -> None:
    task, made = GLUE_TASKS[name], encoder_tokenizer(max_length)
    base = tiny_model("roberta")
    model = get_reft_model(base, ReftConfig(method="loreft", layers=[0, 2], rank=1, positions=positions, tied=tied))
    ours = GlueDataset(made, model, glue_rows(task), task, max_length=max_length)
    settings = {"position": positions, "num_interventions": len(model.representations), "share_weights": tied}
    theirs = StockGlue("glue", name, made, dataset=glue_rows(task), glue=task, **settings)
    assert len(ours) == len(theirs) == 10
    for mine, item in zip(ours, theirs, strict=True):
        length = len(mine["input_ids"])
        assert item["input_ids"].tolist() == [*mine["input_ids"].tolist(), made.pad_token_id]
        assert item["attention_mask"].tolist() == [1] * length + [0]
        assert item["labels"] == mine["labels"]
        # Slots that a short text leaves empty are at the padding token there, and -1 here.
        wanted = [[-1 if column == length else column for column in line] for line in item["intervention_locations"]]
        assert mine["intervention_locations"].tolist() == wanted


def test_the_cases_have_long_and_short_texts() -> None:
    """Else neither the cut nor the empty slots above would be compared."""
    made, task = encoder_tokenizer(256), GLUE_TASKS["cola"]
    model = get_reft_model(tiny_model("roberta"), ReftConfig(method="loreft", layers=[0], rank=1, positions="f3"))
    data = GlueDataset(made, model, glue_rows(task), task)
    assert min(data.lengths) < 6
    assert max(data.lengths) > 12
