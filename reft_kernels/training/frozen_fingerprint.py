"""A fingerprint of everything that the kept states of a base model depend on, apart from the tokens."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor
from transformers import __version__ as transformers_version

from reft_kernels.modules import text_config
from reft_kernels.training.frozen_part import FrozenPart

# Of a config: what has no effect on a hidden state.
_NO_EFFECT = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**20


def fingerprint(part: FrozenPart, precision: str) -> str:
    """32 hex digits that differ where weights, buffers, config, kept blocks, precision or transformers do.

    Args:
        part: the frozen part.
        precision: the dtype of autocast that the states are computed under.
    """
    config = text_config(part.body)
    settings = config.to_dict() if callable(getattr(config, "to_dict", None)) else {}
    document: dict[str, Any] = {
        "body": type(part.body).__name__,
        "config": {name: value for name, value in settings.items() if name not in _NO_EFFECT},
        "first": part.first,
        "precision": precision,
        "transformers": transformers_version,
        "tensors": tensor_sums({**dict(part.body.named_parameters()), **dict(part.body.named_buffers())}),
    }
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def state_of(part: FrozenPart) -> int:
    """A number that changes where the weights have been written, replaced or moved. Looks at no value."""
    return hash(tuple((0 if p.is_inference() else p._version, p.data_ptr()) for p in part.body.parameters()))


@torch.no_grad()
def tensor_sums(tensors: dict[str, Tensor]) -> list[tuple[str, str, list[int], list[int]]]:
    """Name, dtype, shape and 64-bit sums of each tensor.

    The bits of a tensor, in words x_i of the size of its elements, are summed in parts of 2^20 words as sum_i m_i x_i
    modulo 2^64 with odd pseudo-random m_i: a tensor that differs in one element never has the same sums, and one that
    differs anyhow has with a probability of 2^-32 at most. It is computed on the tensor's device, the same on all.
    """
    multipliers: dict[torch.device, Tensor] = {}
    found: list[tuple[str, str, list[int], Tensor]] = []
    for name, tensor in tensors.items():
        words = tensor.detach().contiguous().reshape(-1)
        words = torch.view_as_real(words).reshape(-1) if words.is_complex() else words
        words = words.view(_WORDS[words.element_size()])
        if tensor.device not in multipliers:
            multipliers[tensor.device] = _multipliers().to(tensor.device)
        m = multipliers[tensor.device]
        sums = [(part.to(torch.int64) * m[: len(part)]).sum() for part in words.split(_CHUNK)]
        found.append((name, str(tensor.dtype), list(tensor.shape), torch.stack(sums) if sums else words.long()))
    return [(name, dtype, shape, sums.tolist()) for name, dtype, shape, sums in found]


def _multipliers() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (_CHUNK,), generator=generator) | 1
