"""Supervised data: rows with a prompt and an output, token ids with a masked prompt, and the positions to edit.

One example is a prompt and the output to learn. The loss is on the output alone (paper, eq. 4) and the edit
positions are those of the prompt: the first `f` and the last `l` of its tokens for `"f{f}+l{l}"` (paper,
section 3.2; pyreft `ReftSupervisedDataset`). No sink token is put in front, unlike in pyreft: a prompt
shorter than the prefix and the suffix has fewer positions, and the rest of its row is -1, which means "no
edit".
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from reft_kernels.training.buckets import Buckets
from reft_kernels.training.collators import LOCATIONS, add_locations, pad_locations
from reft_kernels.training.item_layout import IGNORE_INDEX, ItemLayout
from reft_kernels.training.sources import SkippedRows, check_text, parse_rows
from reft_kernels.training.subspaces import checked_subspaces, read_subspaces
from reft_kernels.training.token_cache import cached_table
from reft_kernels.training.tokens import encode_prompts as encode_prompts
from reft_kernels.training.tokens import pad_token_id as pad_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reft_kernels.model import ReftModel

DEFAULT_TEMPLATE = "%s\n"


@dataclass(frozen=True)
class Example:
    """One row: `instruction` (the prompt), `input` (its context, may be empty), `output` (the target text, or
    None in rows for evaluation only), `answer` (the short gold answer, or None) and `subspaces` (the dimensions of
    the interventions' subspaces that the row trains, or None)."""

    instruction: str
    input: str = ""
    output: str | None = None
    answer: str | None = None
    subspaces: tuple[int, ...] | None = None


def build_prompt(instruction: str, input: str = "", template: str = DEFAULT_TEMPLATE) -> str:
    """The prompt of a row: `template` with its `%s` replaced by the instruction, which a non-empty `input`
    follows after a blank line. The default template, `"%s\\n"`, is the paper's for commonsense reasoning.

    Raises ValueError if the template does not hold exactly one `%s`.
    """
    if template.count("%s") != 1:
        raise ValueError(f'template must hold "%s" exactly once, got {template!r}')
    return template.replace("%s", f"{instruction}\n\n{input}" if input else instruction)


def parse_row(row: object, where: str, *, needs_output: bool = True) -> Example:
    """The Example of a decoded row. `where` (for example `"train.jsonl, line 3"`) starts every error message.

    Raises ValueError if the row is no JSON object, if `instruction` is missing, if `output` is missing where
    it is needed (for evaluation, `answer` is enough), or if a field is not text. A number is accepted as
    `answer`; `subspaces`, where there are any, must be a list of ints.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected a JSON object with the field 'instruction', got {type(row).__name__}")

    def text(name: str, number: bool = False) -> str | None:
        value = row.get(name)
        if number and isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: field {name!r} must be text, got {type(value).__name__}")
        return value if value is None else check_text(value, f"{where}: field {name!r}")

    example = Example(
        text("instruction") or "",
        text("input") or "",
        text("output"),
        text("answer", number=True),
        read_subspaces(row.get("subspaces"), where),
    )
    has = ", ".join(repr(str(key)) for key in row) or "none"
    if row.get("instruction") is None:
        raise ValueError(f"{where}: field 'instruction' is missing (fields there: {has})")
    if not example.instruction and not example.input:
        raise ValueError(f"{where}: field 'instruction' is empty, and there is no 'input'")
    if example.output is None and needs_output:
        raise ValueError(f"{where}: field 'output' is missing (fields there: {has})")
    if example.output is None and example.answer is None:
        raise ValueError(f"{where}: fields 'answer' and 'output' are both missing (fields there: {has})")
    return example


def read_examples(
    source: str | Path,
    *,
    split: str | None = None,
    max_examples: int | None = None,
    needs_output: bool = True,
    fields: Mapping[str, str] | None = None,
    skipped: SkippedRows | None = None,
) -> list[Example]:
    """The rows of a file, a folder or a data set of the hub, as Examples. See :func:`iterate_examples`."""
    return list(
        iterate_examples(
            source, split=split, max_examples=max_examples, needs_output=needs_output, fields=fields, skipped=skipped
        )
    )


def iterate_examples(
    source: str | Path,
    *,
    split: str | None = None,
    max_examples: int | None = None,
    needs_output: bool = True,
    fields: Mapping[str, str] | None = None,
    skipped: SkippedRows | None = None,
    streaming: bool = False,
) -> Iterator[Example]:
    """The rows of a source as Examples, read as they are asked for.

    Args:
        source, split, fields, streaming: see :func:`reft_kernels.training.sources.read_rows`.
        max_examples: stop after this many examples.
        needs_output: False for evaluation, where a row with an `answer` needs no `output`.
        skipped: count rows with something wrong here, and go on, instead of raising ValueError.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `read_rows` and `parse_row`; also where every row is skipped.
    """
    return parse_rows(
        lambda row: parse_row(row.fields, row.where, needs_output=needs_output), source, split=split,
        max_examples=max_examples, fields=fields, skipped=skipped, streaming=streaming,
    )  # fmt: skip


def read_jsonl(path: str | Path, *, max_examples: int | None = None, needs_output: bool = True) -> list[Example]:
    """The rows of a data file; :func:`read_examples` of a file, which must exist.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken row (the message names file, line and field), no rows at all, or damaged gzip data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such data file: {path}")
    return read_examples(path, max_examples=max_examples, needs_output=needs_output)


class SupervisedDataset(Dataset[dict[str, Tensor]]):
    """Prompts and outputs as token ids, with labels on the output and the positions to edit in the prompt.

    Prompt and prompt + output are tokenised separately, as pyreft does; the first `len(prompt ids)` labels
    are -100. The end token is appended as an id. Sequences are cut at `max_length` tokens from the right (the
    end token goes first); an example whose prompt alone fills `max_length` has nothing to learn and is left
    out, with one warning for all of them.

    Items: `input_ids` [S] int64, `labels` [S] int64, `intervention_locations` [I, P] int64, one row for
    each of `reft_model.representations`, in their order, padded with -1 to the widest, and `subspaces` [I, k] int64,
    the same for each of them. The locations are absent where a representation edits "all" positions: the model then
    finds the positions itself, from the labels and the mask. Subspaces are there where they are given.

    Args:
        tokenizer: a transformers tokenizer; nothing of it is changed.
        reft_model: its `representations` say which positions are edited.
        prompts, outputs: the texts, one output a prompt.
        max_length: the longest sequence, in tokens.
        append_eos: whether the target ends with the tokenizer's end token.
        cache: a folder to keep the token ids in, from where they are mapped into memory when the same texts are to be
            tokenised in the same way again. See :func:`reft_kernels.training.token_cache.cached_table`.
        subspaces: for interventions of the caller's own that read them, the dimensions of its subspace that each
            example trains, equally many for all of them (paper, appendix G.1).

    Raises:
        ValueError: prompts and outputs differ in number, an empty prompt, `max_length` below 2, a tokenizer
            without end token where one is to be appended, no example short enough, or `subspaces` that are not one
            list of k different dimensions an example, each within every intervention's rank.

    Attributes:
        dropped: the indices of the examples left out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reft_model: ReftModel,
        prompts: Sequence[str],
        outputs: Sequence[str],
        *,
        max_length: int = 512,
        append_eos: bool = True,
        cache: str | Path | None = None,
        subspaces: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if len(prompts) != len(outputs):
            raise ValueError(f"expected as many outputs as prompts, got {len(prompts)} prompts, {len(outputs)} outputs")
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}")
        self._table = cached_table(
            tokenizer, prompts, outputs, max_length=max_length, append_eos=append_eos, folder=cache
        )
        self.dropped: list[int] = self._table.dropped.tolist()
        if not len(self):
            raise ValueError(f"none of the {len(prompts)} examples has an output within max_length={max_length} tokens")
        if self.dropped:
            warnings.warn(
                f"{len(self.dropped)} of {len(prompts)} examples left out: "
                f"nothing of their output is within max_length={max_length} tokens",
                stacklevel=2,
            )
        self._layout = ItemLayout([representation.positions for representation in reft_model.representations])
        self._subspaces: Tensor | None = None
        if subspaces is not None:
            dropped = set(self.dropped)
            chosen = checked_subspaces(subspaces, len(prompts), reft_model)
            self._subspaces = torch.tensor([one for index, one in enumerate(chosen) if index not in dropped])
            self._count = len(reft_model.representations)

    def __len__(self) -> int:
        return len(self._table.prompt_lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} out of range for {len(self)} examples")
        index %= len(self)
        input_ids, prompt_length = self._table.example(index)
        item = self._layout.item(input_ids, prompt_length)
        if self._subspaces is not None:
            item["subspaces"] = self._subspaces[index].expand(self._count, -1)
        return item

    @property
    def lengths(self) -> list[int]:
        """The length of every item's `input_ids`, in tokens."""
        lengths: list[int] = self._table.lengths.tolist()
        return lengths


@dataclass
class SupervisedCollator:
    """Items of SupervisedDataset or of pyreft's data sets -> one batch, padded on the right to its longest item.

    The batch holds `input_ids`, `labels` (-100 where padded) and `attention_mask`, all [B, S] int64, and,
    where the items have them, `intervention_locations` [B, I, P] int64 with -1 for "no edit" and `subspaces`
    [B, I, k] int64. The mask is the items' own, else it comes from the lengths, so a pad token that is also the end
    token hides nothing.

    Attributes:
        pad_token_id: fills padded columns.
        pad_to: S is a multiple of this number, or one of these numbers (see :class:`Buckets`): few shapes for
            `torch.compile` and CUDA graphs. The loss is the same.
        num_positions: P, always; by default the largest number of the batch.

    Raises ValueError for a batch that is longer than every number in `pad_to`, or has more positions.
    """

    pad_token_id: int = 0
    pad_to: int | Sequence[int] | None = None
    num_positions: int | None = None

    def __post_init__(self) -> None:
        self.buckets = None if self.pad_to is None else Buckets(self.pad_to)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.as_tensor(feature["input_ids"], dtype=torch.int64) for feature in features]
        labels = [torch.as_tensor(feature["labels"], dtype=torch.int64) for feature in features]
        mask = [
            torch.as_tensor(feature.get("attention_mask", torch.ones_like(row)), dtype=torch.int64)
            for feature, row in zip(features, ids, strict=True)
        ]
        longest = max(map(len, ids))
        more = 0 if self.buckets is None else self.buckets.next(longest) - longest
        batch = {
            "input_ids": _pad(ids, self.pad_token_id, more),
            "labels": _pad(labels, IGNORE_INDEX, more),
            "attention_mask": _pad(mask, 0, more),
        }
        add_locations(batch, features)
        if LOCATIONS in batch:
            batch[LOCATIONS] = pad_locations(batch[LOCATIONS], self.num_positions)
        return batch


def _pad(rows: list[Tensor], value: int, more: int) -> Tensor:
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    return torch.nn.functional.pad(padded, (0, more), value=value) if more else padded


def make_supervised_data_module(
    tokenizer: PreTrainedTokenizerBase,
    reft_model: ReftModel,
    prompts: Sequence[str],
    outputs: Sequence[str],
    *,
    max_length: int = 512,
    append_eos: bool = True,
    cache: str | Path | None = None,
    subspaces: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Keyword arguments for a Trainer: `train_dataset` (SupervisedDataset), `eval_dataset` (None) and
    `data_collator` (SupervisedCollator). Arguments and errors are those of SupervisedDataset."""
    dataset = SupervisedDataset(
        tokenizer,
        reft_model,
        prompts,
        outputs,
        max_length=max_length,
        append_eos=append_eos,
        cache=cache,
        subspaces=subspaces,
    )
    return {
        "train_dataset": dataset,
        "eval_dataset": None,
        "data_collator": SupervisedCollator(pad_token_id(tokenizer)),
    }
