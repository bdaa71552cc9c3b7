"""Which module of which architecture: from a layer and a component to the module whose output or input is edited."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from reft_kernels.config import Representation

# Where the blocks lie in the models of transformers, below any wrapper's prefix.
_BLOCKS = (
    "model.language_model.layers",
    "language_model.model.layers",
    "model.layers",
    "model.decoder.layers",
    "transformer.h",
    "transformer.blocks",
    "gpt_neox.layers",
    "encoder.layer",
    "decoder.layers",
    "layers",
    "h",
    "blocks",
)

# Paths inside a block, the first that exists. An encoder block of the BERT family has no module for its whole MLP: its
# parts are `intermediate` and `output`, and what an MLP or an attention adds to the stream is their `dense`.
_ATTENTION = ("self_attn", "self_attention", "attn", "attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_INSIDE: dict[str, tuple[str, ...]] = {
    "block_output": ("",),
    "block_input": ("",),
    "mlp_output": ("output.dense", *_MLP),
    "mlp_input": ("intermediate", *_MLP),
    "attention_output": ("attention.output.dense", *_ATTENTION),
    "attention_input": ("attention.self", *_ATTENTION),
}

COMPONENTS = tuple(_INSIDE)
"""The components with a name; any other is a path such as "model.layers[3].mlp.output"."""

_STEP = re.compile(r"([A-Za-z_]\w*|\d+)((?:\[\d+\])*)")


@dataclass(frozen=True)
class Site:
    """A module and the side of it that is edited."""

    path: str
    module: nn.Module
    side: Literal["output", "input"]
    width: int | None
    """Last dimension of what is edited, where it is known before the first call."""
    owned: bool
    """Whether the edited tensor is the block's own (made by it and kept by nobody else)."""


def inner_model(model: nn.Module) -> nn.Module:
    """The model that `generate` calls: inside of PEFT's wrapper, where there is one."""
    get_base_model = getattr(model, "get_base_model", None)
    inner = get_base_model() if callable(get_base_model) else model
    return inner if isinstance(inner, nn.Module) else model


def called_model(model: nn.Module) -> nn.Module:
    """The part of the model that every step of a generation calls as a module: the model below its head.

    transformers 4 calls `forward` of the head's model directly while it prefills in chunks, which runs no hooks.
    """
    inner = inner_model(model)
    body = getattr(inner, "base_model", inner)
    return body if isinstance(body, nn.Module) else inner


def text_config(model: nn.Module) -> Any:
    """The config of the (text part of the) model, or None."""
    config = getattr(inner_model(model), "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config() if callable(get_text_config) else config


def hidden_size(model: nn.Module) -> int | None:
    """Width d of the residual stream, or None where the config does not say."""
    size = getattr(text_config(model), "hidden_size", None)
    return size if isinstance(size, int) else None


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the model's blocks.

    Raises ValueError, saying what was looked for, where there is none or no unique one.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if not getattr(text_config(model), "is_encoder_decoder", False):
        for known in _BLOCKS:
            found = [name for name in lists if name == known or name.endswith("." + known)]
            if len(found) == 1:
                return found[0], lists[found[0]]
    count = getattr(text_config(model), "num_hidden_layers", None)
    fitting = [name for name, blocks in lists.items() if len(blocks) == count]
    if len(fitting) == 1:
        return fitting[0], lists[fitting[0]]
    raise ValueError(
        f"cannot tell which modules of {type(model).__name__} are its layers: looked for {', '.join(_BLOCKS)}, then "
        f"for the only ModuleList of num_hidden_layers = {count} modules, and found "
        f"{fitting or 'none'}; name the module itself, as in component='decoder.block[3].output'"
    )


def find_sites(model: nn.Module, representations: Sequence[Representation]) -> list[Site]:
    """The module of each representation. Raises ValueError naming the part that does not exist."""
    try:
        known: tuple[str, nn.ModuleList] | None = block_list(model)
    except ValueError:
        if not all(item.is_path for item in representations):
            raise
        known = None
    sites = []
    for item in representations:
        if item.is_path:
            sites.append(_site_of_path(model, item.component, () if known is None else known[1]))
        else:
            assert known is not None
            sites.append(_site_of_component(model, item, *known))
    return sites


def _site_of_component(model: nn.Module, representation: Representation, prefix: str, blocks: nn.ModuleList) -> Site:
    component = representation.component
    if component not in _INSIDE:
        raise ValueError(
            f"unknown component {component!r}: expected one of {', '.join(COMPONENTS)}, or a path that ends in .output "
            "or .input, such as 'model.layers[3].mlp.output'"
        )
    layer = representation.layer
    assert layer is not None
    if not 0 <= layer < len(blocks):
        raise ValueError(
            f"layer {layer} does not exist: {type(model).__name__} has {len(blocks)} layers ({prefix}), 0 to "
            f"{len(blocks) - 1}"
        )
    side: Literal["output", "input"] = "input" if component.endswith("_input") else "output"
    for inside in _INSIDE[component]:
        module = _descend(blocks[layer], inside)
        if module is not None:
            path = f"{prefix}[{layer}]" + (f".{inside}" if inside else "")
            return Site(path, module, side, hidden_size(model), owned=component == "block_output")
    raise ValueError(
        f"no {component} in {type(blocks[layer]).__name__} ({prefix}[{layer}]): looked for "
        f"{', '.join(_INSIDE[component])}; name the module itself, as in '{prefix}[{layer}].mlp.output'"
    )


def indices_in_decoder(model: nn.Module, sites: Sequence[Site]) -> frozenset[int]:
    """Which of the sites lie in the decoder of an encoder-decoder; none of another model's."""
    if not getattr(text_config(model), "is_encoder_decoder", False):
        return frozenset()
    get_decoder = getattr(inner_model(model), "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    return frozenset(index for index, site in enumerate(sites) if id(site.module) in inside)


def _descend(module: nn.Module, path: str) -> nn.Module | None:
    for name in filter(None, path.split(".")):
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            return None
        module = child
    return module


def _site_of_path(model: nn.Module, path: str, blocks: Iterable[nn.Module]) -> Site:
    *steps, side = path.split(".")
    if side not in ("output", "input") or not steps:
        raise ValueError(f"component {path!r} must end in .output or .input, as in 'model.layers[3].mlp.output'")
    module = model
    walked = type(model).__name__
    for name in _names(path, steps):
        child = getattr(module, name, None) if not name.isdigit() else _item(module, int(name))
        if not isinstance(child, nn.Module):
            children = [child_name for child_name, _ in module.named_children()]
            shown = ", ".join(children[:12]) + (", ..." if len(children) > 12 else "")
            raise ValueError(
                f"component {path!r}: there is no module {name!r} in {walked} ({type(module).__name__}); it has "
                f"{shown or 'none'}"
            )
        module = child
        walked = f"{walked}[{name}]" if name.isdigit() else f"{walked}.{name}"
    if side == "input":
        return Site(".".join(steps), module, "input", _width(module, side), owned=False)
    block = any(module is one for one in blocks)
    width = hidden_size(model) if block else _width(module, side)
    return Site(".".join(steps), module, "output", width, owned=block)


def _names(path: str, steps: list[str]) -> Iterator[str]:
    for step in steps:
        match = _STEP.fullmatch(step)
        if match is None:
            raise ValueError(f"component {path!r}: cannot read the step {step!r}, expected a name or name[index]")
        yield match[1]
        yield from re.findall(r"\d+", match[2])


def _item(module: nn.Module, index: int) -> Any:
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        return module[index] if index < len(module) else None
    return getattr(module, str(index), None)


def _width(module: nn.Module, side: str) -> int | None:
    """Last dimension of a linear layer's input or output; None for other modules."""
    names = ("in_features", "nx") if side == "input" else ("out_features", "nf")
    for name in names:
        size = getattr(module, name, None)
        if isinstance(size, int):
            return size
    return None


def module_device(model: nn.Module, module: nn.Module) -> torch.device:
    """Where a module computes: its parameters' device, or that of accelerate's hook where they are offloaded."""
    for candidate in (module, model):
        for parameter in candidate.parameters():
            if parameter.device.type != "meta":
                return parameter.device
            hook = getattr(candidate, "_hf_hook", None)
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
            break
    return torch.device("cpu")
