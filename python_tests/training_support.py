"""A tiny Llama, a tiny tokenizer and a tiny data set for the tests of training and of the command line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

COLOURS = ("red", "green", "blue", "white", "black", "brown")


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    """Rows whose answer is the colour named in the instruction; lengths differ from row to row."""
    made = []
    for index in range(first, first + count):
        colour = COLOURS[index % len(COLOURS)]
        extra = " please" * (index % 5)
        made.append(
            {
                "instruction": f"which colour is the {colour} box{extra} ?",
                "input": "",
                "output": f"the correct answer is {colour}",
                "answer": colour,
            }
        )
    return made


def make_tokenizer(*, pad: bool = False, bos: bool = False, append_eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the rows; optionally one that puts start or end tokens itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{row['instruction']}\n{row['output']}" for row in rows(30)], trainer)
    if bos or append_eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' if bos else ''}$A{' </s>' if append_eos else ''}",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in special[:2]],
        )
    names: dict[str, Any] = {"eos_token": "</s>", "bos_token": "<s>", **({"pad_token": "<pad>"} if pad else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_encoder_tokenizer(segments: bool = False) -> PreTrainedTokenizerFast:
    """With RoBERTa's special tokens around a text and between two; `segments`: with BERT's segment ids."""
    tokenizer = make_tokenizer(pad=True)
    second = "$B:1 </s>:1" if segments else "</s> $B </s>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=f"<s> $A </s> {second}", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.model_input_names = ["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"]
    return tokenizer


def make_llama(vocab_size: int = 320, seed: int = 0) -> LlamaForCausalLM:
    """Two layers, width 32, random weights that depend on `seed` alone."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def write_rows(path: Path, made: list[dict[str, Any]]) -> Path:
    """The rows as .jsonl, or .jsonl.gz by the name."""
    text = "".join(json.dumps(row) + "\n" for row in made).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def save_model(folder: Path) -> Path:
    """A folder as `save_pretrained` writes it, with the tiny model and its tokenizer."""
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_encoder(folder: Path, **changes: Any) -> Path:
    """A folder with a tiny RoBERTa, without a classifier's head, and a tokenizer that fits it."""
    model = tiny_model("roberta", vocab_size=400, max_position_embeddings=300, **changes)
    model.roberta.save_pretrained(folder)
    make_encoder_tokenizer().save_pretrained(folder)
    return folder


def sentences(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows of a single-sentence task of GLUE, whose label is whether the first word is a warm colour."""
    return [
        {"sentence1": f"{COLOURS[k % 6]} box number {k}", "label": int(COLOURS[k % 6] in ("red", "brown", "white"))}
        for k in range(first, first + count)
    ]
