"""Continue a prompt with an adapter, or with the frozen base model."""

from __future__ import annotations

import argparse
import sys

from reft_kernels.cli.common import (
    add_adapter_argument,
    add_model_arguments,
    add_template_argument,
    at_least,
)
from reft_kernels.jobs.errors import UserError, user_errors

HELP = "continue a prompt"
USAGE = "--adapter FOLDER --prompt TEXT [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `generate`."""
    add_model_arguments(parser, needs_model=False)
    add_adapter_argument(parser)
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--prompt", metavar="TEXT", help="the instruction (default: standard input)")
    prompt.add_argument("--input", metavar="TEXT", default="", help="context that follows the instruction")
    add_template_argument(prompt)
    generation = parser.add_argument_group("generation")
    generation.add_argument(
        "--max-new-tokens", type=at_least(1), default=64, metavar="N", help="longest continuation, in tokens"
    )
    generation.add_argument(
        "--temperature",
        type=at_least(0.0, float),
        default=0.0,
        metavar="T",
        help="0 is greedy, above 0 samples",
    )
    generation.add_argument("--top-p", type=at_least(0.0, float), default=1.0, metavar="P", help="when sampling")
    generation.add_argument("--seed", type=at_least(0), default=42, metavar="N", help="when sampling")


def run(arguments: argparse.Namespace) -> None:
    """Prints the continuation of the prompt."""
    text = arguments.prompt if arguments.prompt is not None else sys.stdin.read()
    if not text.strip() and not arguments.input:
        raise UserError("--prompt: the prompt is empty")

    import transformers

    from reft_kernels.cli.adapter import find_adapter, load_edited
    from reft_kernels.jobs.run_folder import training_settings
    from reft_kernels.training.evaluate import generate_texts
    from reft_kernels.training.prompts import prompt_and_target, prompt_style

    settings = training_settings(find_adapter(arguments.adapter))
    with user_errors("--template"):
        style = prompt_style(settings.get("style") or "plain", template=arguments.template or settings.get("template"))
    model, tokenizer = load_edited(arguments)

    transformers.set_seed(arguments.seed)
    sampling = (
        {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
        if arguments.temperature > 0
        else {}
    )
    with user_errors("--prompt"):
        prompt, _ = prompt_and_target(text, arguments.input, style=style, tokenizer=tokenizer)
        (continuation,) = generate_texts(
            model,
            tokenizer,
            [prompt],
            max_new_tokens=arguments.max_new_tokens,
            **sampling,
        )
    print(continuation)
