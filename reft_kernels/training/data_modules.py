"""pyreft's functions from prompts and outputs to what its trainers take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from reft_kernels.positions import get_intervention_locations, parse_positions
from reft_kernels.training.collators import LOCATIONS, ReftDataCollator
from reft_kernels.training.item_layout import IGNORE_INDEX
from reft_kernels.training.tokens import encode, end_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_last_position_supervised_data_module(
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    inputs: Iterable[str],
    outputs: Iterable[str],
    num_interventions: int = 1,
    nonstop: bool = False,
    *,
    pyreft_compat: bool = False,
) -> dict[str, Any]:
    """Supervised data edited at the last token of each prompt (pyreft, same name).

    Args:
        tokenizer: a transformers tokenizer with a padding token.
        model: the base model, which the collator asks for decoder inputs where it needs them; may be None.
        inputs: the prompts.
        outputs: what is to be learnt, one a prompt.
        num_interventions: of the model.
        nonstop: leave the end token out.
        pyreft_compat: the collator of pyreft, and the end tokens that a tokenizer appends by itself.

    Returns:
        `train_dataset`, a `datasets.Dataset` with `input_ids`, `labels` (-100 on the prompt) and
        `intervention_locations` [num_interventions][1]; `eval_dataset`, None; `data_collator`, a ReftDataCollator.

    Raises ValueError where inputs and outputs differ in number or the tokenizer lacks an end token.
    """

    def last(length: int) -> list[list[int]]:
        return [[length - 1]] * num_interventions

    return _data_module(tokenizer, model, inputs, outputs, last, nonstop, pyreft_compat)


def make_last_position_supervised_chat_data_module(
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    inputs: Iterable[str],
    outputs: Iterable[str],
    num_interventions: int = 1,
    nonstop: bool = False,
    *,
    pyreft_compat: bool = False,
) -> dict[str, Any]:
    """`make_last_position_supervised_data_module`, under the name that pyreft gives it for chats."""
    return make_last_position_supervised_data_module(
        tokenizer, model, inputs, outputs, num_interventions, nonstop, pyreft_compat=pyreft_compat
    )


def make_multiple_position_supervised_data_module(
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    inputs: Iterable[str],
    outputs: Iterable[str],
    positions: str = "f1+l1",
    num_interventions: int = 1,
    nonstop: bool = False,
    share_weights: bool = False,
    *,
    pyreft_compat: bool = False,
) -> dict[str, Any]:
    """Supervised data edited at the first and last tokens of each prompt (pyreft, same name).

    As `make_last_position_supervised_data_module`, with

    Args:
        positions: "f7+l7" and the like; with "all" there are no `intervention_locations`.
        share_weights: True where prefix and suffix have one intervention (tied).
        pyreft_compat: also, slots that a short prompt leaves empty edit the first token of the output, where they
            are -1 ("no token") otherwise, and an odd number of untied interventions is accepted.
    """
    span = parse_positions(positions)

    def both_ends(length: int) -> list[list[int]]:
        return get_intervention_locations(
            length,
            positions=positions,
            num_interventions=num_interventions,
            share_weights=share_weights,
            pad_mode="last" if pyreft_compat else "first",
            pyreft_compat=pyreft_compat,
        )

    locate = None if span is None else both_ends
    return _data_module(tokenizer, model, inputs, outputs, locate, nonstop, pyreft_compat)


def _data_module(
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    inputs: Iterable[str],
    outputs: Iterable[str],
    locate: Callable[[int], list[list[int]]] | None,
    nonstop: bool,
    pyreft_compat: bool,
) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq

    prompts, targets = list(inputs), list(outputs)
    if len(prompts) != len(targets):
        raise ValueError(f"expected as many outputs as inputs, got {len(prompts)} inputs and {len(targets)} outputs")
    end = "" if nonstop else end_token(tokenizer)
    full = [prompt + target + end for prompt, target in zip(prompts, targets, strict=True)]
    lengths = [len(ids) for ids in encode(tokenizer, prompts, keep_end=pyreft_compat)]
    input_ids = encode(tokenizer, full, keep_end=pyreft_compat)
    columns: dict[str, Any] = {"input_ids": input_ids}
    if locate is not None:
        columns[LOCATIONS] = [locate(length) for length in lengths]
    columns["labels"] = [
        [IGNORE_INDEX] * min(length, len(ids)) + ids[length:] for length, ids in zip(lengths, input_ids, strict=True)
    ]
    inner = DataCollatorForSeq2Seq(tokenizer=tokenizer, model=model, label_pad_token_id=IGNORE_INDEX, padding="longest")
    return {
        "train_dataset": Dataset.from_dict(columns),
        "eval_dataset": None,
        "data_collator": ReftDataCollator(inner, pyreft_compat),
    }
