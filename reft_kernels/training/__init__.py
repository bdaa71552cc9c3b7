"""Training on top of transformers: data with edit positions, the Trainers, what people see, accuracy by generation."""

from reft_kernels.training.answers import ANSWER_RULES, AnswerRule, answer_rule, extract_answer
from reft_kernels.training.card import write_card
from reft_kernels.training.causal_lm import ReftTrainerForCausalLM, ReftTrainerForCausalLMDistributed
from reft_kernels.training.checkpoints import last_complete_checkpoint
from reft_kernels.training.choices import ChoicePrediction, answer_choices, evaluate_choices, score_choices
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
from reft_kernels.training.decoding import DECODING, decoding_settings
from reft_kernels.training.evaluate import Accuracy, Prediction, evaluate_accuracy, generate_texts
from reft_kernels.training.frozen_cache import FrozenCache, FrozenCacheStats
from reft_kernels.training.frozen_rows import SuffixCollator
from reft_kernels.training.glue import GLUE_TASKS, GlueDataset, GlueTask, glue_collator, glue_task, train_head
from reft_kernels.training.length_groups import length_grouping
from reft_kernels.training.memorisation import Recital, recite
from reft_kernels.training.metrics import compute_metrics
from reft_kernels.training.orthonormality import Orthonormality
from reft_kernels.training.packing import PackedCollator
from reft_kernels.training.pair_datasets import ReftPreferenceDataset, ReftRewardDataset
from reft_kernels.training.pretrained import as_pretrained_model
from reft_kernels.training.progress import show_progress
from reft_kernels.training.prompts import PROMPT_STYLES, PromptStyle, prompt_and_target, prompt_style
from reft_kernels.training.pyreft_datasets import ReftDataset, ReftRawDataset
from reft_kernels.training.report import write_report
from reft_kernels.training.sources import SkippedRows, read_rows
from reft_kernels.training.splits import Split, glue_split, gsm8k_split, hold_out
from reft_kernels.training.step_graphs import StepGraphs
from reft_kernels.training.streaming import StreamedDataset
from reft_kernels.training.task_datasets import (
    ReftClassificationDataset,
    ReftGenerationDataset,
    ReftSupervisedDataset,
)
from reft_kernels.training.throughput import Throughput
from reft_kernels.training.trainer import ReftTrainer

__all__ = [
    "ANSWER_RULES",
    "DECODING",
    "GLUE_TASKS",
    "PROMPT_STYLES",
    "Accuracy",
    "AnswerRule",
    "ChoicePrediction",
    "Example",
    "FrozenCache",
    "FrozenCacheStats",
    "GlueDataset",
    "GlueTask",
    "Orthonormality",
    "PackedCollator",
    "Prediction",
    "PromptStyle",
    "Recital",
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
    "Split",
    "StepGraphs",
    "StreamedDataset",
    "SuffixCollator",
    "SupervisedCollator",
    "SupervisedDataset",
    "Throughput",
    "answer_choices",
    "answer_rule",
    "as_pretrained_model",
    "build_prompt",
    "compute_metrics",
    "decoding_settings",
    "encode_prompts",
    "evaluate_accuracy",
    "evaluate_choices",
    "extract_answer",
    "generate_texts",
    "glue_collator",
    "glue_split",
    "glue_task",
    "gsm8k_split",
    "hold_out",
    "iterate_examples",
    "last_complete_checkpoint",
    "length_grouping",
    "make_last_position_supervised_chat_data_module",
    "make_last_position_supervised_data_module",
    "make_multiple_position_supervised_data_module",
    "make_supervised_data_module",
    "prompt_and_target",
    "prompt_style",
    "read_examples",
    "read_jsonl",
    "read_rows",
    "recite",
    "score_choices",
    "show_progress",
    "train_head",
    "write_card",
    "write_report",
]
