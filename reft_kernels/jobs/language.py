"""Jobs that learn the outputs of prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from reft_kernels.jobs import processes
from reft_kernels.jobs.errors import UserError, user_errors
from reft_kernels.jobs.forward_passes import Share, mean_loss
from reft_kernels.jobs.held_out import LanguageTrainer
from reft_kernels.jobs.rows import hold_out_rows, read_all, source_names
from reft_kernels.jobs.run_folder import CACHE
from reft_kernels.jobs.scores import Scores
from reft_kernels.jobs.trainer_arguments import RunOptions
from reft_kernels.recipes.settings import BY_ROW, JobSettings, read_subspace
from reft_kernels.training.answers import ANSWER_RULES, AnswerRule, TextAfterTrigger, answer_rule
from reft_kernels.training.choices import Normalise, answer_choices, evaluate_choices
from reft_kernels.training.cloze import ClozeExample, as_cloze
from reft_kernels.training.data import (
    Example,
    SupervisedCollator,
    SupervisedDataset,
    encode_prompts,
    pad_token_id,
    parse_row,
)
from reft_kernels.training.evaluate import Prediction, evaluate_accuracy
from reft_kernels.training.frozen_cache import FrozenCache
from reft_kernels.training.memorisation import recite
from reft_kernels.training.packing import PackedCollator
from reft_kernels.training.prompts import prompt_and_target, prompt_style
from reft_kernels.training.sharding import whole_outside_of_blocks
from reft_kernels.training.sources import Row, SkippedRows, is_hub_name
from reft_kernels.training.streaming import StreamedDataset
from reft_kernels.training.subspaces import check_subspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reft_kernels.model import ReftModel


class LanguageJob:
    """Prompts, the outputs to learn, and how answers are scored.

    Attributes:
        train: the rows to learn.
        held_out: rows kept from them, to choose by and to score where there is no evaluation set; may be empty.
        evaluated: the rows of each evaluation set, by name.
        skipped: the rows that were left out because they could not be read.
    """

    labels: int | None = None
    regression = False
    trainer = LanguageTrainer

    def __init__(self, settings: JobSettings) -> None:
        self.settings = settings
        self.share: Share = processes.score_all if settings.tensor_parallel or settings.shard else processes.share
        with user_errors("--style"):
            self.style = prompt_style(settings.style, template=settings.template, trigger=settings.trigger)
        self.rule = _rule(settings)
        self.skipped = SkippedRows() if settings.skip_bad_rows else None
        self.train: list[Example] = []
        self.held_out: list[Example] = []
        self.evaluated: dict[str, list[Example]] = {}
        self._subspace: dict[int, tuple[int, ...]] = {}
        self._subspace_size: int | None = None

    def read(self) -> None:
        """Read the rows to train on, those held out, and those to evaluate. Raises UserError naming source and row."""
        settings = self.settings
        if settings.streaming is not None:
            self.read_evaluated()
            return
        parts = read_all(
            settings.data,
            self._trained_row,
            option="--data",
            split=settings.split,
            max_rows=settings.max_examples,
            skipped=self.skipped,
        )
        self.train = [example for part in parts for example in part]
        if settings.subspaces == BY_ROW:
            self._subspace = {id(one): one.subspaces for one in self.train if one.subspaces is not None}
        elif settings.subspaces:
            ranges = [read_subspace(text) for text in settings.subspaces]
            self._subspace = {id(example): s for part, s in zip(parts, ranges, strict=True) for example in part}
        with user_errors("--held-out"):
            self.train, self.held_out = hold_out_rows(self.train, settings.held_out, settings.seed)
        self.read_evaluated()

    def read_evaluated(self) -> None:
        """Read the rows to evaluate alone."""
        settings = self.settings
        if not settings.eval_data:
            return
        parts = read_all(
            settings.eval_data,
            self._scored_row,
            option="--eval-data",
            split=settings.eval_split,
            max_rows=settings.max_eval_examples,
            skipped=self.skipped,
        )
        self.evaluated = dict(zip(source_names(settings.eval_data), parts, strict=True))

    def _trained_row(self, row: Row) -> Example:
        example = self._row(row, needs_output=True)
        self._check_subspaces(example, row.where)
        if self.settings.held_out != "none":  # any row may be one of them
            self._check_answer(example, row.where)
        return example

    def _check_subspaces(self, example: Example, where: str) -> None:
        own = example.subspaces
        if self.settings.subspaces != BY_ROW:
            if own is not None:
                raise ValueError(f"{where}: has a field 'subspaces', which --subspaces rows reads")
            return
        if own is None:
            raise ValueError(f"{where}: field 'subspaces' is missing, which --subspaces rows reads")
        if self._subspace_size is None:
            check_subspace(own, where, len(own), self.settings.rank)
            self._subspace_size = len(own)
        check_subspace(own, where, self._subspace_size, self.settings.rank)

    def _scored_row(self, row: Row) -> Example:
        example = self._row(row, needs_output=self.settings.evaluation in ("loss", "recite"))
        self._check_answer(example, row.where)
        return example

    def _check_answer(self, example: Example, where: str) -> None:
        """Raises ValueError, before anything is trained, where a row has no answer to score by, or no such choice."""
        if not self._answers:
            return
        try:
            gold = self.rule.of_row(example.output).gold(example.answer, example.output)
            if self.settings.evaluation == "generate":
                return
            offered = example.choices if isinstance(example, ClozeExample) else answer_choices(example.instruction)
            if not any(self.rule.match(choice, gold) for choice in offered):
                raise ValueError(f"the answer {gold!r} is none of its choices {', '.join(offered)}")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def _row(self, row: Row, needs_output: bool) -> Example:
        example = parse_row(row.fields, row.where, needs_output=needs_output)
        if self.settings.style != "cloze":
            return example
        try:
            return as_cloze(example)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None

    @property
    def best(self) -> tuple[str, bool]:
        """The metric of the held-out rows that the best epoch is chosen by, and whether more of it is better."""
        return ("eval_accuracy", True) if self._answers else ("eval_loss", False)

    @property
    def _answers(self) -> bool:
        return self.settings.evaluation in ("generate", "rank")

    def trainer_options(
        self, tokenizer: PreTrainedTokenizerBase, reft_model: ReftModel, options: RunOptions
    ) -> dict[str, Any]:
        """Further arguments of the trainer."""
        settings = self.settings
        more: dict[str, Any] = {
            "share": self.share,
            "tensor_parallel": settings.tensor_parallel,
            "step_graphs": settings.step_graphs,
        }
        if self._answers and self.held_out:
            more["score"] = lambda model: self.evaluate_held_out(model, tokenizer).metrics
        if settings.cache_frozen != "none":
            folder = (options.cache_folder or options.output / CACHE) if settings.cache_frozen == "disk" else None
            with user_errors("--cache-frozen"):
                budget = int(settings.cache_gib * 2**30)
                more["frozen_cache"] = FrozenCache(reft_model, settings.cache_frozen, budget=budget, folder=folder)
        return more

    def head_parameters(self, reft_model: ReftModel) -> list[torch.nn.Parameter]:
        """None: a language model's head is frozen."""
        del reft_model
        return []

    def data(
        self, tokenizer: PreTrainedTokenizerBase, reft_model: ReftModel, cache: Path | None = None
    ) -> dict[str, Any]:
        """The Trainer's `train_dataset`, `eval_dataset` (None without held-out rows) and `data_collator`.

        Args:
            cache: a folder for token ids, see SupervisedDataset.
        """
        with user_errors("--data"):
            train: Any = (
                self._dataset(self.train, tokenizer, reft_model, cache)
                if self.settings.streaming is None
                else self._stream(self.settings.streaming, tokenizer, reft_model)
            )
            held_out = self._dataset(self.held_out, tokenizer, reft_model, cache) if self.held_out else None
        self._check_row_lengths(train, held_out)
        with user_errors("--pad-to"):
            return {"train_dataset": train, "eval_dataset": held_out, "data_collator": self._collator(tokenizer)}

    def _check_row_lengths(self, *datasets: Any) -> None:
        """Raises UserError where an example would fit into no row of --packing or --pad-to."""
        settings = self.settings
        longest = max((max(one.lengths) for one in datasets if isinstance(one, SupervisedDataset)),
                      default=settings.max_length)  # fmt: skip
        if settings.packing is not None:
            if settings.packing < longest:
                raise UserError(f"--packing {settings.packing}: examples have up to {longest} tokens")
            longest = settings.packing
        if len(settings.pad_to) > 1 and max(settings.pad_to) < longest:
            raise UserError(f"--pad-to {max(settings.pad_to)}: rows have up to {longest} tokens")

    def _stream(self, buffer: int, tokenizer: PreTrainedTokenizerBase, reft_model: ReftModel) -> StreamedDataset:
        settings = self.settings

        def texts(row: Row) -> tuple[str, str]:
            one = self._trained_row(row)
            prompt, target = prompt_and_target(
                one.instruction, one.input, one.output, style=self.style, tokenizer=tokenizer
            )
            return prompt, target or ""

        (source,) = settings.data
        if not Path(source).expanduser().exists() and not is_hub_name(source):
            raise UserError(f"--data {source}: no such file")

        def stream(skipped: SkippedRows | None, shuffle: int) -> StreamedDataset:
            return StreamedDataset(
                tokenizer,
                reft_model,
                source,
                split=settings.split,
                max_examples=settings.max_examples,
                skipped=skipped,
                texts=texts,
                max_length=settings.max_length,
                shuffle=shuffle,
                seed=settings.seed,
            )

        next(iter(stream(SkippedRows() if settings.skip_bad_rows else None, 0)))  # raises where there are no rows
        return stream(self.skipped, buffer)

    def _collator(self, tokenizer: PreTrainedTokenizerBase) -> SupervisedCollator | PackedCollator:
        settings = self.settings
        if settings.packing is not None:
            return PackedCollator(pad_token_id(tokenizer), row_length=settings.packing, pad_to=settings.padding)
        return SupervisedCollator(pad_token_id(tokenizer), pad_to=settings.padding)

    def _dataset(
        self,
        examples: list[Example],
        tokenizer: PreTrainedTokenizerBase,
        reft_model: ReftModel,
        cache: Path | None = None,
        *,
        trained: bool = True,
    ) -> SupervisedDataset:
        pairs = [
            prompt_and_target(one.instruction, one.input, one.output, style=self.style, tokenizer=tokenizer)
            for one in examples
        ]
        return SupervisedDataset(
            tokenizer,
            reft_model,
            [prompt for prompt, _ in pairs],
            [target or "" for _, target in pairs],
            max_length=self.settings.max_length,
            cache=cache,
            subspaces=[self._subspace[id(one)] for one in examples] if trained and self._subspace else None,
        )

    def evaluate(self, model: ReftModel, tokenizer: PreTrainedTokenizerBase, name: str, *, progress: bool) -> Scores:
        """The scores of a model on the evaluation set of this name."""
        with whole_outside_of_blocks(model):
            return self._score(model, tokenizer, self.evaluated[name], progress)

    def evaluate_held_out(
        self, model: ReftModel, tokenizer: PreTrainedTokenizerBase, *, progress: bool = False
    ) -> Scores:
        """The scores of a model on the held-out rows."""
        with whole_outside_of_blocks(model):
            return self._score(model, tokenizer, self.held_out, progress, "--held-out")

    def _score(
        self,
        model: ReftModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: list[Example],
        progress: bool,
        option: str = "--eval-data",
    ) -> Scores:
        settings = self.settings
        if settings.evaluation == "loss":
            with user_errors(option):
                dataset = self._dataset(examples, tokenizer, model, trained=False)
            collate = SupervisedCollator(pad_token_id(tokenizer))
            loss = mean_loss(model, dataset, collate, settings.eval_batch_size, progress, self.share)
            return Scores({"loss": loss, "perplexity": math.exp(min(loss, 700.0))}, len(dataset))
        if settings.evaluation == "recite":
            found = self.share(examples, lambda part: [self._recite(model, tokenizer, one) for one in part])
            lengths, shares = [one["tokens"] for one in found], [one["share"] for one in found]
            metrics = {"recited_share": sum(shares) / len(found), "recited_tokens": sum(lengths) / len(found)}
            return Scores(metrics, len(found), found)
        if settings.evaluation == "rank":
            said = self._said(tokenizer, examples, lambda part: self._ranked(model, tokenizer, part, progress), option)
            return Scores({"accuracy": sum(one["correct"] for one in said) / len(said)}, len(said), said)
        if settings.evaluation == "generate":
            with _drawing(settings.seed, next(model.parameters()).device):
                said = self._said(
                    tokenizer, examples, lambda part: self._generated(model, tokenizer, part, progress), option
                )
            counts = {
                "accuracy": sum(one["correct"] for one in said),
                "unanswered": sum(not one["answer"] for one in said),
            }
            return Scores({name: number / len(said) for name, number in counts.items()}, len(said), said)
        raise UserError(f"--evaluation {settings.evaluation}: nothing to do")

    def _said(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: list[Example],
        score: Callable[[list[Example]], list[Any]],
        option: str,
    ) -> list[dict[str, Any]]:
        """What is said to each row, which processes share in the batches that one would make."""

        def lengths() -> list[int]:
            prompts = [
                prompt_and_target(one.instruction, one.input, style=self.style, tokenizer=tokenizer)[0]
                for one in examples
            ]
            return [len(ids) for ids in encode_prompts(tokenizer, prompts)]

        with user_errors(option, (ValueError,)):
            found = self.share(examples, score, lengths=lengths, block=self.settings.eval_batch_size)
        return [asdict(one) for one in found]

    def _ranked(
        self, model: ReftModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example], progress: bool
    ) -> list[Prediction]:
        return evaluate_choices(
            model,
            tokenizer,
            examples,
            choices=[one.choices for one in examples if isinstance(one, ClozeExample)] or None,
            style=self.style,
            rule=self.rule,
            normalise=cast(Normalise, self.settings.normalise),
            batch_size=self.settings.eval_batch_size,
            progress=progress,
        ).predictions

    def _generated(
        self, model: ReftModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example], progress: bool
    ) -> list[Prediction]:
        return evaluate_accuracy(
            model,
            tokenizer,
            examples,
            style=self.style,
            rule=self.rule,
            batch_size=self.settings.eval_batch_size,
            progress=progress,
            **self.generation(),
        ).predictions

    def _recite(self, model: ReftModel, tokenizer: PreTrainedTokenizerBase, one: Example) -> dict[str, Any]:
        prompt, target = prompt_and_target(
            one.instruction, one.input, one.output, style=self.style, tokenizer=tokenizer
        )
        with user_errors("--eval-data"):
            recital = recite(model, tokenizer, prompt, target or "")
        said = tokenizer.decode(recital.said)
        return {"prompt": prompt, "text": said, "gold": target, "tokens": recital.length, "share": recital.share}

    def generation(self) -> dict[str, Any]:
        """Keywords of `generate`."""
        settings = self.settings
        found: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "num_beams": settings.num_beams}
        if settings.temperature > 0:
            found |= {
                "do_sample": True,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": settings.top_k,
            }
        if settings.num_beams > 1:
            found["early_stopping"] = True
        if settings.no_repeat_ngram_size:
            found["no_repeat_ngram_size"] = settings.no_repeat_ngram_size
        if settings.repetition_penalty != 1.0:
            found["repetition_penalty"] = settings.repetition_penalty
        return found


@contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Within this context random numbers follow from the seed alone; afterwards they go on as if nothing was drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _rule(settings: JobSettings) -> AnswerRule:
    """The rule that is named, else that of the style, else commonsense."""
    name = settings.rule or (settings.style if settings.style in ANSWER_RULES else "commonsense")
    with user_errors("--rule"):
        if settings.trigger is not None:
            if name != "commonsense":
                raise ValueError(f"a trigger is for the rule commonsense, not for {name}")
            return TextAfterTrigger(settings.trigger)
        return TextAfterTrigger("") if settings.rule is None and settings.style == "cloze" else answer_rule(name)
