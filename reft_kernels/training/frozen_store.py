"""Where the frozen states of examples are kept: in memory, in pinned host memory or on disk, within a budget."""

from __future__ import annotations

import os
import secrets
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reft_kernels.tensor_files import read_safetensors, write_json, write_safetensors

PLACES = ("memory", "pinned", "disk")
_SLAB = 2**26
_ALIGNED = 64
_KIND = ".safetensors"


class Entry(NamedTuple):
    """What never changes of one example, whose first edited token is t0.

    ``keys`` and ``values`` [L, H, t0, D] are those of the L blocks after the first edit; ``hidden`` [S - t0, d] is what
    enters these blocks from t0 on (before the first edit), or [0, d] where that is the embedding.
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the three."""
        return sum(t.numel() * t.element_size() for t in self)


class Store:
    """Entries by key, none of which is ever dropped: those that come when the budget is used up are not kept.

    (An order of dropping, such as the least recently used first, would drop each one just before its next use, since
    every epoch comes to all of them.)

    Args:
        budget: bytes; None for no limit.
    """

    def __init__(self, budget: int | None) -> None:
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
            raise ValueError(f"budget must be a number of bytes of at least 0, or None, got {budget!r}")
        self.budget = budget
        self.bytes = 0
        self.full = False

    def use(self, fingerprint: str, about: dict[str, Any]) -> None:
        """From now on entries are those of the model with this fingerprint; ``about`` says in words which it is."""
        raise NotImplementedError

    def get(self, key: str) -> Entry | None:
        """The entry of a key, where it is kept."""
        raise NotImplementedError

    def put(self, key: str, entry: Entry) -> bool:
        """Keep an entry, if there is room; whether it is kept."""
        if self._has(key):
            return True
        if self.full:
            return False
        if self.budget is not None and self.bytes + entry.nbytes > self.budget:
            self._stop(f"the budget of {self.budget:,} bytes is used up ({self.bytes:,} bytes are kept)")
            return False
        try:
            self._keep(key, entry)
        except OSError as error:
            self._stop(f"an entry cannot be written ({error})")
            return False
        self.bytes += entry.nbytes
        return True

    def _has(self, key: str) -> bool:
        raise NotImplementedError

    def _keep(self, key: str, entry: Entry) -> None:
        raise NotImplementedError

    def _stop(self, reason: str) -> None:
        self.full = True
        warnings.warn(
            f"frozen_cache: {reason}; the states of further examples are computed at every epoch, without gradient",
            stacklevel=4,
        )


class MemoryStore(Store):
    """Entries on the device where they were computed, or (pinned) in page-locked host memory, from which a GPU copies
    them without making the host wait."""

    def __init__(self, budget: int | None, pinned: bool = False) -> None:
        super().__init__(budget)
        if pinned and not torch.cuda.is_available():
            raise ValueError("place 'pinned' needs a CUDA device; without one 'memory' is host memory")
        self.pinned = pinned
        self._entries: dict[str, Entry] = {}
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._fingerprint: str | None = None

    def use(self, fingerprint: str, about: dict[str, Any]) -> None:
        """See Store; the entries of another fingerprint are dropped."""
        del about
        if fingerprint != self._fingerprint:
            self._entries.clear()
            self._slab = self._slab[:0]
            self.bytes, self.full, self._fingerprint = 0, False, fingerprint

    def get(self, key: str) -> Entry | None:
        """See Store."""
        return self._entries.get(key)

    def _has(self, key: str) -> bool:
        return key in self._entries

    def _keep(self, key: str, entry: Entry) -> None:
        # Copies: a part of a batch's tensors would keep the whole of them.
        self._entries[key] = Entry(*(self._pinned(t) if self.pinned else t.clone() for t in entry))

    def _pinned(self, tensor: Tensor) -> Tensor:
        """A copy in a slab: allocated one by one, page-locked tensors are rounded up to powers of two."""
        size = tensor.numel() * tensor.element_size()
        taken = -(-size // _ALIGNED) * _ALIGNED
        if taken > len(self._slab):
            self._slab = torch.empty(max(taken, _SLAB), dtype=torch.uint8, pin_memory=True)
        part, self._slab = self._slab[:size], self._slab[taken:]
        return part.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class DiskStore(Store):
    """Entries as safetensors files, ``folder/<fingerprint>/<two digits>/<key>.safetensors``.

    A file has its name once it is whole, and what is in it depends on its name alone, so several processes may read
    and write one folder. The budget counts what is in the fingerprint's folder when a process starts, what the
    process adds, and what it meets of the others'. A file that cannot be read is written anew.

    Args:
        budget: see Store.
        folder: made where it is missing. What earlier runs of the same model left there is used.
    """

    def __init__(self, budget: int | None, folder: str | os.PathLike[str]) -> None:
        super().__init__(budget)
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"folder of frozen_cache: {self.folder} exists and is not a folder")
        self._root = self.folder
        self._sizes: dict[str, int] = {}

    def use(self, fingerprint: str, about: dict[str, Any]) -> None:
        """See Store."""
        root = self.folder / fingerprint
        if root == self._root:
            return
        self._root = root
        self._sizes = {path.name.removesuffix(_KIND): path.stat().st_size for path in root.glob(f"??/*{_KIND}")}
        self.bytes, self.full = sum(self._sizes.values()), False
        try:
            root.mkdir(parents=True, exist_ok=True)
            fresh = root / f".{secrets.token_hex(8)}.saving"
            write_json(fresh, about)
            os.replace(fresh, root / "about.json")
        except OSError as error:
            self._stop(f"{root} cannot be written ({error})")

    def get(self, key: str) -> Entry | None:
        """See Store."""
        path = self._path(key)
        try:
            tensors = read_safetensors(path)
            entry = Entry(**tensors)
        except FileNotFoundError:
            return None
        except (TypeError, ValueError) as error:
            warnings.warn(f"frozen_cache: {error}; it is computed again", stacklevel=2)
            self.bytes -= self._sizes.pop(key, 0)
            return None
        if key not in self._sizes:  # another process's
            self._sizes[key] = entry.nbytes
            self.bytes += entry.nbytes
        return entry

    def _has(self, key: str) -> bool:
        return key in self._sizes

    def _keep(self, key: str, entry: Entry) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{secrets.token_hex(8)}.saving")
        try:
            write_safetensors(fresh, entry._asdict())
            with fresh.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)
        self._sizes[key] = entry.nbytes

    def _path(self, key: str) -> Path:
        return self._root / key[:2] / f"{key}{_KIND}"


def open_store(place: str, budget: int | None, folder: str | os.PathLike[str] | None) -> Store:
    """The store of a place. Raises ValueError for another place, or one that is not to be had here."""
    if place not in PLACES:
        raise ValueError(f"place must be one of {', '.join(PLACES)}, got {place!r}")
    if (place == "disk") != (folder is not None):
        raise ValueError(f"folder is where place 'disk' keeps its files: got place={place!r} and folder={folder!r}")
    if folder is not None:
        return DiskStore(budget, folder)
    return MemoryStore(budget, pinned=place == "pinned")
