"""Rows, a tokenizer and the pairs of classes for the comparisons of pyreft's data sets with ours."""

from __future__ import annotations

import copy
from typing import Any

from pyreft import dataset as stock
from torch import Tensor
from training_support import COLOURS, make_tokenizer
from transformers import PreTrainedTokenizerFast

from reft_kernels.training import pair_datasets, pyreft_datasets, task_datasets

SHORT = "r"
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """With a start token, a padding token that no text holds, and a limit: pyreft fails without one of them."""
    made = make_tokenizer(**{"pad": True, "bos": True, **options})
    made.model_max_length = 512
    made.chat_template = CHAT
    return made


def row(index: int) -> dict[str, Any]:
    colour, other = COLOURS[index % 6], COLOURS[(index + 1) % 6]
    instruction = SHORT if index == 3 else f"which colour is the {colour} box{' please' * (index % 4)} ?"
    return {
        "instruction": instruction,
        "input": "" if index % 2 else f"the {colour} box",
        "output": f"the correct answer is {colour}",
        "rejected": f"{other}{' box' * (index % 5)}",
        "score": float(index % 3),
        "rejected_score": 1.0,
    }


def rows(count: int = 8, **extra: Any) -> list[dict[str, Any]]:
    return [{**row(index), **extra} for index in range(count)]


def plain(value: Any) -> Any:
    """Tensors as (dtype, list), so that items compare with ==."""
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value


def items(data: Any) -> list[Any]:
    return [plain(dict(data[index])) for index in range(len(data))]


FIELDS = {"instruction_field": "instruction", "input_field": "input"}
CLASSES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "raw": (stock.ReftRawDataset, pyreft_datasets.ReftRawDataset, {}),
    "supervised": (
        stock.ReftSupervisedDataset,
        task_datasets.ReftSupervisedDataset,
        {**FIELDS, "output_field": "output"},
    ),
    "generation": (
        stock.ReftGenerationDataset,
        task_datasets.ReftGenerationDataset,
        {"prompt_field": "instruction", "completion_field": "output"},
    ),
    "classification": (
        stock.ReftClassificationDataset,
        task_datasets.ReftClassificationDataset,
        {"input_field": "instruction", "label_field": "output"},
    ),
    "own text": (
        stock.ReftClassificationDataset,
        task_datasets.ReftClassificationDataset,
        {"input_field": "instruction", "label_field": "instruction"},
    ),
    "unlabelled": (
        stock.ReftClassificationDataset,
        task_datasets.ReftClassificationDataset,
        {"input_field": "instruction", "label_field": None},
    ),
    "preference": (
        stock.ReftPreferenceDataset,
        pair_datasets.ReftPreferenceDataset,
        {**FIELDS, "chosen_output_field": "output", "rejected_output_field": "rejected"},
    ),
    "reward": (
        stock.ReftRewardDataset,
        pair_datasets.ReftRewardDataset,
        {
            "conv_A_field": "output",
            "conv_B_field": "rejected",
            "prompt_field": "instruction",
            "conv_A_reward_field": "score",
            "conv_B_reward_field": "rejected_score",
        },
    ),
}
EARLY = ("supervised", "generation", "classification", "own text", "unlabelled")


def both(name: str, given: Any = None, tokenize: Any = None, **options: Any) -> tuple[Any, Any, Any]:
    """(pyreft's, ours with pyreft_compat, ours) on the same rows."""
    theirs, ours, fields = CLASSES[name]
    given = rows() if given is None else given
    settings = {"position": "f2+l3", "num_interventions": 4, **fields, **options}
    tokenize = tokenize if tokenize is not None else tokenizer()

    def make(kind: type, **more: Any) -> Any:
        return kind("task", None, tokenize, dataset=copy.deepcopy(given), **settings, **more)

    return make(theirs), make(ours, pyreft_compat=True), make(ours)


def unsunk(item: dict[str, Any], early: bool) -> dict[str, Any]:
    """A stock item of a prompt that is long enough, without its sink token and with the suffix in its place."""
    found = copy.deepcopy(item)
    for name, value in item.items():
        if name in ("input_ids", "labels", "chosen_output", "rejected_output") or name.endswith("mask"):
            found[name] = (value[0], value[1][1:])
    half = len(found["intervention_locations"]) // 2
    found["intervention_locations"] = [
        [p - 1 + (early and k >= half) for p in line if p > 0] + [-1] * line.count(0)
        for k, line in enumerate(found["intervention_locations"])
    ]
    return found
