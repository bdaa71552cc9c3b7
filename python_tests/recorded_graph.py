"""CUDA graphs on a CPU: a call's operations are recorded with their tensors, and run again on the same memory.

As with a CUDA graph, nothing of Python runs at a replay: what the host computed, cached or branched on at the capture
stays as it was. Reading a tensor on the host raises, as it does while a stream is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from reft_kernels.orthogonal import OrthonormalRows

_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in _READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = func(*args, **kwargs)
        # The memory of now, whatever a parameter's `.data` may be later.
        args, kwargs = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # Views, and what an operation writes in place, are the memory that it was given.
        new = [leaf if leaf.untyped_storage().data_ptr() not in given else None for leaf in made]
        self.operations.append((func, args, kwargs, new))
        return result


def recorded_capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """As `cuda_capture`'s, but tensors of the recording are never freed, and no recordings share memory."""
    with mock.patch.object(OrthonormalRows, "_key", return_value=None):  # as it is while a stream is captured
        run()
        recorder = _Recorder()
        with recorder, mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True):
            loss = run()

    def replay() -> None:
        with torch.no_grad():
            for func, args, kwargs, outputs in recorder.operations:
                found = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
                for output, value in zip(outputs, found, strict=True):
                    if output is not None:
                        output.copy_(value)

    return replay, loss
