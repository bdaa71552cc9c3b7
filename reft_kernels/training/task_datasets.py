"""pyreft's data sets of single texts: instructions with an answer, texts to complete, texts to classify."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from reft_kernels.training.prompts import WITH_INPUT, WITHOUT_INPUT
from reft_kernels.training.pyreft_datasets import ReftDataset, keyword
from reft_kernels.training.tokens import end_token, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def alpaca_prompt(row: Mapping[str, Any], instruction_field: str, input_field: str | None, keep_none: bool) -> str:
    """The prompt of a row. One without an input, or with an empty one, has the shorter form.

    keep_none: write a None, as data sets fill up missing fields with, out as "None" (what pyreft does).
    """
    given = row[input_field] if input_field is not None and input_field in row else ""
    if given == "" or (given is None and not keep_none):
        return WITHOUT_INPUT % str(row[instruction_field])
    return WITH_INPUT % (str(row[instruction_field]), given)


class ReftSupervisedDataset(ReftDataset):
    """Instructions with an optional input, and the answer to learn, in Alpaca's prompts (pyreft
    `ReftSupervisedDataset`).

    Arguments, items and `pyreft_compat` are ReftDataset's; labels are on the answer and the end token. Further
    keywords: `instruction_field`, `input_field` and `output_field`, the names of the rows' fields, and `no_stop`, which
    leaves the end token out. With `pyreft_compat` the suffix ends one token before the prompt's last.
    """

    def __init__(
        self,
        task: str | None,
        data_path: str | None,
        tokenizer: PreTrainedTokenizerBase,
        data_split: str = "train",
        dataset: Any = None,
        seed: int = 42,
        max_n_example: int | None = None,
        no_stop: bool = False,
        **kwargs: Any,
    ) -> None:
        self.no_stop = no_stop
        super().__init__(task, data_path, tokenizer, data_split, dataset, seed, max_n_example, **kwargs)

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        """Reads the names of the fields."""
        self.input_field = keyword(kwargs, "input_field")
        self.output_field = keyword(kwargs, "output_field")
        self.instruction_field = keyword(kwargs, "instruction_field")

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        """Prompt and answer."""
        prompt = alpaca_prompt(data_item, self.instruction_field, self.input_field, self.pyreft_compat)
        end = "" if self.no_stop else end_token(self.tokenizer)
        result, length = self._prompt_and_target(prompt, data_item[self.output_field] + end)
        return result, self._early(length)


class ReftGenerationDataset(ReftDataset):
    """Prompts and their completions (pyreft `ReftGenerationDataset`).

    Arguments, items and `pyreft_compat` are ReftDataset's; labels are on the completion and the end token. Further
    keywords: `prompt_field` and `completion_field`, the names of the rows' fields. With `pyreft_compat` the suffix
    ends one token before the prompt's last.
    """

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        """Reads the names of the fields."""
        self.prompt_field = keyword(kwargs, "prompt_field")
        self.completion_field = keyword(kwargs, "completion_field")

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        """Prompt and completion."""
        target = data_item[self.completion_field] + end_token(self.tokenizer)
        result, length = self._prompt_and_target(data_item[self.prompt_field], target)
        return result, self._early(length)


class ReftClassificationDataset(ReftDataset):
    """Texts with a label, edited at both ends of the text (pyreft `ReftClassificationDataset`).

    Arguments, items and `pyreft_compat` are ReftDataset's. The text keeps every special token that the tokenizer adds.
    Further keywords: `input_field` and `label_field`, the names of the rows' fields. `labels` are

    - the text's own token ids where both fields are the same one;
    - a number (a class, a score), or a list of numbers (several labels), as a tensor;
    - the token ids of a label that is text;
    - absent where `label_field` is None.

    With `pyreft_compat` the suffix ends one token before the last.
    """

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        """Reads the names of the fields."""
        self.input_field = keyword(kwargs, "input_field")
        self.label_field = keyword(kwargs, "label_field")

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        """Text and label."""
        input_ids = token_ids(self.tokenizer, data_item[self.input_field], keep_end=True)
        result = {"input_ids": input_ids}
        if self.label_field == self.input_field:
            result["labels"] = input_ids.clone()
        elif self.label_field is not None:
            label = data_item[self.label_field]
            is_text = isinstance(label, str)
            result["labels"] = token_ids(self.tokenizer, label, keep_end=True) if is_text else torch.as_tensor(label)
        return result, self._early(len(input_ids))
