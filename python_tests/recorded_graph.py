"""CUDA graphs on a CPU: a call's operations are recorded with their tensors, and run again on the same memory.

As with CUDA graphs, nothing of Python runs at a replay: what the host computed, cached or branched on at the capture
stays as it was. Reading a tensor on the host raises, as it does while a stream is captured. Graphs of one pool share
memory: a replay spoils all that the other graphs have made.
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

_READS = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "repeat_interleave", "bincount",
    "_unique", "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor | None]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        indices = tree_leaves(args[1]) if name in _INDEXED else []
        if name in _READS or any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices):
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

    @torch.no_grad()
    def run(self) -> None:
        for func, args, kwargs, outputs in self.operations:
            found = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for output, value in zip(outputs, found, strict=True):
                if output is not None:
                    output.copy_(value)

    @torch.no_grad()
    def spoil(self) -> None:
        for _, _, _, outputs in self.operations:
            for output in outputs:
                if output is not None:
                    output.fill_(float("nan") if output.is_floating_point() else 0)


def recorded_capture(*_: Any) -> Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]:
    """As `cuda_capture`: what captures graphs of one pool."""
    pool: list[_Recorder] = []

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        # As it is while a stream is captured, which runs nothing and so draws nothing either.
        with mock.patch.object(OrthonormalRows, "_key", return_value=None), torch.random.fork_rng(devices=[]):
            run()
            recorder = _Recorder()
            with recorder, mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True):
                loss = run()
        pool.append(recorder)

        def replay() -> None:
            for other in pool:
                if other is not recorder:
                    other.spoil()
            recorder.run()

        return replay, loss

    return capture
