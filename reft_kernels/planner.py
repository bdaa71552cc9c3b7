"""From the arguments of a call to the plan of what it edits where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels.config import Representation
from reft_kernels.locations import (
    GeneratedLocations,
    Locations,
    NamedLocations,
    Places,
    SpanLocations,
    Window,
)
from reft_kernels.modules import inner_model, text_config
from reft_kernels.plan import GenerationPlan, Plan, cache_length
from reft_kernels.positions import (
    GivenLocations,
    Span,
    parse_positions,
    prompt_mask,
    prompt_positions,
    read_unit_locations,
)


@dataclass
class Planner:
    """What the plans of one ReftModel have in common. ``owner`` is what its hooks look for in a plan."""

    model: nn.Module
    interventions: nn.ModuleDict
    representations: Sequence[Representation]
    tied: bool
    places: Places
    owner: object

    def of_forward(
        self,
        inputs: Mapping[str, Any],
        unit_locations: Any,
        intervention_locations: Tensor | None,
        positions: str | None,
        subspaces: Any,
        inplace: bool,
    ) -> Plan:
        """The plan of one call of the base model; arguments as ``ReftModel.forward``."""
        tokens = _tokens(inputs, ("input_ids", "inputs_embeds"))
        held = 0
        spans = self._spans(unit_locations, intervention_locations, positions)
        locations: Locations
        if spans is None:
            # Named positions count within this call's tokens.
            locations = self._named(inputs, tokens, unit_locations, intervention_locations)
        else:
            mask, past = inputs.get("attention_mask"), inputs.get("past_key_values")
            if isinstance(mask, Tensor) and mask.dim() == 2 and tokens is not None:
                held = max(mask.shape[1] - tokens.shape[1], 0)
            elif past is not None:
                held = int(cache_length(past))
            labels = inputs.get("labels") if self._is_causal() else None
            locations = self._spanned(spans, tokens, mask, held, labels)
        subspaces = _as_the_locations(subspaces, intervention_locations)
        plan: Plan = self._make(Plan, locations, subspaces, tokens, inplace)
        batch, length = (0, 0) if tokens is None else tokens.shape[:2]
        plan.look_at(Window(batch, held, length))
        return plan

    def of_generation(
        self,
        inputs: Mapping[str, Any],
        unit_locations: Any,
        intervention_locations: Tensor | None,
        positions: str | None,
        subspaces: Any,
        inplace: bool,
        intervene_on_prompt: bool,
    ) -> GenerationPlan:
        """The plan of one generation; arguments as ``ReftModel.generate``."""
        tokens = _tokens(inputs, ("input_ids", "inputs", "inputs_embeds"))
        if tokens is None:
            raise ValueError("generate needs input_ids, inputs or inputs_embeds")
        mask = inputs.get("attention_mask")
        spans = self._spans(unit_locations, intervention_locations, positions)
        extent = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else tokens.shape[1]
        locations: Locations
        if not intervene_on_prompt:
            if unit_locations is not None or intervention_locations is not None:
                given = self._named(inputs, tokens, unit_locations, intervention_locations).given
                if given.highest != 0 and given.table is not None:
                    raise ValueError(
                        "intervene_on_prompt=False edits each generated token when it is the only one of its step: "
                        "unit_locations can only name position 0, or be None"
                    )
            locations = GeneratedLocations(extent, tokens.device)
        elif spans is None:
            locations = self._named(inputs, tokens, unit_locations, intervention_locations)
            locations.extent = extent
        else:
            if mask is None and not tokens.is_floating_point():
                mask = self._mask_of(tokens, inputs)
            locations = self._spanned(spans, tokens, mask, extent - tokens.shape[1], None)
        encoder_decoder = bool(getattr(text_config(self.model), "is_encoder_decoder", False))
        subspaces = _as_the_locations(subspaces, intervention_locations)
        plan: GenerationPlan = self._make(
            GenerationPlan, locations, subspaces, tokens, inplace, encoder_decoder=encoder_decoder
        )
        if encoder_decoder:
            plan.look_at(Window(tokens.shape[0], 0, tokens.shape[1]))
        return plan

    def _make(
        self, kind: type[Any], locations: Locations, subspaces: Any, tokens: Tensor | None, inplace: bool, **kw: Any
    ) -> Any:
        modules = list(self.interventions.values())
        read = _read_subspaces(subspaces, len(modules), 0 if tokens is None else tokens.shape[0])
        return kind(self.owner, self.places, modules, locations, read, inplace, **kw)

    def _spans(
        self, unit_locations: Any, intervention_locations: Tensor | None, positions: str | None
    ) -> list[Span | None] | None:
        """(first, last) of every intervention where positions say so, else None."""
        if unit_locations is not None and intervention_locations is not None:
            raise ValueError("give unit_locations or intervention_locations, not both")
        own = [item.span for item in self.representations]
        if unit_locations is not None or intervention_locations is not None:
            if positions is not None:
                raise ValueError("give positions or unit_locations (intervention_locations), not both")
            return None
        if positions is None:
            return own if any(own) else None
        span = parse_positions(positions)
        if span is None:
            return None
        if self.tied or not all(own) or 0 in span:
            return [span] * len(own)
        # Untied: each end keeps its own interventions.
        ends = [(span[0] if item and item[0] else 0, span[1] if item and item[1] else 0) for item in own]
        return list(ends)

    def _named(
        self,
        inputs: Mapping[str, Any],
        tokens: Tensor | None,
        unit_locations: Any,
        intervention_locations: Tensor | None,
    ) -> NamedLocations:
        count = len(self.representations)
        if unit_locations is None and intervention_locations is None:
            return NamedLocations(GivenLocations(None, frozenset(range(count)), None, None), 0)
        if tokens is None:
            raise ValueError(f"unit_locations need input_ids or inputs_embeds, got {sorted(inputs)}")
        batch, length = tokens.shape[:2]
        if intervention_locations is None:
            given = read_unit_locations(unit_locations, count, batch, tokens.device)
        else:
            shape = getattr(intervention_locations, "shape", None)
            if shape is None or len(shape) != 3 or tuple(shape[:2]) != (batch, count):
                raise ValueError(
                    f"intervention_locations must be a tensor [B, num_interventions, P] = [{batch}, {count}, P], got "
                    f"{type(intervention_locations).__name__ if shape is None else list(shape)}"
                )
            given = read_unit_locations(intervention_locations.transpose(0, 1), count, batch, tokens.device)
        if given.highest is not None and given.highest >= length:
            raise ValueError(f"unit_locations name position {given.highest}, but the input has {length} tokens")
        return NamedLocations(given, length)

    def _spanned(
        self, spans: list[Span | None], tokens: Tensor | None, mask: Any, held: int, labels: Any
    ) -> SpanLocations:
        if tokens is None:
            raise ValueError("positions need input_ids or inputs_embeds; pass unit_locations for other inputs")
        batch, length = tokens.shape[:2]
        if mask is None:
            mask = torch.ones(batch, held + length, dtype=torch.bool, device=tokens.device)
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != batch:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"positions need an attention_mask [B, S] with B = {batch}, got {shape}; pass unit_locations instead"
            )
        if not isinstance(labels, Tensor) or labels.shape != tokens.shape[:2]:
            labels = None
        first = max(span[0] for span in spans if span)
        last = max(span[1] for span in spans if span)
        table = prompt_positions(prompt_mask(mask, labels), first, last)
        return SpanLocations(spans, table, first, mask.shape[1])

    def _mask_of(self, ids: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        """What `generate` attends where it is given no mask: every token but padding that is no end token."""
        configs = [
            inputs.get("generation_config"),
            getattr(inner_model(self.model), "generation_config", None),
        ]

        def setting(name: str) -> Any:
            values = [inputs.get(name), *(getattr(config, name, None) for config in configs)]
            return next((value for value in values if value is not None), None)

        pad, ends = setting("pad_token_id"), setting("eos_token_id")
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        return None if pad is None or pad in ends else ids != pad

    def _is_causal(self) -> bool:
        can_generate = getattr(inner_model(self.model), "can_generate", None)
        return callable(can_generate) and bool(can_generate())


def _tokens(inputs: Mapping[str, Any], names: Sequence[str]) -> Tensor | None:
    """The tensor [B, S] or [B, S, d] that says how many tokens come in."""
    return next((inputs[name] for name in names if isinstance(inputs.get(name), Tensor)), None)


def _as_the_locations(subspaces: Any, intervention_locations: Tensor | None) -> Any:
    """A tensor of subspaces with the interventions first. Beside ``intervention_locations`` it has the batch first."""
    batch_first = intervention_locations is not None and isinstance(subspaces, Tensor) and subspaces.dim() == 3
    return subspaces.transpose(0, 1) if batch_first else subspaces


def _read_subspaces(subspaces: Any, count: int, batch: int) -> Sequence[Any] | None:
    """pyreft's forms, an int, a flat list of ints or [num_interventions][B][k], as one item an intervention."""
    if subspaces is None:
        return None
    if isinstance(subspaces, Tensor):
        if subspaces.dim() != 3 or tuple(subspaces.shape[:2]) != (count, batch):
            raise ValueError(
                f"subspaces must be [num_interventions, B, k] = [{count}, {batch}, k], or the first two the other way "
                f"round beside intervention_locations; got {list(subspaces.shape)}"
            )
        return list(subspaces.unbind(0))
    if isinstance(subspaces, int):
        subspaces = [subspaces]
    if isinstance(subspaces, (list, tuple)) and subspaces and all(isinstance(s, int) for s in subspaces):
        return [[list(subspaces)] * batch] * count
    if len(subspaces) != count:
        raise ValueError(
            f"subspaces must be [num_interventions][B][k] with {count} interventions, got {len(subspaces)}"
        )
    return list(subspaces)
