"""The options of `train`, and the TrainingArguments they stand for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reft_kernels.cli.common import (
    add_data_arguments,
    add_model_arguments,
    add_template_argument,
    at_least,
)
from reft_kernels.interventions import METHODS
from reft_kernels.reference import ACTIVATIONS
from reft_kernels.stiefel import ORTHOGONALITIES

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `train`."""
    add_model_arguments(parser, needs_model=True)

    data = add_data_arguments(parser, split="train")
    data.add_argument(
        "--max-length",
        type=at_least(2),
        default=512,
        metavar="N",
        help="longest prompt and output, in tokens",
    )
    add_template_argument(data)

    method = parser.add_argument_group("method")
    add = method.add_argument
    add(
        "--method",
        choices=tuple(METHODS),
        default="loreft",
        help="what an edit computes (the paper's DiReFT is nodireft)",
    )
    add("--rank", type=at_least(1), default=8, metavar="R", help="rank of an edit")
    add("--layers", default="all", metavar="LIST", help='"all", or layer numbers such as "0;5;10"')
    add(
        "--positions",
        default="f7+l7",
        metavar="TEXT",
        help='prompt tokens to edit: "f7+l7" is the first and the last seven; "f3", "l1" and "all" work too',
    )
    add(
        "--tied",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one edit a layer for both ends of the prompt; with --no-tied each end has its own",
    )
    add("--component", default="block_output", metavar="NAME", help="what is edited in a layer")
    add("--dropout", type=at_least(0.0, float), default=0.0, metavar="P", help="on the edited row")
    add("--act-fn", choices=ACTIVATIONS, help="activation of the learned source (default: linear)")
    add(
        "--orthogonality",
        choices=tuple(ORTHOGONALITIES),
        help="how R's rows are kept orthonormal: householder (the default: as pyreft), polar (R is the parameter, the "
        "optimiser keeps it), or none",
    )
    add("--add-bias", action="store_true", help="a bias in the projection of noreft and nodireft")

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--epochs", type=at_least(0.0, float), default=3.0, metavar="N", help="passes over the data")
    add(
        "--max-steps",
        type=at_least(1),
        metavar="N",
        help="stop after N optimiser steps, whatever --epochs says",
    )
    add("--batch-size", type=at_least(1), default=8, metavar="N", help="examples a batch")
    add("--accumulation", type=at_least(1), default=1, metavar="N", help="batches an optimiser step")
    add("--lr", type=at_least(0.0, float), default=9e-4, metavar="X", help="peak learning rate of AdamW")
    add("--scheduler", choices=SCHEDULERS, default="linear", help="of the learning rate")
    add(
        "--warmup",
        type=at_least(0.0, float),
        default=0.1,
        metavar="N",
        help="below 1 a fraction of all steps, else a number of steps",
    )
    add(
        "--weight-decay",
        type=at_least(0.0, float),
        default=0.0,
        metavar="X",
        help="on the learned matrices, not on R",
    )
    add(
        "--max-grad-norm",
        type=at_least(0.0, float),
        default=1.0,
        metavar="X",
        help="gradient clipping; 0 is none",
    )
    add("--seed", type=at_least(0), default=42, metavar="N", help="of initial weights, data order and dropout")

    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--output", required=True, metavar="FOLDER", help="for the adapter, train_log.json and checkpoints")
    add(
        "--save-steps",
        type=at_least(0),
        default=500,
        metavar="N",
        help="write a checkpoint every N steps; 0 is never",
    )
    add(
        "--keep-checkpoints",
        type=at_least(1),
        default=2,
        metavar="N",
        help="delete older ones than the last N",
    )
    add("--log-steps", type=at_least(1), default=10, metavar="N", help="log the loss every N steps")
    add("--no-progress", action="store_true", help="lines instead of a progress bar")
    when_used = output.add_mutually_exclusive_group()
    when_used.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    when_used.add_argument("--overwrite", action="store_true", help="remove an earlier run from the output folder")


def training_arguments(arguments: argparse.Namespace, folder: Path, device: str) -> Any:
    """The Trainer's TrainingArguments for these arguments."""
    from transformers import TrainingArguments

    options: dict[str, Any] = {}
    # transformers 5 takes a fraction as warmup_steps; 4.57 has a name of its own for it.
    if arguments.warmup < 1 and "warmup_ratio" in TrainingArguments.__dataclass_fields__:
        options["warmup_ratio"] = arguments.warmup
    else:
        options["warmup_steps"] = arguments.warmup if arguments.warmup < 1 else int(arguments.warmup)
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=arguments.epochs,
        max_steps=arguments.max_steps or -1,
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.accumulation,
        learning_rate=arguments.lr,
        lr_scheduler_type=arguments.scheduler,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        seed=arguments.seed,
        save_strategy="steps" if arguments.save_steps else "no",
        save_steps=arguments.save_steps or 500,
        save_total_limit=arguments.keep_checkpoints,
        logging_steps=arguments.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=arguments.no_progress,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        report_to="none",
        **options,
    )
