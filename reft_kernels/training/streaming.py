"""Training data that is read and tokenised while it is used: for what does not fit into memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from reft_kernels.training.data import DEFAULT_TEMPLATE, build_prompt, parse_row
from reft_kernels.training.item_layout import ItemLayout
from reft_kernels.training.sources import Row, SkippedRows, parse_rows
from reft_kernels.training.token_table import encode_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reft_kernels.model import ReftModel

_CHUNK = 64
_T = TypeVar("_T")

Texts = tuple[str, str]
"""Prompt and output."""


def texts_of(row: Row, template: str = DEFAULT_TEMPLATE) -> Texts:
    """Prompt and output of a row with the fields of :class:`Example`."""
    example = parse_row(row.fields, row.where)
    return build_prompt(example.instruction, example.input, template), example.output or ""


class StreamedDataset(IterableDataset[dict[str, Tensor]]):
    """Items as those of SupervisedDataset, made one after the other from a source that is never held as a whole.

    It begins anew when the source ends, as long as `repeat` says so, and therefore needs `max_steps` of the Trainer. An
    order follows from the seed alone: a resumed run, for which the Trainer passes over the batches that were done
    already (reading and tokenising them again), goes on with the same examples.

    Workers of a DataLoader share the rows among them. Processes of a distributed run must not do so here, since the
    Trainer (accelerate's IterableDatasetShard) gives each process its part of every batch; `shard` is for training
    loops of one's own. Examples of which nothing of the output is within `max_length` are left out.

    Args:
        tokenizer, reft_model, max_length, append_eos: see :class:`SupervisedDataset`.
        source, split, max_examples, fields, skipped: see :func:`reft_kernels.training.sources.read_rows`. A data set of
            the hub is streamed. What workers skip is counted in their copies of `skipped`.
        template: see :func:`build_prompt`.
        texts: from a row to its prompt and output, instead of the template; raises ValueError for a broken row.
        shuffle: size of the buffer of rows from which the next is drawn; 0 keeps the source's order.
        seed: of the order; every pass over the source has another one.
        repeat: begin anew at the end.
        shard: (number of this process, number of processes): every process gets other rows.

    Raises ValueError, when rows are asked for, as `read_rows`; also for prompts without tokens, and where no row of the
    source can be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reft_model: ReftModel,
        source: str | Path,
        *,
        split: str | None = None,
        max_examples: int | None = None,
        fields: Mapping[str, str] | None = None,
        skipped: SkippedRows | None = None,
        template: str = DEFAULT_TEMPLATE,
        texts: Callable[[Row], Texts] | None = None,
        max_length: int = 512,
        append_eos: bool = True,
        shuffle: int = 0,
        seed: int = 0,
        repeat: bool = True,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}")
        if shuffle < 0:
            raise ValueError(f"shuffle must be the size of a buffer, at least 0, got {shuffle}")
        if not 0 <= shard[0] < shard[1]:
            raise ValueError(f"shard must be (number, count) with 0 <= number < count, got {shard}")
        build_prompt("", template=template)  # raises for a bad template now
        self._tokenizer = tokenizer
        self._layout = ItemLayout([representation.positions for representation in reft_model.representations])
        self._rows = partial(
            parse_rows,
            texts if texts is not None else partial(texts_of, template=template),
            source,
            split=split,
            max_examples=max_examples,
            fields=fields,
            skipped=skipped,
            streaming=True,
        )
        self._encode = partial(encode_pairs, max_length=max_length, append_eos=append_eos)
        self.source = source
        self.shuffle, self.seed, self.repeat, self.shard = shuffle, seed, repeat, shard
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Another order of the rows; the Trainer calls it before each of its epochs."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        number, count = self.shard
        if worker is not None:
            number, count = number * worker.num_workers + worker.id, count * worker.num_workers
        turn = 0
        while True:
            found = False
            for item in self._one_pass(number, count, f"{self.seed}, {self._epoch}, {turn}"):
                found = True
                yield item
            if not found and count == 1:
                raise ValueError(f"{self.source} holds no example that can be used")
            if not found or not self.repeat:
                return
            turn += 1

    def _one_pass(self, number: int, count: int, seed: str) -> Iterator[dict[str, Tensor]]:
        texts: Iterator[Texts] = islice(self._rows(), number, None, count)
        if self.shuffle:
            texts = shuffled(texts, self.shuffle, seed)
        while chunk := list(islice(texts, _CHUNK)):
            prompts, outputs = zip(*chunk, strict=True)
            for pair in self._encode(self._tokenizer, prompts, outputs):
                if pair is not None:
                    yield self._layout.item(torch.tensor(pair.ids, dtype=torch.int64), pair.prompt_length)


def shuffled(items: Iterator[_T], size: int, seed: str) -> Iterator[_T]:
    """The items, each drawn from a buffer of the next `size` of them, in an order that `seed` decides."""
    draw = random.Random(seed)
    buffer = list(islice(items, size))
    for item in items:
        index = draw.randrange(size)
        yield buffer[index]
        buffer[index] = item
    draw.shuffle(buffer)
    yield from buffer
