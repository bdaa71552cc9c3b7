"""The processes that torchrun or accelerate launch started for one job; one alone where nothing launched it.

Each reads the data and the model, and trains on its share of every batch. The first alone writes, prints and logs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from reft_kernels.jobs.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def launched() -> int:
    """How many processes the launcher started, by the environment that it made; nothing is imported."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def says_errors() -> bool:
    """Whether this process prints what is wrong: the first one, and as long as they have not been joined, the first
    one of each machine."""
    return is_first() or (count() == 1 and _local_rank() == 0)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def start(device: str) -> None:
    """Joins the processes of the launcher, by gloo for the device "cpu" and by what fits the accelerator otherwise."""
    if launched() > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")


def finish() -> None:
    """Waits for the others and leaves them: one that left early would close connections that they still use."""
    if count() > 1:
        from accelerate import PartialState

        state = PartialState()
        state.wait_for_everyone()
        state.destroy_process_group()


def score_all(items: Sequence[T], score: Callable[[list[T]], Sequence[R]], **_how: Any) -> list[R]:
    """As `share` where no process has a model of its own: all score all items together."""
    return list(score(list(items)))


@contextmanager
def lost_ones() -> Iterator[None]:
    """Says in one sentence that another process has ended, where gloo says it with a connection."""
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or "by peer" not in str(error):
            raise
        ended = UserError("another process of this job has ended")
        ended.known = True
        raise ended from error


def count() -> int:
    """How many processes have been joined."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_cpu() -> bool:
    """Whether `accelerate launch --cpu` asked for the CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def local_gpu() -> str:
    """The GPU of this process: the one of its number on its machine. Raises UserError where the machine has fewer."""
    import torch

    if launched() == 1:
        return "cuda"
    here, visible = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > visible:
        raise UserError(
            f"the launcher started {here} processes on a machine with {visible} GPUs: start one for each, "
            "or give --device cpu"
        )
    return f"cuda:{_local_rank()}"


def gather(value: T) -> list[T]:
    """The value that each process has, in their order, in all of them."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    found: list[T] = gather_object([value])
    return found


@contextmanager
def together() -> Iterator[None]:
    """All processes come to the end of the block, or all raise: each its own error, the others a UserError with that of
    the lowest number. None waits for one that has failed."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:  # told to the others first
        failed = error
    for index, message in enumerate(gather(None if failed is None else _words(failed))):
        if message is not None and failed is None:
            failed = UserError(f"process {index}: {message}")
    if isinstance(failed, UserError):
        failed.everywhere = failed.known = True
    if failed is not None:
        raise failed


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def share(
    items: Sequence[T],
    score: Callable[[list[T]], Sequence[R]],
    *,
    lengths: Callable[[], Sequence[int]] | None = None,
    block: int = 1,
) -> list[R]:
    """`score(items)`, one result for each item in their order, in all processes, each of which scores a part.

    Args:
        score: gives a result for each item of a part.
        lengths: of the items; they are then dealt from the longest to the shortest.
        block: how many of them a process gets at once. Where `score` itself makes batches of so many, the longest
            first, they are those of one process.
    """
    n = count()
    if n == 1:
        return list(score(list(items)))
    import torch.distributed as dist

    order = list(range(len(items)))
    if lengths is not None:
        sizes = lengths()
        order.sort(key=lambda index: -sizes[index])
    parts = [[k for place, k in enumerate(order) if place // block % n == rank] for rank in range(n)]
    mine = [items[k] for k in parts[dist.get_rank()]]
    found: list[R] = []
    with together():
        found = list(score(mine)) if mine else []
    joined: list[Any] = [None] * len(items)
    for part, results in zip(parts, gather(found), strict=True):
        for k, result in zip(part, results, strict=True):
            joined[k] = result
    return joined
