"""Training on top of transformers: data with edit positions, the Trainers, what people see, accuracy by generation."""

from reft_kernels.training.card import write_card
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
    iterate_examples,
    make_supervised_data_module,
    read_examples,
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
from reft_kernels.training.length_groups import length_grouping
from reft_kernels.training.orthonormality import Orthonormality
from reft_kernels.training.packing import PackedCollator
from reft_kernels.training.pair_datasets import ReftPreferenceDataset, ReftRewardDataset
from reft_kernels.training.pretrained import as_pretrained_model
from reft_kernels.training.progress import show_progress
from reft_kernels.training.pyreft_datasets import ReftDataset, ReftRawDataset
from reft_kernels.training.report import write_report
from reft_kernels.training.sources import SkippedRows, read_rows
from reft_kernels.training.streaming import StreamedDataset
from reft_kernels.training.task_datasets import (
    ReftClassificationDataset,
    ReftGenerationDataset,
    ReftSupervisedDataset,
)
from reft_kernels.training.throughput import Throughput
from reft_kernels.training.trainer import ReftTrainer

__all__ = [
    "Accuracy",
    "Example",
    "Orthonormality",
    "PackedCollator",
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
    "SkippedRows",
    "StreamedDataset",
    "SupervisedCollator",
    "SupervisedDataset",
    "Throughput",
    "as_pretrained_model",
    "build_prompt",
    "encode_prompts",
    "evaluate_accuracy",
    "extract_answer",
    "generate_texts",
    "iterate_examples",
    "last_complete_checkpoint",
    "length_grouping",
    "make_last_position_supervised_chat_data_module",
    "make_last_position_supervised_data_module",
    "make_multiple_position_supervised_data_module",
    "make_supervised_data_module",
    "read_examples",
    "read_jsonl",
    "read_rows",
    "show_progress",
    "write_card",
    "write_report",
]
