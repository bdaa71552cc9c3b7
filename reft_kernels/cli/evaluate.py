"""Scores of an adapter, or of the frozen base model, on data that it was not trained on.

How answers are asked for and scored is what the adapter was trained with, unless a recipe or an option says otherwise.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from reft_kernels.cli.common import add_adapter_argument, add_model_arguments, at_least
from reft_kernels.cli.train_options import add_settings, given_settings
from reft_kernels.jobs import processes
from reft_kernels.jobs.errors import UserError, user_errors
from reft_kernels.jobs.run_folder import write_atomically
from reft_kernels.recipes import OPTIONS, JobSettings, find_recipe

HELP = "print the scores on one or more data sets"
USAGE = "--adapter FOLDER --data FILE|NAME ... [options]"
# What decides how rows are read and scored. How an adapter was trained is read from its log where it is loaded.
_SCORING = {
    *(name for name, option in OPTIONS.items() if option.group == "task"),
    "max_length",
    "seed",
    "skip_bad_rows",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `eval`."""
    add_model_arguments(parser, needs_model=False)
    add_adapter_argument(parser)
    parser.add_argument_group("recipe").add_argument(
        "--recipe", metavar="NAME", help="score as this recipe does (see `recipes`)"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", dest="eval_data", nargs="+", required=True, metavar="FILE|NAME", help=OPTIONS["data"].help
    )
    data.add_argument(
        "--split", dest="eval_split", default="test", metavar="NAME", help="split of a data set from the hub"
    )
    data.add_argument(
        "--max-examples", dest="max_eval_examples", type=at_least(1), metavar="N", help="use the first N rows"
    )
    data.add_argument(
        "--batch-size", dest="eval_batch_size", type=at_least(1), default=16, metavar="N", help="rows a batch"
    )
    add_settings(parser, ("task",))
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="write prompt, text, answer and gold of every row as JSONL")
    output.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> None:
    """Prints the scores on each data set, and writes the predictions where --out says. Under torchrun or accelerate
    launch the rows are shared by all processes."""
    out = Path(arguments.out).expanduser() if arguments.out else None
    if out is not None and out.is_dir():
        raise UserError(f"--out {out}: is a folder")

    from reft_kernels.cli.adapter import find_adapter, load_edited
    from reft_kernels.jobs.base_models import choose_device
    from reft_kernels.jobs.job_log import describe_scores
    from reft_kernels.jobs.run import make_job
    from reft_kernels.jobs.run_folder import training_settings

    processes.start(choose_device(arguments.device))
    shows = processes.is_first()
    with processes.together():
        job = make_job(_settings(arguments, training_settings(find_adapter(arguments.adapter))))
        job.read_evaluated()
        model, tokenizer = load_edited(arguments, job)
    if shows:
        print(f"adapter   {arguments.adapter or 'none'}")
    predictions: list[dict[str, Any]] = []
    for name in job.evaluated:
        start = time.perf_counter()
        with user_errors("--data"), processes.lost_ones():
            scores = job.evaluate(model, tokenizer, name, progress=shows and not arguments.no_progress)
        seconds = time.perf_counter() - start
        several = len(job.evaluated) > 1
        predictions += [{**({"data": name} if several else {}), **row} for row in scores.predictions]
        if shows:
            print(f"{name:9} {describe_scores(scores)}, {1000 * seconds / max(scores.rows, 1):.0f} ms/row")
    with processes.together():
        if out is not None and shows:
            with user_errors(f"--out {out}"):
                write_atomically(out, "".join(json.dumps(row) + "\n" for row in predictions))
    processes.finish()


def _settings(arguments: argparse.Namespace, trained: dict[str, Any]) -> JobSettings:
    """How the training scored, or how the recipe does, changed by the options."""
    if arguments.recipe is not None:
        with user_errors("--recipe"):
            trained = find_recipe(arguments.recipe).settings.as_dict()
    values = {name: value for name, value in trained.items() if name in _SCORING}
    with user_errors("settings"):
        return JobSettings.of({**values, **given_settings(arguments)})
