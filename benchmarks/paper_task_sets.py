"""The data sets of benchmarks.paper_tasks, the recipe of each, and what a small budget changes in it.

Ranks, positions, dropout and decay of LoReFT and DiReFT are those of the recipes (the paper's); so are their learning
rates for language models. LoRA's settings are those of its users: rank 8, alpha 16 and 3e-4 for a language model (as
LLM-Adapters'; on UltraFeedback, where ReFT edits four layers with rank 4, rank 4 in all layers), rank and alpha 8 for
an encoder (as the LoRA paper's RoBERTa-base). Batches for language models are smaller than the recipes', all alike, so
that a small budget has enough steps.

Of a method's settings only the learning rates for GLUE were chosen by a score, on held-out training rows of the task
(benchmarks.paper_task_rates): the recipes' are for tens of epochs, and MiniLM learns little with them in some hundred
steps. The best epoch on GLUE is chosen on a tenth of the training rows as well, so that all rows of the evaluation
files are left to report on. No setting of a method was chosen on rows that are reported; the budgets of OpenBookQA,
CoLA and STS-B, the same for all methods, were raised when with smaller ones nothing had been learned of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reft_kernels.recipes import JobSettings, find_recipe

METHODS = ("loreft", "nodireft", "lora", "frozen")
REFT_METHODS = ("loreft", "nodireft")
LANGUAGE_LORA = {"lr": 3e-4, "lora_alpha": 16, "dropout": 0.05, "warmup": 0.1, "weight_decay": 0.0}


# By `python -m benchmarks.paper_task_rates`; of RTE they were not tried, it has those of SST-2.
GLUE_RATES: Mapping[str, Mapping[str, float]] = {
    "sst2": {"loreft": 3e-3, "nodireft": 1e-2, "lora": 1e-3, "frozen": 3e-1},
    "cola": {"loreft": 3e-3, "nodireft": 3e-3, "lora": 3e-3, "frozen": 1e-1},
    "rte": {"loreft": 3e-3, "nodireft": 1e-2, "lora": 1e-3, "frozen": 3e-1},
    "stsb": {"loreft": 1e-2, "nodireft": 1e-2, "lora": 1e-3, "frozen": 3e-1},
}


@dataclass(frozen=True)
class Budget:
    """What every method may use: the first training rows, optimiser steps, and rows to be scored on."""

    examples: int
    steps: int
    eval_rows: int


@dataclass(frozen=True)
class TaskSet:
    """One training and what is scored after it.

    Attributes:
        family: of the paper's four.
        recipe: the settings of LoReFT.
        direft: the recipe of DiReFT, and the one of LoReFT that it is a variant of.
        train, tests: files under the data folder. Without tests the last rows of ``train`` are held out.
        budget: by default.
        settings: what differs from the recipe, for every method.
        reft, lora: what differs from it further for ReFT methods and for LoRA.
        rates: learning rates instead of those, by method.
        samples: whether texts are generated as well, to be read.
    """

    family: str
    recipe: str
    direft: tuple[str, str]
    train: str
    tests: tuple[str, ...]
    budget: Budget
    settings: Mapping[str, Any] = field(default_factory=dict)
    reft: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    samples: bool = False

    @property
    def encoder(self) -> bool:
        """Whether the model is an encoder with a classifier's head."""
        return self.family == "GLUE"


def _commonsense(name: str, budget: Budget) -> TaskSet:
    folder = f"commonsense/{name}"
    return TaskSet(
        "commonsense",
        "commonsense/small",
        ("commonsense/direft", "commonsense"),
        f"{folder}/train.jsonl.gz",
        (f"{folder}/test.jsonl.gz",),
        budget,
        {"batch_size": 8, "accumulation": 1, "eval_batch_size": 16},
        {"cache_frozen": "memory"},
        LANGUAGE_LORA,
    )


def _glue(name: str, budget: Budget) -> TaskSet:
    return TaskSet(
        "GLUE",
        f"glue/{name}",
        (f"glue/{name}/direft", f"glue/{name}"),
        f"glue/{name}/train.jsonl.gz",
        (f"glue/{name}/dev.jsonl.gz",),
        budget,
        {"held_out": "share:0.1", "batch_size": 32},
        lora={"rank": 8, "lora_alpha": 8, "dropout": 0.0, "warmup": 0.06, "weight_decay": 0.0},
        rates=GLUE_RATES[name],
    )


TASK_SETS: Mapping[str, TaskSet] = {
    "ARC-Easy": _commonsense("ARC-Easy", Budget(400, 100, 250)),
    "openbookqa": _commonsense("openbookqa", Budget(800, 300, 500)),
    "boolq": _commonsense("boolq", Budget(400, 100, 250)),
    "piqa": _commonsense("piqa", Budget(400, 100, 250)),
    "gsm8k": TaskSet(
        "arithmetic",
        "gsm8k",
        ("gsm8k/direft", "gsm8k"),
        "math/gsm8k/train.jsonl.gz",
        ("math/gsm8k/test.jsonl.gz", "math/SVAMP/test.jsonl.gz"),
        Budget(96, 24, 32),
        {
            "held_out": "none",
            "batch_size": 4,
            "accumulation": 1,
            "max_length": 384,
            "max_new_tokens": 128,
            "eval_batch_size": 32,
        },
        lora=LANGUAGE_LORA,
    ),
    "ultrafeedback": TaskSet(
        "instructions",
        "instruct/ultrafeedback",
        ("instruct/ultrafeedback/direft", "instruct/ultrafeedback"),
        "instruct/ultrafeedback_1k.jsonl.gz",
        (),
        Budget(64, 16, 24),
        {"batch_size": 4, "accumulation": 1, "max_length": 512, "eval_batch_size": 4},
        {"cache_frozen": "memory"},
        {**LANGUAGE_LORA, "layers": "all"},
        samples=True,
    ),
    "sst2": _glue("sst2", Budget(2000, 150, 600)),
    "cola": _glue("cola", Budget(8000, 400, 600)),
    "rte": _glue("rte", Budget(2000, 150, 600)),
    "stsb": _glue("stsb", Budget(3600, 300, 600)),
}


def settings_of(
    name: str, train: Path, tests: Sequence[Path], methods: Sequence[str], budget: Budget, *, lengths: int | None = None
) -> tuple[JobSettings, dict[str, dict[str, Any]]]:
    """The settings of all methods on a set, and what each of them changes.

    Args:
        train, tests: the files.
        budget: see Budget.
        lengths: the longest row and the longest continuation instead of the set's own (for tiny models).
    """
    one = TASK_SETS[name]
    values = {
        **find_recipe(one.recipe).values,
        **one.settings,
        "data": (str(train),),
        "eval_data": tuple(map(str, tests)),
        "max_examples": budget.examples,
        "max_steps": budget.steps,
        "max_eval_examples": budget.eval_rows,
    }
    if lengths is not None:
        values |= {"max_length": lengths, "max_new_tokens": 4}
    direft, loreft = (find_recipe(recipe).values for recipe in one.direft)
    # What one budget is about stays as it is.
    kept = {"method", "batch_size", "epochs", "max_steps"}
    apart = {key: value for key, value in direft.items() if loreft.get(key) != value and key not in kept}
    changes = {
        "loreft": dict(one.reft),
        "nodireft": {**apart, **one.reft},
        "lora": dict(one.lora),
        "frozen": {},
    }
    for method, rate in one.rates.items():
        changes[method]["lr"] = rate
    return JobSettings.of(values), {method: changes[method] for method in methods}
