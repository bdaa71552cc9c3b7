"""Write an adapter again in the layout of another library: pyreft's, AdapterHub's, or this one's."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import TYPE_CHECKING

from reft_kernels.jobs.errors import UserError, user_errors

if TYPE_CHECKING:
    import torch

HELP = "adapters to and from pyreft's and AdapterHub's layouts"
USAGE = "SOURCE DESTINATION --to FORMAT --model FOLDER [options]"
FORMATS = ("reft_kernels", "pyreft", "adapterhub")  # those of ReftModel.save, without importing it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `convert`."""
    parser.add_argument("source", metavar="SOURCE", help="folder, or repository on the hub, in any of the layouts")
    parser.add_argument("destination", metavar="DESTINATION", help="a new folder, or an adapter's, which is replaced")
    parser.add_argument("--to", required=True, choices=FORMATS, help="layout to write")
    parser.add_argument(
        "--model",
        required=True,
        metavar="FOLDER|NAME",
        help="base model of the adapter; only its config.json is read, a name on the hub serves too",
    )
    unsaid = parser.add_argument_group("what the source may not say")
    unsaid.add_argument("--positions", metavar="TEXT", help="of a pyreft adapter, such as f7+l7")
    unsaid.add_argument("--act-fn", metavar="NAME", help="of a pyreft adapter; linear if not given")
    unsaid.add_argument("--method", choices=("noreft", "nodireft"), help="of an AdapterHub adapter, NoReFT or DiReFT")


def run(arguments: argparse.Namespace) -> None:
    """Reads the adapter and writes it."""
    from reft_kernels import hub, model_files
    from reft_kernels.model import ReftModel

    base = _model_without_weights(arguments.model)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        with user_errors(arguments.source):
            folder = hub.local_folder(arguments.source)
            if model_files.read_base_tensors(folder, base, optional=True):
                raise UserError(f"{arguments.source}: holds parameters of the base model too, which are not converted")
            reft_model = ReftModel.load(
                folder, base, act_fn=arguments.act_fn, method=arguments.method, positions=arguments.positions
            )
        with user_errors(arguments.destination):
            reft_model.save(arguments.destination, format=arguments.to)
    for note in notes:
        print(f"note     {note.message}", file=sys.stderr)
    print(f"adapter  {len(reft_model.interventions)} interventions in {arguments.destination}")


def _model_without_weights(name: str) -> torch.nn.Module:
    """The model that a config.json describes, on the meta device."""
    import torch
    import transformers

    with user_errors(f"--model {name}", (Exception,)):  # the hub has error classes of its own
        config = transformers.AutoConfig.from_pretrained(name)
        named = (getattr(transformers, one, None) for one in config.architectures or ())
        kind = next(filter(None, named), None)
        with torch.device("meta"):
            model: torch.nn.Module = kind(config) if kind else transformers.AutoModel.from_config(config)
    return model
