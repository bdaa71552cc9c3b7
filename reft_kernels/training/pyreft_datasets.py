"""The base of pyreft's data sets: rows become token ids, masks, labels and edit positions, by methods to override."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from reft_kernels.positions import get_intervention_locations, parse_positions
from reft_kernels.training.data import pad_token_id
from reft_kernels.training.item_layout import IGNORE_INDEX
from reft_kernels.training.tokens import end_token, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASK = "attention_mask"


class ReftDataset(Dataset[dict[str, Any]], ABC):
    """Rows of a data set, tokenised when it is made (pyreft `ReftDataset`).

    A subclass says how one row is tokenised (`tokenize`); every other method may be overridden as well. They are
    called in the order `preprocess`, `load_dataset`, `postprocess`, then for each row `tokenize` and
    `compute_intervention_and_subspaces`, which asks `get_intervention_locations`.

    Items are copies of what `tokenize` returned (`input_ids` and often `labels`, int64 [S]) with

    - `attention_mask` int32 [S]: ones, unless `tokenize` returned a mask of its own because it padded. With several
      `fields_to_mask` there is one `{field}_mask` each;
    - `intervention_locations` [num_interventions][P], ints, -1 for "no token"; absent where `position` is "all";
    - `id`, the row's number;
    - `subspaces` [num_interventions][k], where the row has `subspaces` [k].

    Args:
        task: name of a data set on the hub, where neither `dataset` nor a .json file is given.
        data_path: a .json file, a configuration of `task`, or None.
        tokenizer: a transformers tokenizer; nothing of it is changed.
        data_split: "train", or another one, whose raw rows stay in `raw_dataset`.
        dataset: the rows themselves, a list of dicts or a `datasets.Dataset`.
        seed: of the choice of `max_n_example` rows.
        max_n_example: at most so many rows, chosen at random.
        pyreft_compat: what pyreft computes, faults included; the class attribute of this name where None. There a
            masked padding token, the sink, stands in front of every sequence (`pad_mode` "first") or after it
            ("last"), "no token" is position 0 or the first one after the prompt, every token equal to the padding
            token is masked, tied interventions have half of their `subspaces`, and the suffix of some subclasses ends
            one token early.
        **kwargs: `position` ("f7+l7", "all"), `num_interventions`, `share_weights`, and what a subclass reads, such as
            the names of fields.

    Raises TypeError where a keyword is missing and ValueError where its value is wrong.
    """

    pyreft_compat: bool = False

    def __init__(
        self,
        task: str | None,
        data_path: str | None,
        tokenizer: PreTrainedTokenizerBase,
        data_split: str = "train",
        dataset: Any = None,
        seed: int = 42,
        max_n_example: int | None = None,
        *,
        pyreft_compat: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if pyreft_compat is not None:
            self.pyreft_compat = pyreft_compat
        span = parse_positions(keyword(kwargs, "position"))
        self.first_n = None if span is None else span[0]
        self.last_n = None if span is None else span[1]
        self.tokenizer = tokenizer
        self.task = task
        self.data_path = data_path
        self.data_split = data_split
        self.dataset = dataset
        self.seed = seed
        self.max_n_example = max_n_example
        self.raw_dataset: Any = None
        self.pad_mode = "first"
        self.fields_to_pad = ["input_ids", "labels"]
        self.fields_to_mask = ["input_ids"]

        self.preprocess(kwargs)
        self.task_dataset = self.load_dataset()
        self.postprocess(kwargs)

        self.result: list[dict[str, Any]] = []
        for index, data_item in enumerate(_bar(self.task_dataset)):
            tokenized, last_position = self.tokenize(data_item)
            self.result.append(
                self.compute_intervention_and_subspaces(index, data_item, tokenized, last_position, **kwargs)
            )

    @abstractmethod
    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        """The tensors of one row, and how many tokens its prompt has (the suffix ends with the last of them)."""

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        """Called before the rows are loaded; reads the keywords of a subclass."""

    def postprocess(self, kwargs: dict[str, Any]) -> None:
        """Called when the rows are there as `task_dataset`."""

    def load_dataset(self) -> Any:
        """The rows: `dataset`, the .json file, or `task` from the hub; at most `max_n_example` of them."""
        rows = self.dataset
        if rows is None:
            rows = self._read()
        if self.max_n_example is not None:
            rows = _choose(rows, self.max_n_example, self.seed)
        self.raw_dataset = rows if self.data_split != "train" else None
        return rows

    def _read(self) -> Any:
        if self.task is None and self.data_path is None:
            raise ValueError("give dataset, a data_path or a task: there is nothing to load")
        from datasets import load_dataset

        if self.data_path is None:
            return load_dataset(self.task, split=self.data_split)
        if self.data_path.endswith(".json"):
            # A file has one split, whatever it is used for.
            return load_dataset("json", data_files=self.data_path, split="train")
        return load_dataset(self.task, self.data_path, split=self.data_split)

    def get_intervention_locations(self, **kwargs: Any) -> list[list[int]]:
        """`reft_kernels.get_intervention_locations`; gets all keywords of the data set besides those of its own."""
        return get_intervention_locations(**kwargs)

    def compute_intervention_and_subspaces(
        self, id: int, data_item: Any, result: dict[str, Any], last_position: int, **kwargs: Any
    ) -> dict[str, Any]:
        """The finished item of a row, from what `tokenize` returned. `pad_mode` counts with `pyreft_compat` alone."""
        result["id"] = id
        if self.first_n is not None:
            mode: dict[str, Any] = {"pad_mode": "first"}
            if self.pyreft_compat:
                mode = {"pad_mode": "first" if self.pad_mode == "first" else "last", "pyreft_compat": True}
            result["intervention_locations"] = self.get_intervention_locations(
                last_position=last_position, first_n=self.first_n, last_n=self.last_n, **mode, **kwargs
            )
        if self.pyreft_compat:
            self._add_sink(result)
        for field in self.fields_to_mask:
            name = MASK if len(self.fields_to_mask) == 1 else f"{field}_mask"
            if self.pyreft_compat:
                result[name] = (result[field] != pad_token_id(self.tokenizer)).int()
            elif name not in result:
                result[name] = torch.ones(len(result[field]), dtype=torch.int32)
        if "subspaces" in data_item:
            count = kwargs["num_interventions"]
            if self.pyreft_compat and kwargs.get("share_weights", False):
                count //= 2
            result["subspaces"] = [data_item["subspaces"]] * count
        return result

    def _add_sink(self, result: dict[str, Any]) -> None:
        """A padding token in front of every field, or after it, and the positions moved along."""
        if self.pad_mode not in ("first", "last"):
            return
        for field in self.fields_to_pad:
            if field in result:
                value = IGNORE_INDEX if field == "labels" else pad_token_id(self.tokenizer)
                pair = (torch.tensor([value]), result[field])
                result[field] = torch.cat(pair if self.pad_mode == "first" else pair[::-1])
        if self.pad_mode == "first" and "intervention_locations" in result:
            rows = result["intervention_locations"]
            result["intervention_locations"] = [[position + 1 for position in row] for row in rows]

    def __len__(self) -> int:
        return len(self.result)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return copy.deepcopy(self.result[index])

    # What subclasses have in common

    def _ids(self, text: str) -> Tensor:
        """Token ids of a text that ends where it ends."""
        return token_ids(self.tokenizer, text, keep_end=self.pyreft_compat)

    def _prompt_and_target(self, prompt: str, target: str) -> tuple[dict[str, Any], int]:
        """Token ids of prompt + target, labels on the target, and the number of the prompt's tokens."""
        length = len(self._ids(prompt))
        input_ids = self._ids(prompt + target)
        labels = input_ids.clone()
        labels[:length] = IGNORE_INDEX
        return {"input_ids": input_ids, "labels": labels}, length

    def _early(self, length: int) -> int:
        """The last position of those classes whose suffix ends one token early in pyreft."""
        return length - 1 if self.pyreft_compat else length


class ReftRawDataset(ReftDataset):
    """Rows with `instruction` and `output` as they stand, without a template (pyreft `ReftRawDataset`).

    Arguments, items and `pyreft_compat` are ReftDataset's; only training items have the output, and `labels` on it.
    Besides, the columns of all items are attributes: `input_ids`, `attention_mask`, `intervention_locations`, `id`, and
    `labels` and `subspaces`, which are None where there are none. `data_path` is a .json file or the name of a data set
    on the hub, and `task` has no effect.
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
        **kwargs: Any,
    ) -> None:
        super().__init__(task, data_path, tokenizer, data_split, dataset, seed, max_n_example, **kwargs)
        self.input_ids = self._column("input_ids")
        self.attention_mask = self._column(MASK)
        self.intervention_locations = self._column("intervention_locations")
        self.labels = self._column("labels")
        self.subspaces = self._column("subspaces")
        self.id = self._column("id")

    def _column(self, name: str) -> list[Any] | None:
        return [item[name] for item in self.result] if all(name in item for item in self.result) else None

    def _read(self) -> Any:
        if self.data_path is None:
            raise ValueError("give dataset or a data_path: there is nothing to load")
        from datasets import load_dataset

        if self.data_path.endswith(".json"):
            return load_dataset("json", data_files=self.data_path, split="train")
        return load_dataset(self.data_path, split=self.data_split)

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        """`instruction`, and in training `output` and the end token."""
        prompt = data_item["instruction"]
        if self.data_split == "train":
            return self._prompt_and_target(prompt, data_item["output"] + end_token(self.tokenizer))
        input_ids = self._ids(prompt)
        return {"input_ids": input_ids}, len(input_ids)


def keyword(kwargs: Mapping[str, Any], name: str) -> Any:
    """A keyword that a data set cannot do without. Raises TypeError where it is missing."""
    if name not in kwargs:
        raise TypeError(f"the keyword {name} is missing (given: {', '.join(map(repr, kwargs)) or 'none'})")
    return kwargs[name]


def _choose(rows: Any, count: int, seed: int) -> Any:
    """At most `count` rows; of a list those that `datasets.Dataset.shuffle(seed)` puts first."""
    if hasattr(rows, "shuffle") and hasattr(rows, "select"):
        return rows.shuffle(seed=seed).select(range(min(count, len(rows))))
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[int(index)] for index in order[:count]]


def _bar(rows: Any) -> Any:
    from tqdm.auto import tqdm

    return tqdm(rows)
