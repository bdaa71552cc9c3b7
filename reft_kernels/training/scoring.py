"""How a model predicts given targets after their prompts, the prompts edited as in training."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reft_kernels.model import ReftModel
from reft_kernels.modules import inner_model, text_config
from reft_kernels.training.data import encode_prompts
from reft_kernels.training.item_layout import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_targets(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], targets: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """(all token ids of prompt + target, those of the prompt alone) of each pair, as in training.

    The target's tokens are those of the whole after as many as the prompt has: where a token spans the border it counts
    for the prompt.

    Raises ValueError for a prompt without tokens, and for a target that adds none to its prompt.
    """
    whole = encode_prompts(tokenizer, [prompt + target for prompt, target in zip(prompts, targets, strict=True)])
    alone = encode_prompts(tokenizer, prompts)
    for prompt, target, ids, start in zip(prompts, targets, whole, alone, strict=True):
        if not start:
            raise ValueError(f"prompt has no tokens: {prompt!r}")
        if len(ids) <= len(start):
            raise ValueError(f"the target {target!r} adds no token to the prompt {prompt!r}")
    return list(zip(whole, alone, strict=True))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the model is in eval mode, without gradients; gives the base model.

    Raises ValueError for an encoder-decoder, whose targets are not continuations of its prompts.
    """
    base = model.model if isinstance(model, ReftModel) else model
    if getattr(text_config(base), "is_encoder_decoder", False):
        raise ValueError(f"targets are scored with decoders alone, {type(base).__name__} has an encoder as well")
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield base
    finally:
        model.train(training)


def edited(model: nn.Module, inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Within this context a call of the base model with these inputs is edited, by the model's own positions; `labels`
    among them say where the prompt ends. A model without interventions is called as it is."""
    return model.edited(inputs) if isinstance(model, ReftModel) else nullcontext()


def takes(base: nn.Module, name: str) -> bool:
    """Whether the base model's forward has a parameter of this name."""
    return name in inspect.signature(inner_model(base).forward).parameters


def padded(rows: Sequence[Sequence[int]], value: int, device: torch.device, *, left: bool = False) -> Tensor:
    """The rows as int64 [B, S], filled up with a value on the right, or on the left."""
    width = max(map(len, rows))
    gaps = [[value] * (width - len(row)) for row in rows]
    filled = [[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)]
    return torch.tensor(filled, dtype=torch.int64, device=device)


def target_logits(model: nn.Module, base: nn.Module, rows: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
    """The logits [T, V] that predict each target's T tokens, of one batch of `encode_targets`, padded on the right."""
    device = next(base.parameters()).device
    starts = [len(prompt) for _, prompt in rows]
    ids = padded([whole for whole, _ in rows], 0, device)
    mask = padded([[1] * len(whole) for whole, _ in rows], 0, device)
    labels = padded(
        [[IGNORE_INDEX] * start + whole[start:] for (whole, _), start in zip(rows, starts, strict=True)],
        IGNORE_INDEX,
        device,
    )
    first, stop = min(starts) - 1, max(len(whole) for whole, _ in rows) - 1
    kept = {"logits_to_keep": torch.arange(first, stop, device=device)} if takes(base, "logits_to_keep") else {}
    with edited(model, {"input_ids": ids, "attention_mask": mask, "labels": labels}):
        logits: Tensor = base(input_ids=ids, attention_mask=mask, use_cache=False, **kept).logits
    offset = first if kept else 0
    return [
        logits[row, start - 1 - offset : len(whole) - 1 - offset]
        for row, ((whole, _), start) in enumerate(zip(rows, starts, strict=True))
    ]


def token_log_probs(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """log p of each token [T] under the logits [T, V] that predict it, in float32 (float64 where the logits are)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    chosen = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    return (wide.gather(1, chosen) - wide.logsumexp(1, keepdim=True)).squeeze(1)
