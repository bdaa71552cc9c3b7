"""The methods of pyvene's ``IntervenableModel`` that scripts call on a ReftModel and that are about its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from reft_kernels.wrapped_model import WrappedModel


@dataclass
class ReftModelOutput:
    """What a ReftModel returns for ``return_dict=True`` (pyvene ``IntervenableModelOutput``)."""

    original_outputs: Any = None
    intervened_outputs: Any = None
    collected_activations: Any = None


class PyveneMethods(WrappedModel):
    """Counting, listing and freezing of what is trained."""

    keys: list[str]
    use_fast: bool = False

    @property
    def sorted_keys(self) -> list[str]:
        """The keys of ``interventions``, in the order of ``unit_locations``."""
        return list(self.keys)

    @property
    def model_config(self) -> Any:
        """The base model's config, or None."""
        return getattr(self.model, "config", None)

    def get_device(self) -> torch.device:
        """Device of the base model's first parameter."""
        return self.device

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters of the interventions and the trained ones of the base model."""
        return [parameter for _, parameter in self.trained_parameters()]

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters of the interventions, and the trained ones of the base model, under pyvene's names."""
        ours = list(self.interventions.named_parameters())
        base = [(f"model.{name}", p) for name, p in self.model.named_parameters() if p.requires_grad]
        return ours + base

    def set_zero_grad(self) -> None:
        """Drop the gradients of the interventions."""
        self.interventions.zero_grad()

    def disable_intervention_gradients(self) -> None:
        """Freeze the interventions. (pyvene's does nothing.)"""
        self.interventions.requires_grad_(False)

    def count_parameters(self, include_model: bool = False) -> int:
        """Number of trainable parameters of the interventions, and of the base model where asked for."""
        parts: list[nn.Module] = [self.interventions, *([self.model] if include_model else [])]
        return sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of the interventions and of the base model (pyreft's words)."""
        ours = self.count_parameters()
        base = self.count_parameters(include_model=True) - ours
        total = sum(p.numel() for p in self.model.parameters())
        print(
            f"trainable intervention params: {ours:,d} || trainable model params: {base:,d}\n"
            f"model params: {total:,d} || trainable%: {100 * (ours + base) / max(total, 1)}"
        )
