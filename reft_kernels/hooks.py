"""The hooks that carry out a plan on the modules of a base model."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels import interventions as builtin
from reft_kernels.autograd import advise, saves_through_hooks
from reft_kernels.interventions import Intervention, edit_rows
from reft_kernels.locations import Step
from reft_kernels.modules import Site
from reft_kernels.plan import GenerationPlan, Plan, active_plan, in_backward, is_followed

_built_in: weakref.WeakKeyDictionary[type[nn.Module], bool] = weakref.WeakKeyDictionary()


def is_fusable(intervention: nn.Module) -> bool:
    """Whether an intervention's edit is one of the built-in formulas, and calling it would do nothing besides.

    That is: ours, with no ``forward`` of its own in its class or on itself, no hooks, and parts the kernels know.
    """
    if not isinstance(intervention, Intervention) or not _has_built_in_forward(type(intervention)):
        return False
    hooked = intervention._forward_hooks or intervention._forward_pre_hooks
    return not hooked and "forward" not in vars(intervention) and intervention.is_fused


def _has_built_in_forward(cls: type[nn.Module]) -> bool:
    if cls not in _built_in:
        _built_in[cls] = next(one for one in cls.__mro__ if "forward" in vars(one)).__module__ == builtin.__name__
    return _built_in[cls]


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
        self.edited_in_a_checkpoint = False

    def steps(self, plan: Plan | None) -> list[Step] | None:
        """What the plan asks for here."""
        if plan is None:
            if self.edited_in_a_checkpoint and not torch.compiler.is_compiling() and in_backward():
                raise RuntimeError(
                    f"gradient checkpointing recomputes {self.path}, whose {self.side} is edited, without the edit: "
                    "the gradients would be wrong. Checkpoint with the model's own gradient_checkpointing_enable (of "
                    "transformers), whose recomputation is edited, or not at all"
                )
            return None
        return None if plan.steps is None or plan.busy else plan.steps[self.index]

    def edit(self, plan: Plan, steps: list[Step], value: Any) -> Tensor:
        """The hidden state [B, S, d] with this site's edits."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{self.path}: its {self.side} must be a floating-point tensor to be edited, got {kind}")
        h = value
        if plan.grad and not (torch.compiler.is_compiling() or is_followed()):
            # A reentrant checkpoint runs its forward without gradients, the other one saves through hooks.
            self.edited_in_a_checkpoint |= saves_through_hooks() or not torch.is_grad_enabled()
        members = plan.places.sites[self.index]
        may_rebuild = plan.rebuild and not (torch.compiler.is_compiling() or saves_through_hooks())
        for step in steps:
            ours: list[Any] = [plan.interventions[members[k]] for k in step.members]
            self._check(h, step, ours, plan)
            positions = None if step.positions is None else plan.on(h.device, step.positions)
            if len(ours) == 1 and not plan.places.fusable[members[step.members[0]]]:
                subspaces = None if plan.subspaces is None else plan.subspaces[members[step.members[0]]]
                plan.busy = True
                try:
                    h = edit_with(ours[0], h, positions, subspaces, plan)
                finally:
                    plan.busy = False
                continue
            group = None if step.group is None else plan.on(h.device, step.group)
            inplace = plan.inplace and self.owned and may_write(h)
            rebuild = inplace and may_rebuild and step is steps[-1]  # those before are written again by the last
            h = edit_rows(ours, h, positions, group, inplace=inplace, rebuild=rebuild)
            if rebuild:
                advise(
                    h,
                    f"The {self.side} of {self.path} was edited in place and is kept as edited; if the model wrote it "
                    "again after that, set ReftConfig(rebuild=False)",
                )
        return h

    def _check(self, h: Tensor, step: Step, ours: Sequence[nn.Module], plan: Plan) -> None:
        shape = list(h.shape)
        members = plan.places.sites[self.index]
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
        highest = -1 if plan.highest is None else max(plan.highest[members[k]] for k in step.members)
        if highest >= shape[1]:
            raise ValueError(
                f"{self.names[step.members[0]]}: unit_locations name position {highest}, but the {self.side} of "
                f"{self.path} has {shape[1]} tokens"
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

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Hook of the same model: tells the plan that the call is over."""
        plan = active_plan(self.owner)
        if isinstance(plan, GenerationPlan) and not plan.busy:
            plan.call_is_over(kwargs.get("past_key_values"))


def may_write(h: Tensor) -> bool:
    """Whether an edit may overwrite h: a plain tensor of a module's own making that autograd lets be written."""
    if h._base is not None or (h.requires_grad and h.is_leaf):
        return False
    if torch.compiler.is_compiling():  # Dynamo traces no inference mode
        return True
    return not h.is_inference() or torch.is_inference_mode_enabled()


def edit_with(
    intervention: nn.Module, h: Tensor, positions: Tensor | None, subspaces: Any = None, plan: Plan | None = None
) -> Tensor:
    """h with the named rows replaced by ``intervention(rows, None, subspaces)``, for any module of that form.

    positions int64 [B, P], -1 for none; None calls it on the whole of h. Each row is named at most once. The plan has
    keywords for the call, and is given what it returns if that is more than a tensor.
    """
    kwargs: Mapping[str, Any] = {} if plan is None else plan.additional_kwargs
    if positions is None:
        return _result(intervention(h, None, subspaces, **kwargs), h, plan)
    batch, length, width = h.shape
    if not positions.shape[1] or not length:
        return h
    named = (positions >= 0) & (positions < length)
    target = torch.where(named, positions, length)
    # A slot without a token is given a row that has one, so that an intervention sees real rows alone. What it makes of
    # that goes to a row of its own at the end, which is dropped.
    source = torch.where(named, positions, target.amin(1, keepdim=True).clamp(max=length - 1))
    rows = h.gather(1, source.unsqueeze(-1).expand(-1, -1, width))
    edited = _result(intervention(rows, None, subspaces, **kwargs), rows, plan)
    if plan is not None and plan.written_as_first_row:
        target = target[:1].expand(batch, -1)
    padded = torch.cat([h, h.new_empty(batch, 1, width)], dim=1)
    return padded.scatter(1, target.unsqueeze(-1).expand(-1, -1, width), edited)[:, :length].contiguous()


def _result(value: Any, rows: Tensor, plan: Plan | None) -> Tensor:
    result = value if isinstance(value, Tensor) else getattr(value, "output", None)
    if not isinstance(result, Tensor):
        raise TypeError(f"an intervention must return a tensor, got {type(value).__name__}")
    if result.shape != rows.shape:
        raise ValueError(
            f"an intervention must return the shape of its rows, {list(rows.shape)}, got {list(result.shape)}"
        )
    if plan is not None and result is not value and not in_backward():  # not again where a checkpoint recomputes
        plan.outputs.append(value)
    return result.to(rows.dtype)
