"""One job from its rows to its saved adapter, its scores and its log."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_kernels.jobs.adapters import adapt, check_method
from reft_kernels.jobs.base_models import choose_device, load_base
from reft_kernels.jobs.classification import ClassificationJob
from reft_kernels.jobs.errors import UserError, user_errors
from reft_kernels.jobs.language import LanguageJob
from reft_kernels.jobs.run_folder import (
    adapter_bytes,
    check_output,
    remove_run,
    training_settings,
    write_log,
    write_predictions,
)
from reft_kernels.jobs.scores import Scores
from reft_kernels.jobs.trainer_arguments import RunOptions, training_arguments
from reft_kernels.recipes.settings import JobSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reft_kernels.model import ReftModel

Job = LanguageJob | ClassificationJob


def make_job(settings: JobSettings) -> Job:
    """The job of these settings. Raises UserError naming the option that is wrong."""
    check_method(settings)
    return ClassificationJob(settings) if settings.task == "classification" else LanguageJob(settings)


def run_job(
    settings: JobSettings, options: RunOptions, *, recipe: str | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train, evaluate and save, and return the log, which is also `train_log.json` in the output folder.

    Args:
        settings: what is computed.
        options: where, and what is written.
        recipe: the name that the settings came from, for the log.
        say: is given the lines that tell what happens.

    Raises UserError, one sentence that names what is wrong; nothing is written before the data has been read and the
    model has been loaded and edited.
    """
    from transformers import set_seed

    from reft_kernels.training import last_complete_checkpoint

    folder = options.output
    check_output(folder, resume=options.resume, overwrite=options.overwrite)
    job = make_job(settings)
    device = choose_device(options.device)
    job.read()
    checkpoint = last_complete_checkpoint(folder) if options.resume else None
    if options.resume and checkpoint is None:
        raise UserError(f"--resume: no complete checkpoint in {folder}")
    base, tokenizer = load_base(
        options.model, options.dtype, device, labels=job.labels, regression=job.regression, seed=settings.seed
    )
    set_seed(settings.seed)
    total = sum(parameter.numel() for parameter in base.parameters())
    reft_model = adapt(base, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the header says how many were left out
        data = job.data(tokenizer, reft_model)
    evaluates = data["eval_dataset"] is not None
    if settings.best_epoch and not evaluates:
        raise UserError("--best-epoch: there are no held-out rows to choose by, see --held-out")
    with user_errors("training options"):
        arguments = training_arguments(
            settings, options, device, best=job.best if settings.best_epoch else None, evaluates=evaluates
        )
    log = _describe(settings, options, recipe, reft_model, base, total, job, data)
    _say_header(settings, options, reft_model, base, log, say)
    if checkpoint is not None:
        _check_same_adapter(reft_model, checkpoint)
        _say_differences(training_settings(folder), log["settings"], say)
        say(f"resume   from {checkpoint}")
    if options.overwrite:
        remove_run(folder)
    write_log(folder, log)

    clock = _clock()
    if any(parameter.requires_grad for parameter in reft_model.parameters()):
        trainer = job.trainer(reft_model, arguments, callbacks=[clock], **job.trainer_options(), **data)
        _train(trainer, folder, checkpoint)
        _note_training(log, trainer, clock, folder)
        losses = [entry["loss"] for entry in log["history"] if "loss" in entry]
        if losses:
            say(f"loss     {losses[0]:.4f} -> {losses[-1]:.4f} in {log['steps']} steps")
        say(f"time     {clock.seconds:.1f} s, {clock.ms_per_step:.0f} ms/step")
        say(f"adapter  {log['adapter_bytes']:,} bytes in {folder}")
    results: dict[str, Any] = log.setdefault("results", {})
    for name in job.evaluated:
        start = time.perf_counter()
        scores = job.evaluate(reft_model, tokenizer, name, progress=options.progress)
        results[name] = {**scores.metrics, "rows": scores.rows, "seconds": time.perf_counter() - start}
        if scores.predictions:
            write_predictions(folder, name, scores.predictions)
        say(f"eval     {name}: {describe_scores(scores)}")
    log["finished"] = True
    write_log(folder, log)
    return log


def describe_scores(scores: Scores) -> str:
    """The metrics in words."""
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.metrics.items()) + f" ({scores.rows:,} rows)"


def _check_same_adapter(reft_model: ReftModel, folder: Path) -> None:
    """Raises UserError where the checkpoint's interventions are not those of the model, place by place."""
    from reft_kernels.checkpoint import describe_representation, read_description

    with user_errors("--resume"):
        saved = read_description(folder)["representations"]
    own = [
        describe_representation(key, item, reft_model.interventions[key])
        for key, item in zip(reft_model.keys, reft_model.representations, strict=True)
    ]
    if len(saved) != len(own):
        raise UserError(f"--resume: {folder} has {len(saved)} interventions, this run has {len(own)}")
    for there, here in zip(saved, own, strict=True):
        for name in ("key", "intervention", "low_rank_dimension", "positions", "settings"):
            if there[name] != here[name]:
                raise UserError(
                    f"--resume: {folder} is of another adapter: {name} of {there['key']} is {there[name]} there "
                    f"and {here[name]} here"
                )


def _train(trainer: Any, folder: Path, checkpoint: Path | None) -> None:
    import torch

    from reft_kernels.training import last_complete_checkpoint

    try:
        with user_errors(f"--output {folder}", (OSError,)):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.save_model()
    except torch.OutOfMemoryError as error:
        raise UserError("out of GPU memory: lower --batch-size or --max-length") from error
    except KeyboardInterrupt:
        last = last_complete_checkpoint(folder)
        if last is not None:
            print(f"the last checkpoint is {last}; --resume goes on from there", file=sys.stderr)
        raise


def _note_training(log: dict[str, Any], trainer: Any, clock: Any, folder: Path) -> None:
    log |= {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "seconds": clock.seconds,
        "ms_per_step": clock.ms_per_step,
        "adapter_bytes": adapter_bytes(folder),
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
        "held_out": [entry for entry in trainer.state.log_history if "eval_loss" in entry],
    }


def _describe(
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

    where = Path(options.model).expanduser()
    return {
        "recipe": recipe,
        "settings": {
            **settings.as_dict(),
            "model": str(where.resolve()) if where.is_dir() else options.model,
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
            "used": len(data["train_dataset"]),
            "left_out": len(getattr(data["train_dataset"], "dropped", ())),
            "held_out": 0 if data["eval_dataset"] is None else len(data["eval_dataset"]),
            "skipped": None if job.skipped is None else asdict(job.skipped),
        },
        "device": str(base.device),
        "versions": {
            "reft_kernels": reft_kernels.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "finished": False,
    }


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Wall time of the steps of this run, saving and logging included."""

        seconds = 0.0
        steps = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._start, self._first = time.perf_counter(), state.global_step

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps = state.global_step - self._first

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds = time.perf_counter() - self._start

        @property
        def ms_per_step(self) -> float:
            return 1000 * self.seconds / max(self.steps, 1)

    return Clock()


def _say_header(
    settings: JobSettings,
    options: RunOptions,
    reft_model: ReftModel,
    base: PreTrainedModel,
    log: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    trained, total = log["parameters"]["trained"], log["parameters"]["base"]
    used, left_out = log["examples"]["used"], log["examples"]["left_out"]
    dtype = str(base.dtype).removeprefix("torch.")
    say(f"model    {options.model} ({type(base).__name__}, {total:,} parameters, {dtype} on {base.device})")
    layers = sorted({item.layer for item in reft_model.representations if item.layer is not None})
    if layers:
        tied = ("" if "+" not in settings.positions else ", tied") if settings.tied else ", untied"
        say(f"method   {settings.method}, rank {settings.rank}, positions {settings.positions}{tied}")
        say(f"layers   {_ranges(layers)} ({settings.component})")
    else:
        say(f"method   {settings.method}" + (f", rank {settings.rank}" if trained else ""))
    say(f"trained  {trained:,} of {total:,} parameters ({100 * trained / total:.3f} %)")
    left = f", {left_out:,} left out (no output within --max-length {settings.max_length})" if left_out else ""
    held = f", {log['examples']['held_out']:,} held out" if log["examples"]["held_out"] else ""
    say(f"data     {', '.join(settings.data)}, {used:,} examples{held}{left}")


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers in words: [0, 1, 2, 5] is "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _say_differences(before: dict[str, Any], now: dict[str, Any], say: Callable[[str], None]) -> None:
    for name, value in now.items():
        if name in before and before[name] != value:
            option = "--" + name.replace("_", "-")
            say(f"note     the run to resume had {option} {before[name]}, this one has {value}")
