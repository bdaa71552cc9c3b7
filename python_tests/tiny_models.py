"""Tiny random models of the architectures that ReFT is used with, made from configs: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 50
WIDTH = 16
LAYERS = 3

_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}
_GPT_NEOX = {name: value for name, value in _DECODER.items() if name not in ("num_key_value_heads", "head_dim")}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": 2,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _DECODER),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_DECODER, "query_pre_attn_scalar": 8}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _DECODER),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _GPT_NEOX),
    "bert": ("BertConfig", "BertForSequenceClassification", _ENCODER),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _ENCODER),
}
DECODERS = ("llama", "qwen2", "qwen3", "gemma2", "mistral", "gpt2", "gpt_neox")
ENCODERS = ("bert", "roberta")
ARCHITECTURES = DECODERS + ENCODERS


def tiny_model(architecture: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model of 3 layers and width 16 in eval mode, with weights large enough for edits to show in its output."""
    config_name, class_name, settings = _CONFIGS[architecture]
    config = getattr(transformers, config_name)(**{**settings, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, class_name)(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
        nn.init.normal_(model.get_input_embeddings().weight)
    return model.eval()


def random_batch(lengths: list[int], *, side: str = "right", low: int = 3) -> dict[str, torch.Tensor]:
    """Token ids of the given lengths, padded with 0 on one side, and their attention mask."""
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        part = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, part] = torch.randint(low, VOCABULARY, (length,))
        mask[row, part] = 1
    return {"input_ids": ids, "attention_mask": mask}
