"""The edits of one forward or generation, and which plan is active in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
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
    allows the last edit in place of a site to keep the edited tensor for its backward.
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
    """The plans of each thread, the innermost last, and whether all of this is run again under them if at all."""

    plans: tuple[Plan, ...] = ()
    followed = False


_active = _Active()


@contextmanager
def activated(plan: Plan) -> Iterator[None]:
    """Make the plan the one its owner's hooks follow, within this thread."""
    outer = _active.plans
    _active.plans = (*outer, plan)
    try:
        yield
    finally:
        _active.plans = outer


def active_plans() -> tuple[Plan, ...]:
    """The plans of this thread that may edit, the innermost last."""
    return tuple(plan for plan in _active.plans if not plan.busy)


@contextmanager
def following(plans: tuple[Plan, ...]) -> Iterator[None]:
    """Make these plans, and no others, the active ones of a part of a forward and of its recomputation alike."""
    outer = _active.plans, _active.followed
    _active.plans, _active.followed = plans, True
    try:
        yield
    finally:
        _active.plans, _active.followed = outer


def is_followed() -> bool:
    """Whether what runs now is recomputed, if it is, within :func:`following`."""
    return _active.followed


def active_plan(owner: object) -> Plan | None:
    """The innermost active plan of this owner."""
    for plan in reversed(_active.plans):
        if plan.owner is owner:
            return plan
    return None


def in_backward() -> bool:
    """Whether this code runs inside of the autograd engine's backward pass."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1
