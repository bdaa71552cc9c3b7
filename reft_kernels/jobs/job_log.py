"""What is said and logged of a job."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_kernels.jobs import processes
from reft_kernels.jobs.run_folder import model_source
from reft_kernels.jobs.scores import Scores
from reft_kernels.jobs.trainer_arguments import RunOptions
from reft_kernels.recipes.settings import JobSettings
from reft_kernels.training.card import ranges
from reft_kernels.training.throughput import Throughput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reft_kernels.jobs.run import Job
    from reft_kernels.model import ReftModel


def describe_scores(scores: Scores) -> str:
    """The metrics in words."""
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.metrics.items()) + f" ({scores.rows:,} rows)"


def describe_run(
    settings: JobSettings,
    options: RunOptions,
    recipe: str | None,
    reft_model: ReftModel,
    base: PreTrainedModel,
    total: int,
    job: Job,
    data: dict[str, Any],
) -> dict[str, Any]:
    """What the log says of a run before its first step."""
    import torch
    import transformers

    import reft_kernels

    return {
        "recipe": recipe,
        "settings": {
            **settings.as_dict(),
            "model": model_source(options.model),
            "dtype": options.dtype,
            "device": options.device,
        },
        "base_class": type(base).__name__,
        "parameters": {
            "trained": sum(parameter.numel() for parameter in reft_model.parameters() if parameter.requires_grad),
            "head": sum(head.numel() for head in job.head_parameters(reft_model)),
            "base": total,
        },
        "examples": {
            "used": None if settings.streaming is not None else len(data["train_dataset"]),
            "left_out": len(getattr(data["train_dataset"], "dropped", ())),
            "held_out": 0 if data["eval_dataset"] is None else len(data["eval_dataset"]),
            "skipped": None if job.skipped is None else asdict(job.skipped),
        },
        "device": str(base.device),
        "processes": processes.count(),
        "versions": {
            "reft_kernels": reft_kernels.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "finished": False,
    }


def describe_training(trainer: Any, clock: Any, speed: Throughput) -> dict[str, Any]:
    """What the log says of the steps of a run."""
    totals = speed.totals()
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "seconds": clock.seconds,
        "ms_per_step": totals.get("step_ms", clock.ms_per_step),
        **{name: value for name, value in totals.items() if name != "step_ms"},
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
        "held_out": [entry for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)],
    }


def say_training(log: Mapping[str, Any], speed: Throughput, folder: Path, say: Callable[[str], None]) -> None:
    """Loss, time, speed and size, a line each."""
    losses = [entry["loss"] for entry in log["history"]]
    if losses:
        say(f"loss     {losses[0]:.4f} -> {losses[-1]:.4f} in {log['steps']} steps")
    say(f"time     {log['seconds']:.1f} s, {log['ms_per_step']:.0f} ms/step")
    say(speed.summary())
    if cache := log.get("frozen_cache"):
        looked = cache["hits"] + cache["misses"]
        say(
            f"cache    {cache['hits']:,} of {looked:,} rows had been kept, {cache['bytes'] / 2**30:.2f} GiB; "
            f"{100 * cache['saved_fraction']:.0f} % of tokens times blocks are constant"
        )
    if graphs := log.get("step_graphs"):
        say(
            f"graphs   {graphs['replayed']:,} of {graphs['steps']:,} forward and backward passes were replayed, "
            f"{graphs['graphs']} graphs for {graphs['shapes']} shapes of batches"
            + ("; --pad-to makes shapes few" if 2 * graphs["replayed"] < graphs["steps"] else "")
        )
    say(f"adapter  {log['adapter_bytes']:,} bytes in {folder}")


def make_clock() -> Any:
    """A callback that keeps the time of a run."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc,unused-ignore]
        """Wall time of the steps of this run, saving and logging included."""

        seconds = 0.0
        steps = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._start, self._first = time.perf_counter(), state.global_step

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps = state.global_step - self._first
            if state.global_step >= state.max_steps:  # or what came since the last log would be in none
                control.should_log = True

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds = time.perf_counter() - self._start

        @property
        def ms_per_step(self) -> float:
            return 1000 * self.seconds / max(self.steps, 1)

    return Clock()


def say_header(
    settings: JobSettings,
    options: RunOptions,
    reft_model: ReftModel,
    base: PreTrainedModel,
    log: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """What will be trained and on what, a line each."""
    trained, total = log["parameters"]["trained"], log["parameters"]["base"]
    used = "streamed" if log["examples"]["used"] is None else f"{log['examples']['used']:,} examples"
    left_out = log["examples"]["left_out"]
    dtype = str(base.dtype).removeprefix("torch.")
    say(f"model    {options.model} ({type(base).__name__}, {total:,} parameters, {dtype} on {base.device})")
    layers = sorted({item.layer for item in reft_model.representations if item.layer is not None})
    if layers:
        tied = ("" if "+" not in settings.positions else ", tied") if settings.tied else ", untied"
        say(f"method   {settings.method}, rank {settings.rank}, positions {settings.positions}{tied}")
        say(f"layers   {ranges(layers)} ({settings.component})")
    else:
        say(f"method   {settings.method}" + (f", rank {settings.rank}" if trained else ""))
    say(f"trained  {trained:,} of {total:,} parameters ({100 * trained / total:.3f} %)")
    left = f", {left_out:,} left out (no output within --max-length {settings.max_length})" if left_out else ""
    held = f", {log['examples']['held_out']:,} held out" if log["examples"]["held_out"] else ""
    say(f"data     {', '.join(settings.data)}, {used}{held}{left}")
    if (n := log["processes"]) > 1:
        together = settings.batch_size * settings.accumulation * (1 if settings.tensor_parallel else n)
        each = "with a part of the model" if settings.tensor_parallel else f"with batches of {settings.batch_size}"
        say(f"processes {n}, each {each}: {together} examples a step")


def say_differences(before: Mapping[str, Any], now: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """A line for each setting that a resumed run had otherwise."""
    for name, value in now.items():
        if name in before and before[name] != value:
            option = "--" + name.replace("_", "-")
            say(f"note     the run to resume had {option} {before[name]}, this one has {value}")
