"""Which part of an edited base model is the same at every epoch, and whether it can be kept."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from reft_kernels.hooks import CallHook, SiteHook
from reft_kernels.model import ReftModel
from reft_kernels.modules import Site, block_list, called_model, find_sites, inner_model, text_config

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
# Their frequencies depend on the longest row of a call.
_ROPE_OF_THE_BATCH = {"dynamic", "longrope"}
# Largest difference, relative to the largest value, of what is computed from the same numbers in one call.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}
# Forward hooks of these packages are parts of the model.
_PARTS_OF_THE_MODEL = ("torch", "transformers", "accelerate")


@dataclass(frozen=True)
class FrozenPart:
    """What of a base model nothing that is trained reaches, before the first edited token and below the first edit.

    Attributes:
        body: the model below its head.
        blocks: its blocks.
        first: how many blocks come before the first edit, the block whose own output is edited first included.
        takes_position_ids: whether the model takes position_ids; others count the attention mask.
        outputs: length of the tuple that a block returns; None where it returns a tensor.
    """

    body: nn.Module
    blocks: nn.ModuleList
    first: int
    takes_position_ids: bool
    outputs: int | None

    @property
    def device(self) -> torch.device:
        """Where the body computes."""
        return next(self.body.parameters()).device

    def checkpointed(self) -> bool:
        """Whether gradient checkpointing is on, under which transformers drops keys and values."""
        return any(vars(module).get("gradient_checkpointing", False) for module in self.body.modules())

    def own_hooks(self) -> list[str]:
        """The modules of the body that have forward hooks of the caller's."""
        return [
            path
            for path, module in self.body.named_modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if not _belongs_to_the_model(hook)
        ]


def find_frozen_part(reft_model: ReftModel) -> FrozenPart:
    """The frozen part of a model whose edits begin at some token of every row.

    Raises ValueError, saying why, where a base model is not frozen, draws random numbers in training, is no causal
    decoder whose cache is keys and values, mixes the rows of a batch, or where everything is edited.
    """
    base = inner_model(reft_model.model)
    body = called_model(reft_model.model)
    _check_edits(reft_model)
    _check_kind(base, body)
    _check_tensors(reft_model.model, body)
    _check_chance(reft_model.model)
    _, blocks = block_list(reft_model.model)
    first = _blocks_before(find_sites(reft_model.model, reft_model.representations), blocks)
    signatures = [inspect.signature(module.forward).parameters for module in (base, body)]
    takes = all("position_ids" in found for found in signatures)
    part = FrozenPart(body, blocks, first, takes, None)
    if hooked := part.own_hooks():
        raise ValueError(
            f"frozen_cache cannot tell what the forward hooks on {hooked[0]} of {type(base).__name__} do with a part "
            "of the tokens: remove them"
        )
    return FrozenPart(body, blocks, first, takes, _try(base, body, blocks))


def _refuse(reason: str) -> ValueError:
    return ValueError(f"frozen_cache keeps what never changes, but {reason}")


def _check_edits(reft_model: ReftModel) -> None:
    if not reft_model.representations:
        raise _refuse("nothing is edited: the model has no interventions")
    for key, item in zip(reft_model.keys, reft_model.representations, strict=True):
        if item.positions is not None and item.span is None:
            raise _refuse(f"{key} edits every token (positions={item.positions!r})")


def _check_kind(base: nn.Module, body: nn.Module) -> None:
    name, config = type(base).__name__, text_config(base)
    if getattr(config, "is_encoder_decoder", False):
        raise _refuse(f"{name} is an encoder-decoder: every token of the prompt sees all of it")
    can_generate: Any = getattr(base, "can_generate", None)
    if not callable(can_generate) or not can_generate():
        raise _refuse(f"{name} is no causal language model")
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(base, "_is_stateful", False) or not kinds <= _ATTENTION:
        raise _refuse(f"the cache of {name} is not keys and values alone{_listed(kinds - _ATTENTION)}")
    if "past_key_values" not in inspect.signature(body.forward).parameters:
        raise _refuse(f"{type(body).__name__} takes no past_key_values")
    if getattr(config, "output_router_logits", False):
        raise _refuse(f"the loss of {name} is over the router's choice for every token (output_router_logits=True)")
    ropes = _rope_types([getattr(config, field, None) for field in ("rope_parameters", "rope_scaling")])
    if found := ropes & _ROPE_OF_THE_BATCH:
        raise _refuse(f"the rotary frequencies of {name} depend on the longest row of a batch{_listed(found)}")


def _rope_types(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        own = {str(value[key]) for key in ("rope_type", "type") if key in value}
        return own.union(*(_rope_types(inner) for inner in value.values()))
    return set().union(*map(_rope_types, value)) if isinstance(value, list) else set()


def _listed(found: set[str]) -> str:
    return f" ({', '.join(sorted(found))})" if found else ""


def _check_tensors(model: nn.Module, body: nn.Module) -> None:
    for name, parameter in body.named_parameters():
        if parameter.requires_grad:
            raise _refuse(
                f"{name} of {type(body).__name__} is trained: freeze it (LoRA and the like change every key and value)"
            )
    places = getattr(model, "hf_device_map", None) or {}
    if len(set(places.values())) > 1 or any(p.device.type == "meta" for p in model.parameters()):
        raise _refuse("the base model is spread over several devices, or offloaded; its places must be one device")
    plain = all(type(parameter.data) is Tensor for parameter in body.parameters())
    if getattr(model, "quantization_method", None) or not plain:
        raise _refuse(
            "the base model is quantised or sharded: its result for a row may depend on the other rows of the batch"
        )


def _check_chance(model: nn.Module) -> None:
    for path, module in model.named_modules():
        probabilities: Iterator[tuple[str, Any]] = iter(vars(module).items())
        if isinstance(module, nn.modules.dropout._DropoutNd):
            probabilities = iter([("p", module.p)])
        for name, value in probabilities:
            chance = isinstance(module, nn.modules.dropout._DropoutNd) or "drop" in name or "jitter" in name
            if chance and isinstance(value, float) and value > 0:
                raise _refuse(
                    f"{path}.{name} = {value} of the base model draws other numbers at every step of training: load "
                    "the model with that probability at 0 (attention_dropout=0.0 and the like in its config)"
                )


def _blocks_before(sites: list[Site], blocks: nn.ModuleList) -> int:
    """How many blocks nothing below whose outputs is edited."""
    inside = {id(module): index for index, block in enumerate(blocks) for module in block.modules()}
    own = {id(block) for block in blocks}
    # The edit of a block's own output comes after it; what lies outside of the blocks may come before them.
    return min(inside.get(id(site.module), 0) + int(id(site.module) in own and site.side == "output") for site in sites)


def _belongs_to_the_model(hook: Any) -> bool:
    owner = getattr(hook, "__self__", hook)
    if isinstance(owner, (SiteHook, CallHook)):
        return True
    package = str(getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0]
    return package in _PARTS_OF_THE_MODEL


@torch.no_grad()
def _try(base: nn.Module, body: nn.Module, blocks: nn.ModuleList) -> int | None:
    """Runs two rows that differ in their last token; what a block returns, as FrozenPart.outputs."""
    embeddings: Any = base.get_input_embeddings()  # type: ignore[operator]
    weight = embeddings.weight
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=weight.device) % weight.shape[0]
    returned: list[int | None] = []

    def look(_module: nn.Module, _args: Any, output: Any) -> None:
        returned.append(len(output) if isinstance(output, (tuple, list)) else None)

    handles = [block.register_forward_hook(look) for block in blocks]
    cache = DynamicCache()
    try:
        h = body(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)[0]
    except Exception as error:  # a model with a cache of its own fails wherever it looks into this one
        raise _refuse(f"{type(body).__name__} cannot be called with a DynamicCache ({error})") from error
    finally:
        for handle in handles:
            handle.remove()
    name = type(base).__name__
    held = [(layer.keys, layer.values) for layer in cache.layers]
    if len(returned) != len(blocks) or len(set(returned)) != 1:
        raise _refuse(f"{name} does not run each of its {len(blocks)} blocks once")
    if len(held) != len(blocks) or any(
        not isinstance(states, Tensor) or states.dim() != 4 or states.shape[::2] != (2, 4)
        for pair in held
        for states in pair
    ):
        raise _refuse(f"the cache of {name} is not the keys and values [B, H, S, D] of each of its blocks")
    if len({(keys.shape, values.shape) for keys, values in held}) != 1:
        raise _refuse(f"the keys and values of the blocks of {name} have different shapes")
    for states in (h, *(keys.transpose(1, 2) for keys, _ in held), *(values.transpose(1, 2) for _, values in held)):
        one, other = states[:, :3].double()
        if (one - other).abs().max() > _ROUNDING.get(states.dtype, 1e-2) * one.abs().max():
            raise _refuse(f"{name} is not causal: its last token changes what comes before")
    return returned[0]
