"""Small tables of int64 in device memory (pointers, sizes, offsets), made once for the same values.

A table in the cache was copied on the stream that asks for it. While a stream is captured into a CUDA graph a table
that is there already is used, and then kept for good, as the graph reads it at every replay; one that is not is written
by kernels of the graph itself.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

CAPACITY = 256  # tables; those of captured launches do not count

_Key = tuple[torch.device, int, tuple[int, ...]]
_tables: OrderedDict[_Key, Tensor] = OrderedDict()
_captured: dict[_Key, Tensor] = {}
_lock = threading.Lock()


def device_table(values: Sequence[int], device: torch.device) -> Tensor:
    """The values as int64 [len(values)] on a device, not to be written to; no host synchronisation."""
    contents = tuple(values)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _for_graph(device, contents)
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0, contents)
    with _lock:
        table = _tables.get(key)
        if table is None:
            table = _copied(contents, device)
            _tables[key] = table
            if len(_tables) > CAPACITY:
                _tables.popitem(last=False)
        else:
            _tables.move_to_end(key)
    return table


def _copied(contents: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(contents, dtype=torch.int64, device=device)
    pinned = torch.tensor(contents, dtype=torch.int64, pin_memory=True)
    return pinned.to(device, non_blocking=True)


def _for_graph(device: torch.device, contents: tuple[int, ...]) -> Tensor:
    with _lock:
        for key, table in (*_captured.items(), *_tables.items()):
            if key[0] == device and key[2] == contents:
                _captured[key] = table
                return table
    return written(contents, device)


def written(contents: tuple[int, ...], device: torch.device) -> Tensor:
    """A new table whose values are arguments of the kernels that write it, so that no host memory is read."""
    table = torch.zeros(len(contents), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), list(contents))
    return table
