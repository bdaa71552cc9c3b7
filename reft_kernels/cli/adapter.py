"""Loading a trained adapter with the base model it was trained on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from reft_kernels.cli.common import UserError, choose_device, load_base, user_errors
from reft_kernels.cli.output import LOG_FILE, find_adapter, training_settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def load_edited(
    arguments: argparse.Namespace,
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase, dict[str, Any]]:
    """The ReftModel of `--adapter` (or the base model alone), the tokenizer, and the settings of its training."""
    adapter = find_adapter(arguments.adapter)
    settings = training_settings(adapter)
    name = arguments.model or settings.get("model")
    if name is None:
        raise UserError(
            "--model is needed: " + ("no adapter is given" if adapter is None else f"no {LOG_FILE} names it")
        )
    device = choose_device(arguments.device)
    base, tokenizer = load_base(name, arguments.dtype, device)
    if adapter is None:
        return base, tokenizer, settings
    from reft_kernels.model import ReftModel

    with user_errors(f"--adapter {arguments.adapter}"):
        model = ReftModel.load(str(adapter), base)
    return model.to(device).eval(), tokenizer, settings
