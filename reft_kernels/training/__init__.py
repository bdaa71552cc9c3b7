"""Training on top of transformers: data with edit positions, the Trainers, and accuracy by generation."""

from reft_kernels.training.causal_lm import ReftTrainerForCausalLM, ReftTrainerForCausalLMDistributed
from reft_kernels.training.checkpoints import last_complete_checkpoint
from reft_kernels.training.classification import ReftTrainerForSequenceClassification
from reft_kernels.training.collators import ReftDataCollator, ReftRewardCollator
from reft_kernels.training.data import (
    Example,
    SupervisedCollator,
    SupervisedDataset,
    build_prompt,
    encode_prompts,
    make_supervised_data_module,
    read_jsonl,
)
from reft_kernels.training.data_modules import (
    make_last_position_supervised_chat_data_module,
    make_last_position_supervised_data_module,
    make_multiple_position_supervised_data_module,
)
from reft_kernels.training.evaluate import (
    Accuracy,
    Prediction,
    evaluate_accuracy,
    extract_answer,
    generate_texts,
)
from reft_kernels.training.frozen_cache import FrozenCache, FrozenCacheStats
from reft_kernels.training.frozen_rows import SuffixCollator
from reft_kernels.training.pair_datasets import ReftPreferenceDataset, ReftRewardDataset
from reft_kernels.training.pretrained import as_pretrained_model
from reft_kernels.training.pyreft_datasets import ReftDataset, ReftRawDataset
from reft_kernels.training.task_datasets import (
    ReftClassificationDataset,
    ReftGenerationDataset,
    ReftSupervisedDataset,
)
from reft_kernels.training.trainer import ReftTrainer

__all__ = [
    "Accuracy",
    "Example",
    "FrozenCache",
    "FrozenCacheStats",
    "Prediction",
    "ReftClassificationDataset",
    "ReftDataCollator",
    "ReftDataset",
    "ReftGenerationDataset",
    "ReftPreferenceDataset",
    "ReftRawDataset",
    "ReftRewardCollator",
    "ReftRewardDataset",
    "ReftSupervisedDataset",
    "ReftTrainer",
    "ReftTrainerForCausalLM",
    "ReftTrainerForCausalLMDistributed",
    "ReftTrainerForSequenceClassification",
    "SuffixCollator",
    "SupervisedCollator",
    "SupervisedDataset",
    "as_pretrained_model",
    "build_prompt",
    "encode_prompts",
    "evaluate_accuracy",
    "extract_answer",
    "generate_texts",
    "last_complete_checkpoint",
    "make_last_position_supervised_chat_data_module",
    "make_last_position_supervised_data_module",
    "make_multiple_position_supervised_data_module",
    "make_supervised_data_module",
    "read_jsonl",
]
