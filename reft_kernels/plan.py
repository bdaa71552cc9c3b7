"""What is edited where during one forward or generation, and the hooks that carry it out."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reft_kernels import interventions as builtin
from reft_kernels.interventions import Intervention, edit_rows
from reft_kernels.modules import Site
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

    extent: int
    """Number of tokens that positions refer to; those after it are generated ones."""

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
        self.extent = extent

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
            assert one is not None
            assert other is not None
            apart = not (one[0] and other[0]) and not (one[1] and other[1])
            return one_fusable and other_fusable and apart

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

    A token that is named for two interventions of one site is edited by one after the other where lists say so (as
    pyvene does it), and by the first of the two where a device tensor does, which nobody reads.
    """

    def __init__(self, given: GivenLocations, extent: int) -> None:
        self.given = given
        self.extent = extent

    def steps(self, places: Places, window: Window) -> list[list[Step]]:
        sites = [(members, self._split(members, places)) for members in places.sites]
        keys = {tuple(m[k] for k in run.members) for m, runs in sites for run in runs if not run.whole}
        tables: dict[tuple[int, ...], Tensor] = {}
        if self.given.table is not None and window.offset < self.extent:
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
        """Whether lists name a token for both interventions."""
        host = self.given.host
        if host is None:
            return False
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

    def __init__(self, extent: int, device: torch.device) -> None:
        self.extent = extent
        self.device = device

    def steps(self, places: Places, window: Window) -> list[list[Step]]:
        start = max(0, self.extent - window.offset)
        if start >= window.length:
            return [[] for _ in places.sites]
        rows = None
        if start:
            rows = torch.arange(start, window.length, device=self.device).expand(window.batch, -1).contiguous()
        return [[Step((k,), rows, None) for k in range(len(members))] for members in places.sites]


class Plan:
    """The edits of one forward or generation.

    ``steps`` holds those of the base model's current call, by site, and is None where nothing is left to edit.
    ``length`` is the number of tokens that every edited hidden state must have, where that is known. While an
    intervention that is not of this library runs, the plan is ``busy``: what that calls is not edited.
    """

    def __init__(
        self,
        owner: object,
        places: Places,
        interventions: Sequence[nn.Module],
        locations: Locations,
        subspaces: Sequence[Any] | None,
        inplace: bool,
    ) -> None:
        self.owner = owner
        self.outer: Plan | None = None
        self.places = places
        self.interventions = interventions
        self.locations = locations
        self.subspaces = subspaces
        self.inplace = inplace
        self.grad = torch.is_grad_enabled()
        self.busy = False
        self.steps: list[list[Step]] | None = None
        self.length: int | None = None
        self.moved: dict[tuple[int, torch.device], Tensor] = {}

    def look_at(self, window: Window) -> None:
        """Resolve the steps of the base model's next call."""
        steps = self.locations.steps(self.places, window)
        self.steps = steps if any(steps) else None
        self.length = window.length if isinstance(self.locations, SpanLocations) else None
        self.moved.clear()

    def on(self, device: torch.device, index: Tensor) -> Tensor:
        """An index tensor on the device of the tensor it indexes (models sharded over devices)."""
        if index.device == device:
            return index
        key = id(index), device
        if key not in self.moved:
            self.moved[key] = index.to(device, non_blocking=True)
        return self.moved[key]


class GenerationPlan(Plan):
    """A plan that follows the calls of `generate`: the prompt in one or several parts, then the cached steps."""

    calls = 0
    seen = 0
    counted = False
    settled = False

    def __init__(self, *args: Any, encoder_decoder: bool) -> None:
        super().__init__(*args)
        self.encoder_decoder = encoder_decoder
        self.grad = False  # `generate` builds no graph

    def next_call(self, inputs: Tensor, past: Any) -> None:
        """See to the steps of a call with these inputs (token ids [B, S] or embeddings [B, S, d])."""
        batch, length = inputs.shape[:2]
        self.calls += 1
        if self.encoder_decoder:
            # The prompt went through the encoder; what the decoder is called with comes after it.
            self.look_at(Window(batch, self.locations.extent, length))
            return
        if self.counted and self.settled and past is not None:
            return
        offset = self._offset(past, length)
        # After the prompt every call has the same steps.
        self.settled = offset >= self.locations.extent
        self.look_at(Window(batch, offset, length))

    def _offset(self, past: Any, length: int) -> int:
        """How many tokens the cache holds, without a host synchronisation after the first call."""
        if past is None:
            return 0
        if self.counted:
            offset = self.seen
        else:
            held = cache_length(past)
            # A cache of fixed size may count on the device: read it once, then count along.
            self.counted = isinstance(held, Tensor)
            offset = int(held)
        self.seen = offset + length
        return offset


def cache_length(past: Any) -> int | Tensor:
    """How many tokens a cache of transformers holds, an int or (caches of fixed size) an int tensor."""
    get_seq_length = getattr(past, "get_seq_length", None)
    held: int | Tensor = get_seq_length() if callable(get_seq_length) else past[0][0].shape[-2]
    return held


class _Active(threading.local):
    """The innermost plan of each thread."""

    plan: Plan | None = None


_active = _Active()


@contextmanager
def activated(plan: Plan) -> Iterator[None]:
    """Make the plan the one its owner's hooks follow, within this thread."""
    plan.outer = _active.plan
    _active.plan = plan
    try:
        yield
    finally:
        _active.plan = plan.outer
        plan.outer = None


def active_plan(owner: object) -> Plan | None:
    """The innermost active plan of this owner."""
    plan = _active.plan
    while plan is not None and plan.owner is not owner:
        plan = plan.outer
    return plan


def in_backward() -> bool:
    """Whether this code runs inside of the autograd engine's backward pass."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def is_fusable(intervention: nn.Module) -> bool:
    """Whether an intervention's edit is one of the built-in formulas: ours, with a forward of its own nowhere."""
    if not isinstance(intervention, Intervention):
        return False
    for cls in type(intervention).__mro__:
        if "forward" in vars(cls):
            return cls.__module__ == builtin.__name__
    return False


class SiteHook:
    """Forward hook of one edited module; does nothing unless a plan of its owner is active.

    Holds neither the model nor the ReftModel, so that copying or pickling the base model copies no adapter, and
    copying a ReftModel copies its hooks with it.
    """

    def __init__(self, owner: object, index: int, site: Site, names: Sequence[str]) -> None:
        self.owner = owner
        self.index = index
        self.path = site.path
        self.side = site.side
        self.owned = site.owned
        self.names = tuple(names)
        self.edited_with_grad = False

    def steps(self, plan: Plan | None) -> list[Step] | None:
        """What the plan asks for here."""
        if plan is None:
            if self.edited_with_grad and not torch.compiler.is_compiling() and in_backward():
                raise RuntimeError(
                    f"gradient checkpointing recomputes {self.path}, whose {self.side} is edited, without the edit: "
                    "the gradients would be wrong. Turn checkpointing off, or edit block_output with transformers "
                    "5 or later, which runs hooks outside of the checkpoint"
                )
            return None
        return None if plan.steps is None or plan.busy else plan.steps[self.index]

    def edit(self, plan: Plan, steps: list[Step], value: Any) -> Tensor:
        """The hidden state [B, S, d] with this site's edits."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{self.path}: its {self.side} must be a floating-point tensor to be edited, got {kind}")
        h = value
        if plan.grad:
            self.edited_with_grad = True
        members = plan.places.sites[self.index]
        for step in steps:
            ours: list[Any] = [plan.interventions[members[k]] for k in step.members]
            self._check(h, step, ours, plan)
            positions = None if step.positions is None else plan.on(h.device, step.positions)
            if len(ours) == 1 and not plan.places.fusable[members[step.members[0]]]:
                subspaces = None if plan.subspaces is None else plan.subspaces[members[step.members[0]]]
                plan.busy = True
                try:
                    h = edit_with(ours[0], h, positions, subspaces)
                finally:
                    plan.busy = False
                continue
            group = None if step.group is None else plan.on(h.device, step.group)
            inplace = plan.inplace and self.owned and may_write(h)
            h = edit_rows(ours, h, positions, group, inplace=inplace)
        return h

    def _check(self, h: Tensor, step: Step, ours: Sequence[nn.Module], plan: Plan) -> None:
        shape = list(h.shape)
        for k, intervention in zip(step.members, ours, strict=True):
            width = getattr(intervention, "embed_dim", None)
            if isinstance(width, int) and shape[-1] != width:
                raise ValueError(
                    f"{self.names[k]}: the {self.side} of {self.path} has {shape[-1]} values a row (shape {shape}), "
                    f"the intervention's embed_dim is {width}"
                )
        if step.positions is None:
            return
        if len(shape) != 3 or shape[0] != step.positions.shape[0]:
            raise ValueError(
                f"{self.names[step.members[0]]}: positions need an {self.side} of {self.path} of shape [B, S, d] "
                f"with B = {step.positions.shape[0]}, got {shape}"
            )
        if plan.length is not None and shape[1] != plan.length:
            raise ValueError(
                f"{self.names[step.members[0]]}: the {self.side} of {self.path} has {shape[1]} tokens, the "
                f"model's input {plan.length}: pass unit_locations that count this module's own tokens"
            )


class OutputHook(SiteHook):
    """Edits a module's output: a tensor, the first of a tuple, or the first value of a dict."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        plan = active_plan(self.owner)
        steps = self.steps(plan)
        if not steps or plan is None:
            return None
        if isinstance(output, Tensor):
            edited = self.edit(plan, steps, output)
            return None if edited is output else edited
        if isinstance(output, (tuple, list)) and output:
            edited = self.edit(plan, steps, output[0])
            if edited is output[0]:
                return None
            kind: Any = type(output)
            items = [edited, *output[1:]]
            return kind(*items) if hasattr(kind, "_fields") else kind(items)
        if isinstance(output, Mapping) and output:
            key = next(iter(output))
            edited = self.edit(plan, steps, output[key])
            if edited is output[key]:
                return None
            copied: Any = copy.copy(output)
            copied[key] = edited
            return copied
        return self.edit(plan, steps, output)


class InputHook(SiteHook):
    """Edits a module's input: its first positional argument, else ``hidden_states``, else its first float tensor."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan = active_plan(self.owner)
        steps = self.steps(plan)
        if not steps or plan is None:
            return None
        if args and isinstance(args[0], Tensor):
            return (self.edit(plan, steps, args[0]), *args[1:]), kwargs
        floats = [name for name, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()]
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(floats), None)
        if name is None:
            raise TypeError(f"{self.path}: found no tensor to edit among its arguments")
        return args, {**kwargs, name: self.edit(plan, steps, kwargs[name])}


class CallHook:
    """Pre-hook of the base model: tells a generation's plan which part of the sequence comes next."""

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        plan = active_plan(self.owner)
        if not isinstance(plan, GenerationPlan) or plan.busy:
            return
        names = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
        candidates = [*args[:1], *(kwargs.get(name) for name in names)]
        inputs = next((value for value in candidates if isinstance(value, Tensor)), None)
        if inputs is not None:
            plan.next_call(inputs, kwargs.get("past_key_values"))


def may_write(h: Tensor) -> bool:
    """Whether an edit may overwrite h: a plain tensor of a module's own making that autograd lets be written."""
    if torch.compiler.is_compiling() or h._is_view():
        return False
    if h.requires_grad and h.is_leaf:
        return False
    return not h.is_inference() or torch.is_inference_mode_enabled()


def edit_with(intervention: nn.Module, h: Tensor, positions: Tensor | None, subspaces: Any = None) -> Tensor:
    """h with the named rows replaced by ``intervention(rows, None, subspaces)``, for any module of that form.

    positions int64 [B, P], -1 for none; None calls it on the whole of h. Each row is named at most once.
    """
    if positions is None:
        return _result(intervention(h, None, subspaces), h)
    batch, length, width = h.shape
    named = (positions >= 0) & (positions < length)
    # Rows that are not named share a row of their own at the end, which is dropped again.
    index = torch.where(named, positions, length).unsqueeze(-1).expand(-1, -1, width)
    padded = torch.cat([h, h.new_zeros(batch, 1, width)], dim=1)
    rows = padded.gather(1, index)
    edited = _result(intervention(rows, None, subspaces), rows)
    return padded.scatter(1, index, edited)[:, :length].contiguous()


def _result(value: Any, rows: Tensor) -> Tensor:
    result = value if isinstance(value, Tensor) else getattr(value, "output", None)
    if not isinstance(result, Tensor):
        raise TypeError(f"an intervention must return a tensor, got {type(value).__name__}")
    if result.shape != rows.shape:
        raise ValueError(
            f"an intervention must return the shape of its rows, {list(rows.shape)}, got {list(result.shape)}"
        )
    return result.to(rows.dtype)
