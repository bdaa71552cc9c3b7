"""Supervised data: rows of a JSONL file, token ids with a masked prompt, and the positions to edit.

One example is a prompt and the output to learn. The loss is on the output alone (paper, eq. 4) and the edit
positions are those of the prompt: the first `f` and the last `l` of its tokens for `"f{f}+l{l}"` (paper,
section 3.2; pyreft `ReftSupervisedDataset`). No sink token is put in front, unlike in pyreft: a prompt
shorter than the prefix and the suffix has fewer positions, and the rest of its row is -1, which means "no
edit".
"""

from __future__ import annotations

import gzip
import json
import warnings
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from reft_kernels.positions import get_intervention_locations, parse_positions
from reft_kernels.training.collators import add_locations
from reft_kernels.training.subspaces import checked_subspaces, read_subspaces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reft_kernels.model import ReftModel

IGNORE_INDEX = -100
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
        return value

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


def read_jsonl(path: str | Path, *, max_examples: int | None = None, needs_output: bool = True) -> list[Example]:
    """The rows of a `.jsonl` or `.jsonl.gz` file (UTF-8, one JSON object a line, blank lines skipped).

    Args:
        path: the file; read as gzip if its name ends in `.gz`.
        max_examples: read no further than this many rows.
        needs_output: False for evaluation, where a row with an `answer` needs no `output`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken row (the message names file, line and field), no rows at all, or damaged gzip data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such data file: {path}")
    examples: list[Example] = []
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if max_examples is not None and len(examples) >= max_examples:
                    break
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where}: not UTF-8 text (byte {error.start})") from None
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: not valid JSON, {error.msg} (column {error.colno})") from None
                examples.append(parse_row(row, where, needs_output=needs_output))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip data after line {number} ({error})") from None
    if not examples:
        raise ValueError(f"{path} holds no rows")
    return examples


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the tokenizer's own start tokens but without an end token that it would
    append (a prompt goes on). Training and generation both tokenise prompts here, so their edit positions
    agree."""
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(list(texts), padding=False, truncation=False, verbose=False)["input_ids"]
    eos, eos_text = tokenizer.eos_token_id, tokenizer.eos_token
    if eos is None:
        return encoded
    return [
        ids[:-1] if ids and ids[-1] == eos and not text.endswith(str(eos_text)) else ids
        for ids, text in zip(encoded, texts, strict=True)
    ]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padded columns: the pad token, else the end token, else 0. Its value is never looked
    at, since attention masks are built from lengths."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


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
        subspaces: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if len(prompts) != len(outputs):
            raise ValueError(f"expected as many outputs as prompts, got {len(prompts)} prompts, {len(outputs)} outputs")
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}")
        if append_eos and tokenizer.eos_token_id is None:
            raise ValueError("append_eos=True needs a tokenizer with an end token; this one has no eos_token")
        # Flat storage: a Python list of ids would take eight times the memory.
        self._ids = array("i")
        self._starts = [0]
        self._prompt_lengths: list[int] = []
        self.dropped: list[int] = []
        for index, (prompt, full) in enumerate(_encode_pairs(tokenizer, prompts, outputs)):
            if not prompt:
                raise ValueError(f"prompt {index} has no tokens: {prompts[index]!r}")
            if append_eos:
                full = [*full, int(tokenizer.eos_token_id)]
            full = full[:max_length]
            if len(prompt) >= len(full):
                self.dropped.append(index)
                continue
            self._ids.extend(full)
            self._starts.append(len(self._ids))
            self._prompt_lengths.append(len(prompt))
        if not self._prompt_lengths:
            raise ValueError(f"none of the {len(prompts)} examples has an output within max_length={max_length} tokens")
        if self.dropped:
            warnings.warn(
                f"{len(self.dropped)} of {len(prompts)} examples left out: "
                f"nothing of their output is within max_length={max_length} tokens",
                stacklevel=2,
            )
        self._spans = position_spans([representation.positions for representation in reft_model.representations])
        self._locations: dict[int, Tensor] = {}
        self._subspaces: Tensor | None = None
        if subspaces is not None:
            dropped = set(self.dropped)
            chosen = checked_subspaces(subspaces, len(prompts), reft_model)
            self._subspaces = torch.tensor([one for index, one in enumerate(chosen) if index not in dropped])
            self._count = len(reft_model.representations)

    def __len__(self) -> int:
        return len(self._prompt_lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} out of range for {len(self)} examples")
        index %= len(self)
        input_ids = torch.tensor(self._ids[self._starts[index] : self._starts[index + 1]], dtype=torch.int64)
        prompt_length = self._prompt_lengths[index]
        labels = input_ids.clone()
        labels[:prompt_length] = IGNORE_INDEX
        item = {"input_ids": input_ids, "labels": labels}
        if self._spans is not None:
            if prompt_length not in self._locations:
                self._locations[prompt_length] = span_locations(prompt_length, self._spans)
            item["intervention_locations"] = self._locations[prompt_length]
        if self._subspaces is not None:
            item["subspaces"] = self._subspaces[index].expand(self._count, -1)
        return item

    @property
    def lengths(self) -> list[int]:
        """The length of every item's `input_ids`, in tokens."""
        return [stop - start for start, stop in zip(self._starts, self._starts[1:], strict=False)]


def _encode_pairs(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], outputs: Sequence[str], chunk: int = 1000
) -> Iterator[tuple[list[int], list[int]]]:
    for start in range(0, len(prompts), chunk):
        stop = start + chunk
        full = [prompt + output for prompt, output in zip(prompts[start:stop], outputs[start:stop], strict=True)]
        yield from zip(encode_prompts(tokenizer, prompts[start:stop]), encode_prompts(tokenizer, full), strict=True)


def position_spans(positions: Iterable[str | None]) -> list[tuple[int, int]] | None:
    """(first, last) of each representation, or None as soon as one of them edits all positions."""
    spans: list[tuple[int, int]] = []
    for text in positions:
        span = None if text is None else parse_positions(text)
        if span is None:
            return None
        spans.append(span)
    return spans


def span_locations(prompt_length: int, spans: Sequence[tuple[int, int]]) -> Tensor:
    """The positions of a prompt [I, P], one row for each span, padded with -1 to the widest."""
    width = max(first + last for first, last in spans)
    rows: dict[tuple[int, int], list[int]] = {}
    for first, last in spans:
        if (first, last) not in rows:
            (row,) = get_intervention_locations(
                prompt_length, first_n=first, last_n=last, num_interventions=1, share_weights=True
            )
            rows[first, last] = [*row, *[-1] * (width - len(row))]
    return torch.tensor([rows[span] for span in spans], dtype=torch.int64)


@dataclass
class SupervisedCollator:
    """Items of SupervisedDataset or of pyreft's data sets -> one batch, padded on the right to its longest item.

    The batch holds `input_ids`, `labels` (-100 where padded) and `attention_mask`, all [B, S] int64, and,
    where the items have them, `intervention_locations` [B, I, P] int64 with -1 for "no edit" and `subspaces`
    [B, I, k] int64. The mask is the items' own, else it comes from the lengths, so a pad token that is also the end
    token hides nothing.
    """

    pad_token_id: int = 0

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.as_tensor(feature["input_ids"], dtype=torch.int64) for feature in features]
        labels = [torch.as_tensor(feature["labels"], dtype=torch.int64) for feature in features]
        mask = [
            torch.as_tensor(feature.get("attention_mask", torch.ones_like(row)), dtype=torch.int64)
            for feature, row in zip(features, ids, strict=True)
        ]
        batch = {
            "input_ids": _pad(ids, self.pad_token_id),
            "labels": _pad(labels, IGNORE_INDEX),
            "attention_mask": _pad(mask, 0),
        }
        add_locations(batch, features)
        return batch


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def make_supervised_data_module(
    tokenizer: PreTrainedTokenizerBase,
    reft_model: ReftModel,
    prompts: Sequence[str],
    outputs: Sequence[str],
    *,
    max_length: int = 512,
    append_eos: bool = True,
    subspaces: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Keyword arguments for a Trainer: `train_dataset` (SupervisedDataset), `eval_dataset` (None) and
    `data_collator` (SupervisedCollator). Arguments and errors are those of SupervisedDataset."""
    dataset = SupervisedDataset(
        tokenizer, reft_model, prompts, outputs, max_length=max_length, append_eos=append_eos, subspaces=subspaces
    )
    return {
        "train_dataset": dataset,
        "eval_dataset": None,
        "data_collator": SupervisedCollator(pad_token_id(tokenizer)),
    }
