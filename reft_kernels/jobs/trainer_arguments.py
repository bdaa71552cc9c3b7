"""A job's settings as transformers' TrainingArguments."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_kernels.jobs import processes
from reft_kernels.recipes.settings import JobSettings


@dataclass(frozen=True)
class RunOptions:
    """Where a job runs, and what it writes and shows. Nothing here changes what is computed."""

    model: str
    output: Path
    dtype: str = "auto"
    device: str = "auto"
    save_steps: int = 500
    keep_checkpoints: int = 2
    log_steps: int = 10
    report_to: tuple[str, ...] = ()
    progress: bool = True
    report: bool = True
    cache_folder: Path | None = None
    resume: bool = False
    overwrite: bool = False


def training_arguments(
    settings: JobSettings,
    options: RunOptions,
    device: str,
    *,
    best: tuple[str, bool] | None,
    evaluates: bool,
    blocks: str,
) -> Any:
    """The Trainer's TrainingArguments.

    Args:
        best: the metric that the best epoch is chosen by, and whether more of it is better.
        evaluates: there are held-out rows, looked at after every epoch.
        blocks: the name of the class of the base model's blocks, each of which is sharded by itself; of use with
            `shard` alone.
    """
    from transformers import TrainingArguments

    from reft_kernels.training.length_groups import length_grouping

    more: dict[str, Any] = {}
    # transformers 5 takes a fraction as warmup_steps; 4.57 has a name of its own for it.
    if settings.warmup < 1 and "warmup_ratio" in TrainingArguments.__dataclass_fields__:
        more["warmup_ratio"] = settings.warmup
    else:
        more["warmup_steps"] = settings.warmup if settings.warmup < 1 else int(settings.warmup)
    if settings.group_by_length:
        more |= length_grouping()
    if settings.gradient_checkpointing:
        name = "activation_checkpointing"  # as transformers 5 calls it
        more[name if name in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"] = True
    if settings.compile != "none":
        more |= {"torch_compile": True, "torch_compile_mode": settings.compile}
    if settings.shard:
        more |= _sharding(blocks)
    if settings.tensor_parallel:
        from accelerate import ParallelismConfig

        more["parallelism_config"] = ParallelismConfig(tp_size=processes.count())
    if best is not None:
        more |= {"load_best_model_at_end": True, "metric_for_best_model": best[0], "greater_is_better": best[1]}
    by_epoch = best is not None
    return TrainingArguments(
        output_dir=str(options.output),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.scheduler,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        eval_strategy="epoch" if evaluates else "no",
        save_strategy="epoch" if by_epoch else "steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        save_total_limit=options.keep_checkpoints,
        logging_steps=options.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=not options.progress,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        ddp_find_unused_parameters=False,
        report_to=list(options.report_to) or "none",
        **more,
    )


def _sharding(blocks: str) -> dict[str, Any]:
    from transformers import TrainingArguments

    # transformers 5 takes True; 4.57 has words for what its config says too, and does not hand on which FSDP it is,
    # which accelerate then reads from the environment, as its launcher writes it.
    is_flag = hasattr(TrainingArguments, "_apply_legacy_fsdp_to_config")
    if not is_flag:
        os.environ |= {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    return {
        "fsdp": True if is_flag else "full_shard auto_wrap",
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": [blocks],
            "state_dict_type": "FULL_STATE_DICT",
        },
    }
