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
    ``length`` is the number of tokens that every edited hidden state must have, where that is known; ``highest`` are
    the largest positions of the interventions where the edited hidden states alone tell whether they have them. While
    an intervention that is not of this library runs, the plan is ``busy``: what that calls is not edited. ``rebuild``
    allows the last edit in place of a site to keep the edited tensor for its backward. ``outputs`` collects what
    interventions that are not of this library return besides a tensor, ``additional_kwargs`` are keywords for them.
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
        self.window: Window | None = None
        self.highest: Sequence[int] | None = None
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
    """A plan that follows the calls of `generate`: the prompt in one or several parts, then the cached steps.

    ``edits_steps``: positions are named that are generated, so that every step has edits of its own. ``counted`` tells
    whether the cache's length is counted along here: a cache of fixed size counts on the device, where reading it would
    make the host wait.
    """

    def __init__(self, *args: Any, encoder_decoder: bool, edits_steps: bool) -> None:
        super().__init__(*args)
        self.encoder_decoder = encoder_decoder
        self.edits_steps = edits_steps
        self.grad = False  # `generate` builds no graph
        self.called = False
        self.counted: bool | None = None
        self.settled = False
        self.batch = 0
        self.seen = 0

    def next_call(self, inputs: Tensor, past: Any) -> None:
        """See to the steps of a call with these inputs (token ids [B, S] or embeddings [B, S, d])."""
        if self.settled and past is not None:
            return
        self.called = True
        self.batch, length = inputs.shape[:2]
        offset = 0
        if past is not None:
            offset = self.seen if self.counted else int(cache_length(past))
        self.seen = offset + length
        self.look_at(Window(self.batch, self._before() + offset, length))

    def call_is_over(self, past: Any) -> None:
        """Look, once all that is named has been seen, at the steps that every later call has.

        A compiled step of the model is then one graph, as nothing of the plan changes within it.
        """
        if self.settled or past is None:
            return
        if self.counted is None:
            self.counted = isinstance(cache_length(past), Tensor)
        # Caches that grow are cut again where guessed tokens are dropped.
        if self.counted and self._before() + self.seen >= self.locations.extent:
            self.settled = True
            self.look_at(Window(self.batch, self._before() + self.seen, 1))

    def _before(self) -> int:
        """How many tokens come before those of the cache: the prompt went through the encoder, if there is one."""
        return self.locations.before_decoder if self.encoder_decoder else 0


def cache_length(past: Any) -> int | Tensor:
    """How many tokens a cache of transformers holds, an int or (caches of fixed size) an int tensor."""
    get_seq_length = getattr(past, "get_seq_length", None)
    held: int | Tensor = get_seq_length() if callable(get_seq_length) else past[0][0].shape[-2]
    return held


class _Active(threading.local):
    """The plans of each thread, the innermost last, and whether all of this is run again under them if at all."""

    def __init__(self) -> None:
        # Attributes of the instance, in each thread: Dynamo guards on whether they are there.
        self.plans: tuple[Plan, ...] = ()
        self.followed = False


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
