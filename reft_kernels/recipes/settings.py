"""What a training job can be told: one field for each option, with its type, its range and what it is for.

Recipes, `--set key=value`, the options of the command line and the search all read the fields from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reft_kernels.interventions import METHODS
from reft_kernels.modules import COMPONENTS
from reft_kernels.recipes.option import Option
from reft_kernels.reference import ACTIVATIONS
from reft_kernels.stiefel import ORTHOGONALITIES

PEFT_METHODS = ("lora", "dora")
ALL_METHODS = (*METHODS, "red", *PEFT_METHODS, "frozen")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
EVALUATIONS = ("generate", "rank", "loss", "recite", "none")


def _option(default: Any, kind: type, group: str, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"option": Option(kind, help, group, **more)})


@dataclass(frozen=True)
class JobSettings:
    """Everything that decides what a job computes. Raises ValueError naming the field, what it takes and what came."""

    task: str = _option(
        "language",
        str,
        "task",
        "what is learned: outputs of prompts, or labels of texts",
        choices=("language", "classification"),
    )
    style: str = _option(
        "plain",
        str,
        "task",
        "how a row becomes prompt and target: plain (the row as it is), commonsense, cloze (the option's text, not its "
        "name), math, gsm8k, alpaca, memorise or chat",
        metavar="NAME",
    )
    template: str | None = _option(
        None,
        str,
        "task",
        "the prompt instead of the style's, of a chat the user's turn: \"%s\" is the instruction (and, after a blank "
        "line, the input); \\n is a line break",
        metavar="TEXT",
        optional=True,
    )
    glue: str | None = _option(
        None, str, "task", "the GLUE task of a classification, which says its fields, labels and metric", optional=True
    )
    evaluation: str = _option(
        "generate",
        str,
        "task",
        "how answers are scored: generated, ranked by likelihood, by loss alone, or as a text recited",
        choices=EVALUATIONS,
    )
    normalise: str = _option(
        "none",
        str,
        "task",
        "likelihoods to rank by: of the whole answer, of its tokens or of its bytes",
        choices=("none", "token", "byte"),
    )
    rule: str | None = _option(
        None,
        str,
        "task",
        "which part of a generated text is the answer, and when it is right: commonsense (the text after the trigger), "
        "math (the last number, or a letter) or gsm8k (default: the style's, commonsense for styles without one)",
        metavar="NAME",
        optional=True,
    )
    trigger: str | None = _option(
        None,
        str,
        "task",
        "text that the answer follows, instead of the rule's; in targets too, where the style has one",
        metavar="TEXT",
        optional=True,
    )
    max_new_tokens: int = _option(32, int, "task", "longest continuation, in tokens", minimum=1, metavar="N")
    num_beams: int = _option(1, int, "task", "beams of the generation", minimum=1, metavar="N")
    temperature: float = _option(0.0, float, "task", "0 is greedy, above 0 samples", minimum=0, metavar="T")
    top_p: float = _option(1.0, float, "task", "when sampling", minimum=0, maximum=1, metavar="P")
    top_k: int = _option(0, int, "task", "when sampling; 0 is all", minimum=0, metavar="K")
    no_repeat_ngram_size: int = _option(0, int, "task", "no run of so many tokens twice", minimum=0, metavar="N")
    repetition_penalty: float = _option(1.0, float, "task", "of generation", minimum=0, metavar="X")

    data: tuple[str, ...] = _option(
        (),
        str,
        "data",
        "files (.jsonl, .json, .parquet, also .gz) or names on the Hugging Face hub, with the fields instruction, "
        "input, output, answer (input and answer may be left out)",
        metavar="FILE|NAME",
        many=True,
    )
    subspaces: tuple[str, ...] = _option(
        (),
        str,
        "data",
        'one for each of --data: the directions of the edit that its rows train, such as "0-3"; or "rows": each row '
        "names its own in a field `subspaces`",
        metavar="RANGE",
        many=True,
    )
    streaming: int | None = _option(
        None,
        int,
        "data",
        "read the rows while training, in an order drawn from a buffer of N of them, for what does not fit into "
        "memory; needs --max-steps",
        minimum=1,
        metavar="N",
        optional=True,
    )
    split: str = _option("train", str, "data", "split of a data set from the hub", metavar="NAME")
    max_examples: int | None = _option(None, int, "data", "use the first N rows", minimum=1, metavar="N", optional=True)
    max_length: int = _option(512, int, "data", "longest prompt and output, in tokens", minimum=2, metavar="N")
    held_out: str = _option(
        "none",
        str,
        "data",
        'rows kept from training to choose settings or an epoch by: "last:N", "count:N", "share:X", or "glue", which '
        "takes them from --eval-data as the paper does",
        metavar="HOW",
    )
    eval_data: tuple[str, ...] = _option(
        (),
        str,
        "data",
        "evaluated after training, as --data; without it the held-out rows are",
        metavar="FILE|NAME",
        many=True,
    )
    eval_split: str = _option("test", str, "data", "split of evaluation data from the hub", metavar="NAME")
    max_eval_examples: int | None = _option(
        None, int, "data", "evaluate the first N rows of each", minimum=1, metavar="N", optional=True
    )
    eval_batch_size: int = _option(16, int, "data", "rows a batch of evaluation", minimum=1, metavar="N")
    best_epoch: bool = _option(
        False, bool, "data", "keep the epoch that is best on the held-out rows instead of the last one"
    )
    skip_bad_rows: bool = _option(False, bool, "data", "leave out rows that cannot be read, and count them")

    method: str = _option(
        "loreft",
        str,
        "method",
        "what an edit computes (the paper's DiReFT is nodireft); lora and dora through PEFT; frozen trains nothing",
        choices=ALL_METHODS,
    )
    rank: int = _option(8, int, "method", "rank of an edit", minimum=1, metavar="R")
    layers: str = _option("all", str, "method", '"all", or layer numbers such as "0;5;10"', metavar="LIST")
    positions: str = _option(
        "f7+l7",
        str,
        "method",
        'prompt tokens to edit: "f7+l7" is the first and the last seven; "f3", "l1" and "all" work too',
        metavar="TEXT",
    )
    tied: bool = _option(
        True, bool, "method", "one edit a layer for both ends of the prompt; with --no-tied each end has its own"
    )
    component: str = _option("block_output", str, "method", "what is edited in a layer", metavar="NAME")
    dropout: float = _option(0.0, float, "method", "on the edited row", minimum=0, metavar="P")
    act_fn: str | None = _option(
        None,
        str,
        "method",
        "activation of the learned source (default: linear)",
        choices=tuple(ACTIVATIONS),
        optional=True,
    )
    orthogonality: str | None = _option(
        None,
        str,
        "method",
        "how R's rows are kept orthonormal: householder (the default: as pyreft), polar (R is the parameter, the "
        "optimiser keeps it), or none",
        choices=tuple(ORTHOGONALITIES),
        optional=True,
    )
    add_bias: bool = _option(False, bool, "method", "a bias in the projection of noreft and nodireft")
    lora_modules: tuple[str, ...] = _option(
        (),
        str,
        "method",
        "modules that lora and dora change (default: PEFT's for the model)",
        metavar="NAME",
        many=True,
    )
    lora_alpha: int = _option(32, int, "method", "scale of lora and dora, times their rank", minimum=1, metavar="N")
    train_head: bool = _option(True, bool, "method", "train a classifier's head along")

    epochs: float = _option(3.0, float, "training", "passes over the data", minimum=0.0, metavar="N")
    max_steps: int | None = _option(
        None,
        int,
        "training",
        "stop after N optimiser steps, whatever --epochs says",
        minimum=1,
        metavar="N",
        optional=True,
    )
    batch_size: int = _option(8, int, "training", "examples a batch", minimum=1, metavar="N")
    accumulation: int = _option(1, int, "training", "batches an optimiser step", minimum=1, metavar="N")
    lr: float = _option(9e-4, float, "training", "peak learning rate of AdamW", minimum=0.0, metavar="X")
    scheduler: str = _option("linear", str, "training", "of the learning rate", choices=SCHEDULERS)
    warmup: float = _option(
        0.1,
        float,
        "training",
        "below 1 a fraction of all steps, else a number of steps",
        minimum=0.0,
        metavar="N",
    )
    weight_decay: float = _option(0.0, float, "training", "on the learned matrices, not on R", minimum=0.0, metavar="X")
    max_grad_norm: float = _option(1.0, float, "training", "gradient clipping; 0 is none", minimum=0.0, metavar="X")
    seed: int = _option(42, int, "training", "of initial weights, data order and dropout", minimum=0, metavar="N")

    gradient_checkpointing: bool = _option(
        False, bool, "speed", "keep no activations of a block for the backward, but compute them again"
    )
    compile: str = _option(
        "none",
        str,
        "speed",
        "torch.compile the model, in this mode; reduce-overhead and max-autotune replay CUDA graphs",
        choices=("none", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    step_graphs: bool = _option(
        False,
        bool,
        "speed",
        "on a CUDA device, run forward and backward as one CUDA graph for each shape of batch that comes again; "
        "--pad-to makes shapes few",
    )
    cache_frozen: str = _option(
        "none",
        str,
        "speed",
        "keep what the frozen base model makes of the tokens before the first edited one, and below the first edited "
        "layer, so that an epoch costs the rest alone: in memory, in pinned memory, or on disk",
        choices=("none", "memory", "pinned", "disk"),
    )
    cache_gib: float = _option(8.0, float, "speed", "how much of it to keep, in each process", minimum=0, metavar="X")
    packing: int | None = _option(
        None,
        int,
        "speed",
        "put several examples into one row of at most N tokens",
        minimum=2,
        metavar="N",
        optional=True,
    )
    pad_to: tuple[int, ...] = _option(
        (),
        int,
        "speed",
        "lengths that batches are padded to, for few shapes: one is a step, several are the lengths themselves",
        minimum=1,
        metavar="N",
        many=True,
    )
    group_by_length: bool = _option(False, bool, "speed", "batches of examples of about equal length")

    tensor_parallel: bool = _option(
        False,
        bool,
        "speed",
        "split the base model's matrices over the GPUs of all processes, for one that is too large for one of them; "
        "all see the same batches",
    )

    shard: bool = _option(
        False,
        bool,
        "speed",
        "keep a part of every parameter in each process (FSDP2), for a base model that is too large for one GPU; each "
        "sees batches of its own",
    )

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            object.__setattr__(self, name, option.check(name, getattr(self, name)))
        if self.template is not None and self.template.count("%s") != 1:
            raise ValueError(f'template must hold "%s" exactly once, got {self.template!r}')
        if self.repetition_penalty == 0:
            raise ValueError("repetition_penalty must be above 0, got 0.0")
        if self.epochs == 0 and self.max_steps is None:
            raise ValueError("epochs must be above 0 where max_steps is not given, got 0.0")
        if self.subspaces and self.subspaces != BY_ROW:
            if len(self.subspaces) != len(self.data):
                raise ValueError(
                    f'subspaces must be one for each of data ({len(self.data)}), or "rows"; got {len(self.subspaces)}'
                )
            for text in self.subspaces:
                read_subspace(text)
        if self.streaming is not None:
            self._check_streaming()
        if self.tensor_parallel:
            self._check_split("tensor_parallel", (*METHODS, "red", "frozen"))
        if self.shard:
            self._check_split("shard", (*METHODS, "red"))
            if self.tensor_parallel:
                raise ValueError("shard does not go with tensor_parallel: choose one of them")
            if self.orthogonality == "polar":
                raise ValueError("shard does not go with orthogonality 'polar', which needs each R in one piece")
        if (self.task == "classification") != (self.glue is not None):
            raise ValueError(f"glue must be named for a classification and for nothing else, got {self.glue!r}")
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Raises ValueError where one setting would leave another without effect, or cannot go with it."""
        if self.held_out == "glue" and self.task != "classification":
            raise ValueError(
                'held_out \'glue\' is for classifications, others hold out "last:N", "count:N" or "share:X"'
            )
        if self.subspaces and self.method != "loreft":
            raise ValueError(f"subspaces are of the method loreft, not of {self.method}")
        for name, others in (
            ("cache_frozen", ("packing", "gradient_checkpointing", "compile", "step_graphs")),
            ("step_graphs", ("gradient_checkpointing",)),
            ("subspaces", ("packing",)),
        ):
            for other in others:
                if all(getattr(self, one) != default_of(one) for one in (name, other)):
                    raise ValueError(f"{name} does not go with {other}")

        if self.step_graphs and self.compile in ("reduce-overhead", "max-autotune"):
            raise ValueError(f"step_graphs does not go with compile {self.compile!r}, which makes graphs of its own")

    def _check_streaming(self) -> None:
        if self.max_steps is None:
            raise ValueError("streaming needs max_steps, as nobody knows where an epoch ends")
        if len(self.data) != 1:
            raise ValueError(f"streaming reads one source, got {len(self.data)} as data")
        for name in ("held_out", "group_by_length", "subspaces", "task"):
            if getattr(self, name) != default_of(name):
                raise ValueError(f"streaming does not go with {name} {getattr(self, name)!r}")

    def _check_split(self, how: str, methods: tuple[str, ...]) -> None:
        for name, possible in (
            ("task", ("language",)),
            ("method", methods),
            ("component", COMPONENTS),  # others may lie where each process has a part
            ("cache_frozen", ("none",)),
            ("compile", ("none",)),
            ("step_graphs", (False,)),
        ):
            if getattr(self, name) not in possible:
                raise ValueError(f"{how} does not go with {name} {getattr(self, name)!r}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> JobSettings:
        """The settings of these values, the others at their defaults. Raises ValueError for an unknown name."""
        for name in values:
            option_named(name)
        return cls(**values)

    def changed(self, values: Mapping[str, Any]) -> JobSettings:
        """These settings with some values replaced. Raises ValueError for an unknown name."""
        for name in values:
            option_named(name)
        return dataclasses.replace(self, **values)

    @property
    def padding(self) -> int | tuple[int, ...] | None:
        """`pad_to` as collators take it: a step, the lengths themselves, or None."""
        return self.pad_to[0] if len(self.pad_to) == 1 else self.pad_to or None

    def as_dict(self) -> dict[str, Any]:
        """Name and value of every field, as JSON has them (tuples as lists)."""
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in OPTIONS}


# As `subspaces`: every row names its own.
BY_ROW = ("rows",)


def read_subspace(text: str) -> tuple[int, ...]:
    """The directions that "0-3" or "5" names. Raises ValueError for anything else."""
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
        raise ValueError(f'subspaces must be ranges of directions such as "0-3", got {text!r}')
    return tuple(range(int(first), int(last or first) + 1))


OPTIONS: dict[str, Option] = {f.name: f.metadata["option"] for f in dataclasses.fields(JobSettings)}


def default_of(name: str) -> Any:
    """The value of a setting that nobody gives."""
    return JobSettings.__dataclass_fields__[name].default


def option_named(name: str) -> Option:
    """The option of a setting. Raises ValueError that lists the near names."""
    if name in OPTIONS:
        return OPTIONS[name]
    import difflib

    near = difflib.get_close_matches(name, OPTIONS, n=3)
    raise ValueError(f"unknown setting {name!r}" + (f"; near: {', '.join(near)}" if near else ""))


def read_assignment(text: str) -> tuple[str, Any]:
    """Name and value of a `key=value`. Raises ValueError naming what is wrong."""
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals:
        raise ValueError(f"expected key=value, got {text!r}")
    return name, option_named(name).read(name, value)
