"""pyvene's ``IntervenableModel`` with hooks that edit in place, and without what it does to other people's hooks."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels.compat.patched_interventions import is_fused
from reft_kernels.compat.replacement import Replacement
from reft_kernels.hooks import may_write
from reft_kernels.interventions import edit_rows
from reft_kernels.orthogonal import shared_rows
from reft_kernels.positions import drop_duplicates
from reft_kernels.rotate_layer import orthonormal_parts


def replacements(pyreft: Any, pyvene: Any) -> Iterator[Replacement]:
    """Hooks, modes, and what pyreft's model lacks for transformers' Trainer."""
    model = pyvene.IntervenableModel
    handlers = importlib.import_module("pyvene.models.modeling_utils").HandlerList
    setter, getter = _setter(model._intervention_setter, handlers), model._intervention_getter
    yield Replacement(model, "_intervention_setter", setter, "rows gathered, edited and written back in one call")
    yield Replacement(model, "_intervention_getter", _remembered(getter), "its own hooks are remembered")
    yield Replacement(model, "_remove_forward_hooks", _remove_own_hooks, "other people's hooks stay")
    yield Replacement(model, "forward", _with_shared_rows(model.forward), "R of all layers in one computation")
    yield Replacement(model, "generate", _with_shared_rows(model.generate), "R of all layers once a generation")
    yield Replacement(
        model, "_broadcast_unit_locations", _broadcast(model._broadcast_unit_locations), "use_fast does not stick"
    )
    yield Replacement(model, "train", _train, "train() reaches the interventions, and returns the model")
    yield Replacement(model, "eval", lambda self: _train(self, False), "eval() reaches the interventions")
    reft_model = pyreft.ReftModel
    for name in ("gradient_checkpointing_enable", "gradient_checkpointing_disable"):
        yield Replacement(reft_model, name, _of_base(name), "TrainingArguments(gradient_checkpointing=True)", new=True)


# Hooks


def _setter(stock: Callable[..., Any], handler_list: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    remembered = _remembered(stock)

    @functools.wraps(stock)
    def _intervention_setter(
        self: Any, keys: list[str], unit_locations_base: Any, subspaces: Any, intervention_additional_kwargs: Any
    ) -> Any:
        fused = len(keys) == 1 and not intervention_additional_kwargs and _is_fused_site(self, keys[0])
        if not fused:
            return remembered(self, keys, unit_locations_base, subspaces, intervention_additional_kwargs)
        (key,) = keys
        hook = _EditHook(self, key, unit_locations_base[0])
        handle = self.intervention_hooks[key](hook, with_kwargs=True)
        return _remember(self, handler_list([handle]))

    return _intervention_setter


def _is_fused_site(self: Any, key: str) -> bool:
    """Whether an intervention edits whole rows of a module's output, as the kernels do."""
    item = self.representations[key]
    plain = item.unit == "pos" and item.moe_key is None and key not in self._intervention_reverse_link
    after = getattr(self.intervention_hooks[key], "__name__", "") == "register_forward_hook"
    whole = "." in item.component or item.component in ("block_output", "mlp_output", "attention_output")
    slow = self.use_fast or self.as_adaptor or not is_fused(self.interventions[key])
    return bool(plain and after and whole and not slow)


class _EditHook:
    """Forward hook of one module: its output with the named rows edited."""

    def __init__(self, owner: Any, key: str, locations: Any) -> None:
        self.owner = owner
        self.key = key
        self.locations = locations

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._is_skipped():
            return None
        h, put_back = _hidden_state(output)
        positions = None
        if self.locations is not None:
            positions = _for_each_row(self.owner, _positions(self.owner, self.locations, h), len(h))
        owned = self.owner.representations[self.key].component == "block_output"
        edited = edit_rows((self.owner.interventions[self.key],), h, positions, inplace=owned and may_write(h))
        self.owner._intervention_state[self.key].inc_setter_version()
        return None if edited is h else put_back(edited)

    def _is_skipped(self) -> bool:
        """pyvene's rule while it generates: the prompt's call, or all the others."""
        owner = self.owner
        if self.locations is None or not owner._is_generation:
            return False
        is_prompt: bool = owner._key_setter_call_counter[self.key] == 0
        if not owner._intervene_on_prompt or is_prompt:
            owner._key_setter_call_counter[self.key] += 1
        on_prompt: bool = owner._intervene_on_prompt
        return on_prompt != is_prompt


def _hidden_state(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor that pyvene edits in a module's output, and how to put another in its place."""
    if isinstance(output, tuple):
        return output[0], lambda edited: (edited, *output[1:])
    if isinstance(output, Mapping):
        first = next(iter(output))

        def put_back(edited: Tensor) -> Any:
            output[first] = edited  # type: ignore[index]
            return output

        return output[first], put_back
    return output, lambda edited: edited


def _positions(owner: Any, locations: Any, h: Tensor) -> Tensor:
    """Locations [B][P] as an index tensor on h's device, made once for all layers of a forward.

    Raises ValueError where their rows differ in length and IndexError where a list names a token that h has not. A
    tensor is not read back from its device: of it, positions outside of the tokens name no row.
    """
    if isinstance(locations, Tensor):
        return drop_duplicates(locations.to(h.device, torch.long))
    known = owner.__dict__.setdefault("_reft_kernels_positions", {})
    key = tuple(map(tuple, locations)), h.device
    if key not in known:
        lengths = sorted({len(row) for row in locations})
        if len(lengths) > 1:  # of [[], [3]] torch would make [2, 0], which names nothing
            raise ValueError(f"unit_locations: expected rows of one length, got {lengths}: {locations}")
        host = torch.tensor(locations, dtype=torch.long)
        if host.numel() and (int(host.max()) >= h.shape[1] or int(host.min()) < -1):
            raise IndexError(f"unit_locations name a position outside of the {h.shape[1]} tokens: {locations}")
        known[key] = drop_duplicates(host).to(h.device, non_blocking=True)
    positions: Tensor = known[key]
    return positions


def _for_each_row(owner: Any, positions: Tensor, batch: int) -> Tensor:
    """Positions [batch, P] where there are more rows than prompts: beams, several samples, or one row's for all."""
    times, rest = divmod(batch, max(len(positions), 1))
    if times < 2 or rest or not (owner._is_generation or len(positions) == 1):
        return positions
    return positions.repeat_interleave(times, 0)


def _remembered(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A method that registers hooks, with these kept for :func:`_remove_own_hooks`."""

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _remember(self, stock(self, *args, **kwargs))

    return method


def _remember(self: Any, handlers: Any) -> Any:
    self.__dict__.setdefault("_reft_kernels_hooks", []).append(handlers)
    return handlers


def _remove_own_hooks(self: Any) -> None:
    """In place of a walk over all modules that drops every hook there is."""
    for handlers in self.__dict__.pop("_reft_kernels_hooks", []):
        handlers.remove()
    self.__dict__.pop("_reft_kernels_positions", None)


# R, positions, modes


def _with_shared_rows(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with shared_rows(orthonormal_parts(self.interventions.values())):
            return stock(self, *args, **kwargs)

    return method


def _broadcast(stock: Callable[..., Any]) -> Callable[..., Any]:
    """pyvene's, with ``use_fast`` as it was: an int or a flat list names one row's positions for all, in this call."""

    @functools.wraps(stock)
    def _broadcast_unit_locations(self: Any, batch_size: int, unit_locations: Any) -> Any:
        tensor = _as_tensor(unit_locations)
        if tensor is not None:
            return {"sources->base": (None, tensor)}
        use_fast = self.use_fast
        try:
            return stock(self, batch_size, unit_locations)
        finally:
            self.use_fast = use_fast

    return _broadcast_unit_locations


def _as_tensor(unit_locations: Any) -> Tensor | None:
    """Locations that are an int tensor [num_interventions, B, P] already, which nobody has to read."""
    pair = unit_locations.get("sources->base") if isinstance(unit_locations, Mapping) else None
    return pair[1] if isinstance(pair, tuple) and isinstance(pair[1], Tensor) else None


def _train(self: Any, mode: bool = True) -> Any:
    self.training = mode
    self.model.train(mode)
    self.interventions.train(mode)
    return self


def _of_base(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model, name)(*args, **kwargs)

    method.__name__ = name
    return method
