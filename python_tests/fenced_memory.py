"""Tensors that end where their pages end, so that a read or write beyond them ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)


def fenced(t: Tensor) -> Tensor:
    """A contiguous copy of a CPU tensor, whose last byte is the last one before a page that nobody may touch."""
    nbytes = t.numel() * t.element_size()
    readable = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, readable + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    if _libc.mprotect(ctypes.c_void_p(address + readable), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    flat = torch.frombuffer(pages, dtype=t.dtype, count=t.numel(), offset=readable - nbytes)
    return flat.view(t.shape).copy_(t)
