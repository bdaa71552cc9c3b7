"""Words of device memory for the kernels' grid barriers.

A barrier leaves its word as it found it but for the top bit, so that a word is zeroed once, before it is first used.
Launches that may overlap must not share one: every stream has its own, and every launch in a CUDA graph, as graphs are
replayed in any order and on any stream.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

WORDS = 65536
SECTOR = 8  # int32 in a sector of cache


class Bank:
    """``WORDS`` zeroed words, each in a sector of cache of its own, given out one by one and never taken back."""

    def __init__(self, device: torch.device) -> None:
        # By a thread of its own: this one may be allocating from the pool of a CUDA graph, which owns what is in it.
        with ThreadPoolExecutor(max_workers=1) as thread:
            self._memory = thread.submit(_zeros, device).result()
        self._given = 0
        self._of_stream: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def take(self) -> Tensor | None:
        """A word [1] that nobody else has; None when all are given out."""
        with self._lock:
            if self._given == WORDS:
                return None
            self._given += 1
            return self._memory[(self._given - 1) * SECTOR :][:1]

    def of_stream(self, stream: int) -> Tensor:
        """The word of a stream, by its handle."""
        word = self._of_stream.get(stream)
        if word is None:
            word = self.take()
            if word is None:
                word = Bank(self._memory.device).of_stream(stream)
            self._of_stream[stream] = word
        return word


_banks: dict[torch.device, Bank] = {}
_banks_lock = threading.Lock()


def bank(device: torch.device) -> Bank:
    """The bank of a device."""
    with _banks_lock:
        if device not in _banks:
            _banks[device] = Bank(device)
        return _banks[device]


_shared: dict[torch.device, Tensor] = {}


@contextlib.contextmanager
def shared_by_captures(device: torch.device) -> Iterator[None]:
    """While active every launch that is captured gets one and the same word.

    For who captures many graphs and replays them one after the other, on one stream: words are never taken back.
    """
    word = bank(device).take()
    if word is not None:
        _shared[device] = word
    try:
        yield
    finally:
        _shared.pop(device, None)


def barrier_word(device: torch.device) -> Tensor:
    """int32 [1], at rest, for the next launch on the current stream of ``device``."""
    if not torch.cuda.is_current_stream_capturing():
        return bank(device).of_stream(torch.cuda.current_stream(device).cuda_stream)
    if device in _shared:
        return _shared[device]
    # A bank cannot be made while capturing. The graph then zeroes a word of its own at every replay.
    word = _banks[device].take() if device in _banks else None
    return torch.zeros(1, dtype=torch.int32, device=device) if word is None else word


def barrier_word_beside(tensor: Tensor) -> Tensor | None:
    """:func:`barrier_word` of the device of ``tensor``; None where it is not a GPU."""
    if not tensor.is_cuda:
        return None
    with torch.cuda.device(tensor.device):  # whether a graph is being captured is asked of the current one
        return barrier_word(tensor.device)


def _zeros(device: torch.device) -> Tensor:
    words = torch.zeros(WORDS * SECTOR, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return words
