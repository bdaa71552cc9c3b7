"""From the arguments of a call to the plan of what it edits where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reft_kernels.config import Representation
from reft_kernels.hooks import is_fusable
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
    batch_of_locations,
    parse_positions,
    prompt_mask,
    prompt_positions,
    read_unit_locations,
)

# Of a module whose input names no tokens: an image, speech.
_ANY_LENGTH = 2**62

_TEXT = ("input_ids", "inputs_embeds")
_OTHERS = ("pixel_values", "input_features", "input_values")


class Tokens(NamedTuple):
    """What the inputs of a call say about the rows that are edited; ``length`` is None where only the model knows."""

    batch: int
    length: int | None
    device: torch.device
    source: Tensor
    """Token ids [B, S], embeddings [B, S, d], or what the model makes its tokens of [B, ...]."""
    batches: tuple[int, ...]
    """The different batch sizes of all inputs whose rows may be edited: a model may take more images than texts."""


@dataclass
class Planner:
    """What the plans of one ReftModel have in common.

    ``owner`` is what its hooks look for in a plan; ``decoder`` are the interventions in the decoder of an
    encoder-decoder, whose tokens are not those of the prompt.
    """

    model: nn.Module
    interventions: nn.ModuleDict
    representations: Sequence[Representation]
    tied: bool
    places: Places
    owner: object
    decoder: frozenset[int] = frozenset()

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
        tokens = self._tokens(inputs, _TEXT)
        held = 0
        spans = self._spans(unit_locations, intervention_locations, positions)
        locations: Locations
        if spans is None:
            # Named positions count within this call's tokens.
            locations = self._named(inputs, tokens, unit_locations, intervention_locations)
            length = locations.extent
        else:
            tokens, length = self._counted(tokens, inputs)
            mask, past = inputs.get("attention_mask"), inputs.get("past_key_values")
            if isinstance(mask, Tensor) and mask.dim() == 2:
                held = max(mask.shape[1] - length, 0)
            elif past is not None:
                held = int(cache_length(past))
            labels = inputs.get("labels") if self._is_causal() else None
            locations = self._spanned(spans, tokens, length, mask, held, labels)
        subspaces = _as_the_locations(subspaces, intervention_locations)
        plan: Plan = self._make(Plan, locations, subspaces, tokens, inplace)
        plan.highest = locations.highest if isinstance(locations, NamedLocations) else None
        plan.look_at(Window(locations.batch, held, length))
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
        tokens = self._tokens(inputs, ("input_ids", "inputs", "inputs_embeds"))
        if tokens is None:
            raise ValueError("generate needs input_ids, inputs or inputs_embeds, or what else the model takes")
        mask = inputs.get("attention_mask")
        spans = self._spans(unit_locations, intervention_locations, positions)
        encoder_decoder = bool(getattr(text_config(self.model), "is_encoder_decoder", False))
        prompt = tokens.length
        if prompt is not None and isinstance(mask, Tensor) and mask.dim() == 2:
            prompt = mask.shape[1]
        edits_steps = False
        locations: Locations
        if not intervene_on_prompt:
            if unit_locations is not None or intervention_locations is not None:
                given = self._named(inputs, tokens, unit_locations, intervention_locations).given
                if given.highest != 0 and given.table is not None:
                    raise ValueError(
                        "intervene_on_prompt=False edits each generated token when it is the only one of its step: "
                        "unit_locations can only name position 0, or be None"
                    )
            locations = GeneratedLocations(tokens.batch, _ANY_LENGTH if prompt is None else prompt, tokens.device)
        elif spans is None:
            named = self._named(inputs, tokens, unit_locations, intervention_locations, generating=True)
            named.expect_parts()
            edits_steps = named.extent > (0 if encoder_decoder or prompt is None else prompt)
            if not encoder_decoder:
                named.extent = max(named.extent, prompt or 0)
                _check_reached(named.extent, prompt, inputs)
            locations = named
        else:
            tokens, length = self._counted(tokens, inputs)
            if mask is None and not tokens.source.is_floating_point():
                mask = self._mask_of(tokens.source, inputs)
            held = 0 if prompt is None else prompt - length
            locations = self._spanned(spans, tokens, length, mask, held, None)
        subspaces = _as_the_locations(subspaces, intervention_locations)
        plan: GenerationPlan = self._make(
            GenerationPlan, locations, subspaces, tokens, inplace, encoder_decoder=encoder_decoder,
            edits_steps=edits_steps,
        )  # fmt: skip
        if encoder_decoder:
            plan.look_at(Window(locations.batch, 0, _ANY_LENGTH if tokens.length is None else tokens.length))
        return plan

    def _make(
        self, kind: type[Any], locations: Locations, subspaces: Any, tokens: Tokens | None, inplace: bool, **kw: Any
    ) -> Any:
        modules = list(self.interventions.values())
        places = self.places
        if not torch.compiler.is_compiling():  # a graph is guarded by what it was traced with
            # An intervention may have been replaced, or been given hooks, since the last call.
            places = Places(places.sites, tuple(map(is_fusable, modules)))
        read = _read_subspaces(subspaces, len(modules), 0 if tokens is None else tokens.batch)
        return kind(self.owner, places, modules, locations, read, inplace, **kw)

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
        tokens: Tokens | None,
        unit_locations: Any,
        intervention_locations: Tensor | None,
        generating: bool = False,
    ) -> NamedLocations:
        count = len(self.representations)
        if unit_locations is None and intervention_locations is None:
            whole = GivenLocations(None, frozenset(range(count)), None, None)
            return NamedLocations(whole, 0 if tokens is None else tokens.batch, 0)
        if tokens is None:
            raise ValueError(f"unit_locations need input_ids, inputs_embeds or pixel_values, got {sorted(inputs)}")
        if intervention_locations is None:
            named = batch_of_locations(unit_locations)
            batch = named if named in tokens.batches else tokens.batch
            given = read_unit_locations(unit_locations, count, batch, tokens.device)
        else:
            batch = tokens.batch
            shape = getattr(intervention_locations, "shape", None)
            if shape is not None and len(shape) == 3 and shape[0] in tokens.batches:
                batch = shape[0]
            if shape is None or len(shape) != 3 or tuple(shape[:2]) != (batch, count):
                raise ValueError(
                    f"intervention_locations must be a tensor [B, num_interventions, P] = [{batch}, {count}, P], got "
                    f"{type(intervention_locations).__name__ if shape is None else list(shape)}"
                )
            given = read_unit_locations(intervention_locations.transpose(0, 1), count, batch, tokens.device)
        spans = [item.span for item in self.representations]
        if generating:
            return NamedLocations(given, batch, 0, spans)
        locations = NamedLocations(given, batch, _ANY_LENGTH, spans)
        if tokens.length is None or len(tokens.batches) > 1 or self.decoder:
            locations.check_at_the_sites()
        elif given.highest is not None and given.highest >= tokens.length:
            raise ValueError(f"unit_locations name position {given.highest}, but the input has {tokens.length} tokens")
        return locations

    def _counted(self, tokens: Tokens | None, inputs: Mapping[str, Any]) -> tuple[Tokens, int]:
        """The tokens and how many there are, for positions that count from their ends."""
        if tokens is None or tokens.length is None:
            raise ValueError(
                f"positions need input_ids or inputs_embeds, got {sorted(inputs)}; pass unit_locations for other inputs"
            )
        return tokens, tokens.length

    def _spanned(
        self, spans: list[Span | None], tokens: Tokens, length: int, mask: Any, held: int, labels: Any
    ) -> SpanLocations:
        inside = next((i for i in sorted(self.decoder) if spans[i] is not None), None)
        if inside is not None:
            raise ValueError(
                f"{list(self.interventions)[inside]}: positions are those of the encoder's input, and this edits the "
                "decoder: pass unit_locations, which count the decoder's tokens, or edit every one with positions=None"
            )
        if mask is None:
            mask = torch.ones(tokens.batch, held + length, dtype=torch.bool, device=tokens.device)
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != tokens.batch:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"positions need an attention_mask [B, S] with B = {tokens.batch}, got {shape}; pass unit_locations "
                "instead"
            )
        if not isinstance(labels, Tensor) or labels.shape != (tokens.batch, length):
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

    def _tokens(self, inputs: Mapping[str, Any], text: Sequence[str]) -> Tokens | None:
        """Of token ids or embeddings, else of what the model makes its tokens of; None where no tensor comes in."""
        main = getattr(inner_model(self.model), "main_input_name", None)
        names = [*text, *_OTHERS, *([main] if isinstance(main, str) else []), *inputs]
        found = {
            name: inputs[name] for name in names if isinstance(inputs.get(name), Tensor) and inputs[name].dim() > 1
        }
        name = next(iter(found), None)
        if name is None:
            return None
        source = found[name]
        is_text = name in text and (name != "inputs" or main in (None, *_TEXT))
        batches = [source.shape[0]]  # no set: a compiler would take its members for constants
        for key in _OTHERS:
            if key in found and found[key].shape[0] not in batches:
                batches.append(found[key].shape[0])
        return Tokens(source.shape[0], source.shape[1] if is_text else None, source.device, source, tuple(batches))

    def _is_causal(self) -> bool:
        can_generate = getattr(inner_model(self.model), "can_generate", None)
        return callable(can_generate) and bool(can_generate())


def _check_reached(extent: int, prompt: int | None, inputs: Mapping[str, Any]) -> None:
    """Raises where a generation asked to be of some length cannot come to a position."""
    new, whole = inputs.get("max_new_tokens"), inputs.get("max_length")
    if isinstance(new, int) and prompt is not None:
        whole = prompt + new
    if isinstance(whole, int) and extent > max(whole, prompt or 0):
        raise ValueError(
            f"unit_locations name position {extent - 1}, but the input has {prompt} tokens and is generated up to "
            f"{whole}"
        )


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
    if not isinstance(subspaces, (list, tuple)):
        raise TypeError(f"subspaces must be an int, a list or an int tensor, got {type(subspaces).__name__}")
    if len(subspaces) != count:
        raise ValueError(
            f"subspaces must be [num_interventions][B][k] with {count} interventions, got {len(subspaces)}"
        )
    return list(subspaces)
