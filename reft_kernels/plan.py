"""The edits of one forward or generation, and which plan is active in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels.locations import Locations, Places, SpanLocations, Step, Window


class Plan:
    """The edits of one forward or generation.

    ``steps`` holds those of the base model's current call, by site, and is None where nothing is left to edit.
    ``length`` is the number of tokens that every edited hidden state must have, where that is known. While an
    intervention that is not of this library runs, the plan is ``busy``: what that calls is not edited. ``rebuild``
    allows the last edit in place of a site to keep the edited tensor for its backward. ``outputs`` collects what such
    interventions return besides a tensor, ``additional_kwargs`` are keywords for them.
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
        self.rebuild = False
        self.grad = torch.is_grad_enabled()
        self.busy = False
        self.steps: list[list[Step]] | None = None
        self.length: int | None = None
        self.window: Window | None = None
        self.moved: dict[tuple[int, torch.device], Tensor] = {}
        self.outputs: list[Any] = []
        self.additional_kwargs: Mapping[str, Any] = {}
        self.written_as_first_row = False

    def look_at(self, window: Window) -> None:
        """Resolve the steps of the base model's next call."""
        self.window = window
        steps = self.locations.steps(self.places, window)
        self.steps = steps if any(steps) else None
        self.length = window.length if isinstance(self.locations, SpanLocations) else None
        self.moved.clear()

    def write_as_first_row(self) -> None:
        """Write every row of a batch at the positions of its first row, whichever were read (pyvene's use_fast)."""
        self.written_as_first_row = True
        self.places = Places(self.places.sites, (False,) * len(self.places.fusable))
        if self.window is not None:
            self.look_at(self.window)

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
