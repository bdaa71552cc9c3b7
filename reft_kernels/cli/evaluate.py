"""Accuracy of an adapter, or of the frozen base model, by greedy generation.

The answer is what follows the trigger in the generated text, and must equal the field answer (or the answer
in the field output, where there is none) exactly. Rows whose output does not hold the trigger are judged on
the whole text.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from reft_kernels.cli.adapter import load_edited
from reft_kernels.cli.common import (
    add_adapter_argument,
    add_data_arguments,
    add_model_arguments,
    add_template_argument,
    at_least,
    load_examples,
)
from reft_kernels.jobs.errors import UserError, user_errors
from reft_kernels.jobs.run_folder import write_atomically

HELP = "print the accuracy on a data set"
USAGE = "--adapter FOLDER --data FILE|NAME [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `eval`."""
    add_model_arguments(parser, needs_model=False)
    add_adapter_argument(parser)
    data = add_data_arguments(parser, split="test")
    add_template_argument(data)
    data.add_argument("--trigger", metavar="TEXT", help="what the answer follows (default: 'the correct answer is ')")
    generation = parser.add_argument_group("generation")
    generation.add_argument("--batch-size", type=at_least(1), default=16, metavar="N", help="prompts a batch")
    generation.add_argument(
        "--max-new-tokens", type=at_least(1), default=32, metavar="N", help="longest continuation, in tokens"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="write prompt, text, answer and gold of every row as JSONL")
    output.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> None:
    """Prints the accuracy on the data, and writes the predictions where --out says."""
    out = Path(arguments.out).expanduser() if arguments.out else None
    if out is not None and out.is_dir():
        raise UserError(f"--out {out}: is a folder")
    examples = load_examples(arguments.data, arguments.split, arguments.max_examples, needs_output=False)
    model, tokenizer, settings = load_edited(arguments)

    from reft_kernels.training.evaluate import evaluate_accuracy

    start = time.perf_counter()
    with user_errors("--data"):
        result = evaluate_accuracy(
            model,
            tokenizer,
            examples,
            template=arguments.template or settings.get("template"),
            trigger=arguments.trigger,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            progress=not arguments.no_progress,
        )
    seconds = time.perf_counter() - start
    if out is not None:
        with user_errors(f"--out {out}"):
            write_atomically(out, "".join(json.dumps(asdict(row)) + "\n" for row in result.predictions))
    print(f"adapter   {arguments.adapter or 'none'}")
    counts = f"{result.correct} of {result.total}, {result.unanswered} without an answer"
    print(f"accuracy  {100 * result.accuracy:.2f} % ({counts})")
    print(f"time      {seconds:.1f} s, {1000 * seconds / result.total:.0f} ms/example")
