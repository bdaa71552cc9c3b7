"""What is seen of a training while it runs: lines or a bar, with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from reft_kernels.training.logs import metrics_of


class ProgressLines(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """A line for each log: the step, of how many, the loss, the speed where it is logged, and the time left.

    The time left is that of the steps so far, the first one of this run left out: compiling is done once. Evaluations
    have a line of their own. Only the first process prints.

    Args:
        write: prints a line; by default to standard output.
    """

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        self._write = write if write is not None else lambda line: print(line, flush=True)
        self._marks: list[tuple[int, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._marks = [(state.global_step, time.perf_counter())]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock anew after the first step."""
        if len(self._marks) == 1:
            self._marks.append((state.global_step, time.perf_counter()))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Prints the line."""
        if state.is_world_process_zero and (line := self._line(state, logs or {})):
            self._write(line)

    def _line(self, state: Any, logs: Mapping[str, Any]) -> str | None:
        metrics = metrics_of(logs)
        step = f"step {state.global_step:,}/{state.max_steps:,}"
        if metrics:
            return f"{step}, held out: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if "loss" not in logs:
            return None
        parts = [f"{step} ({100 * state.global_step / max(state.max_steps, 1):.1f} %)", f"loss {logs['loss']:.4f}"]
        if "tokens_per_second" in logs:
            parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
        left = self.seconds_left(state)
        if left is not None:
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)

    def seconds_left(self, state: Any) -> float | None:
        """The time until the last step, or None before the first is done."""
        now = time.perf_counter()
        for step, mark in reversed(self._marks):
            if state.global_step > step:
                steps_left = max(int(state.max_steps) - int(state.global_step), 0)
                return (now - mark) / (int(state.global_step) - step) * steps_left
        return None


class ProgressBar(ProgressCallback):  # type: ignore[misc,unused-ignore]
    """transformers' bar, which has the time left, with the loss beside it instead of a line for each log.

    Evaluations have a line of their own.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows the values."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        metrics = metrics_of(logs)
        if metrics:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self.training_bar.write(f"step {state.global_step:,}, held out: {shown}")
        elif "loss" in logs:
            beside = {"loss": f"{logs['loss']:.4f}"}
            if "tokens_per_second" in logs:
                beside["tokens/s"] = f"{logs['tokens_per_second']:,.0f}"
            self.training_bar.set_postfix(beside)


def show_progress(trainer: Any, *, bar: bool) -> None:
    """Puts the bar, or the lines, in the place of what a Trainer shows by itself."""
    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)
    trainer.add_callback(ProgressBar() if bar else ProgressLines())


def duration(seconds: float) -> str:
    """A time as people say it: 45 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"
