"""Train a ReFT adapter on a base model, which stays frozen."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_kernels.cli.common import (
    UserError,
    choose_device,
    load_base,
    load_examples,
    user_errors,
)
from reft_kernels.cli.output import adapter_bytes, check_output, remove_run, training_settings, write_log
from reft_kernels.cli.train_options import add_arguments, training_arguments
from reft_kernels.config import read_layers
from reft_kernels.positions import parse_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reft_kernels.model import ReftModel
    from reft_kernels.training import ReftTrainerForCausalLM, SupervisedDataset

__all__ = ["HELP", "USAGE", "add_arguments", "run"]

HELP = "train an adapter on prompts and outputs"
USAGE = "--model FOLDER|NAME --data FILE|NAME --output FOLDER [options]"
# Options that say where a run is written and how it is shown; the others make up the run and are logged.
NOT_SETTINGS = {
    "command",
    "output",
    "save_steps",
    "keep_checkpoints",
    "log_steps",
    "no_progress",
    "resume",
    "overwrite",
}


def run(arguments: argparse.Namespace) -> None:
    """Trains, and leaves adapter, checkpoints and train_log.json in the output folder."""
    folder = Path(arguments.output).expanduser()
    check_output(folder, resume=arguments.resume, overwrite=arguments.overwrite)
    _check_method(arguments)
    device = choose_device(arguments.device)
    examples = load_examples(arguments.data, arguments.split, arguments.max_examples, needs_output=True)

    from transformers import set_seed

    from reft_kernels.training import (
        ReftTrainerForCausalLM,
        build_prompt,
        last_complete_checkpoint,
        make_supervised_data_module,
    )
    from reft_kernels.training.data import DEFAULT_TEMPLATE

    checkpoint = last_complete_checkpoint(folder) if arguments.resume else None
    if arguments.resume and checkpoint is None:
        raise UserError(f"--resume: no complete checkpoint in {folder}")
    base, tokenizer = load_base(arguments.model, arguments.dtype, device)
    set_seed(arguments.seed)
    reft_model = _edit(base, arguments)
    arguments.template = arguments.template or DEFAULT_TEMPLATE
    prompts = [build_prompt(example.instruction, example.input, arguments.template) for example in examples]
    outputs = [example.output or "" for example in examples]
    with user_errors("--data"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the header says how many were left out
        data = make_supervised_data_module(tokenizer, reft_model, prompts, outputs, max_length=arguments.max_length)

    with user_errors("training options"):
        options = training_arguments(arguments, folder, device)
    log = _describe(arguments, reft_model, base, data["train_dataset"])
    _print_header(arguments, reft_model, base, log)
    if checkpoint is not None:
        _check_same_adapter(reft_model, checkpoint)
        _print_differences(training_settings(folder), log["settings"])
        print(f"resume   from {checkpoint}", flush=True)
    if arguments.overwrite:
        remove_run(folder)
    write_log(folder, log)

    clock = _clock()
    trainer = ReftTrainerForCausalLM(reft_model, options, callbacks=[clock], **data)
    _train(trainer, folder, checkpoint)
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    log |= {
        "finished": True,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "seconds": clock.seconds,
        "ms_per_step": clock.ms_per_step,
        "adapter_bytes": adapter_bytes(folder),
        "history": losses,
    }
    write_log(folder, log)
    if losses:
        first, last = losses[0]["loss"], losses[-1]["loss"]
        print(f"loss     {first:.4f} -> {last:.4f} in {trainer.state.global_step} steps")
    print(f"time     {clock.seconds:.1f} s, {clock.ms_per_step:.0f} ms/step")
    print(f"adapter  {log['adapter_bytes']:,} bytes in {folder}")


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


def _train(trainer: ReftTrainerForCausalLM, folder: Path, checkpoint: Path | None) -> None:
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


def _check_method(arguments: argparse.Namespace) -> None:
    with user_errors("--layers"):
        read_layers(arguments.layers.replace(",", ";"))
    with user_errors("--positions"):
        parse_positions(arguments.positions)


def _describe(
    arguments: argparse.Namespace, reft_model: ReftModel, base: PreTrainedModel, dataset: SupervisedDataset
) -> dict[str, Any]:
    """What the log says of a run before its first step."""
    import torch
    import transformers

    import reft_kernels

    settings = {name: value for name, value in vars(arguments).items() if name not in NOT_SETTINGS}
    folder = Path(arguments.model).expanduser()
    if folder.is_dir():
        settings["model"] = str(folder.resolve())
    return {
        "settings": settings,
        "base_class": type(base).__name__,
        "parameters": {
            "trained": sum(parameter.numel() for parameter in reft_model.parameters() if parameter.requires_grad),
            "base": sum(parameter.numel() for parameter in base.parameters()),
        },
        "examples": {"used": len(dataset), "left_out": len(dataset.dropped)},
        "device": str(base.device),
        "versions": {
            "reft_kernels": reft_kernels.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "finished": False,
    }


def _edit(base: PreTrainedModel, arguments: argparse.Namespace) -> ReftModel:
    from reft_kernels.config import ReftConfig
    from reft_kernels.model import get_reft_model

    with user_errors("method options"):
        config = ReftConfig(
            method=arguments.method,
            layers=arguments.layers.replace(",", ";"),
            rank=arguments.rank,
            positions=arguments.positions,
            tied=arguments.tied,
            component=arguments.component,
            dropout=arguments.dropout,
            orthogonality=arguments.orthogonality,
            act_fn=arguments.act_fn,
            add_bias=arguments.add_bias,
        )
        return get_reft_model(base, config)


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


def _print_header(
    arguments: argparse.Namespace, reft_model: ReftModel, base: PreTrainedModel, log: dict[str, Any]
) -> None:
    layers = sorted({item.layer for item in reft_model.representations if item.layer is not None})
    trained, total = log["parameters"]["trained"], log["parameters"]["base"]
    used, left_out = log["examples"]["used"], log["examples"]["left_out"]
    dtype = str(base.dtype).removeprefix("torch.")
    tied = ("" if "+" not in arguments.positions else ", tied") if arguments.tied else ", untied"
    print(
        f"model    {arguments.model} ({type(base).__name__}, {total:,} parameters, {dtype} on {base.device})\n"
        f"method   {arguments.method}, rank {arguments.rank}, positions {arguments.positions}{tied}\n"
        f"layers   {_ranges(layers)} ({arguments.component})\n"
        f"trained  {trained:,} of {total:,} parameters ({100 * trained / total:.3f} %)\n"
        f"data     {arguments.data}, {used:,} examples"
        + (f", {left_out:,} left out (no output within --max-length {arguments.max_length})" if left_out else ""),
        flush=True,
    )


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers in words: [0, 1, 2, 5] is "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _print_differences(before: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if name in before and before[name] != value:
            option = "--" + name.replace("_", "-")
            print(f"note     the run to resume had {option} {before[name]}, this one has {value}")
