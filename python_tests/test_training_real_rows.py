"""The paper's data sets, where REFT_KERNELS_DATA names a folder that has them: templates, golds and labels hold."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model
from training_support import make_encoder_tokenizer

from reft_kernels import ReftConfig, get_reft_model
from reft_kernels.training.answers import answer_rule
from reft_kernels.training.data import read_jsonl
from reft_kernels.training.glue import GlueDataset, glue_task
from reft_kernels.training.prompts import COMMONSENSE_TRIGGER, prompt_and_target

LETTERED = r"Please choose the correct answer to the question: .+\n\nAnswer1: .+\n\nAnswer format: answer1(/answer\d)+"
TEMPLATES = {
    "boolq": r"Please answer the following question with true or false, question: .+\?\n\nAnswer format: true/false",
    "piqa": r"Please choose the correct solution to the question: .+\n\nSolution1: .+\n\nSolution2: .+\n\n"
    "Answer format: solution1/solution2",
    "hellaswag": r"Please choose the correct ending to complete the given sentence: .+: .+\n\n"
    r"Ending1: .+ Ending2: .+ Ending3: .+ Ending4: .+\n\nAnswer format: ending1/ending2/ending3/ending4",
    "winogrande": r"Please choose the correct answer to fill in the blank to complete the given sentence: .+\n\n"
    "Option1: .+ Option2: .+ Answer format: option1/option2",
}


@pytest.fixture(scope="module")
def data() -> Path:
    folder = os.environ.get("REFT_KERNELS_DATA")
    if not folder:
        pytest.skip("REFT_KERNELS_DATA names no folder with the paper's data sets")
    return Path(folder)


def found(folder: Path, pattern: str) -> list[Path]:
    files = sorted(folder.glob(pattern))
    assert files, f"no {pattern} in {folder}"
    return files


def test_commonsense(data: Path) -> None:
    rule = answer_rule("commonsense")
    for path in found(data, "commonsense/*/*.jsonl.gz"):
        template = re.compile(TEMPLATES.get(path.parent.name, LETTERED), re.DOTALL)
        for row in read_jsonl(path):
            assert template.fullmatch(row.instruction), f"{path}: {row.instruction}"
            assert rule.gold(None, row.output) == row.answer
            wanted = (f"{row.instruction}\n", COMMONSENSE_TRIGGER + str(row.answer))
            assert prompt_and_target(row.instruction, row.input, row.output) == wanted


def test_arithmetic(data: Path) -> None:
    rule = answer_rule("gsm8k")
    for path in found(data, "math/*/*.jsonl.gz"):
        for row in read_jsonl(path, needs_output=False):
            gold = rule.gold(row.answer, row.output)
            assert rule.match(gold, gold), f"{path}: {row.answer}"
            if path.name.startswith("test"):
                continue  # outputs there are those of a model
            assert rule.match(rule.gold(None, row.output), gold)
            _, target = prompt_and_target(row.instruction, row.input, row.output, style="gsm8k")
            assert target is not None
            assert "####" not in target
            assert rule.match(rule.extract(target, gold), gold)


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_glue(data: Path) -> None:
    model = get_reft_model(tiny_model("roberta"), ReftConfig(method="loreft", layers="all", rank=1, positions="f3"))
    for path in found(data, "glue/*/*.jsonl.gz"):
        task = glue_task(path.parent.name)
        given = rows_of(path)
        items = GlueDataset(make_encoder_tokenizer(), model, given[:2000], task)
        assert [item["labels"] for item in items] == [row["label"] for row in given[:2000]]
        if task.labels:
            assert {row["label"] for row in given} == set(range(task.num_labels))
        else:
            assert all(0 <= row["label"] <= 5 for row in given)
