"""What a ReftModel is as a wrapper of its base model: modes, devices, gradients, checkpointing."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reft_kernels.locations import Places
from reft_kernels.modules import Site, inner_model, module_device
from reft_kernels.recompute import Checkpoints

if TYPE_CHECKING:
    from typing_extensions import Self


class WrappedModel(nn.Module):
    """A base model and the interventions on its sites, moved, frozen and checkpointed together."""

    model: nn.Module
    interventions: nn.ModuleDict
    pyreft_compat: bool
    _sites: Sequence[Site]
    _places: Places
    _checkpoints: Checkpoints

    def train(self, mode: bool = True) -> Self:
        """Train or eval mode of base model and interventions; with ``pyreft_compat`` of the base model alone."""
        if not self.pyreft_compat:
            return super().train(mode)
        self.training = mode
        self.model.train(mode)
        return self

    def disable_model_gradients(self) -> None:
        """Freeze the base model's parameters and put it into eval mode."""
        self.model.requires_grad_(False)
        self.model.eval()

    def enable_model_gradients(self) -> None:
        """Unfreeze the base model's parameters and put it into train mode."""
        self.model.requires_grad_(True)
        self.model.train()

    def set_device(self, device: torch.device | str | None = None, set_model: bool = True) -> None:
        """Move every intervention to the device of the module it edits, the base model first to ``device`` if given.

        A base model that is quantised or spread over devices is never moved, nor is any without ``set_model``.
        """
        base: Any = self.model
        fixed = getattr(base, "hf_device_map", None) or getattr(base, "quantization_method", None)
        if device is not None and set_model and not fixed:
            base.to(device)
        modules = list(self.interventions.values())
        for site, members in zip(self._sites, self._places.sites, strict=True):
            for index in members:
                modules[index].to(module_device(self.model, site.module))

    @property
    def device(self) -> torch.device:
        """Device of the base model's first parameter."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the base model's first floating-point parameter."""
        floats = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floats, torch.float32)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base model takes num_items_in_batch, as transformers' Trainer asks its models."""
        base: Any = inner_model(self.model)
        declared = getattr(base, "accepts_loss_kwargs", None)
        if declared is not None:
            return bool(declared)
        kinds = [parameter.kind for parameter in inspect.signature(base.forward).parameters.values()]
        return inspect.Parameter.VAR_KEYWORD in kinds

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The base model's own (transformers 5), see :meth:`gradient_checkpointing_enable`."""
        base: Any = self.model
        base.activation_checkpointing_enable(*args, **kwargs)
        self._checkpoints.follow()

    def activation_checkpointing_disable(self) -> None:
        """The base model's own (transformers 5)."""
        base: Any = self.model
        base.activation_checkpointing_disable()
        self._checkpoints.release()

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The base model's own: recompute its blocks in the backward, with the edits of their forward.

        Reentrant or not. A reentrant checkpoint around an edit gives it gradients also where the base model is frozen
        and its inputs require none. Blocks checkpointed by other means raise RuntimeError when they are recomputed
        without their edits.
        """
        base: Any = self.model
        base.gradient_checkpointing_enable(*args, **kwargs)
        self._checkpoints.follow()

    def gradient_checkpointing_disable(self) -> None:
        """The base model's own."""
        base: Any = self.model
        base.gradient_checkpointing_disable()
        self._checkpoints.release()
