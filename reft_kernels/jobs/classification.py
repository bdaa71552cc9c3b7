"""Jobs that learn the labels of texts: GLUE, as the paper does it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from reft_kernels.jobs import processes
from reft_kernels.jobs.adapters import trained_heads
from reft_kernels.jobs.errors import UserError, user_errors
from reft_kernels.jobs.forward_passes import predict
from reft_kernels.jobs.held_out import ClassificationTrainer
from reft_kernels.jobs.rows import hold_out_rows, read_all, source_names
from reft_kernels.jobs.scores import Scores
from reft_kernels.jobs.trainer_arguments import RunOptions
from reft_kernels.recipes.settings import JobSettings, default_of
from reft_kernels.training.glue import GlueDataset, check_glue_row, glue_collator, glue_task
from reft_kernels.training.sources import SkippedRows
from reft_kernels.training.splits import glue_split, take

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reft_kernels.model import ReftModel

Rows = list[Mapping[str, Any]]


class ClassificationJob:
    """Texts of a GLUE task and their labels, scored by the task's metrics.

    Attributes: as LanguageJob's. With ``held_out="glue"`` the rows to choose by are a half of the evaluation data, and
    the other half is evaluated (paper, section 4.4).
    """

    trainer = ClassificationTrainer

    def __init__(self, settings: JobSettings) -> None:
        self.settings = settings
        self.share = processes.share
        for name in ("cache_frozen", "packing", "subspaces", "template", "trigger"):
            if getattr(settings, name) != default_of(name):
                raise UserError(f"--{name.replace('_', '-')}: is for language models, not for classifications")
        with user_errors("--glue"):
            self.task = glue_task(settings.glue or "")
        self.labels = self.task.num_labels
        self.regression = self.task.problem_type == "regression"
        self.best = (f"eval_{self.task.best_metric}", True)
        self.skipped = SkippedRows() if settings.skip_bad_rows else None
        self.train: Rows = []
        self.held_out: Rows = []
        self.evaluated: dict[str, Rows] = {}

    def read(self) -> None:
        """Read the rows to train on, those held out, and those to evaluate. Raises UserError naming source and row."""
        settings = self.settings
        parts = self._read(settings.data, "--data", settings.split, settings.max_examples)
        with user_errors("--held-out"):
            self.train, self.held_out = hold_out_rows(
                [row for part in parts for row in part], settings.held_out, settings.seed
            )
        self.read_evaluated()
        if settings.held_out != "glue":
            return
        if not self.evaluated:
            raise UserError("--held-out glue: takes its rows from --eval-data, which is not given")
        for name, rows in self.evaluated.items():
            with user_errors(f"--eval-data {name}"):
                split = glue_split(len(rows), settings.seed)
            self.held_out += take(rows, split.held_out)
            self.evaluated[name] = take(rows, split.kept)

    def read_evaluated(self) -> None:
        """Read the rows to evaluate alone, all of them."""
        settings = self.settings
        if settings.eval_data:
            parts = self._read(settings.eval_data, "--eval-data", settings.eval_split, settings.max_eval_examples)
            self.evaluated = dict(zip(source_names(settings.eval_data), parts, strict=True))

    def _read(self, sources: tuple[str, ...], option: str, split: str, most: int | None) -> list[Rows]:
        return read_all(
            sources,
            lambda row: check_glue_row(row.fields, row.where, self.task),
            option=option,
            split=split,
            max_rows=most,
            skipped=self.skipped,
        )

    def trainer_options(
        self, tokenizer: PreTrainedTokenizerBase, reft_model: ReftModel, options: RunOptions
    ) -> dict[str, Any]:
        """Further arguments of the trainer."""
        del tokenizer, reft_model, options
        return {
            "compute_metrics": self.task.compute_metrics(),
            "share": self.share,
            "step_graphs": self.settings.step_graphs,
        }

    def head_parameters(self, reft_model: ReftModel) -> list[nn.Parameter]:
        """The parameters of the head that are trained."""
        return trained_heads(reft_model.model)

    def data(
        self, tokenizer: PreTrainedTokenizerBase, reft_model: ReftModel, cache: Path | None = None
    ) -> dict[str, Any]:
        """The Trainer's `train_dataset`, `eval_dataset` (None without held-out rows) and `data_collator`."""
        del cache
        with user_errors("--data"):
            train = self._dataset(self.train, tokenizer, reft_model)
            held_out = self._dataset(self.held_out, tokenizer, reft_model) if self.held_out else None
        longest = max(length for dataset in (train, held_out) if dataset is not None for length in dataset.lengths)
        if len(self.settings.pad_to) > 1 and max(self.settings.pad_to) < longest:
            raise UserError(f"--pad-to {max(self.settings.pad_to)}: texts have up to {longest} tokens")
        with user_errors("--pad-to"):
            collator = glue_collator(tokenizer, self.settings.padding)
        return {"train_dataset": train, "eval_dataset": held_out, "data_collator": collator}

    def _dataset(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, reft_model: ReftModel) -> GlueDataset:
        return GlueDataset(tokenizer, reft_model, rows, self.task, max_length=self.settings.max_length)

    def evaluate(self, model: ReftModel, tokenizer: PreTrainedTokenizerBase, name: str, *, progress: bool) -> Scores:
        """The task's metrics of a model on the evaluation set of this name."""
        return self._score(model, tokenizer, self.evaluated[name], progress)

    def evaluate_held_out(
        self, model: ReftModel, tokenizer: PreTrainedTokenizerBase, *, progress: bool = False
    ) -> Scores:
        """The task's metrics of a model on the held-out rows."""
        return self._score(model, tokenizer, self.held_out, progress, "--held-out")

    def _score(
        self,
        model: ReftModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        progress: bool,
        option: str = "--eval-data",
    ) -> Scores:
        with user_errors(option):
            dataset = GlueDataset(tokenizer, model, rows, self.task, max_length=self.settings.max_length)
        logits, labels = predict(
            model, dataset, glue_collator(tokenizer), self.settings.eval_batch_size, progress, self.share
        )
        metrics = self.task.compute_metrics()((logits, labels))
        chosen = logits.reshape(len(rows), -1)
        answers = chosen[:, 0] if self.regression else chosen.argmax(-1)
        predictions = [
            {"row": index, "answer": answer, "gold": gold}
            for index, (answer, gold) in enumerate(zip(answers.tolist(), labels.tolist(), strict=True))
        ]
        return Scores(metrics, len(rows), predictions)
