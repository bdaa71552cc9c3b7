"""Loading the base model of a job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_kernels.jobs import processes
from reft_kernels.jobs.errors import UserError, user_errors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


def choose_device(name: str) -> str:
    """The device that --device names, of several processes each its own. Raises UserError where there is none."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not processes.on_cpu() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    return processes.local_gpu() if name == "cuda" else name


def choose_dtype(name: str, device: str) -> torch.dtype:
    """The dtype that --dtype names: bfloat16 on a GPU and float32 elsewhere for auto."""
    import torch

    if name == "auto":
        name = "bfloat16" if device.startswith("cuda") else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_base(
    name: str,
    dtype: str,
    device: str,
    *,
    labels: int | None = None,
    regression: bool = False,
    seed: int = 42,
    tensor_parallel: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, in eval mode on `device`, and its tokenizer. For a folder the hub is not asked.

    Args:
        labels: load a classifier with so many labels, whose head is new where the model has none of that size.
        regression: the one label is a number.
        seed: of a new head.
        tensor_parallel: split the matrices of a language model over all processes.
    """
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local and not (folder / "config.json").is_file():
        raise UserError(f"--model {name}: the folder holds no config.json, so it is no model folder")
    if not local and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or folder.exists()):
        raise UserError(f"--model {name}: no such folder")
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # of the loading of weights
    source = str(folder) if local else name
    what = f"--model {name}" if local else f"--model {name}: no folder here, and not to be had from the hub"
    options: dict[str, Any] = {"local_files_only": local, "dtype": choose_dtype(dtype, device)}
    if tensor_parallel:
        options |= _split()
    verbosity = logging.get_verbosity()
    # safetensors, tokenizers and the hub have error classes of their own.
    with user_errors(f"{what}: its tokenizer cannot be loaded" if local else what, (Exception,)):
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    with user_errors(what, (Exception,)):
        if labels is None:
            model = AutoModelForCausalLM.from_pretrained(source, **options)
        else:
            kind = "regression" if regression else "single_label_classification"
            options |= {"num_labels": labels, "problem_type": kind, "ignore_mismatched_sizes": True}
            try:
                set_seed(seed)
                logging.set_verbosity_error()  # which says that the head is new
                model = AutoModelForSequenceClassification.from_pretrained(source, **options)
            finally:
                logging.set_verbosity(verbosity)
            if model.config.pad_token_id is None:
                model.config.pad_token_id = tokenizer.pad_token_id
    return (model if tensor_parallel else model.to(device)).eval(), tokenizer


def _split() -> dict[str, Any]:
    """What `from_pretrained` takes to split a model by its own plan."""
    import inspect

    from transformers.distributed import DistributedConfig

    if "tp_plan" in inspect.signature(DistributedConfig).parameters:  # as transformers 5 takes it
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    return {"tp_plan": "auto"}


def count_layers(name: str) -> int | None:
    """How many blocks the model of this folder or name has, where its config says so."""
    from transformers import AutoConfig

    folder = Path(name).expanduser()
    with user_errors(f"--model {name}", (Exception,)):
        config = AutoConfig.from_pretrained(str(folder) if folder.is_dir() else name, local_files_only=folder.is_dir())
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    return count if isinstance(count, int) else None
