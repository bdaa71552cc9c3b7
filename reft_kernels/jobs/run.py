"""One job from its rows to its saved adapter, its scores and its log."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_kernels.jobs import processes
from reft_kernels.jobs.adapters import adapt, check_method
from reft_kernels.jobs.base_models import choose_device, load_base
from reft_kernels.jobs.classification import ClassificationJob
from reft_kernels.jobs.errors import UserError, user_errors, write_errors
from reft_kernels.jobs.job_log import (
    describe_run,
    describe_scores,
    describe_training,
    make_clock,
    say_differences,
    say_header,
    say_training,
)
from reft_kernels.jobs.language import LanguageJob
from reft_kernels.jobs.run_folder import (
    adapter_bytes,
    check_output,
    remove_run,
    remove_unfinished,
    training_settings,
    write_log,
    write_predictions,
)
from reft_kernels.jobs.trainer_arguments import RunOptions, training_arguments
from reft_kernels.modules import block_list
from reft_kernels.recipes.settings import JobSettings
from reft_kernels.training.card import write_card
from reft_kernels.training.checkpoints import last_complete_checkpoint
from reft_kernels.training.orthonormality import Orthonormality
from reft_kernels.training.progress import show_progress
from reft_kernels.training.report import write_report
from reft_kernels.training.throughput import Throughput

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from reft_kernels.model import ReftModel

Job = LanguageJob | ClassificationJob

# Among the results, where there is no evaluation data.
HELD_OUT = "held_out"


def make_job(settings: JobSettings) -> Job:
    """The job of these settings. Raises UserError naming the option that is wrong."""
    check_method(settings)
    return ClassificationJob(settings) if settings.task == "classification" else LanguageJob(settings)


def run_job(
    settings: JobSettings,
    options: RunOptions,
    *,
    recipe: str | None = None,
    callbacks: Sequence[Any] = (),
    evaluate: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train, evaluate and save, and return the log, which is also `train_log.json` in the output folder.

    Under torchrun or accelerate launch every process calls this; they train and evaluate together, and the first alone
    says and writes anything.

    Args:
        settings: what is computed.
        options: where, and what is written.
        recipe: the name that the settings came from, for the log.
        callbacks: further callbacks of the trainer.
        evaluate: whether it is scored after the training: on the evaluation sets, or where none are named on the
            held-out rows.
        say: is given the lines that tell what happens.

    Raises UserError, one sentence that names what is wrong; nothing is written before the data has been read and the
    model has been loaded and edited. Raises KeyboardInterrupt that says from where to go on.
    """
    device = choose_device(options.device)
    processes.start(device)
    if not processes.is_first():
        options, say = _quietly(options), _unsaid
    try:
        run = _prepare(settings, options, recipe, device, say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None
    try:
        with processes.lost_ones():
            return _carry_out(run, callbacks, evaluate)
    except (KeyboardInterrupt, UserError) as error:
        if processes.is_first():
            remove_unfinished(options.output)
        if isinstance(error, UserError):
            raise
        raise KeyboardInterrupt(_where_to_go_on(options.output)) from None


@dataclass(frozen=True)
class _Run:
    """What a job has before anything is written."""

    job: Job
    options: RunOptions
    reft_model: ReftModel
    tokenizer: PreTrainedTokenizerBase
    data: dict[str, Any]
    arguments: Any
    checkpoint: Path | None
    log: dict[str, Any]
    say: Callable[[str], None]


def _prepare(
    settings: JobSettings, options: RunOptions, recipe: str | None, device: str, say: Callable[[str], None]
) -> _Run:
    """Read the rows, load the model and edit it. Writes nothing."""
    from transformers import set_seed

    folder = options.output
    with processes.together():
        if processes.is_first():
            check_output(folder, resume=options.resume, overwrite=options.overwrite)
            if options.cache_folder is not None and options.cache_folder.exists() and not options.cache_folder.is_dir():
                raise UserError(f"--cache-folder {options.cache_folder}: exists and is no folder")
        job = make_job(settings)
        _check_device(settings, device, resume=options.resume)
        job.read()
        checkpoint = last_complete_checkpoint(folder) if options.resume else None
        if options.resume and checkpoint is None:
            raise UserError(f"--resume: no complete checkpoint in {folder}")
        base, tokenizer = load_base(
            options.model, options.dtype, device, labels=job.labels, regression=job.regression, seed=settings.seed,
            tensor_parallel=settings.tensor_parallel,
        )  # fmt: skip
        set_seed(settings.seed)
        total = sum(parameter.numel() for parameter in base.parameters())
        reft_model = adapt(base, settings)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "[0-9]+ of [0-9]+ examples left out")  # the header has their number
            data = job.data(tokenizer, reft_model, options.cache_folder)
        arguments = _arguments(settings, options, device, job, base, evaluates=data["eval_dataset"] is not None)
        log = describe_run(settings, options, recipe, reft_model, base, total, job, data)
        if checkpoint is not None:
            _check_same_adapter(reft_model, checkpoint)
    say_header(settings, options, reft_model, base, log, say)
    return _Run(job, options, reft_model, tokenizer, data, arguments, checkpoint, log, say)


def _check_device(settings: JobSettings, device: str, *, resume: bool) -> None:
    if settings.step_graphs and (device == "cpu" or processes.count() > 1):
        raise UserError(f"--step-graphs: needs a CUDA device and one process, got {device} and {processes.count()}")
    option = "--tensor-parallel" if settings.tensor_parallel else "--shard" if settings.shard else None
    if option is not None and processes.count() == 1:
        raise UserError(f"{option}: needs several processes, as torchrun --nproc-per-node 2 starts them")
    if option is not None and device == "cpu":
        raise UserError(f"{option}: needs GPUs, accelerate does not train a model in parts without")
    if resume and device == "cpu" and processes.count() > 1:
        from transformers import __version__

        if int(__version__.partition(".")[0]) < 5:  # torch.load knows no "cpu:0", which it asks for
            raise UserError(f"--resume: of several processes on CPUs needs transformers 5, got {__version__}")


def _carry_out(run: _Run, callbacks: Sequence[Any], evaluate: bool) -> dict[str, Any]:
    """Train, evaluate and write."""
    options, reft_model, log, say = run.options, run.reft_model, run.log, run.say
    folder = options.output
    with processes.together():
        if processes.is_first():
            _begin(run)
    history: list[dict[str, Any]] = []
    if any(parameter.requires_grad for parameter in reft_model.parameters()):
        skips = "--cache-frozen skips most operations" if run.job.settings.cache_frozen != "none" else None
        clock, speed = make_clock(), Throughput(show=False, without_mfu=skips)
        with processes.together(), user_errors("training options", (ValueError, ImportError)):
            trainer = run.job.trainer(
                reft_model, run.arguments, callbacks=[clock, speed, Orthonormality(), *callbacks], **run.data,
                **run.job.trainer_options(run.tokenizer, reft_model, options),
            )  # fmt: skip
        show_progress(trainer, bar=options.progress)
        _train(trainer, run)
        history = trainer.state.log_history
        cache = getattr(trainer, "frozen_cache", None)
        if cache is not None:
            log["frozen_cache"] = {**asdict(cache.stats), "saved_fraction": cache.stats.saved_fraction}
        if trainer.step_graphs is not None:
            log["step_graphs"] = asdict(trainer.step_graphs.stats)
        log |= describe_training(trainer, clock, speed)
        with processes.together():
            if processes.is_first():
                log["adapter_bytes"] = adapter_bytes(folder)
                say_training(log, speed, folder, say)
                write_log(folder, log)
    log["results"] = _evaluate(run) if evaluate else {}
    log["finished"] = True
    with processes.together():
        if processes.is_first():
            write_log(folder, log)
            if options.report and history:
                with user_errors(f"--output {folder}", (OSError,)):
                    _write_pages(folder, log, reft_model, history)
                say(f"report   {folder / 'report.html'}")
    return log


def _begin(run: _Run) -> None:
    """What is said and written before the first step."""
    folder = run.options.output
    if run.checkpoint is not None:
        say_differences(training_settings(folder), run.log["settings"], run.say)
        run.say(f"resume   from {run.checkpoint}")
        remove_unfinished(folder)
    if run.options.overwrite:
        remove_run(folder)
    write_log(folder, run.log)


def _quietly(options: RunOptions) -> RunOptions:
    """The options of a process that shows nothing."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return replace(options, progress=False)


def _unsaid(line: str) -> None:
    del line


def _where_to_go_on(folder: Path) -> str:
    last = last_complete_checkpoint(folder)
    if last is None:
        return f"no checkpoint had been written to {folder}; --overwrite starts anew"
    return f"the last checkpoint is {last}; --resume goes on from there"


def _arguments(
    settings: JobSettings, options: RunOptions, device: str, job: Job, base: nn.Module, *, evaluates: bool
) -> Any:
    from transformers.integrations import get_reporting_integration_callbacks

    if settings.best_epoch and not evaluates:
        raise UserError("--best-epoch: there are no held-out rows to choose by, see --held-out")
    with user_errors("--report-to", (ValueError,)):
        get_reporting_integration_callbacks(list(options.report_to))
    with user_errors("training options"):
        return training_arguments(
            settings,
            options,
            device,
            best=job.best if settings.best_epoch else None,
            evaluates=evaluates,
            blocks=type(block_list(base)[1][0]).__name__ if settings.shard else "",
        )


def _evaluate(run: _Run) -> dict[str, Any]:
    """The metrics of every evaluation set, or of the held-out rows where there is none; what was said row by row is
    written beside the adapter."""
    job = run.job
    results: dict[str, Any] = {}
    if job.settings.evaluation == "none" and job.settings.task == "language":
        return results
    held_out = not job.settings.eval_data and bool(job.held_out)
    for name in (HELD_OUT,) if held_out else job.evaluated:
        start = time.perf_counter()
        if held_out:
            scores = job.evaluate_held_out(run.reft_model, run.tokenizer, progress=run.options.progress)
        else:
            scores = job.evaluate(run.reft_model, run.tokenizer, name, progress=run.options.progress)
        results[name] = {**scores.metrics, "rows": scores.rows, "seconds": time.perf_counter() - start}
        with processes.together():
            if scores.predictions and processes.is_first():
                write_predictions(run.options.output, name, scores.predictions)
        run.say(f"eval     {name}: {describe_scores(scores)}")
    return results


def _write_pages(folder: Path, log: dict[str, Any], reft_model: ReftModel, history: list[dict[str, Any]]) -> None:
    recipe = log["recipe"]
    settings = {**log["settings"], **{name: _public(log["settings"][name]) for name in ("data", "eval_data", "model")}}
    metrics = {f"{name}: {metric}": value for name, found in log["results"].items() for metric, value in found.items()}
    kept = ("base_class", "parameters", "examples", "device", "versions", "seconds", "ms_per_step")
    facts = {name: log[name] for name in kept if name in log}
    write_report(folder, title=recipe, history=history, settings=settings, results=metrics, facts=facts)
    write_card(
        folder,
        reft_model,
        base_model=log["settings"]["model"],
        title=recipe,
        recipe=recipe,
        data={"train": settings["data"], **log["examples"]},
        settings=settings,
        metrics=metrics,
        versions=log["versions"],
    )


def _public(sources: str | Sequence[str]) -> str:
    """Names that may be published with an adapter: of a file here, the last two parts of its path."""
    names = [sources] if isinstance(sources, str) else sources
    return ", ".join("/".join(Path(name).parts[-2:]) if Path(name).expanduser().exists() else name for name in names)


def _check_same_adapter(reft_model: ReftModel, folder: Path) -> None:
    """Raises UserError where the checkpoint's interventions are not those of the model, place by place, or what it has
    trained of the base model (LoRA, a head) is not what this run trains."""
    from reft_kernels.checkpoint import BASE_FILE, check_base_tensors, describe_representation, read_description
    from reft_kernels.tensor_files import read_safetensors

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
    path = folder / BASE_FILE
    trained = {name for name, parameter in reft_model.model.named_parameters() if parameter.requires_grad}
    with user_errors("--resume"):
        tensors = read_safetensors(path) if path.is_file() else {}
        check_base_tensors(path, tensors, reft_model.model)
    if differing := sorted(trained ^ set(tensors)):
        where = "this run has not" if differing[0] in tensors else "this run has as well"
        raise UserError(f"--resume: {folder} is of another adapter: {where} {differing[0]}")


def _train(trainer: Any, run: _Run) -> None:
    import torch

    from reft_kernels.training.frozen_cache import CacheMismatch
    from reft_kernels.training.step_graphs import CaptureError

    # Rows that are read while training may be wrong there.
    wrong_rows = (ValueError,) if run.job.settings.streaming is not None else ()
    try:
        with (
            write_errors(f"--output {run.options.output}"),
            user_errors("--data", wrong_rows),
            user_errors("--cache-frozen", (CacheMismatch,)),
            user_errors("--step-graphs", (CaptureError,)),
        ):
            trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
            trainer.save_model()
    except torch.OutOfMemoryError as error:
        raise UserError("out of GPU memory: lower --batch-size or --max-length") from error
