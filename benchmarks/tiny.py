"""Random models with a tokenizer of single bytes, for benchmarks' --tiny: no download, a step in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def tiny_tokenizer() -> Any:
    """A fast tokenizer with one token a byte, an end token and a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def tiny_llama(seed: int = 0) -> Any:
    """A Llama of two layers and width 32, in eval mode; weights that depend on ``seed`` alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tiny_bert(seed: int = 0) -> Any:
    """A BERT of two layers and width 32, without a head."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertModel(config).eval()


def save_tiny(folder: Path, model: Any) -> Path:
    """The model and its tokenizer as ``save_pretrained`` writes them."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
