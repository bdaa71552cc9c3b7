"""What is trained in a base model: the six interventions, RED, LoRA and DoRA, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from reft_kernels.checkpoint import BASE_FILE
from reft_kernels.config import ReftConfig, Representation, read_layers
from reft_kernels.jobs.errors import UserError, user_errors
from reft_kernels.jobs.red import RedIntervention
from reft_kernels.jobs.subspace_loreft import SubspaceLoreftIntervention
from reft_kernels.model import ReftModel, get_reft_model
from reft_kernels.modules import block_list, hidden_size
from reft_kernels.positions import parse_positions
from reft_kernels.recipes.settings import OPTIONS, PEFT_METHODS, JobSettings

# The names under which transformers' classifiers keep what comes after the encoder or the decoder.
HEADS = ("classifier", "score", "classification_head")
OWN_CLASSES: dict[str, type[nn.Module]] = {
    "RedIntervention": RedIntervention,
    "SubspaceLoreftIntervention": SubspaceLoreftIntervention,
}


def check_method(settings: JobSettings) -> None:
    """Raises UserError naming an option of the method that no model could have."""
    with user_errors("--layers"):
        read_layers(settings.layers.replace(",", ";"))
    with user_errors("--positions"):
        parse_positions(settings.positions)


def adapt(base: nn.Module, settings: JobSettings) -> ReftModel:
    """The base model, frozen, with what `settings.method` trains. LoRA and DoRA change it in place, through PEFT.

    Raises UserError naming the option that the model cannot have.
    """
    heads = _heads(base) if settings.task == "classification" and settings.train_head else []
    if settings.method in PEFT_METHODS:
        with user_errors("method options"):
            base = _lora(base, settings, heads)
        trained = [p for p in base.parameters() if p.requires_grad]
        reft_model = get_reft_model(base, ReftConfig([]))
        for p in trained:
            p.requires_grad_(True)
        return reft_model
    with user_errors("method options"):
        reft_model = get_reft_model(base, _config(base, settings))
    for head in heads:
        base.get_submodule(head).requires_grad_(True)
    return reft_model


def _heads(base: nn.Module) -> list[str]:
    found = [name for name, _ in base.named_children() if name in HEADS]
    if not found:
        raise UserError(f"--model: {type(base).__name__} has no head to train (looked for {', '.join(HEADS)})")
    return found


def load_adapter(folder: Path, base: nn.Module, settings: Mapping[str, Any]) -> ReftModel:
    """The base model with the adapter that a job saved, its classifier's head and its LoRA with it.

    Args:
        settings: those that the job logged; {} for an adapter from elsewhere.

    Raises ValueError or FileNotFoundError naming file and key.
    """
    if settings.get("method") in PEFT_METHODS:
        known = {name: value for name, value in settings.items() if name in OPTIONS}
        base = adapt(base, JobSettings.of(known)).model
    include_model = (folder / BASE_FILE).is_file()
    return ReftModel.load(folder, base, include_model=include_model, classes=OWN_CLASSES)


def _config(base: nn.Module, settings: JobSettings) -> ReftConfig:
    layers = settings.layers.replace(",", ";")
    if settings.method == "frozen":
        return ReftConfig([])
    if settings.method == "red":
        chosen = read_layers(layers)
        numbers = chosen if isinstance(chosen, list) else range(len(block_list(base)[1]))
        width = hidden_size(base)
        if width is None:
            raise ValueError(f"{type(base).__name__} does not say its hidden size")
        return ReftConfig(
            [
                Representation(layer, settings.component, intervention=RedIntervention(width), positions="all")
                for layer in numbers
            ]
        )
    config = ReftConfig(
        method=settings.method,
        layers=layers,
        rank=settings.rank,
        positions=settings.positions,
        tied=settings.tied,
        component=settings.component,
        dropout=settings.dropout,
        orthogonality=settings.orthogonality,
        act_fn=settings.act_fn,
        add_bias=settings.add_bias,
    )
    if not settings.subspaces:
        return config
    if settings.method != "loreft":
        raise ValueError(f"subspaces are of loreft, not of {settings.method}")
    listed = config.expand(len(block_list(base)[1]))
    return ReftConfig([replace(item, intervention_type=SubspaceLoreftIntervention) for item in listed])


def _lora(base: nn.Module, settings: JobSettings, heads: list[str]) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"--method {settings.method} needs the package peft ({error})") from None
    layers = read_layers(settings.layers.replace(",", ";"))
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.lora_modules) or None,
        layers_to_transform=layers if isinstance(layers, list) else None,
        use_dora=settings.method == "dora",
        modules_to_save=heads or None,
        task_type="SEQ_CLS" if settings.task == "classification" else "CAUSAL_LM",
    )
    return peft.get_peft_model(base, config)


def trained_heads(base: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of a classifier's head, in a model with LoRA as well."""
    return [
        parameter
        for name, parameter in base.named_parameters()
        if parameter.requires_grad and any(part in HEADS for part in name.split("."))
    ]
