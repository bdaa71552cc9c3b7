"""A ReftModel as the PreTrainedModel that it edits, for trainers that take nothing else (TRL's)."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from reft_kernels.model import ReftModel
from reft_kernels.training.checkpoints import save_beside

_WHERE = ("unit_locations", "intervention_locations", "positions", "subspaces")
_WEIGHTS_FILE = "model.safetensors"


def as_pretrained_model(reft_model: ReftModel) -> Any:
    """The ReftModel in the form of its base model: an object of the base model's class whose calls are edited.

    For trainers that look into the model, replace its ``forward`` or ask whether it is a PreTrainedModel, such as
    TRL's SFTTrainer and DPOTrainer. Nothing is copied: it has the base model's modules and, as ``interventions``,
    the ReftModel's. The base model itself stays as it is and is the unedited reference:

        DPOTrainer(model=as_pretrained_model(reft_model), ref_model=reft_model.model, ...)

    - A call is edited at the positions of the config, or of the keywords unit_locations, intervention_locations and
      positions; ``generate`` is the ReftModel's.
    - ``save_pretrained`` writes the adapter, as ``ReftModel.save`` does, and beside it ``model.safetensors`` with the
      trained parameters alone, from which a Trainer resumes and loads its best model.
    - Within ``reft_model.disable_edits()``, and PEFT's ``disable_adapter()`` where the base model has LoRA too, it is
      the base model.

    Raises TypeError where ``reft_model`` is no ReftModel.
    """
    if not isinstance(reft_model, ReftModel):
        raise TypeError(f"reft_model must be a ReftModel, got {type(reft_model).__name__}")
    base = reft_model.model
    kind: Any = type(base)
    members = {"__module__": __name__, "forward": _edited_forward(kind.forward)}
    view: Any = object.__new__(type(kind.__name__, (_EditedModel, kind), members))
    own = {
        name: copy.copy(value) for name, value in vars(base).items() if name.endswith("_hooks") or name == "_modules"
    }
    view.__dict__.update({**vars(base), **own})
    view._modules["interventions"] = reft_model.interventions
    view.__dict__["_reft_model"] = reft_model  # no submodule: its modules are here already
    # Trainer refuses to train a quantised model that has no adapter of PEFT.
    view.__dict__["is_quantized"] = False
    return view


class _EditedModel(nn.Module):
    """What ``as_pretrained_model`` puts before the class of the base model."""

    _reft_model: ReftModel

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Also where a trainer put a forward of its own that calls the model's parts.
        return _edited_call(super().__call__, self, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self._reft_model.model
        if isinstance(value, nn.Module) and name in base._modules:  # a head of another size, for example
            setattr(base, name, value)
        super().__setattr__(name, value)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As ReftModel's; positional arguments as the base model's."""
        base: Any = self._reft_model.model
        return self._reft_model.generate(**dict(zip(_parameters(type(base).generate), args, strict=False)), **kwargs)

    def train(self, mode: bool = True) -> Any:
        """Sets the ReftModel and its base model too, whose children are this one's."""
        self._reft_model.training = self._reft_model.model.training = mode
        return super().train(mode)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapter and the trained parameters, see :func:`as_pretrained_model`; ``kwargs`` have no effect."""
        if not is_main_process:
            return
        folder = Path(save_directory)
        save_beside(self._reft_model, folder)
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        state = self.state_dict() if state_dict is None else state_dict
        kept = {
            name: value.detach().contiguous().clone()
            for name, value in state.items()
            if name in trained or name.startswith("interventions.")
        }
        staging = folder / f".{_WEIGHTS_FILE}.{secrets.token_hex(8)}"
        try:
            save_file(kept, staging, metadata={"format": "pt"})
            os.replace(staging, folder / _WEIGHTS_FILE)
        finally:
            staging.unlink(missing_ok=True)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """PEFT's, where the base model is one of its models; the edits are off too."""
        base: Any = super()
        with base.disable_adapter(), self._reft_model.disable_edits():
            yield

    def add_adapter(self, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """PEFT's, but for the adapter that TRL adds as the reference of a preference loss."""
        base: Any = super()
        if adapter_name == "ref":
            raise ValueError(
                "an adapter as the reference would have the edits too: pass the trainer a ref_model, another instance "
                "of the base model"
            )
        return base.add_adapter(adapter_name, *args, **kwargs)


def _edited_forward(forward: Any) -> Any:
    """The method of the base model's class, edited also where it is called directly, as PEFT does."""

    @functools.wraps(forward)
    def edited(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _edited_call(functools.partial(forward, self), self, args, kwargs)

    return edited


def _edited_call(call: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    reft_model: ReftModel = model._reft_model
    if reft_model.is_editing():
        return call(*args, **kwargs)
    where = {name: kwargs.pop(name) for name in _WHERE if name in kwargs}
    named = dict(zip(_parameters(type(model).forward), args, strict=False)) if args else {}
    with reft_model.edited({**named, **kwargs}, **where):
        return call(*args, **kwargs)


def _parameters(function: Any) -> list[str]:
    """Names of a method's parameters, without self."""
    return list(inspect.signature(function).parameters)[1:]
