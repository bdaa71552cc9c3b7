"""The forward and backward of a training step as one CUDA graph for every shape of batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reft_kernels.debug import debug_is_on

Run = Callable[[], Tensor]
Capture = Callable[[Run], tuple[Callable[[], None], Tensor]]


class StepGraphs:
    """Runs forward and backward of batches, those of a shape that has come before by replaying a graph of them.

    A step on a small batch is hundreds of launches, each of which costs the host more time than the GPU; a replay is
    one. The first ``before`` batches of a shape run as they are, the next is captured and replayed from then on. All
    graphs together hold about the activations of the largest. Batches of few shapes are what this is for (collators'
    ``pad_to``, packing); those of further shapes than ``most`` run as they are, and so do all in debug mode.

    Losses and gradients are those of the step as it is; gradients are added to what is in ``.grad``. Dropout draws a
    new mask at every replay. Graphs are dropped where a parameter's memory is another's than at their capture.

    Args:
        step: forward and backward of a batch, which is given as keywords: returns the loss, scalar, detached. It reads
            no tensor on the host.
        parameters: all that it makes gradients of.
        capture: makes a graph of a call: returns what replays it, and the tensor that the call returned.
        before: how many batches of a shape run as they are.
        most: how many graphs are kept.

    Raises:
        ValueError: ``before`` is below 1, or ``most`` is negative.
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        parameters: Iterable[Tensor],
        capture: Capture,
        *,
        before: int = 2,
        most: int = 16,
    ) -> None:
        if before < 1:  # optimisers, scalers and kernels make what they need in the first step
            raise ValueError(f"before must be at least 1, got {before}")
        if most < 0:
            raise ValueError(f"most must be at least 0, got {most}")
        self._step = step
        self._parameters = [p for p in parameters if p.requires_grad]
        self._capture = capture
        self._before = before
        self._most = most
        self._met: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Graph] = {}
        self._addresses: tuple[int, ...] = ()

    def __len__(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of a batch; its gradients are added to those of the parameters.

        Args:
            batch: the keywords of the step. What is no tensor is a part of the batch's shape.

        Raises:
            RuntimeError: the step of this batch cannot be captured.
        """
        shape = _shape(batch)
        if shape is None or debug_is_on():
            return self._step(**batch)
        addresses = tuple(p.data_ptr() for p in self._parameters)
        if addresses != self._addresses:
            self._graphs.clear()
            self._addresses = addresses
        graph = self._graphs.get(shape)
        if graph is None:
            self._met[shape] += 1
            if self._met[shape] <= self._before or len(self._graphs) >= self._most:
                return self._step(**batch)
            graph = self._graphs[shape] = self._captured(batch)
        return self._replayed(graph, batch)

    def _captured(self, batch: Mapping[str, Any]) -> _Graph:
        kept = [p.grad for p in self._parameters]
        inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}

        def run() -> Tensor:
            for p in self._parameters:
                p.grad = None  # so that the backward makes a new one, which is the graph's
            return self._step(**inputs)

        try:
            replay, loss = self._capture(run)
            grads = [p.grad for p in self._parameters]
        except RuntimeError as error:
            shapes = {name: list(value.shape) for name, value in batch.items() if isinstance(value, Tensor)}
            raise RuntimeError(
                f"the training step of a batch {shapes} cannot be made a CUDA graph: {error}. Train without step graphs"
            ) from error
        finally:
            for p, grad in zip(self._parameters, kept, strict=True):
                p.grad = grad
        return _Graph(inputs, replay, loss, grads)

    def _replayed(self, graph: _Graph, batch: Mapping[str, Any]) -> Tensor:
        # What an earlier replay left in .grad is memory that this one writes, or may write: graphs share it.
        graphs = {id(grad) for one in self._graphs.values() for grad in one.grads if grad is not None}
        for p in self._parameters:
            if p.grad is not None and id(p.grad) in graphs:
                p.grad = p.grad.clone()
        for name, value in graph.inputs.items():
            if isinstance(value, Tensor):
                value.copy_(batch[name], non_blocking=True)
        graph.replay()
        for p, grad in zip(self._parameters, graph.grads, strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad + grad
        return graph.loss.clone()


@dataclass(frozen=True)
class _Graph:
    """A captured step: the tensors that it reads, and those that its replay writes."""

    inputs: dict[str, Any]
    replay: Callable[[], None]
    loss: Tensor
    grads: list[Tensor | None]


def _shape(batch: Mapping[str, Any]) -> Hashable | None:
    """What two batches have in common that one graph can run; None where a batch holds what no graph can be given."""
    found: list[Hashable] = []
    for name, value in sorted(batch.items()):
        if isinstance(value, Tensor):
            found.append((name, tuple(value.shape), value.dtype, value.device))
        elif value is None or isinstance(value, bool | int | float | str):
            found.append((name, type(value), value))
        else:
            return None
    return tuple(found)


def cuda_capture(device: torch.device) -> Capture:
    """Captures calls as CUDA graphs of one memory pool.

    A call is run once, on the stream that it is then captured on, before that: what libraries make at their first call
    (handles, workspaces) is no part of a graph.

    Raises:
        ValueError: the device is no CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"step graphs are for CUDA devices, got {str(device)!r}")
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)

    def capture(run: Run) -> tuple[Callable[[], None], Tensor]:
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            loss = run()
        return graph.replay, loss

    return capture
