"""How many floating-point operations a step of training needs, when the base model is frozen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reft_kernels.modules import block_list, inner_model, text_config

if TYPE_CHECKING:
    from reft_kernels.model import ReftModel

# What configs call their number of experts.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
# Components that are the last thing a block does: no gradient flows through the block itself.
_LAST_IN_BLOCK = ("block_output", "mlp_output")


@dataclass(frozen=True)
class ModelFlops:
    """The sizes that the operations of a training step follow from.

    With T tokens, of which C predict a target, and P pairs of a token and one that it attends to (n (n + 1) / 2 of a
    causal example of n tokens, n^2 of any other), a step takes

        forward   2 (N T + N_head C) + 4 L a P
        backward  2 (N' T + N_head C) + 8 L' a P + 2 M T

    Each weight of a matrix product costs a multiplication and an addition a token. Attention forms Q K^T and its
    product with V forward, and four such products backward. Only what needs a gradient has a backward: a frozen
    weight has no dW, and nothing below the first edited layer has a gradient of its input. What an implementation does
    beside (padding, logits that no target needs, recomputed activations) does not count, nor do embeddings, norms,
    softmax, the edits themselves, which are below a thousandth of a model, or the narrower attention of a sliding
    window.

    Attributes:
        weights: N, in matrix products below the head.
        weights_above: N', those above the first edit, or above the first trained weight if that lies lower.
        head: N_head, of the output embedding; 0 where the model has none.
        trained: M, weights of the base model that are trained themselves.
        layers, layers_above: L and L'.
        attention_width: a, the heads' number times their width.
        causal: whether a token attends to those before it alone.
    """

    weights: int
    weights_above: int
    head: int
    trained: int
    layers: int
    layers_above: int
    attention_width: int
    causal: bool

    def training_step(self, tokens: float, pairs: float, targets: float) -> float:
        """Operations of forward and backward, for T = `tokens`, P = `pairs` and C = `targets`."""
        forward = 2 * (self.weights * tokens + self.head * targets) + 4 * self.layers * self.attention_width * pairs
        through = 2 * (self.weights_above * tokens + self.head * targets)
        through += 8 * self.layers_above * self.attention_width * pairs
        return forward + through + 2 * self.trained * tokens


def model_flops(reft_model: ReftModel) -> ModelFlops:
    """The sizes of a model. Where an edit lies inside a layer the whole layer counts as above it.

    Raises ValueError, saying why, where the operations do not follow from the weights: encoder-decoders, mixtures of
    experts, packed weights of a quantised model, weights that are spread over processes, layers that cannot be told.
    """
    model, config = reft_model.model, text_config(reft_model.model)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("encoder-decoders are not counted")
    if any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS):
        raise ValueError("mixtures of experts are not counted")
    prefix, blocks = block_list(model)
    first = _first_with_gradient(reft_model, prefix, len(blocks))
    head = _head(model)
    weights = above = trained = 0
    for name, weight in _matrices(model):
        if not weight.is_floating_point():
            raise ValueError(f"packed weights of {weight.dtype} are not counted")
        if weight is head:
            continue
        layer = _layer_of(name, prefix)
        weights += weight.numel()
        # Outside of the blocks only what follows them is in matrix products: embeddings are looked up.
        above += weight.numel() if layer is None or layer >= first else 0
        trained += weight.numel() if weight.requires_grad else 0
    if not weights:
        raise ValueError("weights that are spread over processes are not counted")
    heads = getattr(config, "num_attention_heads", None) or 0
    if not isinstance(heads, int):
        raise ValueError("layers with different numbers of heads are not counted")
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    can_generate = getattr(inner_model(model), "can_generate", None)
    return ModelFlops(
        weights=weights,
        weights_above=above,
        head=0 if head is None else head.numel(),
        trained=trained + (head.numel() if head is not None and head.requires_grad else 0),
        layers=len(blocks),
        layers_above=len(blocks) - min(first, len(blocks)),
        attention_width=heads * width,
        causal=callable(can_generate) and bool(can_generate()),
    )


def _head(model: nn.Module) -> torch.Tensor | None:
    get = getattr(inner_model(model), "get_output_embeddings", None)
    head = get() if callable(get) else None
    weight = getattr(head, "weight", None)
    return weight if isinstance(weight, torch.Tensor) else None


def _matrices(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of matrix products: of all modules but embeddings, each once."""
    looked_up = {
        id(weight) for m in model.modules() if isinstance(m, nn.Embedding) for weight in m.parameters(recurse=False)
    }
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and id(weight) not in looked_up:
            yield name, weight


def _first_with_gradient(reft_model: ReftModel, prefix: str, count: int) -> int:
    """The lowest block that a gradient flows through; `count` where there is none."""
    lowest = [_first_above(item, prefix) for item in reft_model.representations]
    for name, parameter in reft_model.model.named_parameters():
        if parameter.requires_grad:
            layer = _layer_of(name, prefix)
            # A trained weight outside of the blocks is an embedding's below them, or it lies above them.
            embedding = layer is None and any(part in name for part in ("embed", "wte", "wpe"))
            lowest.append(0 if embedding else count if layer is None else layer)
    return min(lowest, default=count)


def _first_above(item: Any, prefix: str) -> int:
    if not item.is_path:
        return int(item.layer) + (item.component in _LAST_IN_BLOCK)
    layer = _layer_of(item.component.replace("[", ".").replace("]", ""), prefix)
    if layer is None:
        raise ValueError(f"the layer of {item.component!r} cannot be told")
    return layer


def _layer_of(name: str, prefix: str) -> int | None:
    if not name.startswith(f"{prefix}."):
        return None
    number = name.removeprefix(f"{prefix}.").partition(".")[0]
    return int(number) if number.isdecimal() else None
