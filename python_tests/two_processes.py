"""What the tests of two processes share: a model, its share of a batch, and what one process makes of the whole."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import tiny_model
from torch import Tensor, nn

from reft_kernels.config import ReftConfig
from reft_kernels.model import ReftModel, get_reft_model

WORLD = 2
STEPS = 3
CASES = [
    {"component": component, "reentrant": reentrant}
    for component in ("block_output", "mlp_output")
    for reentrant in (None, False, True)
]


def make(component: str = "block_output", reentrant: bool | None = None) -> ReftModel:
    torch.manual_seed(0)
    config = ReftConfig(method="loreft", layers="all", rank=2, positions="f2+l2", tied=False, component=component)
    reft_model = get_reft_model(tiny_model("llama"), config).train()
    if reentrant is not None:
        reft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return reft_model


def joint_batch() -> Tensor:
    """Token ids of two rows for each process."""
    return torch.randint(3, 40, (2 * WORLD, 6), generator=torch.Generator().manual_seed(1))


def train(
    model: nn.Module, parameters: list[nn.Parameter], ids: Tensor, after_backward: Callable[[], None] | None = None
) -> Tensor:
    """The losses of a few steps."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_trained_alike(found: ReftModel, losses: Tensor, case: dict[str, Any]) -> None:
    """As one process trains on the joint batch; ``losses`` are those of this process."""
    alone = make(case["component"])
    wanted = train(alone, list(alone.interventions.parameters()), joint_batch())
    assert wanted[-1] < wanted[0]
    losses = losses.clone()
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / WORLD, wanted, rtol=1e-5, atol=1e-5, msg=str(case))
    for one, other in zip(found.interventions.parameters(), alone.interventions.parameters(), strict=True):
        torch.testing.assert_close(whole(one.detach()), other.detach(), rtol=1e-4, atol=1e-5, msg=str(case))


def in_processes(work: Callable[..., None], *args: Any) -> None:
    """``work(rank, *args)`` in each process, whose process group is then destroyed."""
    done = torch.multiprocessing.get_context("spawn").Barrier(WORLD)
    torch.multiprocessing.spawn(_together, args=(work, done, args), nprocs=WORLD)


def _together(rank: int, work: Callable[..., None], done: Any, args: tuple[Any, ...]) -> None:
    work(rank, *args)
    # One that leaves early closes its connections while the other may still be in its last collective.
    done.wait(timeout=300)
    if dist.is_initialized():
        dist.destroy_process_group()
    # What is left is the interpreter's own end, in which threads of torch that still run may abort the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def share(rank: int) -> Tensor:
    """A process's rows of the joint batch."""
    return joint_batch()[2 * rank : 2 * rank + 2]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def as_launched(rank: int, port: int) -> None:
    """The environment that torchrun makes for a process."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
