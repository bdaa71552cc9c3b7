"""What a call makes the machine do: ATen operations, kernels on the GPU, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

Call = Callable[[], object]


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def aten_calls(call: Call) -> int:
    """How many ATen operations a call dispatches, views not counted; a kernel of this package's is none."""
    with _Counter() as counter:
        call()
    return counter.count


def kernel_names(call: Call) -> list[str]:
    """Names of what a call runs on the current CUDA device, in order: kernels, copies ("Memcpy ...") and "Memset ...".

    The call is made once before, so that what is compiled or made at the first call does not count.
    """
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.events() or [] if event.device_type == DeviceType.CUDA]
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]


def peak_mib(call: Call) -> float:
    """MiB of CUDA memory that a call holds at its peak, beyond what was held before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / 2**20
