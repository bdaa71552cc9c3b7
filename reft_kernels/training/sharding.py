"""Checkpoints of models whose parameters are sharded over processes (FSDP2): the same files as of one process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reft_kernels.model import ReftModel
from reft_kernels.training.checkpoints import save_beside


def save_together(model: ReftModel, folder: Path, *, writes: bool) -> None:
    """`save_beside` in one process, with the others' parts of each parameter; all processes call this.

    Args:
        writes: this is the process that writes. (The others go through the same steps in a folder of their own, since
            every process takes part in the making of each whole tensor.)
    """
    if writes:
        save_beside(model, folder)
        return
    with tempfile.TemporaryDirectory() as elsewhere:
        save_beside(model, Path(elsewhere) / "adapter")


def save_optimizer(trainer: Any, folder: str) -> None:
    """The optimizer's state, made whole, and the scheduler's. (Trainer would write the base model as well.)"""
    from accelerate.utils import save_fsdp_optimizer
    from transformers.trainer import SCHEDULER_NAME

    accelerator = trainer.accelerator
    save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, trainer.optimizer, trainer.model, folder)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), Path(folder) / SCHEDULER_NAME)


def taking_whole_tensors(sharded: bool) -> AbstractContextManager[Any]:
    """Within this context each process puts its part of a whole tensor, which all have, into a sharded parameter."""
    if not sharded:
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


@contextmanager
def whole_outside_of_blocks(model: nn.Module) -> Iterator[None]:
    """Within this context the base model of a sharded ReftModel may be called by itself, as `generate` does: the
    parameters outside of its blocks are whole. Its blocks put themselves together whenever they are called."""
    unshard, reshard = getattr(model, "unshard", None), getattr(model, "reshard", None)
    if unshard is None or reshard is None:
        yield
        return
    unshard()
    try:
        yield
    finally:
        reshard()
