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
from reft_kernels.positions import get_intervention_locations, parse_positions
from reft_kernels.stiefel_adamw import StiefelAdamW

if TYPE_CHECKING:
    from reft_kernels.compat import patch_pyreft, unpatch_pyreft
    from reft_kernels.config import ReftConfig
    from reft_kernels.model import ReftModel, get_reft_model
    from reft_kernels.task_types import ReftType, TaskType
    from reft_kernels.training import (
        ReftClassificationDataset,
        ReftDataCollator,
        ReftDataset,
        ReftGenerationDataset,
        ReftPreferenceDataset,
        ReftRawDataset,
        ReftRewardCollator,
        ReftRewardDataset,
        ReftSupervisedDataset,
        ReftTrainer,
        ReftTrainerForCausalLM,
        ReftTrainerForCausalLMDistributed,
        ReftTrainerForSequenceClassification,
        as_pretrained_model,
        make_last_position_supervised_chat_data_module,
        make_last_position_supervised_data_module,
        make_multiple_position_supervised_data_module,
        make_supervised_data_module,
    )

__version__ = "0.1.0"

__all__ = [
    "ConsreftIntervention",
    "DireftIntervention",
    "LobireftIntervention",
    "LoreftIntervention",
    "NodireftIntervention",
    "NoreftIntervention",
    "OrthonormalRows",
    "ReftClassificationDataset",
    "ReftConfig",
    "ReftDataCollator",
    "ReftDataset",
    "ReftGenerationDataset",
    "ReftModel",
    "ReftPreferenceDataset",
    "ReftRawDataset",
    "ReftRewardCollator",
    "ReftRewardDataset",
    "ReftSupervisedDataset",
    "ReftTrainer",
    "ReftTrainerForCausalLM",
    "ReftTrainerForCausalLMDistributed",
    "ReftTrainerForSequenceClassification",
    "ReftType",
    "StiefelAdamW",
    "TaskType",
    "as_pretrained_model",
    "available_backends",
    "consreft",
    "direft",
    "edit",
    "explain",
    "get_intervention_locations",
    "get_reft_model",
    "lobireft",
    "loreft",
    "make_last_position_supervised_chat_data_module",
    "make_last_position_supervised_data_module",
    "make_multiple_position_supervised_data_module",
    "make_supervised_data_module",
    "nodireft",
    "noreft",
    "orthonormal_rows",
    "parse_positions",
    "patch_pyreft",
    "set_debug",
    "unpatch_pyreft",
]

# Names whose modules need more than torch: imported when first asked for.
_LAZY = {
    "ReftConfig": "reft_kernels.config",
    "ReftModel": "reft_kernels.model",
    "ReftType": "reft_kernels.task_types",
    "TaskType": "reft_kernels.task_types",
    "get_reft_model": "reft_kernels.model",
    "patch_pyreft": "reft_kernels.compat",
    "unpatch_pyreft": "reft_kernels.compat",
    "ReftClassificationDataset": "reft_kernels.training",
    "ReftDataCollator": "reft_kernels.training",
    "ReftDataset": "reft_kernels.training",
    "ReftGenerationDataset": "reft_kernels.training",
    "ReftPreferenceDataset": "reft_kernels.training",
    "ReftRawDataset": "reft_kernels.training",
    "ReftRewardCollator": "reft_kernels.training",
    "ReftRewardDataset": "reft_kernels.training",
    "ReftSupervisedDataset": "reft_kernels.training",
    "ReftTrainer": "reft_kernels.training",
    "ReftTrainerForCausalLM": "reft_kernels.training",
    "ReftTrainerForCausalLMDistributed": "reft_kernels.training",
    "ReftTrainerForSequenceClassification": "reft_kernels.training",
    "make_last_position_supervised_chat_data_module": "reft_kernels.training",
    "make_last_position_supervised_data_module": "reft_kernels.training",
    "make_multiple_position_supervised_data_module": "reft_kernels.training",
    "as_pretrained_model": "reft_kernels.training",
    "make_supervised_data_module": "reft_kernels.training",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
