"""Which tokens every site edits during one call of the base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels.positions import GivenLocations, Span, drop_duplicates, shift_positions


class Step(NamedTuple):
    """One edit at a site. positions int64 [B, P] (None: every token), group int64 [B, P] for several members."""

    members: tuple[int, ...]
    positions: Tensor | None
    group: Tensor | None


class Window(NamedTuple):
    """The part of the sequence that one call of the base model sees: ``length`` tokens after ``offset`` others."""

    batch: int
    offset: int
    length: int


class Places(NamedTuple):
    """The interventions of every site (as indices), and which of all interventions can share one edit."""

    sites: tuple[tuple[int, ...], ...]
    fusable: tuple[bool, ...]


class Locations:
    """Where every intervention edits; base of the two ways to say it."""

    batch: int
    """How many rows the positions are for."""
    extent: int
    """Number of tokens that positions refer to; those after it are edited alike."""
    before_decoder: int = 0
    """How many tokens come before those that the decoder of an encoder-decoder makes."""

    def steps(self, places: Places, window: Window) -> list[list[Step]]:
        """The edits of every site within a window."""
        raise NotImplementedError

    def _fit(self, table: Tensor, window: Window) -> Tensor:
        """Positions [..., B, P] for the batch (beams lie next to each other) and the part of the window."""
        batch = table.shape[-2]
        if window.batch != batch:
            if batch == 0 or window.batch % batch:
                raise ValueError(f"positions are for a batch of {batch}, the model was called with {window.batch}")
            table = table.repeat_interleave(window.batch // batch, dim=-2)
        if window.offset or window.length < self.extent:
            table = shift_positions(table, window.offset, window.length)
        return table


class Run(NamedTuple):
    """Interventions of one site, by their place in it, that one step edits with; ``whole``: on every token."""

    members: tuple[int, ...]
    whole: bool


def _runs(whole: Sequence[bool], join: Callable[[int, int], bool]) -> list[Run]:
    """Split a site's interventions, in their order, into as few runs as possible."""
    runs: list[Run] = []
    for k, all_tokens in enumerate(whole):
        last = runs[-1] if runs else None
        if last is not None and not all_tokens and not last.whole and all(join(j, k) for j in last.members):
            runs[-1] = Run((*last.members, k), False)
        else:
            runs.append(Run((k,), all_tokens))
    return runs


def _apart(one: Span | None, other: Span | None) -> bool:
    """Whether one is a prefix and the other a suffix."""
    return one is not None and other is not None and not (one[0] and other[0]) and not (one[1] and other[1])


def _group(tables: Sequence[Tensor]) -> Tensor | None:
    """Which of the tables [B, P_k] each slot of their concatenation comes from."""
    if len(tables) == 1:
        return None
    return torch.cat([torch.full_like(table, k) for k, table in enumerate(tables)], dim=1)


class SpanLocations(Locations):
    """Prefixes and suffixes of the prompt. The table [B, first + last] holds the widest of each."""

    def __init__(self, spans: Sequence[Span | None], table: Tensor, first: int, extent: int) -> None:
        self.spans = tuple(spans)
        self.table = table
        self.first = first
        self.batch = table.shape[0]
        self.extent = self.before_decoder = extent

    def steps(self, places: Places, window: Window) -> list[list[Step]]:
        table = None if window.offset >= self.extent else self._fit(self.table, window)
        known: dict[tuple[tuple[Span | None, bool], ...], list[Step]] = {}
        found = []
        for members in places.sites:
            key = tuple((self.spans[i], places.fusable[i]) for i in members)
            if key not in known:
                known[key] = self._site(key, table)
            found.append(known[key])
        return found

    def _site(self, key: tuple[tuple[Span | None, bool], ...], table: Tensor | None) -> list[Step]:
        def join(j: int, k: int) -> bool:
            (one, one_fusable), (other, other_fusable) = key[j], key[k]
            return one_fusable and other_fusable and _apart(one, other)

        steps = []
        for members, whole in _runs([span is None for span, _ in key], join):
            if whole:
                steps.append(Step(members, None, None))
            elif table is not None:
                parts = [self._columns(key[k][0], table) for k in members]
                joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
                steps.append(Step(members, joined, _group(parts)))
        return steps

    def _columns(self, span: Span | None, table: Tensor) -> Tensor:
        assert span is not None
        first, last = span
        width = table.shape[1]
        if (first, first + last) == (self.first, width):
            return table
        return torch.cat([table[:, :first], table[:, width - last :]], dim=1)


class NamedLocations(Locations):
    """Positions given by the caller: lists or a device tensor, or every token.

    A token that is named for two interventions of one site is edited by one after the other, as pyvene does it. Two
    that name no token in common are one edit. Of a tensor, which nobody reads, that is known where the interventions'
    own ``spans`` are a prefix and a suffix; the first alone then edits a token that it names for both.
    """

    def __init__(
        self, given: GivenLocations, batch: int, extent: int, spans: Sequence[Span | None] | None = None
    ) -> None:
        self.given = given
        self.spans = spans
        self.batch = batch
        self.extent = extent
        self.highest: list[int] | None = None
        self._columns: list[int] | None = None

    def check_at_the_sites(self) -> None:
        """Note the largest position of every intervention, for sites whose number of tokens the inputs do not tell."""
        if self.given.host is not None and self.given.host.numel():
            self.highest = self.given.host.amax(dim=(1, 2)).tolist()

    def expect_parts(self) -> None:
        """Find out, once, which positions are named, so that parts of the sequence without any cost nothing.

        The one time that a device tensor is read.
        """
        table = self.given.table if self.given.host is None else self.given.host
        self._columns = [] if table is None else table.unique().tolist()
        self.extent = max(self._columns, default=-1) + 1

    def _is_named_in(self, window: Window) -> bool:
        if self._columns is None:
            return True
        return any(window.offset <= column < window.offset + window.length for column in self._columns)

    def steps(self, places: Places, window: Window) -> list[list[Step]]:
        sites = [(members, self._split(members, places)) for members in places.sites]
        keys = {tuple(m[k] for k in run.members) for m, runs in sites for run in runs if not run.whole}
        tables: dict[tuple[int, ...], Tensor] = {}
        if self.given.table is not None and window.offset < self.extent and self._is_named_in(window):
            tables = self._tables(self._fit(self.given.table, window), keys)
        groups: dict[int, Tensor | None] = {}
        found = []
        for site, runs in sites:
            steps = []
            for members, whole in runs:
                table = tables.get(tuple(site[k] for k in members))
                if whole:
                    steps.append(Step(members, None, None))
                elif table is not None:
                    count = len(members)
                    if count not in groups:
                        groups[count] = _group(table.chunk(count, dim=1)) if table.shape[1] else None
                    steps.append(Step(members, table, groups[count]))
            found.append(steps)
        return found

    def _split(self, site: tuple[int, ...], places: Places) -> list[Run]:
        def join(j: int, k: int) -> bool:
            one, other = site[j], site[k]
            return places.fusable[one] and places.fusable[other] and not self._meet(one, other)

        return _runs([i in self.given.whole for i in site], join)

    def _meet(self, one: int, other: int) -> bool:
        """Whether a token is, or may be, named for both interventions."""
        host = self.given.host
        if host is None:
            return self.spans is None or not _apart(self.spans[one], self.spans[other])
        same = (host[one].unsqueeze(-1) == host[other].unsqueeze(-2)) & (host[one].unsqueeze(-1) >= 0)
        return bool(same.any())

    def _tables(self, table: Tensor, keys: set[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        """Positions [B, n * P] of every run, all runs of one length in one go, without duplicates."""
        found: dict[tuple[int, ...], Tensor] = {}
        for count in {len(key) for key in keys}:
            ours = sorted(key for key in keys if len(key) == count)
            flat = [i for key in ours for i in key]
            joined = table if flat == list(range(len(table))) else torch.stack([table[i] for i in flat])
            _, batch, width = joined.shape
            joined = joined.reshape(len(ours), count, batch, width).transpose(1, 2)
            joined = joined.reshape(len(ours), batch, count * width)
            if self.given.host is None:  # lists lost their duplicates on the host
                joined = drop_duplicates(joined)
            found.update(zip(ours, joined.unbind(0), strict=True))
        return found


class GeneratedLocations(Locations):
    """Every generated token and none of the prompt."""

    def __init__(self, batch: int, extent: int, device: torch.device) -> None:
        self.batch = batch
        self.extent = self.before_decoder = extent
        self.device = device

    def steps(self, places: Places, window: Window) -> list[list[Step]]:
        start = max(0, self.extent - window.offset)
        if start >= window.length:
            return [[] for _ in places.sites]
        rows = None
        if start:
            rows = torch.arange(start, window.length, device=self.device).expand(window.batch, -1).contiguous()
        return [[Step((k,), rows, None) for k in range(len(members))] for members in places.sites]
