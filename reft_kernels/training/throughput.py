"""How fast a training runs: tokens, examples and steps a second, model FLOP utilisation, peak memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reft_kernels.training.flops import ModelFlops, model_flops
from reft_kernels.training.item_layout import IGNORE_INDEX
from reft_kernels.training.log_values import LogValues
from reft_kernels.training.peak_rates import PeakRate, peak_rate
from reft_kernels.training.split_models import tensor_parallel_size

_TEXT = ("input_ids", "inputs_embeds")


class Throughput(LogValues):
    """A callback of ReftTrainer that logs the speed of training, and prints it at the end.

    Every training log has, over the steps since the last one,

    - `tokens_per_second`: tokens of examples; `padded_tokens_per_second`: all columns of the batches, padding included
      (absent where a FrozenCache runs fewer columns than there are tokens);
    - `examples_per_second` and `step_ms`, the wall time of an optimiser step, fetching its data included, evaluation
      and saving not;
    - `mfu`, the model FLOP utilisation: the operations that the tokens need (forward, and backward only through what
      needs gradients: :class:`reft_kernels.training.flops.ModelFlops` has the formula) by the time and the device's
      peak rate, the share of the peak that does useful work. The peak is the data sheet's for known GPUs and a measured
      matrix product's on a CPU. Left out, with the reason in `without_mfu`, for other devices, and for models whose
      operations do not follow from their weights;
    - `peak_memory_gib`: the most that PyTorch had allocated on the GPU, or the most that the process held of the
      computer's memory.

    With several processes rates are those of all together and `mfu` is their mean; memory is the first one's. The
    device is waited for only when a log is made.

    Args:
        peak_flops: the peak rate of one device in FLOP/s, instead of the known one.
        show: print `summary()` to standard output at the end.
        without_mfu: a reason to leave `mfu` out.
    """

    def __init__(self, *, peak_flops: float | None = None, show: bool = True, without_mfu: str | None = None) -> None:
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"peak_flops must be positive, got {peak_flops}")
        self.show = show
        self.without_mfu = without_mfu
        self._unwanted = without_mfu
        self._given_peak = peak_flops
        self._peak = PeakRate(None, "")
        self._flops: ModelFlops | None = None
        self._window = _Counts()
        self._total = _Counts()
        self._memory: float | None = None
        self._mark = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Finds the model's sizes and the device's peak rate."""
        self._window, self._total = _Counts(), _Counts()
        self._peak, self._flops, self.without_mfu = PeakRate(None, ""), None, self._unwanted
        try:
            self._flops = model_flops(model)
        except ValueError as error:
            self.without_mfu = str(error)
        if self.without_mfu is None:
            if self._given_peak is not None:
                self._peak = PeakRate(self._given_peak, "the given peak")
            else:
                self._peak = peak_rate(args.device, _compute_dtype(args, model))
            if self._peak.flops_per_second is None:
                self.without_mfu = self._peak.source
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        self._mark = time.perf_counter()

    def see_batch(self, inputs: Mapping[str, Any]) -> None:
        """Counts a batch on its device."""
        self._window.add(inputs, self._flops is None or self._flops.causal)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts an optimiser step."""
        self._window.steps += 1
        self._advance()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the time since the last step out."""
        self._mark = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the time since the last step out."""
        self._mark = time.perf_counter()

    def log_values(self, args: Any, state: Any, model: Any) -> dict[str, float]:
        """See the class."""
        if not self._window.steps:
            return {}
        self._advance()
        window, self._window = self._window, _Counts()
        window.gather(args.device, tensor_parallel_size(args))
        self._total.join(window)
        self._memory = _peak_memory_gib(args.device)
        return self._values(window)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prints the summary of the run in the first process."""
        if self._window.steps:
            self._window.gather(args.device, tensor_parallel_size(args))
            self._total.join(self._window)
            self._window = _Counts()
        self._memory = _peak_memory_gib(args.device)
        if self.show and state.is_world_process_zero and self._total.steps:
            print(self.summary(), flush=True)

    def totals(self) -> dict[str, float]:
        """The values of the whole run, named as those of the logs."""
        return self._values(self._total) if self._total.steps else {}

    def summary(self) -> str:
        """The values of the whole run in one line, which starts with "speed"."""
        values = self.totals()
        if not values:
            return "speed    nothing was trained"
        padded = values.get("padded_tokens_per_second")
        parts = [
            f"speed    {values['tokens_per_second']:,.0f} tokens/s",
            *([] if padded is None else [f"{padded:,.0f} with padding"]),
            f"{values['examples_per_second']:,.1f} examples/s",
            f"{values['step_ms']:,.0f} ms/step",
        ]
        if "mfu" in values:
            rate = (self._peak.flops_per_second or 0) / 1e12
            parts.append(f"MFU {100 * values['mfu']:.1f} % of {rate:,.3g} TFLOP/s ({self._peak.source})")
        else:
            parts.append(f"no MFU ({self.without_mfu})")
        if "peak_memory_gib" in values:
            parts.append(f"peak memory {values['peak_memory_gib']:.2f} GiB")
        return ", ".join(parts)

    def _advance(self) -> None:
        now = time.perf_counter()
        self._window.seconds += now - self._mark
        self._mark = now

    def _values(self, counts: _Counts) -> dict[str, float]:
        tokens, pairs, targets, examples = counts.values
        seconds = max(counts.seconds, 1e-9)
        values = {
            "tokens_per_second": tokens / seconds,
            **({"padded_tokens_per_second": counts.columns / seconds} if counts.columns >= tokens else {}),
            "examples_per_second": examples / seconds,
            "step_ms": 1000 * seconds / counts.steps,
        }
        if self._flops is not None and self._peak.flops_per_second is not None:
            done = self._flops.training_step(tokens, pairs, targets)
            values["mfu"] = done / seconds / self._peak.flops_per_second / counts.processes
        if self._memory is not None:
            values["peak_memory_gib"] = self._memory
        return values


class _Counts:
    """What batches held: `values` are tokens, pairs that attend, targets and examples."""

    def __init__(self) -> None:
        self.steps = 0
        self.seconds = 0.0
        self.columns = 0
        self.processes = 1
        self.values = (0.0, 0.0, 0.0, 0.0)
        self._on_device: Tensor | None = None

    def add(self, inputs: Mapping[str, Any], causal: bool) -> None:
        source = next((inputs[name] for name in _TEXT if isinstance(inputs.get(name), Tensor)), None)
        if source is None:
            return
        self.columns += source.shape[0] * source.shape[1]
        counts = torch.stack(_count(inputs, source, causal))
        self._on_device = counts if self._on_device is None else self._on_device + counts

    def gather(self, device: torch.device, copies: int = 1) -> None:
        """Brings the counts to the host, summed over all processes, of which `copies` each have the same batches."""
        counts = torch.zeros(5, dtype=torch.int64, device=device)
        if self._on_device is not None:
            counts[:4] = self._on_device
        counts[4] = self.columns
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            self.processes = torch.distributed.get_world_size()
        *values, self.columns = (count // copies for count in counts.tolist())
        tokens, pairs, targets, examples = values
        self.values = (tokens, pairs, targets, examples)

    def join(self, other: _Counts) -> None:
        self.steps += other.steps
        self.seconds += other.seconds
        self.columns += other.columns
        self.processes = other.processes
        a, b, c, d = (one + more for one, more in zip(self.values, other.values, strict=True))
        self.values = (a, b, c, d)


def _count(inputs: Mapping[str, Any], source: Tensor, causal: bool) -> list[Tensor]:
    """Tokens, pairs that attend, targets and examples of a batch."""
    mask, positions, labels = (inputs.get(name) for name in ("attention_mask", "position_ids", "labels"))
    batch, width = source.shape[:2]

    def constant(value: int) -> Tensor:  # filled on the device: a copy from the host would be waited for
        return torch.full((), value, dtype=torch.int64, device=source.device)

    if isinstance(mask, Tensor) and mask.dim() == 2:
        lengths = mask.sum(-1)
        tokens, examples = lengths.sum(), constant(batch)
        pairs = (lengths * (lengths + 1)).sum() // 2 if causal else (lengths * lengths).sum()
    elif isinstance(positions, Tensor) and positions.shape == (batch, width):
        # Packed: an example counts its positions from 0, and padding is positions 0 that no 1 follows.
        following = torch.nn.functional.pad(positions[:, 1:], (0, 1))
        starts = (positions == 0) & (following == 1)
        inside = starts | (positions > 0)
        tokens, examples = inside.sum(), starts.sum()
        pairs = ((positions + 1) * inside).sum()
    else:
        tokens, examples = constant(batch * width), constant(batch)
        pairs = constant(batch * (width * (width + 1) // 2 if causal else width * width))
    labelled = isinstance(labels, Tensor) and labels.shape == (batch, width)
    targets = (labels[:, 1:] != IGNORE_INDEX).sum() if isinstance(labels, Tensor) and labelled else constant(0)
    return [tokens, pairs, targets, examples]


def _compute_dtype(args: Any, model: Any) -> torch.dtype:
    if args.bf16:
        return torch.bfloat16
    if args.fp16:
        return torch.float16
    dtypes = [p.dtype for p in model.model.parameters() if p.is_floating_point()]
    return max(set(dtypes), key=dtypes.count, default=torch.float32)


def _peak_memory_gib(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)
