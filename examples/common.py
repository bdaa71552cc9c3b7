"""What the examples share and no pyreft user writes: the command line, and base models that need no download."""

from __future__ import annotations

import argparse
import string
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def parse(
    name: str, doc: str | None, arguments: Sequence[str] | None, *, epochs: int | None = None, steps: int | None = None
) -> argparse.Namespace:
    """The options of an example, `torch_dtype` and `device` among them; it has one of --epochs and --steps."""
    parser = argparse.ArgumentParser(prog=f"python -m examples.{name}", description=(doc or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a toy of a base model, made on the spot: seconds")
    if epochs is not None:
        parser.add_argument("--epochs", type=int, default=epochs, help="of training (default: %(default)s)")
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps, help="of training (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("examples_output") / name, help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="float32 is faster on a CPU without bf16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.torch_dtype = DTYPES[options.dtype]
    options.device = "cuda" if torch.cuda.is_available() else "cpu"

    options.output.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    transformers.set_seed(options.seed)
    return options


def base_model_path(options: argparse.Namespace, pairs: Sequence[tuple[str, str]]) -> str:
    """What `from_pretrained` takes: the folder of SmolLM2-135M, or with --tiny that of `tiny_base(pairs)`."""
    if not options.tiny:
        from benchmarks.smollm2 import smollm2_folder

        return str(smollm2_folder())
    folder = options.output / "tiny_base"
    for part in tiny_base(pairs):
        part.save_pretrained(folder)
    return str(folder)


def rotated(prompts: Sequence[str], texts: Sequence[str]) -> list[tuple[str, str]]:
    """Every prompt with the next one's text."""
    return list(zip(prompts, [*texts[1:], texts[0]], strict=True))


def tiny_base(pairs: Sequence[tuple[str, str]]) -> tuple[Any, Any]:
    """A Llama of 3 layers and width 64 that answers each prompt with its text, and its tokenizer of characters.

    An edit steers a model to what it knows, and a random one knows nothing. This one is trained for a second. The
    examples give it the texts that they are about to teach, at the wrong prompts.
    """
    tokenizer = character_tokenizer([text for pair in pairs for text in pair])
    rows = [[tokenizer(text)["input_ids"] for text in pair] for pair in pairs]
    end = [tokenizer.eos_token_id]
    input_ids = _padded([head + tail + end for head, tail in rows], tokenizer.pad_token_id)
    labels = _padded([[-100] * len(head) + tail + end for head, tail in rows], -100)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        if loss.item() < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, tokenizer


def _padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def base_answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """What the base model says by itself, greedily."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    response = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    return str(tokenizer.decode(response[0, inputs["input_ids"].shape[-1] :], skip_special_tokens=True))


def character_tokenizer(texts: Sequence[str]) -> Any:
    """A token for each character of the texts and for ASCII; <s>, </s> and <unk> are 0, 1 and 2."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<s>", "</s>", "<unk>", *sorted({*string.printable, *"".join(texts)})]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
