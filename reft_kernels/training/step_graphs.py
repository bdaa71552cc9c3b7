"""The forward and backward of a training step as one CUDA graph for every shape of batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels.debug import debug_is_on

Run = Callable[[], Tensor]
Capture = Callable[[Run], tuple[Callable[[], None], Tensor]]


class CaptureError(RuntimeError):
    """A training step that cannot be made a CUDA graph."""


@dataclass
class StepGraphStats:
    """What was replayed: steps by a graph, all steps, graphs, and shapes of batches."""

    replayed: int = 0
    steps: int = 0
    graphs: int = 0
    shapes: int = 0


class StepGraphs:
    """Runs forward and backward of batches, those of a shape that has come before by replaying a graph of them.

    A step on a small batch is hundreds of launches, each of which costs the host more time than the GPU; a replay is
    one. The first ``before`` batches of a shape run as they are, the next is captured and replayed from then on. All
    graphs together hold about the activations of the largest. Batches of few shapes are what this is for (collators'
    ``pad_to``); those of further shapes than ``most`` run as they are, and so do all in debug mode.

    Losses and gradients are those of the step as it is; gradients are added to what is in ``.grad``. Dropout draws a
    new mask at every replay, as from the generator's state of then. Graphs are dropped where a tensor of the model
    has come to lie elsewhere, or to need a gradient or none; parameters and buffers that come later are not seen.

    Args:
        step: forward and backward of a batch, which is given as keywords: returns the loss, scalar, detached. It reads
            no tensor on the host.
        model: whose parameters the step makes gradients of.
        capturing: makes what captures, for graphs that share memory; see :func:`cuda_capture`.
        before: how many batches of a shape run as they are.
        most: how many graphs are kept.

    Raises:
        ValueError: ``before`` is below 1, or ``most`` is negative.
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        model: nn.Module,
        capturing: Callable[[], Capture],
        *,
        before: int = 2,
        most: int = 16,
    ) -> None:
        if before < 1:  # optimisers, scalers and kernels make what they need in the first step
            raise ValueError(f"before must be at least 1, got {before}")
        if most < 0:
            raise ValueError(f"most must be at least 0, got {most}")
        self._step = step
        self._parameters = list(model.parameters())
        self._buffers = list(model.buffers())
        self._capturing = capturing
        self._capture: Capture | None = None
        self._before = before
        self._most = most
        self._met: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Graph] = {}
        self._state: tuple[Hashable, ...] = ()
        self._trained: list[nn.Parameter] = []
        self._stats = StepGraphStats()

    @property
    def stats(self) -> StepGraphStats:
        """What was replayed until now."""
        self._stats.graphs, self._stats.shapes = len(self._graphs), len(self._met)
        return self._stats

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of a batch; its gradients are added to those of the parameters.

        Args:
            batch: the keywords of the step. What is no tensor is a part of the batch's shape.

        Raises:
            CaptureError: the step of this batch cannot be captured.
        """
        self._stats.steps += 1
        shape = _shape(batch)
        if shape is None or debug_is_on():
            return self._step(**batch)
        self._look_at_the_model()
        graph = self._graphs.get(shape)
        if graph is None:
            self._met[shape] += 1
            if self._met[shape] <= self._before or len(self._graphs) >= self._most:
                return self._step(**batch)
            graph = self._graphs[shape] = self._captured(batch)
        self._stats.replayed += 1
        return self._replayed(graph, batch)

    def _look_at_the_model(self) -> None:
        state = (
            *((p.data_ptr(), p.requires_grad) for p in self._parameters),
            *(buffer.data_ptr() for buffer in self._buffers),
        )
        if state == self._state:
            return
        self._state = state
        self._trained = [p for p in self._parameters if p.requires_grad]
        self._graphs.clear()
        self._capture = None  # and its memory, which gradients of its graphs may still be in

    def _captured(self, batch: Mapping[str, Any]) -> _Graph:
        kept = [p.grad for p in self._trained]
        inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
        if self._capture is None:
            self._capture = self._capturing()

        def run() -> Tensor:
            for p in self._trained:
                p.grad = None  # so that the backward makes a new one, which is the graph's
            return self._step(**inputs)

        try:
            replay, loss = self._capture(run)
            grads = [p.grad for p in self._trained]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            shapes = {name: list(value.shape) for name, value in batch.items() if isinstance(value, Tensor)}
            raise CaptureError(
                f"the training step of a batch {shapes} cannot be made a CUDA graph: {error}. Train without step graphs"
            ) from error
        finally:
            for p, grad in zip(self._trained, kept, strict=True):
                p.grad = grad
        return _Graph(inputs, replay, loss, grads)

    def _replayed(self, graph: _Graph, batch: Mapping[str, Any]) -> Tensor:
        # What an earlier replay left in .grad is memory that this one writes, or may write: graphs share it.
        if held := [p for p in self._trained if p.grad is not None]:
            graphs = {id(grad) for one in self._graphs.values() for grad in one.grads}
            for p in held:
                if p.grad is not None and id(p.grad) in graphs:
                    p.grad = p.grad.clone()
        for name, value in graph.inputs.items():
            if isinstance(value, Tensor):
                value.copy_(batch[name], non_blocking=True)
        graph.replay()
        for p, grad in zip(self._trained, graph.grads, strict=True):
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

    A call is run once before, on the stream that it is then captured on: what libraries make at their first call
    (handles, workspaces) is no part of a graph. It draws no random numbers from the generator.

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
        with torch.random.fork_rng(devices=[device]), torch.cuda.stream(stream):
            run()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        failure: Exception | None = None
        try:
            # Threads of a data loader pin memory meanwhile, which is none of this capture's business.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    loss = run()
                except Exception as error:
                    failure = error  # ending the capture raises another one, which does not say what went wrong
                    raise
        except Exception:
            torch.cuda.set_stream(current)
            if failure is None:
                raise
            raise failure from None
        return graph.replay, loss

    return capture
