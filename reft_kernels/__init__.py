"""Fused low-rank edits of hidden states (ReFT) for PyTorch: functions, modules and their injection into models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from reft_kernels.debug import set_debug
from reft_kernels.functional import (
    available_backends,
    consreft,
    direft,
    edit,
    explain,
    lobireft,
    loreft,
    nodireft,
    noreft,
)
from reft_kernels.interventions import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    NodireftIntervention,
    NoreftIntervention,
)
from reft_kernels.orthogonal import OrthonormalRows, orthonormal_rows
from reft_kernels.stiefel_adamw import StiefelAdamW

if TYPE_CHECKING:
    from reft_kernels.config import ReftConfig
    from reft_kernels.model import ReftModel, get_reft_model
    from reft_kernels.training import ReftTrainerForCausalLM, as_pretrained_model, make_supervised_data_module

__version__ = "0.1.0"

__all__ = [
    "ConsreftIntervention",
    "DireftIntervention",
    "LobireftIntervention",
    "LoreftIntervention",
    "NodireftIntervention",
    "NoreftIntervention",
    "OrthonormalRows",
    "ReftConfig",
    "ReftModel",
    "ReftTrainerForCausalLM",
    "StiefelAdamW",
    "as_pretrained_model",
    "available_backends",
    "consreft",
    "direft",
    "edit",
    "explain",
    "get_reft_model",
    "lobireft",
    "loreft",
    "make_supervised_data_module",
    "nodireft",
    "noreft",
    "orthonormal_rows",
    "set_debug",
]

# Names whose modules need more than torch: imported when first asked for.
_LAZY = {
    "ReftConfig": "reft_kernels.config",
    "ReftModel": "reft_kernels.model",
    "get_reft_model": "reft_kernels.model",
    "ReftTrainerForCausalLM": "reft_kernels.training",
    "as_pretrained_model": "reft_kernels.training",
    "make_supervised_data_module": "reft_kernels.training",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
