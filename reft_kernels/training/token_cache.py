"""Token ids on disk: texts are tokenised once, and mapped into memory from then on."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from reft_kernels.folders import replace_files
from reft_kernels.training.token_table import TokenTable, make_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = "reft_kernels token table 1"


def cached_table(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    outputs: Sequence[str],
    *,
    max_length: int,
    append_eos: bool,
    folder: str | Path | None = None,
) -> TokenTable:
    """The table of prompts and outputs, read from `folder` where it is there, else made and put there.

    The file's name is the fingerprint of all that the ids follow from: the texts (with the template that they were
    made with), the tokenizer, `max_length`, `append_eos`, and the format. A file that is damaged or of something else
    is passed over and written anew. It is written under another name first, so two processes may do this at once; each
    then tokenises. Where it cannot be written (a full disk) the table is kept in memory alone, with a warning.

    Args:
        tokenizer, prompts, outputs, max_length, append_eos: see :func:`reft_kernels.training.token_table.encode_pairs`.
        folder: made where it is missing; None keeps nothing.

    Raises ValueError as `encode_pairs`.
    """

    def make() -> TokenTable:
        return make_table(tokenizer, prompts, outputs, max_length=max_length, append_eos=append_eos)

    if folder is None:
        return make()
    fingerprint = _fingerprint(tokenizer, prompts, outputs, max_length, append_eos)
    path = Path(folder) / f"tokens-{fingerprint}.safetensors"
    table = _read(path, fingerprint)
    if table is not None:
        return table
    table = make()
    try:
        replace_files(folder, lambda fresh: _write(fresh / path.name, table, fingerprint))
    except (OSError, SafetensorError) as error:
        warnings.warn(f"token ids are not kept in {folder}: {error}", stacklevel=3)
    return table


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides which ids a text has, and of the versions of the packages that make them."""
    import tokenizers
    import transformers

    about: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "versions": [tokenizers.__version__, transformers.__version__],
        "end": [tokenizer.eos_token_id, str(tokenizer.eos_token)],
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", None),
    }
    hashed = hashlib.blake2b(digest_size=16)
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # What the last call left: these do not decide the ids of a call that neither pads nor truncates.
        state.pop("truncation", None)
        state.pop("padding", None)
        about["state"] = state
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    _add_texts(hashed, [path.name])
                    hashed.update(path.read_bytes())
    hashed.update(json.dumps(about, sort_keys=True).encode())
    return hashed.hexdigest()


def _fingerprint(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    outputs: Sequence[str],
    max_length: int,
    append_eos: bool,
) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    _add_texts(hashed, [_FORMAT, tokenizer_fingerprint(tokenizer), str(max_length), str(append_eos)])
    _add_texts(hashed, prompts)
    _add_texts(hashed, outputs)
    return hashed.hexdigest()


def _add_texts(hashed: Any, texts: Iterable[str]) -> None:
    """The texts with their lengths, so that no two lists of texts are the same bytes."""
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        hashed.update(len(encoded).to_bytes(8, "little"))
        hashed.update(encoded)


def _checksum(table: TokenTable) -> str:
    checksum = 0
    for tensor in table:
        checksum = zlib.crc32(tensor.numpy().data, checksum)
    return f"{checksum:08x}"


def _write(path: Path, table: TokenTable, fingerprint: str) -> None:
    metadata = {"format": _FORMAT, "fingerprint": fingerprint, "checksum": _checksum(table)}
    save_file(table._asdict(), path, metadata=metadata)


def _read(path: Path, fingerprint: str) -> TokenTable | None:
    """The table in a file, mapped into memory; None where the file is missing, damaged or another's."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            table = TokenTable(*(file.get_tensor(name) for name in TokenTable._fields))
    except (SafetensorError, OSError):
        return None
    expected = {"format": _FORMAT, "fingerprint": fingerprint, "checksum": _checksum(table)}
    return table if metadata == expected and _fits(table) else None


def _fits(table: TokenTable) -> bool:
    ids, starts, prompt_lengths, dropped = table
    return (
        [tensor.dtype for tensor in table] == [torch.int32, torch.int64, torch.int32, torch.int64]
        and all(tensor.dim() == 1 for tensor in table)
        and len(starts) == len(prompt_lengths) + 1
        and [int(starts[0]), int(starts[-1])] == [0, len(ids)]
        and bool(((prompt_lengths > 0) & (prompt_lengths < table.lengths)).all())
        and bool((dropped >= 0).all())
    )
