"""Training on top of transformers: data with edit positions, the Trainer, and accuracy by generation."""

from reft_kernels.training.data import (
    Example,
    SupervisedCollator,
    SupervisedDataset,
    build_prompt,
    encode_prompts,
    make_supervised_data_module,
    read_jsonl,
)
from reft_kernels.training.evaluate import (
    Accuracy,
    Prediction,
    evaluate_accuracy,
    extract_answer,
    generate_texts,
)
from reft_kernels.training.pretrained import as_pretrained_model
from reft_kernels.training.trainer import ReftTrainerForCausalLM, last_complete_checkpoint

__all__ = [
    "Accuracy",
    "Example",
    "Prediction",
    "ReftTrainerForCausalLM",
    "SupervisedCollator",
    "SupervisedDataset",
    "as_pretrained_model",
    "build_prompt",
    "encode_prompts",
    "evaluate_accuracy",
    "extract_answer",
    "generate_texts",
    "last_complete_checkpoint",
    "make_supervised_data_module",
    "read_jsonl",
]
