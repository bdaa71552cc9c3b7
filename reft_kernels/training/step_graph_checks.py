"""What a replayed training step cannot do, refused before anything is trained."""

from __future__ import annotations

from typing import Any

from torch import nn

# Whose update is a part of the backward, with the learning rate of the capture.
_IN_BACKWARD = ("lomo", "layerwise")
_ATTENTION = (None, "sdpa", "eager")


def check_step_graphs(args: Any, base: nn.Module) -> None:
    """Raises ValueError, which names it, where an argument or the base model does not go with step graphs."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    for name, is_on in (
        ("several processes", args.world_size > 1),
        ("deepspeed", bool(args.deepspeed)),
        ("fsdp", bool(args.fsdp)),
        ("gradient_checkpointing", args.gradient_checkpointing),
        ("torch_compile_mode", args.torch_compile and args.torch_compile_mode in ("reduce-overhead", "max-autotune")),
        ("torch_empty_cache_steps", args.torch_empty_cache_steps is not None),
        (f"optim {optimizer!r}", any(part in optimizer for part in _IN_BACKWARD)),
    ):
        if is_on:
            raise ValueError(f"step_graphs does not go with {name}")
    attention = getattr(getattr(base, "config", None), "_attn_implementation", None)
    if attention not in _ATTENTION:
        raise ValueError(f"step_graphs goes with sdpa and eager attention, which read no mask; got {attention!r}")
    from transformers.utils import import_utils

    if not hasattr(import_utils, "is_cuda_stream_capturing"):
        raise ValueError("step_graphs needs transformers 5, whose masks are made without reading them on the host")
