"""What never changes is computed once: training steps over the tokens from the first edited one on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from reft_kernels.model import ReftModel
from reft_kernels.training.collators import LOCATIONS, SUBSPACES
from reft_kernels.training.frozen_fingerprint import fingerprint, state_of
from reft_kernels.training.frozen_part import find_frozen_part
from reft_kernels.training.frozen_rows import ROWS, SuffixRows
from reft_kernels.training.frozen_states import (
    FrozenStates,
    as_cache,
    compute_entries,
    join_entries,
    padded,
    skipped_blocks,
)
from reft_kernels.training.frozen_store import open_store

# Largest difference, relative to the largest value, of the last hidden state.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_TOLERANCE_OF_HALF = 0.05


@dataclass
class FrozenCacheStats:
    """What a FrozenCache has done so far.

    Attributes:
        hits: rows whose states were kept.
        misses: rows whose states were computed; ``not_kept`` of them without being kept afterwards.
        bytes: of what is kept.
        block_tokens: tokens of all rows times the model's blocks.
        frozen_block_tokens: those that are constant, which a hit saves the forward and the backward of.
    """

    hits: int = 0
    misses: int = 0
    not_kept: int = 0
    bytes: int = 0
    block_tokens: int = 0
    frozen_block_tokens: int = 0

    @property
    def saved_fraction(self) -> float:
        """The part of tokens times blocks that a hit saves; of little use where it is small."""
        return self.frozen_block_tokens / max(self.block_tokens, 1)


class CacheMismatch(RuntimeError):
    """A base model computes something else from what FrozenCache keeps than from all tokens."""


class FrozenCache:
    """Keeps what never changes while a ReftModel is trained, so that an epoch costs what changes alone.

    The base model is frozen and causal. With t0 a row's first edited token, the keys and values of the tokens before t0
    are the same at every epoch, in every block, and for the tokens from t0 on so is everything below the first edit.
    Both are computed once for each example, without gradient; a step then runs the tokens from t0 on through the blocks
    after the first edit, against those keys and values. Loss and gradients are the same to rounding. (Dropout of an
    edit draws its mask by the place of a row in the batch's tensor, so that it draws another here, of the same
    distribution.)

    ::

        cache = FrozenCache(reft_model, "disk", budget=20 * 2**30, folder="states")
        ReftTrainerForCausalLM(reft_model, args, frozen_cache=cache, **data).train()

    Args:
        reft_model: the model. Most is saved with positions such as "l7"; with a prefix ("f7+l7") t0 is 0, and the
            blocks below the first edited layer are what is saved.
        place: "memory" (of the model's device), "pinned" (host memory that a GPU copies from by itself) or "disk".
        budget: how many bytes to keep, in each process. What comes after that is computed at every epoch, without
            gradient. None: no limit.
        folder: of "disk", and only then. Later runs use what is there of the same base model, config, first edited
            layer, tokens and positions, and nothing else; several processes may share it.
        verify: compute the first batch without the cache as well, and compare.

    Raises ValueError, saying why, where the model has no frozen part (see
    :func:`reft_kernels.training.frozen_part.find_frozen_part`), and for an unknown place or a folder that it lacks.

    Attributes:
        stats: a FrozenCacheStats.
    """

    def __init__(
        self,
        reft_model: ReftModel,
        place: str = "memory",
        *,
        budget: int | None = 8 * 2**30,
        folder: str | os.PathLike[str] | None = None,
        verify: bool = True,
    ) -> None:
        if not isinstance(reft_model, ReftModel):
            raise TypeError(f"reft_model must be a ReftModel, got {type(reft_model).__name__}")
        self._part = find_frozen_part(reft_model)
        self._store = open_store(place, budget, folder)
        self._model = reft_model
        self._verify = verify
        self._used: tuple[int, str] | None = None
        self.stats = FrozenCacheStats()

    @property
    def frozen_blocks(self) -> int:
        """How many blocks lie before the first edit."""
        return self._part.first

    def is_of(self, reft_model: nn.Module) -> bool:
        """Whether this is the cache of a model."""
        return self._model is reft_model

    @contextmanager
    def apply(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Within this context, the keywords with which to call the ReftModel for a batch of SuffixCollator.

        The logits of the output are those of the batch's columns. Raises as ``look_up``.
        """
        with self.enter(self.look_up(batch), batch) as inputs:
            yield inputs

    def look_up(self, batch: Mapping[str, Any]) -> FrozenStates:
        """The frozen states of a batch of SuffixCollator, kept or computed now; under the caller's autocast.

        Raises ValueError where gradient checkpointing is on, or where a forward hook has been put into the base model.
        Raises CacheMismatch where the first batch comes out differently without the cache.
        """
        rows: SuffixRows = batch[ROWS]
        if self._part.checkpointed():
            raise ValueError(
                "frozen_cache: gradient checkpointing drops the keys and values that are kept; turn it off"
            )
        self._look_at_the_weights()
        entries = [self._store.get(key) for key in rows.keys]
        missing = [index for index, entry in enumerate(entries) if entry is None]
        if missing:
            computed = compute_entries(self._part, [rows.tokens[i] for i in missing], [rows.starts[i] for i in missing])
            for index, entry in zip(missing, computed, strict=True):
                entries[index] = entry
                self.stats.not_kept += not self._store.put(rows.keys[index], entry)
        self._count(rows, len(missing))
        found = join_entries(self._part, [entry for entry in entries if entry is not None], rows.starts)
        if self._verify:
            self._verify = False
            self._compare(batch, found)
        return found

    @contextmanager
    def enter(self, states: FrozenStates, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """As ``apply``, with the states of that batch. They are for one call: an edit may be written into them."""
        names = set(batch) - {ROWS} - ({"position_ids"} if not self._part.takes_position_ids else set())
        inputs = {name: value for name, value in batch.items() if name in names}
        with skipped_blocks(self._part, states.hidden):
            yield {**inputs, "past_key_values": as_cache(states, self._part), "use_cache": True}

    def _look_at_the_weights(self) -> None:
        """Tell the store which model its entries are of, anew where weights, or autocast, may be others than before."""
        kind = self._part.device.type
        precision = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "as the weights"
        now = state_of(self._part), precision
        if now == self._used:
            return
        about = {"model": type(self._part.body).__name__, "frozen_blocks": self._part.first, "precision": precision}
        self._store.use(fingerprint(self._part, precision), about)
        self._used = now

    def _count(self, rows: SuffixRows, missing: int) -> None:
        blocks = len(self._part.blocks)
        stats = self.stats
        stats.hits += len(rows.keys) - missing
        stats.misses += missing
        stats.bytes = self._store.bytes
        for tokens, start in zip(rows.tokens, rows.starts, strict=True):
            stats.block_tokens += len(tokens) * blocks
            stats.frozen_block_tokens += len(tokens) * blocks - (len(tokens) - start) * (blocks - self._part.first)

    @torch.no_grad()
    def _compare(self, batch: Mapping[str, Any], states: FrozenStates) -> None:
        """Raises where the edited hidden states of a batch are others without the cache."""
        if hooked := self._part.own_hooks():
            raise ValueError(f"frozen_cache cannot tell what the forward hooks on {hooked[0]} do: remove them")
        rows: SuffixRows = batch[ROWS]
        ids, mask = padded(rows.tokens, self._part.device)
        cut = batch[LOCATIONS]
        whole = {"input_ids": ids, "attention_mask": mask}
        copied = states._replace(hidden=None if states.hidden is None else states.hidden.clone())
        model, subspaces = self._model, batch.get(SUBSPACES)
        with _in_eval_mode(model.interventions):
            uncut = rows.locations.to(ids.device)
            with model.edited(whole, intervention_locations=uncut, subspaces=subspaces):
                wanted = self._part.body(**whole, use_cache=False)[0]
            names = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache")
            edited = model.edited(batch, intervention_locations=cut, subspaces=subspaces)
            with self.enter(copied, batch) as inputs, edited:
                found = self._part.body(**{name: inputs[name] for name in names if name in inputs})[0]
        n = found.shape[1]
        starts = torch.tensor(rows.starts, device=ids.device)
        columns = (starts[:, None] + torch.arange(n, device=ids.device)).clamp(max=ids.shape[1] - 1)
        wanted = wanted.gather(1, columns.unsqueeze(-1).expand_as(found))
        inside = batch["attention_mask"][:, -n:].bool()
        off = float((found - wanted).abs()[inside].max() / wanted.abs()[inside].max())
        if not off <= _TOLERANCE.get(found.dtype, _TOLERANCE_OF_HALF):
            raise CacheMismatch(
                f"frozen_cache: {type(self._part.body).__name__} computes other hidden states from kept keys and "
                f"values than from all tokens (they differ by {off:.1e} of the largest): it cannot be trained with them"
            )


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(inner, inner.training) for inner in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for inner, training in modes:
            inner.training = training
