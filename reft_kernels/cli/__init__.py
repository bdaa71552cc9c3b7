"""The command line, `python -m reft_kernels COMMAND`; COMMANDS has them all.

Exit codes: 0 done; 2 something the user gave is wrong, and one sentence on standard error says what; 130
interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from reft_kernels.cli import compare, convert, evaluate, generate, info, recipes, search, train, tune
from reft_kernels.cli.common import Parser
from reft_kernels.jobs import processes
from reft_kernels.jobs.errors import UserError

COMMANDS = {
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "recipes": recipes,
    "compare": compare,
    "search": search,
    "convert": convert,
    "info": info,
    "tune": tune,
}
# What torchrun and accelerate launch may start several processes of.
TOGETHER = ("train", "eval")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of all commands, and that of each; a command's module adds its own options."""
    parser = Parser(prog="reft_kernels", description="Representation finetuning (ReFT) of language models.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    parsers = {}
    for name, module in COMMANDS.items():
        parsers[name] = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, usage=f"reft_kernels {name} {module.USAGE}"
        )
        module.add_arguments(parsers[name])
    return parser, parsers


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `--help` and misused options leave with SystemExit (0, 2).

    With REFT_KERNELS_DEBUG=1 a user's error is raised instead of printed, with what led to it.
    """
    parser, parsers = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    command: str = arguments.command
    if unknown:
        parsers[command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if processes.launched() > 1 and command not in TOGETHER:
            raise UserError(f"runs in one process; {' and '.join(TOGETHER)} run in several")
        COMMANDS[command].run(arguments)
    except UserError as error:
        if os.environ.get("REFT_KERNELS_DEBUG", "0") not in ("", "0"):
            raise
        if processes.says_errors() or (processes.count() > 1 and not error.known):
            print(f"reft_kernels {command}: error: {error}", file=sys.stderr)
        if error.everywhere:
            processes.finish()
        return 2
    except KeyboardInterrupt as stop:
        if processes.is_first():
            print(f"reft_kernels {command}: interrupted" + f"; {stop}" * bool(stop.args), file=sys.stderr)
        return 130
    return 0
